"""Not too far: the comparison of the PPO paper (Schulman et al. 2017, arXiv 1707.06347, §6.1, table 1).

python -m experiments.not_too_far                      docs/results/not_too_far.json, .png; 105 runs, hours
python -m experiments.not_too_far --steps 1000000      the paper's length
python -m experiments.not_too_far --seeds 1            a complete comparison on one seed; --seeds 3 goes on from it
python -m experiments.not_too_far --look --dirty       while it runs: the seeds that are complete, training nothing

Seven MuJoCo tasks, five algorithms, three seeds. What differs between the algorithms is the loss:

    none          is-pg without a cap, whose gradient w A ∇log π is that of the paper's L^CPI
    clip          ppo-clip, ε = 0.2
    adaptive KL   ppo-kl, d_targ = 0.01
    fixed KL      ppo-kl, β = 1
    A2C           RMSprop, 4 environments × 8 steps, λ 0.9, one update a round; not in the paper's table

Settings of the paper: one environment, 2,048 steps a round, 10 epochs of minibatches of 64, Adam 3e-4, γ .99, λ .95,
separate 64-64 tanh nets, a log-deviation that does not depend on the state, no entropy bonus. From OpenAI
Baselines, not from the paper: observations and rewards in running units, lr linear to 0, gradients cut at norm 0.5,
advantages normalised in each minibatch.

The score of a run is the mean return of its last 100 episodes of training, on a scale on which a policy of
uniformly random actions has 0 and the best of the task's runs 1; scores are averaged over all runs. Differences
from the paper: 200,000 steps where it has a million (of a task with episodes of 1,000 steps the last 100 are half
the run); Gymnasium's v5 tasks; actions are cut to their box before the environment sees them, so that a policy
cannot be charged for torques that the robot never felt, which is what makes the paper's −0.39 so low.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
from benchmarks.record import commit
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import training
from experiments.result import STYLE, write
from ppolite.control.config import Control, parse_control

NAME = "not_too_far"
TASKS = (
    "HalfCheetah-v5", "Hopper-v5", "InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Reacher-v5", "Swimmer-v5",
    "Walker2d-v5",
)  # fmt: skip
PAPER: dict[str, float | None] = {
    "none": -0.39,
    "clip": 0.82,
    "adaptive KL": 0.74,
    "fixed KL": 0.71,
    "A2C": None,
}
"""Table 1: no clipping or penalty; ε = 0.2; d_targ = 0.01; β = 1."""
LOSSES: dict[str, dict[str, Any]] = {
    "none": {"algorithm": "is-pg"},
    "clip": {"algorithm": "ppo-clip", "clip": 0.2},
    "adaptive KL": {"algorithm": "ppo-kl", "beta": 1.0, "kl_target": 0.01},
    "fixed KL": {"algorithm": "ppo-kl", "beta": 1.0, "kl_target": None},
}
SEEDS, STEPS, EVERY = 3, 200_000, 10_000
EPISODES = 100
COLOURS = {
    "clip": "#0072b2", "adaptive KL": "#009e73", "fixed KL": "#e69f00", "none": "#d55e00", "A2C": "#7f7f7f",
}  # fmt: skip
QUIET = "#666666"

Scores = dict[str, dict[str, list[float]]]
"""Task → algorithm → a number for each seed."""


def config_of(task: str, algorithm: str, seed: int, steps: int) -> Control:
    units = {"normalise_obs": True, "normalise_reward": True}
    common = {"env": task, "seed": seed, "steps": steps, "log_every": 2048}
    if algorithm == "A2C":
        own = {"algorithm": "a2c", "envs": {"count": 4, **units}, "rollout": 8, "lam": 0.9}
        return parse_control(common | own)
    paper = {
        "envs": {"count": 1, **units}, "net": {"hidden": [64, 64], "activation": "tanh"}, "rollout": 2048,
        "epochs": 10, "minibatches": 32, "gamma": 0.99, "lam": 0.95, "optim": {"kind": "adam", "lr": 3e-4},
    }  # fmt: skip
    return parse_control(common | paper | LOSSES[algorithm])


def wanted(seeds: int, steps: int) -> dict[str, Control]:
    """All runs of a seed before those of the next, so that what is there early is a whole comparison."""
    return {
        key_of(steps, task, algorithm, seed): config_of(task, algorithm, seed, steps)
        for seed in range(seeds)
        for task in TASKS
        for algorithm in PAPER
    }


def key_of(steps: int, task: str, algorithm: str, seed: int) -> str:
    return f"{steps}/{task}/{algorithm.lower().replace(' ', '-')}-{seed}"


def random_return(task: str, episodes: int = EPISODES) -> float:
    """Mean return of episodes of uniformly random actions."""
    total = 0.0
    with closing(gym.make(task)) as env:
        env.action_space.seed(0)
        for episode in range(episodes):
            env.reset(seed=episode)
            over = False
            while not over:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                total += float(reward)
                over = terminated or truncated
    return total / episodes


def normalised(returns: Scores, floors: dict[str, float]) -> Scores:
    """(return − random) / (best − random), best being the task's best run, whichever algorithm made it."""
    out: Scores = {}
    for task, by_algorithm in returns.items():
        floor = floors[task]
        span = max(max(values) for values in by_algorithm.values()) - floor
        if span <= 0:
            raise ValueError(f"{task}: no run is better than random actions, so that there is no scale")
        out[task] = {name: [(x - floor) / span for x in values] for name, values in by_algorithm.items()}
    return out


