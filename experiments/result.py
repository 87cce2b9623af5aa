"""What an experiment leaves: docs/results/NAME.json (how it was made, and every number) and NAME.png (the figure).

python -m experiments.NAME              # run what is missing in runs/results/NAME, write both
python -m experiments.NAME --dirty      # uncommitted code: print and write nothing into docs/
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from benchmarks.record import ROOT, commit, machine, today, versions
from matplotlib.figure import Figure

RESULTS = ROOT / "docs" / "results"
CELLS = ROOT / "runs" / "results"
"""Finished parts of experiments, so that an interrupted one goes on."""

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "font.size": 9,
}


def arguments(story: str) -> argparse.ArgumentParser:
    """A parser with what every experiment takes: --dirty."""
    parser = argparse.ArgumentParser(description=story, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dirty", action="store_true", help="uncommitted code: nothing goes into docs/results"
    )
    return parser


def write(
    name: str,
    *,
    config: dict[str, Any],
    results: Any,
    figure: Figure,
    dirty: bool,
    packages: tuple[str, ...] = (),
) -> None:
    """NAME.json and NAME.png in docs/results; with `dirty` the numbers are printed and the figure goes to runs/."""
    made = {
        "experiment": name,
        "command": " ".join(["python", "-m", f"experiments.{name}", *sys.argv[1:]]),
        "commit": None if dirty else commit(),
        "date": today(),
        **machine(),
        **versions(*packages),
        "config": config,
        "results": results,
    }
    text = json.dumps(made, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    folder = CELLS if dirty else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    figure.savefig(folder / f"{name}.png")
    plt.close(figure)
    print(f"{folder / name}.json, .png")


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
