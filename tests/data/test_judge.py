"""The judge is VADER's own program, or a sentence that says how to install it."""

from __future__ import annotations

import sys

import pytest

from ppolite.data import judge
from ppolite.data.judge import vader_judge
from ppolite.types import UserError


def test_examples_of_the_package() -> None:
    pytest.importorskip("vaderSentiment", reason="the [demo] extra is not installed")
    # README of vaderSentiment 3.3.2, "Demo, including example of non-English text translations"
    texts = ["VADER is smart, handsome, and funny.", "Today SUX!", "The book was good."]
    assert vader_judge(texts) == [0.8316, -0.5461, 0.4404]
    assert vader_judge([]) == []


def test_absent_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vaderSentiment", "vaderSentiment.vaderSentiment"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install vaderSentiment"):
        vader_judge(["good"])


def test_other_languages_are_no_judgement(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("vaderSentiment", reason="the [demo] extra is not installed")
    judge._warn_once.cache_clear()
    vader_judge(["A lovely café.", "Superb!", "数到三"])
    assert not caplog.records
    assert vader_judge(["很好的电影", "糟糕"]) == [0.0, 0.0]
    vader_judge(["很好的电影"])
    assert [record.getMessage()[:44] for record in caplog.records] == [
        "evaluation.judge is vader, which knows Engli"
    ]
