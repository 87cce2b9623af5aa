"""A source becomes numbered rows: `{column: value}`, whatever the file format.

| source | read as |
|---|---|
| `FILE.jsonl` | one JSON object a line |
| `FILE.json` | a list of objects |
| `FILE.csv`, `FILE.tsv` | a header line, then records; UTF-8, quoted as spreadsheets do |
| `FILE.parquet` | rows of all row groups |
| `FOLDER` | a data set saved with Hugging Face `save_to_disk`; `FOLDER#SPLIT` where it has several splits |
| `hub:NAME` | `datasets.load_dataset(NAME)`, split `train`; `hub:NAME#SPLIT` for another |

A row that cannot be read at all goes into the report; a source that cannot be opened is a UserError. Only
`hub:` sources touch the network, and only Parquet and saved data sets load their libraries. Columns of pictures,
sound and the like are left out of data sets: to open them would run decoders on them, or fetch what they name.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ppolite.config import at_home
from ppolite.config.strict_json import loads
from ppolite.data.report import Report
from ppolite.types import UserError

Rows = Iterator[tuple[int, Any]]
"""Row number (from 1; the line number in JSON Lines) and its values: a dict, or the reader says otherwise."""


class RowError(Exception):
    """One row cannot be used: the reason, and what to do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason, advice)
        self.reason, self.advice = reason, advice


def read_rows(source: str) -> tuple[list[tuple[int, dict[str, Any]]], Report]:
    """All rows of `source` that hold named values. `report.rows` counts the others too."""
    report = Report(source)
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        for number, values in _open(source):
            report.rows += 1
            if isinstance(values, RowError):
                report.add(number, values.reason, values.advice)
            elif not isinstance(values, dict):
                report.add(number, f"is {_kind(values)}, not an object", "write it as {column: value}")
            else:
                rows.append((number, values))
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}; check the name and your rights") from error
    if not report.rows:
        raise UserError(f"{source} is empty; give a source with at least one row")
    return rows, report


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?` where something similar is known, else nothing."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def named(names: Iterable[object], most: int = 20) -> str:
    """Names of columns in one of our sentences: a file may have thousands, and long ones."""
    short = [text if len(text) <= 40 else f"{text[:39]}…" for text in map(str, names)]
    return ", ".join(short[:most]) + (f" and {len(short) - most} more" if len(short) > most else "") or "none"


def _open(source: str) -> Rows:
    if source.startswith("hub:"):
        return _hub(source)
    plain, _, split = source.partition("#")
    path, folder = at_home(source), at_home(plain)
    if plain and not path.exists() and folder.is_dir():
        return _saved(folder, source, split)
    if not source or not path.exists():
        there = {p.stem: p.name for p in path.parent.iterdir()} if path.parent.is_dir() else {}
        near = difflib.get_close_matches(path.stem, there, n=1, cutoff=0.7)
        hint = f"did you mean {there[near[0]]!r}?" if near else "look at its path"
        raise UserError(
            f"{source or 'data'}: no such file or folder; {hint} (a "
            "Hugging Face hub name is written hub:NAME, and embedded:film is what comes with ppolite)"
        )
    if path.is_dir():
        return _saved(path, source, "")
    formats: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }
    if path.suffix.lower() not in formats:
        raise UserError(
            f"{source}: the format of {path.suffix or 'a file without an ending'} is unknown; convert it to"
            f" one of {', '.join(formats)}"
        )
    return formats[path.suffix.lower()](path)


def _jsonl(path: Path) -> Rows:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = loads(line)
            except ValueError as error:
                row = RowError(str(error), "write one JSON object on each line, in UTF-8")
            if isinstance(row, list):
                advice = "write it as {column: value}, or give a file that is one list the ending .json"
                row = RowError(f"is {_kind(row)}, not an object", advice)
            yield number, row


def _json(path: Path) -> Rows:
    try:
        rows = loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} {error}; mend the file: a list of objects, in UTF-8") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} holds {_kind(rows)}; expected a list of objects, [{{…}}, {{…}}]")
    yield from enumerate(rows, start=1)


def _csv(path: Path) -> Rows:
    # A long answer may exceed the module's default field limit of 131,072 characters.
    before = csv.field_size_limit(1 << 30)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
            # Not strict, it would take the rest of the file into a field whose quote is never closed.
            reader = csv.reader(file, dialect, strict=True)
            header = next(reader, [])
            if header and header[0].startswith("{"):
                raise UserError(f"{path}: looks like JSON lines; give it the ending .jsonl")
            for mark, marks in ((";", "semicolons"), ("\t", "tabs")):
                if len(header) == 1 and mark in header[0]:
                    raise UserError(
                        f"{path}: its fields are separated by {marks}; save it with commas, or with tabs as .tsv"
                    )
            if twice := {name for name in header if header.count(name) > 1}:
                raise UserError(f"{path}: the header names {sorted(twice)[0]!r} twice; rename one")
            number = 0
            for values in reader:
                if not values:
                    continue
                number += 1
                if len(values) == len(header):
                    yield number, dict(zip(header, values, strict=True))
                else:
                    yield (
                        number,
                        RowError(
                            f"has {len(values)} fields where the header has {len(header)}",
                            "put quotes around fields that hold separators or line breaks",
                        ),
                    )
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error.reason}); save it as UTF-8 (in Excel: CSV UTF-8)"
        ) from error
    except csv.Error as error:
        raise UserError(
            f"{path} cannot be read as {path.suffix[1:]} ({error}); mend the quotes in it"
        ) from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # a date beyond Python's
        raise UserError(f"{path} cannot be read as Parquet ({error}); write the file again") from error


def _saved(path: Path, source: str, split: str) -> Rows:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # it raises whatever the folder's JSON makes it stumble over
        raise UserError(
            f"{source} is no folder saved with datasets' save_to_disk ({_sentence(error)}); name a file in it, or"
            " save it that way"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        name = split or next(iter(found), "")
        if name not in found or (not split and len(found) > 1):
            splits = named(found)
            raise UserError(f"{source}: name one of its splits ({splits}) like {path}#{name}")
        found = found[name]
    elif split:
        raise UserError(f"{source}: this data set has no splits; leave away #{split}")
    yield from enumerate(_texts(found), start=1)


def _hub(source: str) -> Rows:
    import datasets

    name, _, split = source.removeprefix("hub:").partition("#")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"{source}: no name on the hub; write hub:OWNER/NAME, and a folder without hub:")
    if Path(name).exists():
        # datasets would read that, whatever is in it, and say nothing.
        raise UserError(
            f"{source}: {name} is also a folder here; give its path without hub:, or start elsewhere"
        )
    try:
        found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # it raises whatever its files make it stumble over
        raise UserError(
            f"{source} could not be loaded ({_sentence(error)}); check its name, its split (hub:NAME#SPLIT) and the"
            " network"
        ) from error
    yield from enumerate(_texts(found), start=1)


def _texts(found: Any) -> Any:
    """The data set without the columns that its features would open."""
    return found.remove_columns([name for name, feature in found.features.items() if _is_media(feature)])


def _is_media(feature: Any) -> bool:
    if isinstance(feature, dict | list):
        return any(map(_is_media, feature.values() if isinstance(feature, dict) else feature))
    inside = getattr(feature, "feature", None)
    return (
        _is_media(inside)
        if inside is not None
        else getattr(feature, "_type", "") != "Json" and hasattr(feature, "decode")
    )


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _kind(value: object) -> str:
    if isinstance(value, str):
        return f"text ({value[:20]!r})"
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
