"""Control runs that experiments are made of. Each is a cell: trained once, kept as a file, found again.

    made = runs("how_far", {"lambda-0.5/0": config, ...}, options)      options: parser(...).parse_args()
    steps, returns = curve(made["lambda-0.5/0"]["rows"], every=5_000)

A cell's file holds its config (the seed is in it), what `ppolite.control.train` logged, the commit, and `code`: a
digest of the sources that decide its numbers. An interrupted experiment goes on where it stopped. Cells that
other code made are not mixed in unawares: `--older` keeps them, and the experiment's JSON counts them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.pool import pool
from benchmarks.record import ROOT, commit, versions
from matplotlib.axes import Axes

from experiments.result import CELLS, arguments, load
from ppolite.control.config import Control, parse_control
from ppolite.control.train import train
from ppolite.obs import sinks
from ppolite.types import UserError

SOURCES = ("src/ppolite/control/*.py", "src/ppolite/ops/*.py")
"""What decides a cell's numbers, beside its config."""
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco")
KEPT = (
    "step", "episodes", "return/mean", "kl/old_step", "weights/ess", "policy/entropy", "policy/ratio_max",
    "policy/weight_max", "policy/clip_fraction", "penalty/beta", "value/explained_variance",
)  # fmt: skip
"""The metrics of a run that its cell keeps."""

Cell = dict[str, Any]
Row = dict[str, Any]
Curve = dict[str, Any]


def parser(story: str) -> argparse.ArgumentParser:
    """What every experiment takes, and --jobs, --cells, --older."""
    out = arguments(story)
    out.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread (default 1)")
    out.add_argument("--cells", type=Path, help="where finished runs are kept (default runs/results/NAME)")
    out.add_argument("--older", action="store_true", help="keep finished runs that other code made")
    return out


def runs(name: str, wanted: Mapping[str, Control], options: argparse.Namespace) -> dict[str, Cell]:
    """All cells, those that are not there yet trained in this order. Exits where other code made some of them."""
    folder: Path = options.cells or CELLS / name
    made_by = code()  # read before the first run: sources may be edited while runs last
    kept = {key: cell for key, config in wanted.items() if (cell := _read(folder, key, config))}
    other = [key for key, cell in kept.items() if cell["code"] != made_by]
    if other and not options.older:
        sys.exit(
            f"{folder}: {len(other)} of {len(kept)} finished runs were made by other code ({other[0]}, …); delete "
            "them, or keep them with --older"
        )
    missing = [key for key in wanted if key not in kept]
    made_at = None if options.dirty else commit()
    started = time.monotonic()
    print(f"{name}: {len(kept)} of {len(wanted)} runs are there", flush=True)
    trained = _train_all({key: wanted[key] for key in missing}, options.jobs)
    for done, (key, cell) in enumerate(trained, start=1):
        path = folder / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        whole = {"commit": made_at, "code": made_by, **cell}
        draft.write_text(json.dumps(whole, allow_nan=False) + "\n", encoding="utf-8")
        draft.rename(path)
        kept[key] = load(path)
        left = (time.monotonic() - started) / done * (len(missing) - done)
        print(
            f"{len(kept)}/{len(wanted)}  {key}  {cell['seconds']:.0f} s, last return {_last(cell['rows'])}; "
            f"{_clock(left)} left",
            flush=True,
        )
    return {key: kept[key] for key in wanted}


def finished(name: str, wanted: Mapping[str, Control], options: argparse.Namespace) -> dict[str, Cell]:
    """Those of the wanted cells that are there; trains nothing."""
    folder: Path = options.cells or CELLS / name
    return {key: cell for key, config in wanted.items() if (cell := _read(folder, key, config))}


def origin(made: Mapping[str, Cell]) -> dict[str, Any]:
    """Which code made the cells, for an experiment's JSON."""
    return {
        "runs": len(made),
        "by_other_code": sum(cell["code"] != code() for cell in made.values()),
        "commits": sorted({str(cell["commit"]) for cell in made.values()}),
        "versions": sorted({json.dumps(cell["versions"]) for cell in made.values()}),
        "seconds": round(sum(cell["seconds"] for cell in made.values())),
    }


