"""Own data or old data: how much can be learned from one batch, before it is no longer one's own.

python -m experiments.own_or_old_control        docs/results/own_or_old_control.json, .png

1. CartPole: return against environment steps, for A2C, which uses each round once; is-pg, which goes through each
   round K times with weights π_θ/μ, plain or cut at 2; and ppo-clip with the same K. All but A2C have the recipe of
   ppo-clip (256 steps a round, one update a pass, Adam 1e-3), so that K is the number of updates that are made from
   one round. Ten seeds of 60,000 steps: with three, other machines, whose sums round otherwise, gave other orders.
   Finished runs are kept in runs/results/own_or_old_control.
2. A half-trained policy μ plays one round, and is-pg learns from it alone, update after update: a line of policies
   π_θ that leaves μ behind. For each of them, with other episodes of μ (of at most 200 steps):
   - KL(μ‖π_θ), exact in each state, mean over the states of μ, nats a step;
   - the effective sample size (`ops.importance`) of weights of a step, of all steps so far, and of whole episodes,
     plain and cut at 2;
   - π_θ's return as 64 episodes of μ tell it: bias, deviation and root mean square of the error over 40 such batches.
     The return is known from 1,000 episodes of π_θ itself. Beside it the error of 64 of π_θ's own episodes.
   Three such policies μ.

A low deviation far out is no comfort: the weights that would make the estimate right are so rare that no batch
holds one, and the sum of the others is nearly 0. Left out: V-trace, and self-normalised weights, which trade the
variance of plain ones for another bias.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from benchmarks.record import commit
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments import training
from experiments.result import STYLE, write
from ppolite.control.config import Control, load_control
from ppolite.control.envs import make_envs
from ppolite.control.learn import Learner
from ppolite.control.policy import Policy
from ppolite.control.process import one_thread
from ppolite.control.rounds import Player, learnable
from ppolite.control.train import train
from ppolite.obs import sinks
from ppolite.ops.importance import WeightKind, effective_sample_size, log_weights, truncated_weights

NAME = "own_or_old_control"
SEEDS, STEPS, EVERY = 10, 60_000, 4_000
MUS = 3
KS = (1, 4, 10, 40)
CAP = 2.0
MU_STEPS = 10_000
HORIZON, BATCH, BATCHES, OWN = 200, 64, 40, 1_000
UPDATES = (1, 2, 4, 7, 10, 20, 40, 100)
"""How many updates from the one round the policies of part 2 have behind them."""
KINDS: tuple[tuple[str, WeightKind, float | None], ...] = (
    ("step", "step", None),
    ("per_decision", "per_decision", None),
    ("trajectory", "trajectory", None),
    ("trajectory_cut", "trajectory", CAP),
)
COLOURS = {"step": "#0072b2", "per_decision": "#009e73", "trajectory": "#d55e00", "trajectory_cut": "#cc79a7"}
LABELS = {
    "step": "one step", "per_decision": "all steps so far", "trajectory": "whole episode",
    "trajectory_cut": f"whole episode, cut at {CAP:g}",
}  # fmt: skip
FAMILIES = {"is-pg": "plain weights", "is-pg-cut": f"weights cut at {CAP:g}", "ppo-clip": "ppo-clip"}
TITLES = {
    "is-pg": "Plain weights: too far in a round",
    "is-pg-cut": "Cut at 2: ten passes pay, not forty",
    "ppo-clip": "With the clip 40 passes pay",
}  # fmt: skip
SHADES = {1: "#56b4e9", 4: "#0072b2", 10: "#e69f00", 40: "#d55e00"}
QUIET = "#666666"


def wanted(options: argparse.Namespace) -> dict[str, Control]:
    """Part 1's runs, seed after seed."""
    out: dict[str, Control] = {}
    for seed in range(options.seeds):
        common = [f"seed={seed}", f"steps={options.steps}", "log_every=500"]
        out[f"a2c/{seed}"] = load_control("cartpole", algorithm="a2c", overrides=common)
        for k in KS:
            more = [*common, f"epochs={k}"]
            out[f"is-pg-{k}/{seed}"] = load_control("cartpole", algorithm="is-pg", overrides=more)
            if k > 1:  # the weights of a first pass are 1: nothing to cut, nothing to clip
                capped = [*more, f"max_weight={CAP}"]
                out[f"is-pg-cut-{k}/{seed}"] = load_control("cartpole", algorithm="is-pg", overrides=capped)
                out[f"ppo-clip-{k}/{seed}"] = load_control("cartpole", algorithm="ppo-clip", overrides=more)
    return out


