"""Every format gives the same rows; every broken file gives a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas
import pytest

from ppolite.data.tables import read_rows
from ppolite.types import UserError


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", 'prompt,response\nq1,a1\nq2,"He said\nq3,a3\n'),
        ("rows.tsv", 'score\ttext\n1\t"Fine film\n2\tgreat "movie"\n'),
        ("rows.csv", 'prompt,response\nq1,"great" movie\n'),
    ],
)
def test_a_quote_that_swallows_rows_is_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="mend the quotes in it"):
        read_rows(str(tmp_path / name))


ROWS = [
    {"prompt": "Say “hi”,\nplease", "response": "hi", "score": 1.5},
    {"prompt": "数到三", "response": "一\t二\t三", "score": -2.0},
]


def write(path: Path, rows: list[dict]) -> str:
    frame = pandas.DataFrame(rows)
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8-sig")
        case ".json":
            path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        case ".csv":
            frame.to_csv(path, index=False, encoding="utf-8-sig")
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
        case ".parquet":
            frame.to_parquet(path)
        case _:
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "folder"])
def test_formats_agree(tmp_path: Path, name: str) -> None:
    rows, report = read_rows(write(tmp_path / name, ROWS))
    assert [number for number, _ in rows] == [1, 2]
    assert [{**values, "score": float(values["score"])} for _, values in rows] == ROWS
    assert (report.rows, report.problems) == (2, [])


def test_saved_splits_are_named(tmp_path: Path) -> None:
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "d"))
    assert len(read_rows(f"{tmp_path}/d#train")[0]) == 2
    assert len(read_rows(f"{tmp_path}/d#test")[0]) == 1
    for source in (f"{tmp_path}/d", f"{tmp_path}/d#dev"):
        with pytest.raises(UserError, match="train, test"):
            read_rows(source)
    write(tmp_path / "one", ROWS)
    with pytest.raises(UserError, match="no splits"):
        read_rows(f"{tmp_path}/one#train")


def test_broken_lines_are_reported_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n"x"\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
    rows, report = read_rows(str(path))
    assert [number for number, _ in rows] == [1, 8]
    assert [problem.row for problem in report.problems] == [3, 4, 5, 6, 7]
    assert report.rows == 7
    for problem, part in zip(
        report.problems, ["not JSON", "a list", "UTF-8", "text", "not JSON"], strict=True
    ):
        assert part in problem.reason
        assert problem.advice


def test_csv_fields_beyond_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\na,b\na,b,c\na\n"' + "x" * 200_000 + '",y\n', encoding="utf-8")
    rows, report = read_rows(str(path))
    assert [number for number, _ in rows] == [1, 4]
    assert [(p.row, p.reason[:12]) for p in report.problems] == [(2, "has 3 fields"), (3, "has 1 fields")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n \n", "empty"),
        ("a.json", b"[]", "empty"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b'{"a": 1}', "expected a list"),
        ("a.json", b"\xff\xfe", "not UTF-8"),
        ("a.csv", b"", "empty"),
        ("a.csv", b"a,b\n", "empty"),
        ("a.csv", b"a,a\n1,2\n", "'a' twice"),
        ("a.csv", b"a,b\n\xff,2\n", "in Excel: CSV UTF-8"),
        ("a.csv", b"prompt;text\n1;2\n", "separated by semicolons; save it with commas"),
        ("a.csv", b"prompt\ttext\n1\t2\n", "separated by tabs"),
        ("a.csv", b'{"prompt": 1}\n', "looks like JSON lines"),
        ("a.parquet", b"not parquet", "Parquet"),
        ("a.xlsx", b"PK", "unknown"),
        ("a", b"x", "without an ending"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_rows(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_absent_sources(tmp_path: Path) -> None:
    (tmp_path / "reviews.jsonl").touch()
    with pytest.raises(UserError, match=r"did you mean 'reviews\.jsonl'"):
        read_rows(str(tmp_path / "review.jsonl"))
    with pytest.raises(UserError, match=r"no such file or folder; look at its path"):
        read_rows(str(tmp_path / "nope.jsonl"))
    with pytest.raises(UserError, match="save_to_disk"):
        read_rows(str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing could not be loaded"):
        read_rows("hub:nobody/nothing")
    for name in ("no/such/thing", "../..", "/etc", "", "#train", "a b"):
        with pytest.raises(UserError, match="no name on the hub"):
            read_rows(f"hub:{name}")
