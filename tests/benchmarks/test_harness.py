"""Turns, ratios, memory and refusals of the harness. The workers are real processes of a few lines."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
import pytest
from benchmarks.figures import Book, Figure, Side, compared, ratio, summary
from benchmarks.harness import Failed, HadToEnd, fastest, in_turn, measure

from benchmarks import figures, harness, record

TIME, RATE, SIZE = Figure("s", "s", "time"), Figure("r", "tokens/s", "rate"), Figure("m", "MB", "size")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BENCH", tmp_path / "bench")
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "benchmarks" / "results")


def side(name: str, code: str, setting: str = "plain") -> Side:
    return Side(name, setting, (sys.executable, "-c", code))


def saying(**figures: Any) -> str:
    return f"print({json.dumps(figures)!r})"


def test_ratios_are_taken_pair_by_pair() -> None:
    """A machine that slowed down in the second pair changes both medians, and the ratios do not care."""
    found = ratio(TIME, [2.0, 20.0, 2.0], [6.0, 60.0, 8.0])
    assert found["pairs"] == [3.0, 3.0, 4.0]
    assert (found["median"], found["min"], found["max"]) == (3.0, 3.0, 4.0)
    assert ratio(RATE, [30.0, 10.0], [10.0, 20.0])["pairs"] == [3.0, 0.5]
    assert ratio(SIZE, [1.0], [4.0])["median"] == 0.25


def test_a_comparison_holds_every_run_and_what_all_sides_measured() -> None:
    sides = [Side("ours", "a", ()), Side("peer", "b", ()), Side("other", "c", ())]
    runs = [
        [{"s": 1.0, "gpu": None}, {"s": 3.0, "gpu": None}],
        [{"s": 4.0}, {"s": 6.0}],
        [{"s": 1.0}, {"s": 1.5}],
    ]
    found = compared(sides, runs, [TIME, Figure("gpu", "MB", "size")])
    assert found["figures"] == [["s", "s", "time"]]
    ours, peer, other = found["sides"]
    assert ours["s"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert "ratios" not in ours
    assert peer["ratios"]["s"]["pairs"] == [4.0, 2.0]
    assert other["ratios"]["s"]["pairs"] == [1.0, 0.5]
    assert peer["runs"] == runs[1]
    told = list(summary({"bench": "b", "comparison": "c", **found, "notes": ["a note"]}))
    assert told[0] == "b, c: ours, a: 2 s (1 to 3)"
    assert told[2] == "    s: 3.00× (2.00 to 4.00) as fast as peer"
    assert told[-1] == "a note"


def test_a_note_has_no_ratio() -> None:
    found = compared(
        [Side("a", "", ()), Side("b", "", ())], [[{"n": 1}], [{"n": 2}]], [Figure("n", "tokens", "note")]
    )
    assert found["sides"][1]["ratios"] == {}


def test_sides_take_turns_with_a_seed_for_each_pair(tmp_path: Path) -> None:
    order = tmp_path / "order"
    code = (
        f"import os; open({str(order)!r}, 'a').write(NAME + os.environ['BENCH_SEED'] + ' '); {saying(s=1.0)}"
    )
    sides = [side(name, f"NAME = {name!r}; {code}") for name in "ab"]
    runs = in_turn(sides, TIME, Namespace(pairs=3, threads=1))
    assert order.read_text() == "a1 b1 a2 b2 a3 b3 "
    assert [len(mine) for mine in runs] == [3, 3]


def test_memory_is_that_of_the_whole_process_tree() -> None:
    """60 MB in a child of the worker, which itself is small."""
    child = "x = bytearray(60 << 20); import time; time.sleep(2)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); {saying(s=1.0)}"
    alone = measure(side("alone", saying(s=1.0)), 1)["peak_rss_mb"]
    assert 60 < measure(side("tree", code), 1)["peak_rss_mb"] < 60 + 2 * max(alone, 40)


def test_a_worker_is_told_the_threads_and_asks_what_it_needs() -> None:
    code = """