def learning(made: dict[str, training.Cell]) -> dict[str, Any]:
    """For each algorithm: curve, mean of the curve, last episodes; how far a round led, and what it left of ESS."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(key.rsplit("/", 1)[0] for key in made):
        runs = [cell["rows"] for key, cell in made.items() if key.rsplit("/", 1)[0] == name]
        last = [training.last_episodes(rows, 50) for rows in runs]
        mean, error = training.mean_and_error(last)
        curve = training.curves(runs, EVERY)
        out[name] = {
            "curve": curve,
            "curve_mean": round(float(np.mean(curve["mean"])), 1),
            "last_50_episodes": [round(x, 1) for x in last],
            "last_mean": round(mean, 1),
            "last_error": round(error, 1),
            "ess_after_a_round": round(_over_rows(runs, "weights/ess"), 4),
            "kl_after_a_round": round(_over_rows(runs, "kl/old_step"), 5),
        }
    return out


def _over_rows(runs: list[list[training.Row]], key: str) -> float:
    return float(np.mean([row[key] for rows in runs for row in rows if row[key] is not None]))


class Episodes(NamedTuple):
    """The first episode of each environment, a row each, of at most HORIZON steps."""

    obs_BTD: Tensor
    actions_BT: Tensor
    params_BTP: Tensor
    """The distributions that the actions were drawn from."""
    mask_BT: Tensor

    @property
    def returns_B(self) -> Tensor:
        """CartPole pays 1 a step."""
        return self.mask_BT.sum(1)


def play(policy: Policy, config: Control, episodes: int, seed: int) -> Episodes:
    """Whole episodes of the policy as it samples, all begun at once, so that short ones are not favoured."""
    wide = config.model_copy(
        update={
            "rollout": HORIZON,
            "envs": config.envs.model_copy(
                update={"count": episodes, "options": {"max_episode_steps": HORIZON}}
            ),
        }
    )
    with one_thread(), closing(make_envs(wide, episodes)) as envs:
        seen = Player(envs, policy, wide, seed).play(torch.Generator().manual_seed(seed))
    obs_BTD, actions_BT = seen.obs_TND[:-1].transpose(0, 1).clone(), seen.actions_TN.T.clone()
    params_BTP = policy.agent(obs_BTD.flatten(0, 1))[0].view(*actions_BT.shape, -1)
    ended_BT = seen.ended_TN.T.to(torch.int64)
    return Episodes(obs_BTD, actions_BT, params_BTP, ended_BT.cumsum(1) - ended_BT == 0)


def trained(config: Control) -> Policy:
    sinks.console.quiet = True
    with tempfile.TemporaryDirectory() as folder:
        return train(config, Path(folder))


def leaving(seed: int) -> dict[str, Any]:
    """Part 2: is-pg learns from one round of μ, again and again."""
    recipe = ["log_every=100000", "optim.schedule=constant"]
    config = load_control(
        "cartpole", algorithm="is-pg", overrides=[f"seed={seed}", f"steps={MU_STEPS}", *recipe]
    )
    policy = trained(config)
    old = play(policy, config, BATCH * BATCHES, seed=1_000 + seed)
    with one_thread(), closing(make_envs(config, config.envs.count)) as envs:
        seen = Player(envs, policy, config, seed).play(torch.Generator().manual_seed(2_000 + seed))
        batch = learnable(seen, policy.agent, config)
        learner = Learner(policy.agent, config.model_copy(update={"epochs": 1}), seed)
        rows: list[dict[str, Any]] = []
        for update in range(1, max(UPDATES) + 1):
            learner.learn(batch, left=1.0)
            if update in UPDATES:
                own = play(policy, config, OWN, seed=3_000 + seed)
                rows.append({"updates": update, **compare(policy, old, own.returns_B.double())})
    return {"mu_return": round(float(old.returns_B.double().mean()), 2), "policies": rows}


def compare(policy: Policy, old: Episodes, own_returns_N: Tensor) -> dict[str, Any]:
    """How far π_θ is from μ, what μ's episodes are still worth, and how wrong they are about π_θ's return."""
    dist, mask_BT = policy.agent.dist, old.mask_BT
    params_MP = policy.agent(old.obs_BTD.flatten(0, 1))[0]
    mu_MP, actions_M = old.params_BTP.flatten(0, 1), old.actions_BT.flatten()
    logprobs_BT = dist.logprob(params_MP, actions_M).view_as(mask_BT).double()
    behaviour_BT = dist.logprob(mu_MP, actions_M).view_as(mask_BT).double()
    kl_BT = dist.kl(mu_MP, params_MP).view_as(mask_BT)
    truth, own_deviation = float(own_returns_N.mean()), float(own_returns_N.std())
    out: dict[str, Any] = {
        "kl_step": float(kl_BT[mask_BT].mean()),
        "kl_episode": float((kl_BT * mask_BT).sum(1).mean()),
        "return": truth,
        "own_error": own_deviation / math.sqrt(BATCH),
        "ess": {},
        "estimate": {},
        "weight_mean": {},
    }
    for name, kind, cap in KINDS:
        log_BT = log_weights(logprobs_BT, behaviour_BT, mask_BT, kind=kind)
        if cap is not None:
            log_BT = log_BT.clamp(max=math.log(cap))
        out["ess"][name] = ess_share(log_BT, mask_BT, kind)
        estimates_N = estimated_returns(log_BT, mask_BT).view(BATCHES, BATCH).mean(1)
        out["estimate"][name] = _miss(estimates_N, truth)
        first = log_BT[:, 0] if kind == "trajectory" else log_BT[mask_BT]
        out["weight_mean"][name] = float(truncated_weights(first, None).mean())
    return out


def ess_share(log_BT: Tensor, mask_BT: Tensor, kind: WeightKind) -> float:
    """Effective sample size over the number of samples: episodes for `trajectory`, else steps."""
    samples = log_BT[:, 0] if kind == "trajectory" else log_BT[mask_BT]
    return float(effective_sample_size(samples)) / samples.numel()


def estimated_returns(log_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Σ_t w_t r_t of each episode, with CartPole's reward of 1: its mean estimates the return of π_θ."""
    return (truncated_weights(log_BT, None) * mask_BT).sum(1)


