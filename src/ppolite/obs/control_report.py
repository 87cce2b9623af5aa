"""`report.html` of a control run: what the policy earns, how it came to that, and what it looks like.

The same page as that of a language run, from `metrics.jsonl`, `eval.json`, `recipe.yaml` and `agent.gif`.

    write_control_report("runs/cartpole-ppo-clip-0")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ppolite.obs.plots import HELDOUT, TRAIN, Panel, Row, grid
from ppolite.obs.report import escaped, figure, page, section
from ppolite.obs.run_files import ControlEvaluation, read_json
from ppolite.obs.sinks import read_metrics
from ppolite.types import UserError

PANELS: list[Panel] = [
    (
        "return of an episode",
        [
            ("return/mean", "training, sampled actions", TRAIN),
            ("eval/return_mean", "likeliest action", HELDOUT),
        ],
    ),
    ("KL(π_old‖π) of a round, nats a step", [("kl/old_step", "exact", TRAIN)]),
    ("effective sample size, share of a round", [("weights/ess", "after its last update", TRAIN)]),
    ("entropy, nats a step", [("policy/entropy", "policy", TRAIN)]),
    ("explained variance of the critic", [("value/explained_variance", "before the update", TRAIN)]),
    ("clip fraction", [("policy/clip_fraction", "mean over updates", TRAIN)]),
    ("β of the KL penalty", [("penalty/beta", "after the round", TRAIN)]),
    ("largest weight π_θ/μ", [("policy/weight_max", "of all updates", TRAIN)]),
    ("gradient norm, before clipping", [("policy/grad_norm", "both nets", TRAIN)]),
]


def write_control_report(run_dir: str | Path) -> Path:
    """Write `control.png` and `report.html` into the run's folder, and return the path of the latter."""
    run = Path(run_dir)
    rows: list[Row] = [row for row in read_metrics(run) if row["stage"] == "control"]
    path, remedy = run / "eval.json", f"delete it and run `ppolite control {run}` again"
    result = read_json(path, ControlEvaluation, remedy)
    if result is None:
        raise UserError(f"{path}: there is no such file; `ppolite control {run}` makes it")
    sections = {
        "result": section(
            "result", f"{escaped(result['env'])}, {escaped(result['algorithm'])}", _table(result)
        )
    }
    if plots := grid([(panel, rows) for panel in PANELS]):
        plots.savefig(run / "control.png", dpi=150)
        caption = "Against environment steps. A point is the mean since the point before."
        sections["curves"] = section("curves", "Curves", figure(run / "control.png", caption))
    if (run / "agent.gif").exists():
        caption = "The first seconds of one episode, with the likeliest action in every state."
        sections["agent"] = section("agent", "The agent", figure(run / "agent.gif", caption))
    recipe = escaped((run / "recipe.yaml").read_text(encoding="utf-8"))
    sections["settings"] = section("settings", "Settings", f"<pre>{recipe}</pre>\n")
    path = run / "report.html"
    path.write_text(page(run.resolve().name, _facts(rows), sections), encoding="utf-8")
    return path


def _table(result: Mapping[str, Any]) -> str:
    cells = [
        ("return, mean ± deviation", f"{result['return_mean']:.2f} ± {result['return_std']:.2f}"),
        ("worst … best", f"{result['return_min']:.2f} … {result['return_max']:.2f}"),
        ("length of an episode, steps", f"{result['length_mean']:.1f}"),
    ]
    rows = "".join(f"<tr><td>{label}</td><td>{value.replace('-', '−')}</td></tr>" for label, value in cells)
    return (
        f"<p>Over {result['episodes']} episodes after {result['steps']:,} steps of training (seed "
        f"{result['seed']}), with the likeliest action and frozen statistics.</p><table>{rows}</table>"
    )


def _facts(rows: Sequence[Row]) -> str:
    speeds = [row["time/steps_per_s"] for row in rows if row.get("time/steps_per_s")]
    if not speeds:
        return "A ppolite control run without a line of metrics."
    episodes = sum(row["episodes"] for row in rows if isinstance(row.get("episodes"), int))
    return f"{rows[-1]['step']:,} steps · {episodes:,} episodes · median {median(speeds):,.0f} steps/s"