def learn(config: Control) -> Cell:
    """Train, and what is to be kept of it. A run whose gradient stopped being finite counts as far as it went."""
    started = time.monotonic()
    stopped = None
    sinks.console.quiet = True  # a hundred runs would print a thousand lines
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(config, Path(folder))
        except UserError as error:
            stopped = str(error)
        rows = sinks.read_metrics(folder)
    return {
        "versions": versions(*PACKAGES),
        "config": config.model_dump(mode="json"),
        "seconds": round(time.monotonic() - started, 1),
        "stopped": stopped,
        "rows": [{key: _short(row[key]) for key in KEPT if key in row} for row in rows],
    }


def curve(rows: Sequence[Row], every: int) -> tuple[list[int], list[float | None]]:
    """Mean return of the episodes that ended in each window of `every` steps, at the window's end.

    A window in which none ended has the return of the one before, or None where there is none.
    """
    ends = list(range(every, rows[-1]["step"] + 1, every))
    returns: list[float | None] = []
    for end in ends:
        seen = [row for row in rows if end - every < row["step"] <= end and row["episodes"]]
        count = sum(row["episodes"] for row in seen)
        total = sum(row["episodes"] * row["return/mean"] for row in seen)
        returns.append(total / count if count else (returns[-1] if returns else None))
    return ends, returns


def curves(runs: Sequence[Sequence[Row]], every: int) -> Curve:
    """The runs' curves in one: mean and standard error over the runs, where all have one."""
    found = [curve(rows, every) for rows in runs]
    steps = min((ends for ends, _ in found), key=len)
    columns = zip(*(returns[: len(steps)] for _, returns in found), strict=True)
    points = [
        (step, *mean_and_error([value for value in column if value is not None]))
        for step, column in zip(steps, columns, strict=True)
        if None not in column
    ]
    return {
        "steps": [step for step, _, _ in points],
        "mean": [round(mean, 3) for _, mean, _ in points],
        "error": [round(error, 3) for _, _, error in points],
    }


def plot_curve(axes: Axes, found: Curve, colour: str, label: str, style: str = "-") -> None:
    """Mean and a band of one standard error, steps in thousands."""
    x, mean, error = np.array(found["steps"]) / 1000, np.array(found["mean"]), np.array(found["error"])
    axes.plot(x, mean, style, color=colour, label=label, linewidth=1.6)
    axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)


def last_episodes(rows: Sequence[Row], count: int) -> float:
    """Mean return of a run's last `count` episodes. A row knows its mean only, so that the oldest row counts in part.

    All episodes, where there were fewer.
    """
    total, left = 0.0, count
    for row in reversed(rows):
        if n := min(left, row["episodes"]):
            total += n * row["return/mean"]
            left -= n
    if left == count:
        raise ValueError("no episode ended in this run")
    return total / (count - left)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error: the deviation (ddof 1) over √n; 0 for one value."""
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else 0.0
    return float(array.mean()), error


@cache
def code() -> str:
    """Digest of the sources that decide a cell's numbers; comments, docstrings and layout are no part of it."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.name.encode() + _program(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:12]


def _program(source: str) -> str:
    """What a source says to the interpreter, without its strings that stand alone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # pyright: ignore[reportAttributeAccessIssue]
                line
                for line in body
                if not (
                    isinstance(line, ast.Expr)
                    and isinstance(line.value, ast.Constant)
                    and isinstance(line.value.value, str)
                )
            ]
    return ast.dump(tree)


def _train_all(configs: Mapping[str, Control], jobs: int) -> Iterator[tuple[str, Cell]]:
    if jobs == 1:
        for key, config in configs.items():
            yield key, learn(config)
        return
    with pool(jobs) as processes:
        tasks = {processes.submit(learn, config): key for key, config in configs.items()}
        for task in as_completed(tasks):
            yield tasks[task], task.result()


def _read(folder: Path, key: str, config: Control) -> Cell | None:
    """The kept cell, unless it is missing. A setting newer than it had its default.

    Exits where it has other settings: a short trial would replace what took hours.
    """
    path = folder / f"{key}.json"
    if not path.exists():
        return None
    cell = load(path)
    if parse_control(cell["config"], where=str(path)) != config:
        sys.exit(
            f"{path}: was made with other settings; delete it, or keep these runs elsewhere with --cells"
        )
    return cell


def _short(number: float | None) -> float | None:
    return number if number is None or isinstance(number, int) else float(f"{number:.6g}")


def _last(rows: Sequence[Row]) -> str:
    means = [row["return/mean"] for row in rows if row["episodes"]]
    return f"{means[-1]:.1f}" if means else "none"


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"
