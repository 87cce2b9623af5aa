"""The curves of a run as PNG files, from the rows of `metrics.jsonl` and from `eval.json`.

One picture a question: did the stages before PPO learn, how did PPO go, what did the gain cost in KL, do the
reward model's numbers mean what they say. Colours hold throughout: blue is held-out, grey is training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Row = Mapping[str, Any]

TRAIN, HELDOUT, GUIDE = "#8a8f98", "#1f6feb", "#c9ccd1"

# title, then (metric, label, colour) for each line
Panel = tuple[str, list[tuple[str, str, str]]]

PPO_PANELS: list[Panel] = [
    (
        "score (reward model, the proxy)",
        [("score/mean", "train", TRAIN), ("heldout/score", "held-out", HELDOUT)],
    ),
    (
        "KL to the reference, nats a sequence",
        [("kl/ref_seq", "train", TRAIN), ("heldout/kl_ref_seq", "held-out", HELDOUT)],
    ),
    ("judge", [("heldout/judge", "held-out", HELDOUT)]),
    ("clip fraction", [("policy/clip_fraction", "train", TRAIN)]),
    ("entropy, nats a token", [("policy/entropy", "train", TRAIN)]),
    ("length, tokens", [("length/mean", "train", TRAIN), ("heldout/length", "held-out", HELDOUT)]),
    ("explained variance of the critic", [("value/explained_variance", "train", TRAIN)]),
    (
        "effective sample size, share of the samples",
        [
            ("ess/share", "π against μ, before the step", TRAIN),
            ("ess/update", "in its updates", "#7a7a7a"),
            ("ess/worn", "worn out", "#d9730d"),
        ],
    ),
    ("KL(μ‖π), nats a token", [("kl/behaviour_token", "train", TRAIN)]),
]
EARLIER_PANELS: dict[str, list[Panel]] = {
    "sft": [
        ("SFT: loss, nats a token", [("loss/train", "train", TRAIN), ("loss/heldout", "held-out", HELDOUT)])
    ],
    "reward": [
        ("reward model: loss", [("loss/train", "train", TRAIN)]),
        (
            "reward model: agreement",
            [
                ("heldout/spearman", "Spearman, held-out", HELDOUT),
                ("heldout/pair_accuracy", "pair accuracy, held-out", "#d9730d"),
            ],
        ),
    ],
}


def write_plots(rows: Sequence[Row], calibration: Sequence[Sequence[float]], folder: Path) -> dict[str, Path]:
    """PNGs of what there is to show, by name: `stages`, `ppo`, `reward_vs_kl`, `rm_calibration`."""
    by_stage = {stage: [r for r in rows if r["stage"] == stage] for stage in ("sft", "reward", "ppo")}
    early = [(panel, by_stage[stage]) for stage, panels in EARLIER_PANELS.items() for panel in panels]
    ppo = [(panel, by_stage["ppo"]) for panel in PPO_PANELS]
    figures = {
        "stages": grid(early),
        "ppo": grid(ppo),
        "reward_vs_kl": _reward_vs_kl(by_stage["ppo"]),
        "rm_calibration": _calibration(calibration),
    }
    written: dict[str, Path] = {}
    for name, figure in figures.items():
        if figure:
            written[name] = folder / f"{name}.png"
            figure.savefig(written[name], dpi=150)
    return written


def points(rows: Iterable[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """Both coordinates of the rows that have both."""
    pairs = [
        (_drawable(r[x]), _drawable(r[y])) for r in rows if r.get(x) is not None and r.get(y) is not None
    ]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def _drawable(value: float) -> float:
    """Within what matplotlib finds ticks for: at 1e308 it fails with "arange: cannot compute length"."""
    return 0.0 if abs(value) < 1e-100 else max(-1e100, min(value, 1e100))


def grid(panels: Sequence[tuple[Panel, list[Row]]]) -> Figure | None:
    """One small plot a panel, three in a row; panels without a point are left out."""
    filled = [
        (title, lines, rows)
        for (title, lines), rows in panels
        if any(points(rows, "step", key)[0] for key, _, _ in lines)
    ]
    if not filled:
        return None
    columns = min(3, len(filled))
    height = -(-len(filled) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * height), layout="constrained")
    for place, (title, lines, rows) in enumerate(filled, 1):
        axes = figure.add_subplot(height, columns, place)
        for key, label, colour in lines:
            xs, ys = points(rows, "step", key)
            if xs:
                sparse = len(xs) <= 12
                axes.plot(xs, ys, color=colour, label=label, lw=1.6, marker="o" if sparse else None, ms=3)
        axes.set_title(title, fontsize=9.5, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _plain_frame(axes)
        axes.legend(fontsize=7.5, frameon=False)
    return figure


def _reward_vs_kl(rows: list[Row]) -> Figure | None:
    """The price of the score: how far the policy went from the reference for it."""
    train = points(rows, "kl/ref_seq", "score/mean")
    held = [r for r in rows if r.get("heldout/score") is not None and r.get("heldout/kl_ref_seq") is not None]
    if not train[0] and not held:
        return None
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(*train, s=14, color=TRAIN, alpha=0.6, label="training rollouts, one point a step", lw=0)
    if held:
        xs, ys = points(held, "heldout/kl_ref_seq", "heldout/score")
        axes.plot(xs, ys, color=HELDOUT, marker="o", ms=4, lw=1.4, label="held-out prompts, with the step")
        for row, x, y in zip(held, xs, ys, strict=True):
            axes.annotate(
                str(row["step"]),
                (x, y),
                fontsize=7,
                xytext=(4, -9),
                textcoords="offset points",
                color=HELDOUT,
            )
    axes.set_xlabel("KL to the reference, nats a sequence", fontsize=9)
    axes.set_ylabel("score (reward model, the proxy)", fontsize=9)
    _plain_frame(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _calibration(bins: Sequence[Sequence[float]]) -> Figure | None:
    if not bins:
        return None
    pred, target = ([_drawable(b[i]) for b in bins] for i in (0, 1))
    count = [b[2] for b in bins]
    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    ends = [min(*pred, *target), max(*pred, *target)]
    axes.plot(ends, ends, color=GUIDE, lw=1, label="perfect")
    axes.plot(pred, target, color=HELDOUT, lw=1.2)
    axes.scatter(
        pred, target, s=[12 + 60 * n / max(count) for n in count], color=HELDOUT, label="held-out, by tenths"
    )
    axes.set_xlabel("score that the reward model predicts", fontsize=9)
    axes.set_ylabel("score that people gave", fontsize=9)
    _plain_frame(axes)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _plain_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eceef0", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