def _miss(estimates_N: Tensor, truth: float) -> dict[str, float]:
    bias, deviation = float(estimates_N.mean()) - truth, float(estimates_N.std(correction=0))
    return {"bias": bias, "deviation": deviation, "rmse": math.hypot(bias, deviation)}


def draw(part1: dict[str, Any], part2: list[dict[str, Any]], seeds: int) -> Figure:
    with plt.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure = plt.figure(figsize=(11.0, 7.4), layout="constrained")
        upper, lower = (figure.add_subfigure(half) for half in figure.add_gridspec(2, 1))
        row = upper.subplots(1, 3, sharey=True)
        for axes, (family, told) in zip(row, FAMILIES.items(), strict=True):
            _curves(axes, part1, family)
            kl = part1[f"{family}-{max(KS)}"]["kl_after_a_round"]
            _title(axes, TITLES[family], f"{told}; KL of a round at K = {max(KS)}: {kl:.2g} nats a step")
        row[0].set_ylabel(f"return, mean ± standard error of {seeds} seeds")
        ess, miss = lower.subplots(1, 2)
        for found in part2:
            _line(ess, found, "ess")
            _line(miss, found, "estimate")
        _marks(ess, part2[0])
        ess.set(yscale="log", ylim=(3e-4, 1.6), ylabel="effective sample size, share")
        _title(
            ess,
            "Whole episodes wear out near a hundredth of a nat",
            "what μ's samples are worth to π_θ; a line for each μ",
        )
        own = [(p["kl_step"], p["own_error"] / p["return"]) for found in part2 for p in found["policies"]]
        miss.plot(*zip(*sorted(own), strict=True), ".", color=QUIET, label="64 episodes of its own")
        miss.set(yscale="log", ylim=(8e-3, 20), ylabel="root mean square error / return")
        _title(miss, "Old episodes are soon worse than own ones", "π_θ's return, told by 64 episodes of μ")
        for axes in (ess, miss):
            axes.set(xscale="log", xlabel="KL(μ‖π_θ), nats a step")
        ess.legend(loc="lower left")
        miss.legend(loc="upper left", ncols=2, fontsize=8)
    return figure


