"""The leash in language: what the film critic gains, and how far it goes for it, under clip, leash, both, neither.

Six policies learn from the same SFT model and the same reward model with the settings of recipes/film.yaml:

    clip, β = 0 .02 .05 .1     PPO-clip with a leash of growing firmness; β = 0 is the clip alone
    no clip, β = .05           the weighted policy gradient on the same rounds and epochs: the leash alone
    no clip, β = 0             neither

The reward model's score is what they climb; VADER has no part in training. Both are measured on held-out prompts
during the run, and on 200 others at its end, with samples of the text. `max_kl` is out of the way, so that the policy
that is kept is the best-scoring one, wherever it has gone.

    python -m experiments.leash               # about 8 minutes a cell on one core; finished cells are kept
    python -m experiments.leash --only clip-0 free-0
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from benchmarks.record import commit
from matplotlib.figure import Figure

from experiments.film import cell, column, short
from experiments.result import STYLE, arguments, write

FREE = ["ppo.max_kl=1000"]
CLIPPED = {f"clip-{beta}": [f"ppo.kl.beta={beta}"] for beta in ("0", "0.02", "0.05", "0.1")}
PLAIN = {f"free-{beta}": ["ppo.objective=is", f"ppo.kl.beta={beta}"] for beta in ("0", "0.05")}
CONDITIONS = CLIPPED | PLAIN

COLOURS = {"clip": ["#c6dbef", "#6baed6", "#2171b5", "#08306b"], "free": ["#d95f02", "#a63603"]}


def label(name: str) -> str:
    kind, beta = name.split("-")
    if name == "free-0":
        return "neither clip nor leash"
    if kind == "free":
        return f"leash alone, β = {beta}"
    return "clip alone, β = 0" if beta == "0" else f"clip and leash, β = {beta}"


def draw(cells: dict[str, dict[str, Any]]) -> Figure:
    """Score and judge against KL, on held-out prompts, one line a condition, a point every two rounds."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.9), layout="constrained", sharex=True)
        for axes, key, title in (
            (left, "heldout/score", "score of the reward model, which is climbed"),
            (right, "heldout/judge", "VADER, which is not"),
        ):
            for name in CONDITIONS:
                if name not in cells:
                    continue
                kind = name.split("-")[0]
                place = [n for n in CONDITIONS if n.startswith(kind)].index(name)
                points = column(cells[name], "heldout/kl_ref_seq", key)
                axes.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[kind][place],
                    marker="o" if kind == "clip" else "s",
                    ms=3.5,
                    lw=1.5,
                    label=label(name),
                )
            axes.set_title(title, loc="left")
            axes.set_xlabel("KL to the SFT model, nats a sequence (log scale above 1)")
            axes.set_xscale("symlog", linthresh=1)
        left.legend(fontsize=8)
        left.set_ylabel("mean over 64 held-out prompts")
    return figure


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    args = parser.parse_args()
    if not args.dirty:
        commit()
    cells = {
        name: cell("leash", name, [*FREE, *CONDITIONS[name]], seed=args.seed, dirty=args.dirty)
        for name in args.only
    }
    for name, made in cells.items():
        told = made["eval"]
        print(
            f"{label(name):28} score {told['score_before']:+.2f} → {told['score_after']:+.2f}   "
            f"judge {told['judge_before']:+.3f} → {told['judge_after']:+.3f}   {told['kl_ref_seq']:6.2f} nats   "
            f"distinct-2 {told['distinct2_after']:.3f}   length {told['length_after']:.1f}"
        )
    if list(cells) != list(CONDITIONS):
        print("with --only nothing goes into docs/results: it would be a part in the place of the whole")
        return
    write(
        "leash",
        config={
            "recipe": "film",
            "seed": args.seed,
            "conditions": {n: [*FREE, *CONDITIONS[n]] for n in cells},
        },
        results={name: short(made) for name, made in cells.items()},
        figure=draw(cells),
        dirty=args.dirty,
        packages=("vaderSentiment",),
    )


if __name__ == "__main__":
    main()
