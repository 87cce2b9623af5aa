"""A reward that can be checked: 1 where the answer to a GSM8K question ends with the right number, else 0.

    ppo:
      prompts: {path: example_model_solutions.jsonl, columns: {prompt: question}}
      rewards: [{kind: function, function: "examples/gsm8k_reward.py:right_answer"}]

The file is grade_school_math/data/example_model_solutions.jsonl of github.com/openai/grade-school-math, where
`ground_truth` is a column; the function gets it because its signature names it.
"""

import re
from fractions import Fraction

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def final_number(text: str) -> Fraction | None:
    """The number after the last `A:` or `####`, or else the last one in the text; None without any."""
    marked = re.split(r"(?:^|\n)\s*(?:A:|####)", text)
    found = NUMBER.findall(marked[-1]) or NUMBER.findall(text)
    if not found:
        return None
    # What follows a mark begins with the answer, a sentence ends with it.
    number = found[0] if len(marked) > 1 and NUMBER.search(marked[-1]) else found[-1]
    try:
        return Fraction(re.sub(r"[$,]", "", number))
    except ZeroDivisionError:
        return None


def right_answer(responses: list[str], ground_truth: list[str]) -> list[float]:
    """Called by ppolite with lists as long as the round."""
    pairs = zip(map(final_number, responses), map(final_number, ground_truth), strict=True)
    return [float(given is not None and given == right) for given, right in pairs]
