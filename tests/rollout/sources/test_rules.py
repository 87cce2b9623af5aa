"""Penalties by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tests.rollout.sources.kit import said

from ppolite.config import FormatSource, LengthSource
from ppolite.rollout.sources.rules import FormatPenalty, LengthPenalty


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max": 5}, [0, 0, 0, -1, -7]),
        ({"min": 4}, [-3, 0, 0, 0, 0]),
        ({"min": 4, "max": 5}, [-3, 0, 0, -1, -7]),
        ({"min": 5, "max": 5}, [-4, -1, 0, -1, -7]),
    ],
)
def test_length_in_tokens_beyond_the_bounds(settings: dict[str, int], expected: list[float]) -> None:
    made = LengthPenalty(LengthSource(kind="length", **settings))
    assert made.score([said("same text", tokens=n) for n in (1, 4, 5, 6, 12)]) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"####\s*-?\d+", [0, 0, -1, -1]),
        (r"\A#", [-1, 0, -1, -1]),
        (r"(?i)none", [-1, -1, 0, -1]),
        (r"\A(?!.*none)", [0, 0, 0, 0]),
        (r"(?is)\A(?!.*none)", [0, 0, -1, 0]),
    ],
)
def test_format(pattern: str, expected: list[float]) -> None:
    made = FormatPenalty(FormatSource(kind="format", pattern=pattern))
    texts: list[Any] = ["so it is\n#### 42", "#### -7", "one\nNone", ""]
    assert made.score([said(text) for text in texts]) == expected
