"""From runs to a line of results: medians, spread, ratios pair by pair, and where they were measured.

    ratio of a pair   how many times as fast ours is, or which share of the peer's memory it needs

The ratios are taken within each pair, and then their median: a machine that was slower for a while moves both medians,
and no ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import psutil

from benchmarks.record import ROOT, commit, machine, today

RESULTS = ROOT / "benchmarks" / "results"
Run = dict[str, Any]
"""What a worker reports, with `peak_rss_mb` of its whole process tree."""


@dataclass(frozen=True)
class Side:
    """One system with one setting."""

    name: str
    setting: str
    command: tuple[str, ...] = field(repr=False)


class Figure(NamedTuple):
    """A number of a run, and what its ratio means; a `note` has none."""

    key: str
    unit: str
    kind: Literal["time", "rate", "size", "note"]


MEMORY = Figure("peak_rss_mb", "MiB", "size")
GPU_MEMORY = Figure("gpu_mb", "MiB of GPU memory", "size")


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(figure: Figure, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Pair by pair: how many times as fast ours is (`time`, `rate`), or our share of their memory (`size`)."""
    over = [t / o if figure.kind == "time" else o / t for o, t in zip(ours, theirs, strict=True)]
    return {"kind": figure.kind, **spread(over), "pairs": over}


def compared(
    sides: Sequence[Side], runs: Sequence[Sequence[Run]], figures: Sequence[Figure]
) -> dict[str, Any]:
    """Medians and spread of all sides; ratios of the first one, ours, to each of the others."""
    there = [f for f in figures if all(run.get(f.key) is not None for mine in runs for run in mine)]
    columns = [{f.key: [run[f.key] for run in mine] for f in there} for mine in runs]
    told = [
        {
            "name": side.name,
            "setting": side.setting,
            **{f.key: spread(column[f.key]) for f in there},
            "runs": list(mine),
        }
        for side, column, mine in zip(sides, columns, runs, strict=True)
    ]
    for peer, column in zip(told[1:], columns[1:], strict=True):
        peer["ratios"] = {
            f.key: ratio(f, columns[0][f.key], column[f.key]) for f in there if f.kind != "note"
        }
    return {"figures": [list(f) for f in there], "sides": told}


class Book:
    """Where a benchmark writes: one line a comparison, or nowhere with --dirty. Opened before anything is measured."""

    def __init__(self, bench: str, args: argparse.Namespace) -> None:
        self.bench, self.sha = bench, None if args.dirty else commit()
        busy = os.getloadavg()[0]
        if busy > 0.3:
            print(
                f"this machine is busy (load {busy:.1f}): its timings will be worth little", file=sys.stderr
            )
        self.about = {
            "command": shlex.join(["python", "-m", f"benchmarks.{bench}", *sys.argv[1:]]),
            "commit": self.sha,
            "date": today(),
            **machine(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30),
            "threads": args.threads,
            "load": round(busy, 2),
        }

    def write(self, comparison: str, result: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Print what came out, and keep it."""
        line = self.keep(comparison, **result, **more)
        print(*summary(line), sep="\n", flush=True)
        return line

    def keep(self, comparison: str, **result: Any) -> dict[str, Any]:
        """Add a line to the results, unless the code is uncommitted."""
        line = {"bench": self.bench, "comparison": comparison, **result, **self.about}
        if self.sha and commit() != self.sha:
            sys.exit(f"{self.bench}: the code was changed while it was measured; nothing is kept")
        if self.sha:
            RESULTS.mkdir(exist_ok=True)
            with (RESULTS / f"{self.bench}.jsonl").open("a", encoding="utf-8") as out:
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        return line


def summary(line: dict[str, Any]) -> Iterator[str]:
    """A comparison in words."""
    figures = [Figure(*f) for f in line["figures"]]
    for side in line["sides"]:
        each = (f"{number(side[f.key]['median'])} {f.unit} ({between(side[f.key])})" for f in figures)
        yield f"{line['bench']}, {line['comparison']}: {side['name']}, {side['setting']}: {', '.join(each)}"
        for f in figures:
            if f.key in side.get("ratios", {}):
                yield f"    {f.unit}: {ratio_text(side['ratios'][f.key], side['name'])}"
    yield from line.get("notes", [])


def in_words(side: Side, run: Run, figure: Figure) -> str:
    """A run in words."""
    return f"{side.name}, {side.setting}: {number(run[figure.key])} {figure.unit}, {number(run['peak_rss_mb'])} MiB"


def number(value: float) -> str:
    """Three digits are all that such figures are good for."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def between(figure: dict[str, float]) -> str:
    return f"{number(figure['min'])} to {number(figure['max'])}"


def ratio_text(figure: dict[str, Any], peer: str) -> str:
    what = f"the memory of {peer}" if figure["kind"] == "size" else f"as fast as {peer}"
    return f"{figure['median']:.2f}× ({figure['min']:.2f} to {figure['max']:.2f}) {what}"