import json, os
print("library noise")
print(json.dumps({"ask": 20}), flush=True)
answer = json.loads(input())
print(json.dumps({"s": answer, "threads": os.environ["OMP_NUM_THREADS"]}))
print("goodbye")
"""
    run = measure(side("asking", code), 3, answer=lambda asked: asked + 1)
    assert (run["s"], run["threads"]) == (21, "3")


def test_a_peer_does_not_see_our_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "src")
    code = 'import json, os; print(json.dumps({"path": os.environ.get("PYTHONPATH")}))'
    assert measure(side("ours", code), 1)["path"] == "src"
    peer = Side("peer", "", ("env", sys.executable, "-c", code))
    assert measure(peer, 1)["path"] is None


def test_what_fails_is_told_with_the_end_of_its_log() -> None:
    with pytest.raises(Failed, match=r"(?s)broken \(plain\) failed with 1; .*ValueError: no such thing"):
        measure(side("broken", "raise ValueError('no such thing')"), 1)
    with pytest.raises(Failed, match="silent"):
        measure(side("silent", "print('nothing to report')"), 1)


def test_what_takes_too_long_ends_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    start = "import subprocess; p = subprocess.Popen(['sleep', '60'])"
    code = f"{start}; open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    with pytest.raises(HadToEnd):
        measure(side("slow", code), 1, limit_s=3.0)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(pid.read_text())).wait(timeout=30)


def test_a_terminated_comparison_takes_its_worker_along(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    worker = (
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    code = f"""
import pathlib, sys
from benchmarks import harness
from benchmarks.figures import Side
harness.BENCH = pathlib.Path({str(tmp_path)!r})
harness.arguments("").parse_args([])
harness.measure(Side("slow", "plain", (sys.executable, "-c", {worker!r})), 1)
"""
    comparison = subprocess.Popen([sys.executable, "-c", code], cwd=harness.ROOT)
    until = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    slow = psutil.Process(int(pid.read_text()))
    comparison.terminate()
    assert comparison.wait(timeout=30) == 143
    with contextlib.suppress(psutil.NoSuchProcess):
        slow.wait(timeout=30)


def test_the_fastest_setting_wins_and_all_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    args = Namespace(threads=1)
    sides = [
        side("x", saying(s=3.0), "slow"),
        side("x", "raise OSError('no kernel')", "broken"),
        side("x", saying(s=2.0), "quick"),
        side("x", saying(s=1.0, reached=False), "never there"),
    ]
    best, tried = fastest(sides, TIME, args)
    assert best.setting == "quick"
    assert [(row["setting"], row.get("s")) for row in tried] == [
        ("slow", 3.0), ("broken", None), ("quick", 2.0), ("never there", 1.0),
    ]  # fmt: skip
    assert tried[1]["failed"] == "OSError: no kernel"
    assert "no kernel" in capsys.readouterr().out
    assert (
        fastest([side("x", saying(r=3.0), "a"), side("x", saying(r=5.0), "b")], RATE, args)[0].setting == "b"
    )
    with pytest.raises(Failed, match="no kernel"):
        fastest([sides[1], sides[1]], TIME, args)
    assert fastest(sides[:1], TIME, args) == (sides[0], [])


def test_a_dirty_tree_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*args: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", "-C", str(tmp_path), *who, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "--pairs", "1"])
    code = tmp_path / "code.py"
    code.write_text("1\n")
    (tmp_path / ".gitignore").write_text("bench/\n")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "other.jsonl").write_text("{}\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")

    sides = [Side("ours", "a", ()), Side("peer", "b", ())]
    result = compared(sides, [[{"s": 1.0}], [{"s": 2.0}]], [TIME])
    book = Book("small", Namespace(dirty=False, threads=1))
    book.write("one", result)
    kept = results / "small.jsonl"
    line = json.loads(kept.read_text())
    assert line["commit"] == git("rev-parse", "HEAD").strip()
    assert line["command"] == "python -m benchmarks.small --pairs 1"
    assert (line["threads"], line["comparison"]) == (1, "one")

    Book("small", Namespace(dirty=False, threads=1)).write("two", result)  # results are no change of the code
    assert len(kept.read_text().splitlines()) == 2
    code.write_text("2\n")
    with pytest.raises(SystemExit, match="the working tree has changes"):
        Book("small", Namespace(dirty=False, threads=1))
    Book("small", Namespace(dirty=True, threads=1)).write("three", result)
    assert len(kept.read_text().splitlines()) == 2
