"""What a refusal must be: exit code 2, one line on stderr with a place and something to do, fit for a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ppolite.cli import main

Refuse = Callable[..., str]
REMEDY = re.compile(r"; |did you mean|known here|should |expected |must |`ppolite ")
COMMANDED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys, or what reorders a line, but for the line breaks themselves."""


BARS = re.compile(r"\r[A-Z][a-z]+ [a-z]+: .*")
"""Progress bars of transformers, which came to be before the command line could turn them off."""


def check_sentence(said: str, *places: Path | str) -> str:
    """One of the places is in it, something to do is in it, and it is no page."""
    assert any(str(p) in said for p in places), f"no place in: {said}"
    assert REMEDY.search(said), f"nothing to do in: {said}"
    assert len(said) < 1000 + max(len(str(p)) for p in places), f"too long: {said}"
    return said


def refused(
    capsys: pytest.CaptureFixture[str], place: Path | str | tuple[Path | str, ...], *argv: str | Path
) -> str:
    """The sentence of a command that exits with 2; one of the places must be in it."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    out, said = capsys.readouterr()
    said = BARS.sub("", said)
    assert code == 2, (code, out, said)
    assert "Traceback" not in said
    assert not COMMANDED.search(out + said), repr(out + said)
    line = said.splitlines()[-1]
    assert line.startswith("ppolite: ")
    assert sum(one.startswith("ppolite: ") for one in said.splitlines()) == 1
    return check_sentence(line, *(place if isinstance(place, tuple) else (place,)))
