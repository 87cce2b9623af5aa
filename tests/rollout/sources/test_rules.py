"""Penalties by hand."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.rollout.sources.kit import said

from ppolite.config import FormatSource, LengthSource
from ppolite.rollout.sources.rules import FormatPenalty, LengthPenalty
from ppolite.types import UserError


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


ENDLESS = "a" * 40 + "!"
"""`re` looks for `(a+)+$` in it for days."""


def test_a_pattern_that_would_take_for_ever_is_ended() -> None:
    made = FormatPenalty(FormatSource(kind="format", pattern=r"(a+)+$"), longest=0.5)
    assert made.score([said("aaa"), said("b")]) == [0, -1]
    with pytest.raises(
        UserError, match=r"`format` searched for \(a\+\)\+\$ in one response for 0\.5 s"
    ) as caught:
        made.score([said("aaa"), said(ENDLESS)])
    assert "aaaa!" in str(caught.value)
    assert made.score([said("aaa"), said("b")]) == [0, -1], "the next round gets a fresh process"


def test_no_process_is_left(tmp_path: Path) -> None:
    made = FormatPenalty(FormatSource(kind="format", pattern=r"(a+)+$"), longest=0.3)
    with pytest.raises(UserError):
        made.score([said(ENDLESS)])
    made.score([said("a")])
    del made
    gc.collect()
    scripts = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not any("matcher.py" in script for script in scripts)


TEXTS = ["", "\n", "\0", "\u2028", "电影 👩‍🔬", "\x1b[31m", "a" * 100_000, '{"found": 1}\n{}']


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_arrives_whole(text: str) -> None:
    made = FormatPenalty(FormatSource(kind="format", pattern=rf"\A{re.escape(text)}\Z"))
    assert made.score([said(text), said(text + "x")]) == [0, -1]


@pytest.mark.parametrize(
    "pattern",
    [r"(?P<n>a)(?P=n)", r"(?<=x)a", r"a++b", r"(?>a+)b", r"a{,2}b", r"(?i:A)b", r"\bcafé\b"],
)
def test_patterns_mean_what_python_says(pattern: str) -> None:
    texts = ["", "aa", "xa", "aab", "[a", "a{,2}b", "Ab", "un café noir", "ab"]
    made = FormatPenalty(FormatSource(kind="format", pattern=pattern))
    assert made.score([said(t) for t in texts]) == [0.0 if re.search(pattern, t) else -1.0 for t in texts]
