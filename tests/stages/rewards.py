"""A reward function for recipes of tests."""

import math


def lengths(responses: list[str]) -> list[int]:
    """Words of each."""
    return [len(response.split()) for response in responses]


_calls = 0


def second_is_nan(responses: list[str]) -> list[float]:
    """The number of words; in the second round none is known."""
    global _calls
    _calls += 1
    return [
        math.nan if _calls == 2 else float(len(r.split())) for r in responses
    ]  # first come held-out prompts
