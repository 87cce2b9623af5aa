"""docs/benchmarks.md: written from results, the latest of each comparison, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS, Figure, Side, compared
from benchmarks.page import PAGE, page

ABOUT = {
    "command": "python -m benchmarks.rlhf_step", "commit": "0123456789abcdef", "date": "2026-11-24", "cpu": "A chip",
    "gpu": None, "threads": 2, "python": "3.11.7", "cores": 2, "memory_gb": 24, "load": 0.1,
}  # fmt: skip
FIGURES = [Figure("step_s", "s a step", "time"), Figure("peak_rss_mb", "MB", "size")]


def line(comparison: str, ours: list[float], theirs: list[float], **more: Any) -> str:
    runs = [[{"step_s": s, "peak_rss_mb": mb} for s in each] for each, mb in ((ours, 1000), (theirs, 4000))]
    runs[1][0]["versions"] = {"trl": "1.12.0"}
    sides = [Side("ppolite", "film", ()), Side("TRL", "full", ())]
    row = {"bench": "rlhf_step", "comparison": comparison, **compared(sides, runs, FIGURES)}
    return json.dumps(row | ABOUT | more) + "\n"


def test_the_latest_of_each_comparison_with_where_it_comes_from(tmp_path: Path) -> None:
    tried = [
        {"name": "TRL", "setting": "lora", "step_s": 150.0, "peak_rss_mb": 2500},
        {"name": "TRL", "setting": "bf16", "ended_after_s": 600},
        {"name": "TRL", "setting": "odd", "failed": "ImportError: no kernel"},
    ]
    (tmp_path / "rlhf_step.jsonl").write_text(
        line("like", [900.0], [900.0])
        + line("best", [10.0], [100.0], tried=tried, notes=["one note"])
        + line("like", [80.0, 90.0, 85.0], [160.0, 180.0, 255.0])
    )
    text = page(tmp_path)
    assert "| like | ppolite: film | 85 (80 to 90) | 1,000 |" in text
    assert "|  | TRL: full | 180 (160 to 255) | 4,000 |" in text
    assert "| **2.00×** as fast (2.00 to 3.00) | **0.25×** of it (0.25 to 0.25) |" in text
    assert "900" not in text
    said = "lora: 150 s, 2,500 MiB; bf16: ended after 600 s; odd: failed (ImportError: no kernel)"
    assert f"best: tried once each, TRL — {said}; one note." in text
    assert (
        text.count(
            "`python -m benchmarks.rlhf_step`, commit 012345678, 2026-11-24, A chip, 2 cores, 24 GB, load 0.1 before"
        )
        == 1
    )
    assert "trl 1.12.0" in text
    assert "## generate" not in text


def test_what_was_measured_with_something_else_says_so(tmp_path: Path) -> None:
    (tmp_path / "rlhf_step.jsonl").write_text(
        line("like", [1.0], [2.0]) + line("best", [1.0], [2.0], commit="f" * 40)
    )
    text = page(tmp_path)
    assert "like: `python -m benchmarks.rlhf_step`, commit 012345678" in text
    assert "best: `python -m benchmarks.rlhf_step`, commit fffffffff" in text


def test_the_page_says_what_the_results_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(RESULTS)
