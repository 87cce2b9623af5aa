"""Data files of which no training can be made, for every format; `write(name, folder)` puts one there.

Each format meets the same misfortunes: nothing in it, cut off, other bytes than its name says, other encodings, wrong
shapes, wrong types, numbers that are none, names given twice.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GOOD = [{"prompt": f"film {i}", "completion": "good"} for i in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in GOOD)
CSV = "prompt,completion\n" + "".join(f"film {i},good\n" for i in range(20))
HUGE = "1" + "0" * 5000

Content = bytes | str | Callable[[Path], None]


def rows(*made: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in made)


def parquet(columns: dict[str, Any]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def cut(share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(GOOD), path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return write


def flipped(place: float) -> Callable[[Path], None]:
    """A parquet file with a part of its end, where the columns are described, turned over."""

    def write(path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(GOOD), path)
        data = bytearray(path.read_bytes())
        at = int(len(data) * place)
        data[at : at + 16] = bytes(b ^ 0xFF for b in data[at : at + 16])
        path.write_bytes(data)

    return write


def folder(**files: str | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            (path / name.replace("__", ".")).write_bytes(data)

    return write


STATE = json.dumps({
    "_data_files": [{"filename": "data.arrow"}], "_fingerprint": "x", "_format_columns": None, "_format_kwargs": {},
    "_format_type": None, "_output_all_columns": False, "_split": None,
})  # fmt: skip
INFO = json.dumps({"features": {"prompt": {"dtype": "string", "_type": "Value"}}})


def loop(path: Path) -> None:
    path.symlink_to(path)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


FILES: dict[str, Content] = {
    # JSON Lines
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n\t\n",
    "BOM alone.jsonl": b"\xef\xbb\xbf",
    "no JSON.jsonl": "film: good\n",
    "CSV inside.jsonl": CSV,
    "YAML inside.jsonl": "- prompt: a\n",
    "one list.jsonl": json.dumps(GOOD),
    "pretty.jsonl": json.dumps(GOOD[0], indent=2),
    "lists.jsonl": rows([1], ["a"]),
    "numbers.jsonl": "1\n2\n",
    "strings.jsonl": '"a"\n"b"\n',
    "nulls.jsonl": "null\n" * 3,
    "empty objects.jsonl": "{}\n{}\n",
    "cut.jsonl": '{"prompt": "film", "compl',
    "comma.jsonl": '{"prompt": "film",}\n',
    "single quotes.jsonl": "{'prompt': 'film', 'completion': 'good'}\n",
    "Python.jsonl": "{'prompt': None}\n",
    "comments.jsonl": '// a\n{"prompt": "a"} # b\n',
    "two on a line.jsonl": '{"prompt": "a", "completion": "b"} {"prompt": "a", "completion": "b"}\n',
    "UTF-16.jsonl": LINES.encode("utf-16"),
    "UTF-32.jsonl": LINES.encode("utf-32"),
    "latin 1.jsonl": '{"prompt": "café", "completion": "à"}\n'.encode("latin-1"),
    "GBK.jsonl": '{"prompt": "电影", "completion": "好"}\n'.encode("gbk"),
    "NUL.jsonl": b'{"prompt": "a\0b", "completion": "c"}\n',
    "zeros.jsonl": bytes(1000),
    "gzip.jsonl": gzip.compress(LINES.encode()),
    "deep.jsonl": "[" * 100_000 + "\n",
    "deep objects.jsonl": '{"a":' * 100_000 + "\n",
    "deep value.jsonl": '{"prompt": "a", "completion": ' + "[" * 50_000 + "]" * 50_000 + "}\n",
    "huge number.jsonl": f'{{"prompt": {HUGE}, "completion": "a"}}\n',
    "number for text.jsonl": rows({"prompt": 3, "completion": 4}),
    "null for text.jsonl": rows({"prompt": None, "completion": None}),
    "list for text.jsonl": rows({"prompt": [1, [2]], "completion": "a"}),
    "object for text.jsonl": rows({"prompt": {"a": 1}, "completion": "a"}),
    "true for text.jsonl": rows({"prompt": True, "completion": "a"}),
    "empty text.jsonl": rows({"prompt": "", "completion": ""}),
    "blank text.jsonl": rows({"prompt": " \n", "completion": "a"}),
    "half a character.jsonl": '{"prompt": "\\ud800", "completion": "a"}\n',
    "half a character as name.jsonl": '{"\\ud800": "a", "completion": "b"}\n',
    "escapes as name.jsonl": rows({"\x1b[31mprompt\u202e": "a", "completion": "b"}),
    "escapes as value.jsonl": rows({"prompt": {"\x1b]0;x\x07": 1}, "completion": "b"}),
    "name twice.jsonl": '{"prompt": "a", "prompt": "b", "completion": "c"}\n',
    "other names.jsonl": rows({"question": "a", "answer": "b"}),
    "one name wrong.jsonl": rows({"prompt": "a", "completoin": "b"}),
    "wide.jsonl": rows({f"column {i}": 1 for i in range(5000)}),
    "long name.jsonl": rows({"x" * 100_000: 1}),
    "no turns.jsonl": rows({"messages": []}),
    "turns of text.jsonl": rows({"messages": ["a", "b"]}),
    "turns as text.jsonl": rows({"messages": "user: a"}),
    "turns as an object.jsonl": rows({"messages": {"role": "user", "content": "a"}}),
    "turns without content.jsonl": rows({"messages": [{"role": "user"}]}),
    "turns without a role.jsonl": rows({"messages": [{"content": "a"}]}),
    "turns of numbers.jsonl": rows({"messages": [{"role": 1, "content": 2}]}),
    "turns in turns.jsonl": rows({"messages": [[{"role": "user", "content": "a"}]]}),
    "no answer.jsonl": rows({"messages": [{"role": "user", "content": "a"}]}),
    "answer alone.jsonl": rows({"messages": [{"role": "assistant", "content": "a"}]}),
    "content is a list.jsonl": rows({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
    "one prompt.jsonl": rows(*[{"prompt": "a", "completion": str(i)} for i in range(20)]),
    # JSON
    "empty.json": b"",
    "empty list.json": "[]",
    "object.json": json.dumps({"data": GOOD}),
    "text.json": '"a"',
    "number.json": "3",
    "null.json": "null",
    "cut.json": json.dumps(GOOD)[:100],
    "lines.json": LINES,
    "UTF-16.json": json.dumps(GOOD).encode("utf-16"),
    "latin 1.json": '[{"prompt": "é"}]'.encode("latin-1"),
    "deep.json": "[" * 100_000,
    "huge number.json": f"[{HUGE}]",
    "NaN.json": '[{"prompt": NaN, "completion": Infinity}]',
    "lists.json": "[[1], [2]]",
    "nulls.json": "[null, null]",
    "numbers.json": "[1, 2, 3]",
    "name twice.json": '[{"prompt": "a", "prompt": "b", "completion": "c"}]',
    "NUL.json": b'[{"prompt": "a\0"}]',
    "gzip.json": gzip.compress(json.dumps(GOOD).encode()),
    # CSV and TSV
    "empty.csv": b"",
    "header.csv": "prompt,completion\n",
    "no header.csv": "film 1,good\nfilm 2,good\n",
    "name twice.csv": "prompt,prompt,completion\na,b,c\n",
    "names blank.csv": ",,\na,b,c\n",
    "semicolons.csv": CSV.replace(",", ";"),
    "tabs.csv": CSV.replace(",", "\t"),
    "commas.tsv": CSV,
    "short rows.csv": "prompt,completion\na\nb\n",
    "long rows.csv": "prompt,completion\na,b,c\nd,e,f\n",
    "open quote.csv": 'prompt,completion\n"a,b\nc,d\n',
    "empty cells.csv": "prompt,completion\n,\n,\n",
    "NUL.csv": b"prompt,completion\n\0,a\n",
    "zeros.csv": bytes(1000),
    "UTF-16.csv": CSV.encode("utf-16"),
    "latin 1.csv": "prompt,completion\ncafé,à\n".encode("latin-1"),
    "GBK.tsv": "prompt\tcompletion\n电影\t好\n".encode("gbk"),
    "gzip.csv": gzip.compress(CSV.encode()),
    "carriage returns.csv": CSV.replace("\n", "\r").replace("prompt", "question"),
    "empty.tsv": b"",
    "header.tsv": "prompt\tcompletion\n",
    "messages.csv": 'messages\n"[1, 2"\n"[]"\nx\n',
    "deep messages.csv": f'messages\n"{"[" * 50_000}"\n',
    # Parquet
    "empty.parquet": b"",
    "text.parquet": b"not parquet",
    "magic alone.parquet": b"PAR1PAR1",
    "magic and zeros.parquet": b"PAR1" + bytes(100) + b"PAR1",
    "huge footer.parquet": b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1",
    "cut in half.parquet": cut(0.5),
    "cut at the end.parquet": cut(0.99),
    "turned over early.parquet": flipped(0.02),
    "turned over in the middle.parquet": flipped(0.45),
    "turned over at the end.parquet": flipped(0.9),
    "no rows.parquet": parquet({"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())}),
    "no columns.parquet": parquet({}),
    "numbers.parquet": parquet({"prompt": [1, 2], "completion": [3, 4]}),
    "bytes.parquet": parquet({"prompt": [b"\xff", b"a"], "completion": [b"b", b"c"]}),
    "nulls.parquet": parquet({"prompt": pa.nulls(2), "completion": pa.nulls(2)}),
    "structs.parquet": parquet({"prompt": [{"a": 1}], "completion": [{"b": [1]}]}),
    "times.parquet": parquet({"prompt": pa.array([2**62], pa.timestamp("us")), "completion": ["a"]}),
    "days.parquet": parquet({"prompt": pa.array([2**30], pa.date32()), "completion": ["a"]}),
    "other names.parquet": parquet({"a": ["x"], "b": ["y"]}),
    "maps.parquet": parquet({"prompt": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "completion": ["a"]}),
    "CSV inside.parquet": CSV,
    # folders
    "nothing": folder(),
    "only a picture": folder(picture__png=b"\x89PNG"),
    "only data": folder(data__jsonl=LINES),
    "state is no JSON": folder(state__json="{", dataset_info__json="{"),
    "state is a list": folder(state__json="[]", dataset_info__json="[]"),
    "state is null": folder(state__json="null", dataset_info__json="null"),
    "state is empty": folder(state__json="{}", dataset_info__json="{}"),
    "state without data": folder(state__json=STATE, dataset_info__json=INFO),
    "data is text": folder(state__json=STATE, dataset_info__json=INFO, data__arrow="x"),
    "data is zeros": folder(state__json=STATE, dataset_info__json=INFO, data__arrow=bytes(100)),
    "data is a pickle": folder(state__json=STATE, dataset_info__json=INFO, data__arrow=b"cos\nsystem\n(S'x'\ntR."),
    "data lies elsewhere": folder(
        state__json=STATE.replace("data.arrow", "../../../../etc/passwd"), dataset_info__json=INFO
    ),
    "unknown feature": folder(
        state__json=STATE, dataset_info__json=INFO.replace("Value", "Nonesuch"), data__arrow="x"
    ),
    "unknown type": folder(
        state__json=STATE, dataset_info__json=INFO.replace("string", "strong"), data__arrow="x"
    ),
    "splits that are not there": folder(dataset_dict__json='{"splits": ["train"]}'),
    "splits are a number": folder(dataset_dict__json='{"splits": 3}'),
    "splits are no JSON": folder(dataset_dict__json="{"),
    "script": folder(loader__py="raise SystemExit(3)", dataset_infos__json="{}"),
    # files that are none
    "folder.jsonl": folder(),
    "folder.json": folder(),
    "folder.csv": folder(),
    "folder.parquet": folder(),
    "loop.jsonl": loop,
    "loop.parquet": loop,
    "loop": loop,
    "dangling.csv": dangling,
    "sheet.xlsx": b"PK\x03\x04",
    "archive.zip": b"PK\x03\x04",
    "pickle.pkl": b"cos\nsystem\n(S'x'\ntR.",
    "tensor.pt": b"PK\x03\x04",
    "array.npy": b"\x93NUMPY",
    "script.py": "raise SystemExit(3)",
    "no ending": b"x",
    "odd.JSONL.bak": LINES,
    ".jsonl": LINES,
}  # fmt: skip

ONE_PROMPT = ["one prompt.jsonl", "NUL.csv"]
"""Every row is fine, but they leave nothing to hold out."""

ABSENT = [
    "nowhere.jsonl", "no/such/folder/x.csv", "x.jsonl/y.jsonl", "~nobody-of-that-name/x.jsonl", "", ".", "..", "/", "~",
    "#", "#train", "x#y#z", "embedded:flim", "embedded:", "hub:", "hub:../..", "hub:#", "hub:/etc", "hub:a/b/c/d",
    "https://a.test/x.jsonl", "s3://bucket/x.parquet", "C:\\data\\x.jsonl", "\x1b[31m.jsonl", "\u202ex.jsonl",
    "x" * 300 + ".jsonl", "x/" * 3000 + "y.jsonl", "x.jsonl\n", " ", "%s%n.jsonl", "{x}.jsonl", "[bold]x[/bold].jsonl",
    "[/bold].jsonl",
]  # fmt: skip


def write(name: str, place: Path) -> Path:
    path, content = place / name, FILES[name]
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


SCORED = {"prompt": "a", "response": "b"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
CHOICE = {"prompt": "a", "first": "b", "second": "c"}
RANKING = {"prompt": "a", "responses": ["b", "c"]}

ROWS: dict[str, tuple[str, str]] = {
    "scores: text": ("scores", rows({**SCORED, "score": "high"})),
    "scores: empty": ("scores", rows({**SCORED, "score": ""})),
    "scores: null": ("scores", rows({**SCORED, "score": None})),
    "scores: list": ("scores", rows({**SCORED, "score": [1]})),
    "scores: object": ("scores", rows({**SCORED, "score": {"mean": 1}})),
    "scores: NaN": ("scores", rows({**SCORED, "score": float("nan")})),
    "scores: infinite": ("scores", rows({**SCORED, "score": float("inf")})),
    "scores: too large": ("scores", f'{{"prompt": "a", "response": "b", "score": 1{"0" * 400}}}\n'),
    "scores: 1e999": ("scores", '{"prompt": "a", "response": "b", "score": 1e999}\n'),
    "scores: missing": ("scores", rows(SCORED)),
    "scores: all the same": ("scores", rows(*[{**SCORED, "prompt": f"film {i}", "score": 1} for i in range(99)])),
    "scores: too few": ("scores", rows(*[{**SCORED, "prompt": f"film {i}", "score": i} for i in range(9)])),
    "pairs: equal": ("pairs", rows({**PAIR, "rejected": "b"})),
    "pairs: text without prompt": ("pairs", rows({"chosen": "b", "rejected": "c"})),
    "pairs: different beginnings": (
        "pairs",
        rows({k: [{"role": r, "content": k} for r in ("user", "assistant")] for k in ("chosen", "rejected")}),
    ),
    "pairs: negative margin": ("pairs", rows({**PAIR, "margin": -1})),
    "pairs: margin is text": ("pairs", rows({**PAIR, "margin": "much"})),
    "pairs: preferred 0": ("pairs", rows({**CHOICE, "preferred": 0})),
    "pairs: preferred 3": ("pairs", rows({**CHOICE, "preferred": 3})),
    "pairs: preferred true": ("pairs", rows({**CHOICE, "preferred": True})),
    "pairs: preferred infinite": ("pairs", rows({**CHOICE, "preferred": float("inf")})),
    "pairs: preferred is NaN": ("pairs", rows({**CHOICE, "preferred": float("nan")})),
    "pairs: preferred is a list": ("pairs", rows({**CHOICE, "preferred": [1]})),
    "pairs: preferred has an escape": ("pairs", rows({**CHOICE, "preferred": "\x1b[2J"})),
    "rankings: one": ("rankings", rows({**RANKING, "responses": ["b"]})),
    "rankings: equal": ("rankings", rows({**RANKING, "responses": ["b", "b"]})),
    "rankings: text": ("rankings", rows({**RANKING, "responses": "b"})),
    "rankings: numbers": ("rankings", rows({**RANKING, "responses": [1, 2]})),
    "rankings: ties": ("rankings", rows({**RANKING, "scores": [1, 1]})),
    "rankings: too few scores": ("rankings", rows({**RANKING, "scores": [1]})),
    "rankings: scores are text": ("rankings", rows({**RANKING, "scores": ["a", "b"]})),
    "rankings: scores are NaN": ("rankings", rows({**RANKING, "scores": [float("nan"), 1]})),
    "prompts: empty": ("prompts", rows({"prompt": ""})),
    "prompts: numbers": ("prompts", rows({"prompt": 3})),
    "prompts: one": ("prompts", rows({"prompt": "film"})),
    "prompts: the same": ("prompts", rows(*[{"prompt": "film"}] * 50)),
    "prompts: too few": ("prompts", rows(*[{"prompt": f"film {i}"} for i in range(5)])),
    "prompts: turns of a strange role": ("prompts", rows({"messages": [{"role": "\x1b[31m", "content": ""}]})),
    "prompts: all too long": ("prompts", rows(*[{"prompt": "film " * 99 + str(i)} for i in range(50)])),
}  # fmt: skip
SOUND_ROWS = [
    "scores: all the same", "scores: too few", "prompts: one", "prompts: the same", "prompts: too few",
    "prompts: all too long",
]  # fmt: skip
"""Each row is fine; together they are not enough for a run."""