def summary(scores: Scores) -> dict[str, dict[str, Any]]:
    """For each algorithm the mean over all runs with its standard error, beside the paper's number."""
    out: dict[str, dict[str, Any]] = {}
    for algorithm, paper in PAPER.items():
        values = [x for by_algorithm in scores.values() for x in by_algorithm[algorithm]]
        mean, error = training.mean_and_error(values)
        without = [x for task in TASKS[1:] for x in scores[task][algorithm]]
        out[algorithm] = {
            "score": round(mean, 3),
            "error": round(error, 3),
            "runs": len(values),
            "without_half_cheetah": round(training.mean_and_error(without)[0], 3),
            "paper": paper,
        }
    return out


def results(made: dict[str, training.Cell], seeds: int, steps: int) -> dict[str, Any]:
    def cells(task: str, algorithm: str) -> list[training.Cell]:
        return [made[key_of(steps, task, algorithm, seed)] for seed in range(seeds)]

    floors = {task: random_return(task) for task in TASKS}
    returns = {
        task: {
            name: [training.last_episodes(cell["rows"], EPISODES) for cell in cells(task, name)]
            for name in PAPER
        }
        for task in TASKS
    }
    scores = normalised(returns, floors)
    return {
        "table": summary(scores),
        "random": {task: round(floor, 2) for task, floor in floors.items()},
        "returns": {t: {a: [round(x, 2) for x in xs] for a, xs in by.items()} for t, by in returns.items()},
        "scores": {t: {a: [round(x, 3) for x in xs] for a, xs in by.items()} for t, by in scores.items()},
        "kl_of_a_round": {t: {a: round(_usual_kl(cells(t, a)), 4) for a in PAPER} for t in TASKS},
        "stopped": {key: cell["stopped"] for key, cell in made.items() if cell["stopped"]},
        "curves": {t: {a: _curve(cells(t, a)) for a in PAPER} for t in TASKS},
        "runs": training.origin(made),
    }


def _usual_kl(cells: list[training.Cell]) -> float:
    """KL(π_old‖π_θ) after a round, nats a step: the median over the rounds, the mean over the seeds."""
    kls = [[row["kl/old_step"] for row in cell["rows"] if row["kl/old_step"] is not None] for cell in cells]
    return float(np.mean([np.median(of_a_run) for of_a_run in kls]))


def _curve(cells: list[training.Cell]) -> training.Curve:
    return training.curves([cell["rows"] for cell in cells], EVERY)


