"""`ppolite score FILE`: a person rates candidates in the terminal, one key an answer.

The file is scored data: a JSON object a line with `prompt` (text or messages), `response` and `score`, which
is null until somebody gives one. Rows without a score are asked in file order. Every answer is on disk before
the next question: the file is written anew under a temporary name, synced, and renamed over the old one, so
a power cut costs nothing. Lines that were not rated keep their bytes; rated ones keep their other fields.

Left out: several raters at once. A file that somebody else changed meanwhile is not overwritten.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.text import Text

from ppolite.config.strict_json import loads
from ppolite.obs.visible import visible
from ppolite.types import UserError

_ESCAPE = re.compile(rb"\x1b(\[[0-?]*[ -/]*[@-~]|O.|.)?", re.DOTALL)
"""What arrow and function keys send. Page Up is ESC [ 5 ~, whose digit must not become a score."""

HELP = "0–9 score · s skip · u undo · q quit"


class Counts(NamedTuple):
    rated: int
    """Answers given in this sitting, less those taken back."""
    left: int
    """Rows without a score."""
    total: int


def rate_file(path: str | Path, *, keys: Iterator[str] | None = None, out: TextIO | None = None) -> Counts:
    """Ask for the missing scores until none is left or the person quits.

    `keys` yields one key at a time ("0".."9", "s", "u", "q") and defaults to the terminal's, or to lines of
    stdin where that is no terminal; its end counts as "q". Skipped rows are asked again in the next sitting.
    """
    file = _ScoredFile(Path(path))
    console = Console(file=out or sys.stdout, highlight=False, soft_wrap=False)
    open_rows = [i for i, row in enumerate(file.rows) if row.get("score") is None]
    at = 0
    if not open_rows:
        console.print(f"All {len(file.rows)} rows have a score.")
        return Counts(0, 0, len(file.rows))
    with _closing(keys or _keys()) as pressed:
        while True:
            _ask(console, file, open_rows, at)
            key = next(pressed, "q").lower()
            if key == "q" or (at == len(open_rows) and key != "u"):
                break
            if key == "u" and at > 0:
                at -= 1
                file.write_score(open_rows[at], None)
            elif key == "s":
                at += 1
            elif len(key) == 1 and key in "0123456789":
                file.write_score(open_rows[at], int(key))
                at += 1
            else:
                console.print("Nothing to undo." if key == "u" else HELP, style="yellow")
    left = sum(row.get("score") is None for row in file.rows)
    rated = len(open_rows) - left
    console.print(f"\n{rated} rated, {left} of {len(file.rows)} left. Every answer is in {file.path}.")
    return Counts(rated, left, len(file.rows))


def _ask(console: Console, file: _ScoredFile, open_rows: list[int], at: int) -> None:
    console.print()
    if at == len(open_rows):
        console.print(
            Text("That was the last row. u takes the last answer back, any other key ends. › "), end=""
        )
    else:
        row = file.rows[open_rows[at]]
        have = sum(r.get("score") is not None for r in file.rows)
        console.rule(f"{at + 1}/{len(open_rows)} · {have} of {len(file.rows)} have a score", align="left")
        for role, text in _turns(row["prompt"]):
            console.print(Text(visible(role), style="dim"))
            console.print(Text(visible(text) + "\n"))
        console.print(Text("response", style="dim"))
        console.print(Text(visible(row["response"]) + "\n", style="bold"))
        console.print(Text(f"{HELP} › ", style="cyan"), end="")
    console.file.flush()


def _turns(prompt: str | list[dict[str, str]]) -> list[tuple[str, str]]:
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    return [(turn["role"], turn["content"]) for turn in prompt]


class _ScoredFile:
    """The rows of a scored-data file and the lines they came from. Only `write_score` changes it."""

    def __init__(self, path: Path):
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; `ppolite sample` writes files to score") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}); expected jsonl") from error
        self.path = path.resolve()  # a rename over a link would replace the link
        self._lines = text.split("\n")
        self._line_of = [i for i, line in enumerate(self._lines) if line.strip()]
        self.rows = [_row(self._lines[i], f"{path} row {i + 1}") for i in self._line_of]
        if not self.rows:
            raise UserError(f"{path} has no rows; `ppolite sample` writes files to score")
        self._seen = self._stamp()

    def write_score(self, index: int, score: int | None) -> None:
        if self.rows[index].get("score") == score:
            return
        if self._stamp() != self._seen:
            raise UserError(f"{self.path} was changed by another program; run `ppolite score` again to go on")
        row = self.rows[index] | {"score": score}
        line = self._line_of[index]
        ascii_only = self._lines[line].isascii()
        self._lines[line] = json.dumps(row, ensure_ascii=ascii_only)
        # backslashreplace writes a lone surrogate as the very escape that JSON has for it
        replace_file(self.path, "\n".join(self._lines).encode("utf-8", "backslashreplace"))
        self.rows[index] = row
        self._seen = self._stamp()

    def _stamp(self) -> tuple[int, int, int]:
        try:
            stat = self.path.stat()
        except OSError:
            return (0, 0, 0)
        return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = loads(line)
    except ValueError as error:
        raise UserError(f"{where} {error}; expected an object a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}; expected an object with 'prompt' and 'response'")
    prompt, score = row.get("prompt"), row.get("score")
    if not isinstance(prompt, str) and not _is_messages(prompt):
        raise UserError(f"{where}: 'prompt' is {prompt!r:.40}; expected text or a list of role and content")
    if not isinstance(row.get("response"), str):
        raise UserError(f"{where}: 'response' is {row.get('response')!r:.40}; expected text")
    if score is not None and not _is_score(score):
        raise UserError(
            f"{where}: 'score' is {score!r:.40}; expected a number, or null for a row to be rated"
        )
    return row


def _is_score(score: Any) -> bool:
    if isinstance(score, bool) or not isinstance(score, int | float):
        return False
    return isinstance(score, int) or math.isfinite(score)


def _is_messages(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in prompt
        )
    )


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file so that at any moment it holds either the old or the new content, whole and synced."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, new)
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}); its old content stands") from error
    if os.name == "posix":  # the rename itself is on disk only when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _closing(keys: Iterator[str]) -> Iterator[Iterator[str]]:
    """Put the terminal back as it was even if writing an answer fails."""
    try:
        yield keys
    finally:
        if isinstance(keys, Generator):
            keys.close()


def _keys() -> Iterator[str]:
    """Single keys of the terminal; lines of stdin where it is none, or on a system without termios."""
    try:
        import termios
        import tty
    except ImportError:
        termios = tty = None
    if termios is None or tty is None or not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)  # not raw: Ctrl-C still interrupts and output keeps its line ends
        while chunk := os.read(fd, 64):
            for key in _ESCAPE.sub(b"", chunk).decode(errors="ignore"):
                if key == "\x04":  # Ctrl-D
                    return
                yield key
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