def _title(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, color=QUIET, fontsize=8, in_layout=False)


def _curves(axes: Axes, part1: dict[str, Any], family: str) -> None:
    training.plot_curve(axes, part1["a2c"]["curve"], "#8a8a8a", "A2C", "--")
    for k in KS:
        name = f"{family}-{k}" if k > 1 else "is-pg-1"
        training.plot_curve(axes, part1[name]["curve"], SHADES[k], f"K = {k}")
    axes.set(xlabel="environment steps, thousands", ylim=(0, 510))
    axes.legend(loc="upper left", fontsize=8, ncols=3, columnspacing=1)


def _line(axes: Axes, found: dict[str, Any], key: str) -> None:
    """One seed's policies, a line for each kind of weight; labelled once."""
    policies = found["policies"]
    new = not axes.lines
    for name, colour in COLOURS.items():
        values = [
            p["ess"][name] if key == "ess" else p["estimate"][name]["rmse"] / p["return"] for p in policies
        ]
        label = LABELS[name] if new else None
        axes.plot(
            [p["kl_step"] for p in policies],
            values,
            ".-",
            color=colour,
            label=label,
            linewidth=1.2,
            alpha=0.85,
        )


def _marks(axes: Axes, found: dict[str, Any]) -> None:
    """How many updates the first seed's policies have behind them."""
    for row in found["policies"]:
        if row["updates"] in KS:
            axes.annotate(
                f"K = {row['updates']}", (row["kl_step"], row["ess"]["step"]), (0, 5), textcoords="offset points",
                ha="center", fontsize=7, color=QUIET,
            )  # fmt: skip


def main() -> None:
    parser = training.parser(__doc__ or "")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run of part 1 (default {STEPS:,})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of part 1 (default {SEEDS})")
    parser.add_argument("--mus", type=int, default=MUS, help=f"policies μ of part 2 (default {MUS})")
    options = parser.parse_args()
    if not options.dirty:
        commit()
    made = training.runs(NAME, wanted(options), options)
    part1 = learning(made)
    part2: list[dict[str, Any]] = []
    for seed in range(options.mus):
        part2.append(leaving(seed))
        print(
            f"μ of seed {seed}: return {part2[-1]['mu_return']}, {len(UPDATES)} policies compared", flush=True
        )
    write(
        NAME,
        config={
            "steps": options.steps, "seeds": options.seeds, "every": EVERY, "passes": KS, "cap": CAP,
            "mus": options.mus, "mu_steps": MU_STEPS, "horizon": HORIZON, "batch": BATCH, "batches": BATCHES,
            "own": OWN, "recipes": {name: made[f"{name}/0"]["config"] for name in part1},
        },
        results={"learning": part1, "leaving": part2, "runs": training.origin(made)},
        figure=draw(part1, part2, options.seeds),
        dirty=options.dirty,
        packages=training.PACKAGES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
