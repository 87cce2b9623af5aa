"""Reward functions for recipes of tests."""

import math


def lengths(responses: list[str]) -> list[int]:
    """Words of each."""
    return [len(response.split()) for response in responses]


def bads(responses: list[str]) -> list[int]:
    """Bad words of each: what people do not want."""
    return [sum(word in BAD for word in response.split()) for response in responses]


BAD = ["bad", "dull", "stale", "silly"]
_calls = 0


def second_is_nan(responses: list[str]) -> list[float]:
    """The number of words; in the second round none is known."""
    global _calls
    _calls += 1
    return [
        math.nan if _calls == 2 else float(len(r.split())) for r in responses
    ]  # first come held-out prompts
