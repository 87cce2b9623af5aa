"""The film task: finish a review from its first two to four words, and be liked for how it ends.

    system     You are a film critic.
    user       Finish this review: The gorgeously elaborate
    assistant  continuation of the trilogy is so huge that …

Each rated snippet (`embedded.film_path`) gives one example: its opening is the prompt, the rest a person's
response, its mean rating on −4..4 the score. How many words the opening has is drawn from a hash of the row
and the seed. The order is drawn the same way, so that the first n rows are a fair sample.

In recipes and for the readers this source is called `embedded:film`.
"""

from __future__ import annotations

from ppolite.data.embedded import film_path
from ppolite.data.report import Report
from ppolite.data.split import prompt_key, stable_hash
from ppolite.types import Example, Prompt, Scored

SOURCE = "embedded:film"
SYSTEM = "You are a film critic."
REQUEST = "Finish this review: "
OPENING_WORDS = (2, 3, 4)
WORDS = range(6, 46)
"""Shorter snippets leave too little to write; longer ones do not fit the demo's 48 tokens by far."""


def film_rows() -> list[tuple[str, float]]:
    """`(text, mean rating)` of all 10,605 snippets, fetched first where they are missing."""
    with film_path().open(encoding="utf-8", newline="\n") as lines:
        next(lines)  # the header
        rows = [line.rstrip("\n").split("\t") for line in lines]
    return [(text, float(score)) for _, score, text in rows]


def film_prompt(opening: str, source: str = "") -> Prompt:
    """The prompt that asks for the rest of a review."""
    turns = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": REQUEST + opening})
    return Prompt(messages=turns, source=source)


def judge_text(prompt: Prompt, response: str) -> str:
    """What a judge should read: for a film prompt the whole review, else the response alone."""
    if not prompt.last.startswith(REQUEST):
        return response
    return f"{prompt.last.removeprefix(REQUEST)} {response}"


def film_scored(seed: int = 0) -> tuple[list[Scored], Report]:
    """Opening, ending and rating of every snippet of usable length. Words are joined by single spaces."""
    report = Report(SOURCE)
    items: list[tuple[int, Scored]] = []
    rows = film_rows()
    for row, (text, score) in enumerate(rows, start=1):
        words = text.split()
        if len(words) not in WORDS:
            continue
        cut = OPENING_WORDS[stable_hash(seed, "opening", row) % len(OPENING_WORDS)]
        prompt = film_prompt(" ".join(words[:cut]), f"{SOURCE} row {row}")
        order = stable_hash(seed, "order", row)
        items.append((order, Scored(prompt, " ".join(words[cut:]), score)))
    report.used = report.rows = len(items)
    left_out = len(rows) - len(items)
    span = f"{WORDS[0]} to {WORDS[-1]} words"
    report.notes.append(f"{SOURCE}: the task takes {span}; {left_out:,} other snippets left out")
    return [item for _, item in sorted(items, key=lambda pair: pair[0])], report


def film_examples(seed: int = 0) -> tuple[list[Example], Report]:
    """What people wrote, without their scores: for SFT."""
    items, report = film_scored(seed)
    return [Example(item.prompt, item.response) for item in items], report


def film_prompts(seed: int = 0) -> tuple[list[Prompt], Report]:
    """The openings, each once: for PPO."""
    items, report = film_scored(seed)
    unique: dict[str, Prompt] = {}
    for item in items:
        unique.setdefault(prompt_key(item.prompt), item.prompt)
    report.notes.append(f"{SOURCE}: {len(unique):,} different openings, each kept once as a prompt")
    return list(unique.values()), report
