"""Own data or old data, in language: score against the number of answers drawn, and what old answers are worth.

The film critic by recipes/film.yaml, four ways to use an answer:

    a2c      learned from once, while fresh
    ppo      learned from in four passes, while fresh: PPO-clip
    stale    the same, two rounds later, with weights π_old/μ
    old      512 answers of the SFT model, drawn once, learned from in small steps, pass after pass, with weights
             π/μ, until the effective sample size of a round falls below the floor; nothing new is drawn

The second panel is of `old`: the effective sample size against the distance that the policy has gone from the SFT
model, which is μ.

    python -m experiments.own_or_old_language          # about 30 minutes on one core; finished cells are kept
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from benchmarks.record import commit
from matplotlib.figure import Figure

from experiments.film import cell, column, short
from experiments.result import STYLE, arguments, write

CONDITIONS = {
    "a2c": ["ppo.objective=a2c", "ppo.epochs=1", "ppo.minibatches=1"],
    "ppo": [],
    "stale": ["ppo.behaviour=stale", "ppo.stale_steps=2"],
    "old": [
        "ppo.objective=is",
        "ppo.behaviour=sft",
        "ppo.sft_samples=512",
        "ppo.epochs=1",
        "ppo.steps=80",
        "ppo.eval_every=8",
        "ppo.optim.lr=3e-5",
        "ppo.optim.schedule=constant",
        "ppo.weight_cap=5",
        "ppo.ess_floor=0.5",
    ],
}
LABELS = {
    "a2c": "A2C: fresh, once",
    "ppo": "PPO-clip: fresh, four passes",
    "stale": "PPO-clip: two rounds old, weighted",
    "old": "weighted gradient: 512 answers of the SFT model",
}
COLOURS = {"a2c": "#7a7a7a", "ppo": "#2171b5", "stale": "#6baed6", "old": "#d95f02"}


def drawn(made: dict[str, Any]) -> list[tuple[float, float]]:
    """Answers drawn so far and held-out score, from the untrained policy on."""
    looks = [(x, y) for x, y in column(made, "samples/drawn", "heldout/score")]
    before = (
        looks[0][0] if "ppo.behaviour=sft" in made["overrides"] else 0.0
    )  # all it has is drawn at the start
    start = [(before, row["heldout/score"]) for row in made["steps"] if row["step"] == 0]
    return start + looks


def draw(cells: dict[str, dict[str, Any]]) -> Figure:
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.9), layout="constrained")
        for name, made in cells.items():
            left.plot(
                *zip(*drawn(made), strict=True),
                color=COLOURS[name],
                marker="o",
                ms=3.5,
                lw=1.5,
                label=LABELS[name],
            )
        left.set_title("old answers teach, and then are worn out", loc="left")
        left.set_xlabel("answers drawn")
        left.set_ylabel("held-out score (reward model)")
        left.legend(fontsize=8, loc="upper left")
        left.set_ylim(top=3.9)
        if "old" in cells:
            points = column(cells["old"], "kl/behaviour_token", "ess/share")
            right.plot(*zip(*points, strict=True), color=COLOURS["old"], marker="o", ms=3.5, lw=1.2)
            right.axhline(0.5, color="#b0b0b0", lw=1, ls="--")
            right.annotate("floor: here the run stops", (0, 0.51), fontsize=8)
        right.set_ylim(0, 1.03)
        right.set_title("what the SFT model's answers are worth", loc="left")
        right.set_xlabel("KL(μ‖π), nats a token")
        right.set_ylabel("effective sample size, share of a round")
    return figure


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.dirty:
        commit()
    cells = {
        name: cell("own_or_old_language", name, overrides, seed=args.seed, dirty=args.dirty)
        for name, overrides in CONDITIONS.items()
    }
    for name, made in cells.items():
        points = drawn(made)
        last = max(points, key=lambda point: point[1])
        print(f"{LABELS[name]:48} best {last[1]:+.2f} after {last[0]:.0f} answers; {made['result']}")
    write(
        "own_or_old_language",
        config={"recipe": "film", "seed": args.seed, "conditions": CONDITIONS},
        results={name: short(made) for name, made in cells.items()},
        figure=draw(cells),
        dirty=args.dirty,
    )


if __name__ == "__main__":
    main()
