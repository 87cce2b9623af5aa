"""An adaptive leash: does KL settle where it is told to, while the score rises?

The film critic's SFT and reward model, PPO as in recipes/film_kl.yaml: a target of 4 nats a response from the SFT
model, 36 rounds. Settled means: within 25 % of the target, averaged over the rounds from `SETTLED` on, in the rounds'
own answers and in those to held-out prompts.

    python -m experiments.leash_target        # about half an hour on one core; a finished run is kept
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
from benchmarks.record import commit
from matplotlib.figure import Figure

from experiments.film import cell, column, short
from experiments.result import STYLE, arguments, write

TARGET, BAND = 4.0, 0.25
SETTLED = 20
OVERRIDES = [
    "ppo.steps=36",
    "ppo.objective=kl",
    "ppo.penalty_target=0.04",
    "ppo.optim.schedule=constant",
    "ppo.kl.beta=0.3",
    f"ppo.kl.target={TARGET}",
    "ppo.kl.horizon=400",
    "ppo.eval_every=4",
    "ppo.max_kl=8",
]
"""What PPO has otherwise in recipes/film_kl.yaml than in recipes/film.yaml."""


def settled(made: dict[str, Any], key: str) -> float:
    """Mean of a KL from round `SETTLED` on."""
    return fmean(value for step, value in column(made, "step", key) if step >= SETTLED)


def draw(made: dict[str, Any]) -> Figure:
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
        left.axhspan(TARGET * (1 - BAND), TARGET * (1 + BAND), color="#2171b5", alpha=0.12, lw=0)
        left.axhline(TARGET, color="#b0b0b0", lw=1, ls="--")
        left.plot(
            *zip(*column(made, "step", "kl/ref_seq"), strict=True),
            color="#6baed6",
            lw=1.2,
            label="a round's answers",
        )
        held = column(made, "step", "heldout/kl_ref_seq")
        left.plot(
            *zip(*held, strict=True), color="#08306b", marker="o", ms=3.5, lw=1.5, label="held-out answers"
        )
        left.set_title(f"KL to the SFT model; band: {TARGET:g} ± {BAND:.0%}", loc="left")
        left.set_ylabel("nats a response")
        left.legend(fontsize=8, loc="lower right")
        right.plot(
            *zip(*column(made, "step", "heldout/score"), strict=True),
            color="#08306b",
            marker="o",
            ms=3.5,
            lw=1.5,
        )
        right.set_title("score of held-out answers; β of the leash dashed", loc="left")
        right.set_ylabel("score (reward model)")
        beta = right.twinx()
        beta.plot(*zip(*column(made, "step", "leash/beta"), strict=True), color="#d95f02", lw=1.2, ls="--")
        beta.set_ylabel("β", color="#d95f02")
        beta.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xlabel("round")
    return figure


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.dirty:
        commit()
    made = cell("leash_target", "target", OVERRIDES, seed=args.seed, dirty=args.dirty)
    found = {key: round(settled(made, key), 3) for key in ("kl/ref_seq", "heldout/kl_ref_seq")}
    scores = [score for _, score in column(made, "step", "heldout/score")]
    print(
        f"from round {SETTLED} on {found['kl/ref_seq']:.2f} nats, held out {found['heldout/kl_ref_seq']:.2f}; "
        f"held-out score {scores[0]:+.2f} → {scores[-1]:+.2f}"
    )
    write(
        "leash_target",
        config={"recipe": "film", "seed": args.seed, "overrides": OVERRIDES, "settled_from": SETTLED},
        results={"settled": found, "run": short(made)},
        figure=draw(made),
        dirty=args.dirty,
        packages=("vaderSentiment",),
    )


if __name__ == "__main__":
    main()