def draw(found: dict[str, Any], seeds: int, steps: int) -> Figure:
    with plt.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure = plt.figure(figsize=(12.0, 6.4), layout="constrained")
        grid = figure.add_gridspec(2, 5, width_ratios=(1.5, 1, 1, 1, 1))
        _bars(figure.add_subplot(grid[:, 0]), found["table"], seeds, steps)
        for place, task in enumerate(TASKS):
            axes = figure.add_subplot(grid[place // 4, 1 + place % 4])
            for algorithm, colour in COLOURS.items():
                training.plot_curve(axes, found["curves"][task][algorithm], colour, algorithm)
            axes.axhline(found["random"][task], color=QUIET, linewidth=0.8, linestyle=":")
            axes.set_title(task, loc="left", fontsize=9)
            axes.ticklabel_format(axis="y", scilimits=(-3, 4))
            if place >= 3:
                axes.set_xlabel("thousand steps")
        legend = figure.add_subplot(grid[1, 4])
        legend.axis("off")
        for algorithm, colour in COLOURS.items():
            legend.plot([], [], color=colour, label=algorithm, linewidth=2)
        legend.plot([], [], color=QUIET, linestyle=":", label="random actions")
        legend.legend(loc="center", title="return of training episodes")
    return figure


def _bars(axes: Axes, table: dict[str, dict[str, Any]], seeds: int, steps: int) -> None:
    names = list(COLOURS)[::-1]
    for y, name in enumerate(names):
        row = table[name]
        axes.barh(y + 0.18, row["score"], 0.42, xerr=row["error"], color=COLOURS[name], ecolor="#222222")
        if row["paper"] is not None:
            axes.barh(y - 0.24, row["paper"], 0.26, color="#d0d0d0")
            side = "right" if row["paper"] < 0 else "left"
            axes.text(
                row["paper"],
                y - 0.24,
                f" {row['paper']:.2f} ",
                va="center",
                ha=side,
                fontsize=7.5,
                color=QUIET,
            )
        axes.text(max(row["score"], 0) + row["error"] + 0.03, y + 0.18, f"{row['score']:.2f}", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.margins(x=0.14)
    axes.set_xlabel(
        "mean score ± standard error\n(0 random, 1 best run; grey: the paper, 1M steps)", fontsize=8
    )
    axes.set_title(
        f"{len(TASKS)} tasks × {seeds} seed{'s' * (seeds > 1)}, {steps // 1000}k steps", loc="left"
    )
    axes.grid(visible=False, axis="y")


def main() -> None:
    parser = training.parser(__doc__ or "")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default {STEPS:,})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default {SEEDS}")
    parser.add_argument(
        "--look", action="store_true", help="train nothing; sum up the seeds that are complete"
    )
    options = parser.parse_args()
    if not options.dirty:
        commit()
    seeds = options.seeds
    if options.look:
        seeds = complete(options)
    made = training.runs(NAME, wanted(seeds, options.steps), options)
    found = results(made, seeds, options.steps)
    for name, row in found["table"].items():
        print(f"{name:12} {row['score']:6.2f} ± {row['error']:.2f}   paper {row['paper']}")
    write(
        NAME,
        config={
            "tasks": TASKS, "seeds": seeds, "steps": options.steps, "episodes": EPISODES,
            "recipes": {name: config_of(TASKS[0], name, 0, options.steps).model_dump(mode="json") for name in PAPER},
        },
        results=found,
        figure=draw(found, seeds, options.steps),
        dirty=options.dirty,
        packages=training.PACKAGES,
    )  # fmt: skip


def complete(options: argparse.Namespace) -> int:
    """How many seeds, from the first on, have all their runs."""
    there = training.finished(NAME, wanted(options.seeds, options.steps), options)
    seeds = 0
    while seeds < options.seeds and wanted(seeds + 1, options.steps).keys() <= there.keys():
        seeds += 1
    if seeds == 0:
        raise SystemExit(
            f"{len(there)} of the {len(TASKS) * len(PAPER)} runs of the first seed are there; later"
        )
    return seeds


if __name__ == "__main__":
    main()
