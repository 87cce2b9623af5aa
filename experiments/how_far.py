"""How far to look: what λ does to the advantage estimate, and to learning.

python -m experiments.how_far             docs/results/how_far.json, .png

1. A corridor of 20 states with a prize at its right end, walked by a fixed policy whose V and Q are solved by linear
   algebra. GAE (`ops.advantages.gae`) estimates the advantage of every step of 4,000 episodes, with critics that are
   wrong in a known way: a smooth error of two sizes, and what TD(0) has learned after 20, 60 and 300 passes over ten
   episodes. For each λ: bias², variance and mean squared error of the mean of 20 estimates, averaged over the steps
   that the policy takes.
2. CartPole with the recipe of ppo-clip and only λ changed (it has 0.8): return against environment steps, three
   seeds. 15 runs of 100,000 steps; finished ones are kept in runs/results/how_far.

An offset that is the same for all actions of a state, as −error(s) is at λ = 1, cancels in the policy gradient. So
`bias2`, `mse` and `best_lambda_of_n` are of advantages less their mean over the policy's actions; `offset2` is the mean
square of what that leaves out, and `best_lambda_whole_of_n` counts it.

Left out: an error of the critic that depends on the λ it was trained with, as it does in practice.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from benchmarks.record import commit
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments import training
from experiments.result import STYLE, write
from ppolite.control.config import Control, load_control
from ppolite.ops.advantages import Steps, gae, td

Floats = NDArray[np.float64]

NAME = "how_far"
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
EPISODES, LONGEST, VISITS = 4_000, 150, 20
PASSES = (20, 60, 300)
CURVE_LAMBDAS = (0.0, 0.5, 0.9, 0.95, 1.0)
SEEDS, STEPS, EVERY = 3, 100_000, 5_000
BIAS, VARIANCE, ERROR = "#d55e00", "#0072b2", "#222222"
QUIET = "#666666"
PASS_COLOURS = ("#d55e00", "#e69f00", "#009e73")
UNIT = 1e-3
SHARED = "less what all actions of a state share"
SHADES = ("#b8b8b8", "#56b4e9", "#009e73", "#e69f00", "#cc79a7")


class Corridor(NamedTuple):
    """States 0 … size−1 in a row; action 1 goes right, 0 left, and with `slip` the other way. Left of 0 is a wall.

    The step beyond the right end earns `prize` and ends the episode; each step's reward carries normal noise.
    """

    size: int = 20
    right: float = 0.75
    """Probability that the policy chooses to go right, in every state."""
    slip: float = 0.1
    prize: float = 1.0
    noise: float = 0.02
    """Standard deviation of each step's reward."""
    gamma: float = 0.98

    @property
    def policy(self) -> Floats:
        """π(a), the same in every state."""
        return np.array([1 - self.right, self.right])


def true_values(chain: Corridor) -> tuple[Floats, Floats]:
    """V [S] and Q [S, 2] of the policy, from V = r + γ P V."""
    moves_SAS, rewards_SA = _model(chain)
    moves_SS = np.einsum("a,sak->sk", chain.policy, moves_SAS)
    v_S = np.linalg.solve(np.eye(chain.size) - chain.gamma * moves_SS, rewards_SA @ chain.policy)
    return v_S, rewards_SA + chain.gamma * moves_SAS @ v_S


class Walks(NamedTuple):
    """Episodes, one a row, [B, T]; what comes after the end is masked."""

    states_BT: NDArray[np.int64]
    next_states_BT: NDArray[np.int64]
    actions_BT: NDArray[np.int64]
    rewards_BT: Floats
    terminated_BT: NDArray[np.bool_]
    mask_BT: NDArray[np.bool_]

    def steps(self, values_S: Floats) -> Steps:
        """As the critic `values_S` sees them. A walk that is cut at LONGEST is truncated, not terminated."""
        ended_BT = self.terminated_BT.copy()
        ended_BT[:, -1] = True
        arrays = (
            self.rewards_BT, values_S[self.states_BT], values_S[self.next_states_BT],
            self.terminated_BT, ended_BT, self.mask_BT,
        )  # fmt: skip
        return Steps(*map(torch.from_numpy, arrays))


def walk(chain: Corridor, episodes: int, longest: int, rng: np.random.Generator) -> Walks:
    """Episodes of the policy that start anywhere."""
    B, T = episodes, longest
    actions_BT = (rng.random((B, T)) < chain.right).astype(np.int64)
    goes_right_BT = (actions_BT == 1) ^ (rng.random((B, T)) < chain.slip)
    states_BT, next_BT = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    state_B = rng.integers(chain.size, size=B)
    for t in range(T):
        states_BT[:, t] = state_B
        state_B = np.maximum(state_B + np.where(goes_right_BT[:, t], 1, -1), 0)
        next_BT[:, t] = state_B = np.minimum(state_B, chain.size)
        state_B = np.where(state_B == chain.size, 0, state_B)  # walks on, masked
    reached_BT = next_BT == chain.size
    mask_BT = np.cumsum(reached_BT, axis=1) - reached_BT == 0
    rewards_BT = chain.prize * reached_BT + chain.noise * rng.standard_normal((B, T))
    terminated_BT = reached_BT & mask_BT
    next_BT[reached_BT] = 0  # never read: V of a terminal state is 0
    return Walks(states_BT, next_BT, actions_BT, rewards_BT, terminated_BT, mask_BT)


def critics(chain: Corridor, rng: np.random.Generator) -> dict[str, Floats]:
    """Values that are wrong in a known way, by the root of their mean squared error."""
    v_S, _ = true_values(chain)
    few = walk(chain, 10, LONGEST, rng)
    wave_S = np.sqrt(2) * np.sin(2 * np.pi * np.arange(chain.size) / chain.size + 0.5)
    return {
        "small": v_S + 0.05 * wave_S,
        "large": v_S + 0.2 * wave_S,
        **{f"td-{passes}": learned(chain, few, passes) for passes in PASSES},
    }


def learned(chain: Corridor, seen: Walks, passes: int, rate: float = 0.5) -> Floats:
    """A critic that starts at 0 and, state by state, goes part of the way to the mean TD(0) target, `passes` times."""
    values_S = np.zeros(chain.size)
    states_M = seen.states_BT[seen.mask_BT]
    counts_S = np.bincount(states_M, minlength=chain.size)
    for _ in range(passes):
        targets_M = td(seen.steps(values_S), gamma=chain.gamma).numpy()[seen.mask_BT]
        sums_S = np.bincount(states_M, weights=targets_M, minlength=chain.size)
        values_S = values_S + rate * (sums_S - counts_S * values_S) / np.maximum(counts_S, 1)
    return values_S


def errors(chain: Corridor, seen: Walks, values_S: Floats, lam: float) -> dict[str, float]:
    """`bias2` and `offset2` (see above) and `variance` of one GAE estimate, averaged over the steps."""
    v_S, q_SA = true_values(chain)
    estimates_BT, _ = gae(seen.steps(values_S), gamma=chain.gamma, lam=lam)
    pairs_M = (2 * seen.states_BT + seen.actions_BT)[seen.mask_BT]
    found_M = estimates_BT.numpy()[seen.mask_BT]
    counts_P = np.bincount(pairs_M, minlength=2 * chain.size)
    mean_P = np.bincount(pairs_M, weights=found_M, minlength=2 * chain.size) / np.maximum(counts_P, 1)
    bias_SA = mean_P.reshape(-1, 2) - (q_SA - v_S[:, None])
    variance = float(np.mean(np.square(found_M - mean_P[pairs_M])))
    return _squares(chain, bias_SA, counts_P.reshape(-1, 2)) | {"variance": variance}


def exact_bias(chain: Corridor, values_S: Floats, lam: float) -> Floats:
    """E[Â|s,a] − A(s,a), [S, A], by linear algebra: what `errors` estimates from episodes."""
    moves_SAS, rewards_SA = _model(chain)
    v_S, q_SA = true_values(chain)
    delta_SA = rewards_SA + chain.gamma * moves_SAS @ values_S - values_S[:, None]
    moves_SS = np.einsum("a,sak->sk", chain.policy, moves_SAS)
    factor = chain.gamma * lam
    later_S = np.linalg.solve(np.eye(chain.size) - factor * moves_SS, delta_SA @ chain.policy)
    return delta_SA + factor * moves_SAS @ later_S - (q_SA - v_S[:, None])


def _squares(chain: Corridor, bias_SA: Floats, counts_SA: NDArray[np.int64]) -> dict[str, float]:
    """Mean squares, over the steps, of what differs between actions and of what does not."""
    offset_S = bias_SA @ chain.policy
    share_SA = counts_SA / counts_SA.sum()
    bias2 = float((share_SA * np.square(bias_SA - offset_S[:, None])).sum())
    return {"bias2": bias2, "offset2": float((share_SA.sum(1) * np.square(offset_S)).sum())}


def _model(chain: Corridor) -> tuple[Floats, Floats]:
    """P(s'|s,a) [S, A, S] without the way out, and the mean reward [S, A]."""
    S = chain.size
    moves_SAS, rewards_SA = np.zeros((S, 2, S)), np.zeros((S, 2))
    for s in range(S):
        for a, ahead in enumerate((-1, 1)):
            for step, p in ((ahead, 1 - chain.slip), (-ahead, chain.slip)):
                if s + step == S:
                    rewards_SA[s, a] += p * chain.prize
                else:
                    moves_SAS[s, a, max(s + step, 0)] += p
    return moves_SAS, rewards_SA


def estimates(chain: Corridor) -> dict[str, Any]:
    """Part 1: for each critic its error, and for each λ what GAE makes of it."""
    rng = np.random.default_rng(0)
    v_S, q_SA = true_values(chain)
    wrong = critics(chain, rng)
    seen = walk(chain, EPISODES, LONGEST, rng)
    counts_P = np.bincount((2 * seen.states_BT + seen.actions_BT)[seen.mask_BT], minlength=2 * chain.size)
    counts_SA = counts_P.reshape(-1, 2)
    truth = {
        "steps": int(counts_SA.sum()),
        "cut_episodes": int((~seen.terminated_BT.any(axis=1)).sum()),
        "advantage2": float((np.square(q_SA - v_S[:, None]) * counts_SA).sum() / counts_SA.sum()),
    }
    found: dict[str, Any] = {}
    for name, values_S in wrong.items():
        rows: list[dict[str, float]] = []
        for lam in LAMBDAS:
            row = {"lam": lam, **errors(chain, seen, values_S, lam)}
            row["bias2_exact"] = _squares(chain, exact_bias(chain, values_S, lam), counts_SA)["bias2"]
            row["mse"] = row["bias2"] + row["variance"] / VISITS
            rows.append(row)
        best, whole = (
            {n: _best(rows, n, parts) for n in (1, 5, VISITS, 100, 1000)}
            for parts in (("bias2",), ("bias2", "offset2"))
        )
        found[name] = {
            "critic_rmse": float(np.sqrt(np.mean(np.square(values_S - v_S)))),
            "by_lambda": rows,
            "best_lambda_of_n": best,
            "best_lambda_whole_of_n": whole,
        }
    return {"truth": truth, "critics": found}


def _best(rows: list[dict[str, float]], n: int, parts: tuple[str, ...]) -> float:
    """Of the mean of n estimates, whose squared bias is the sum of `parts`."""
    return min(rows, key=lambda row: sum(row[part] for part in parts) + row["variance"] / n)["lam"]


def wanted(options: argparse.Namespace) -> dict[str, Control]:
    """Part 2's runs."""
    return {
        f"lambda-{lam:g}/{seed}": load_control(
            "cartpole",
            algorithm="ppo-clip",
            overrides=[f"lam={lam}", f"seed={seed}", f"steps={options.steps}", "log_every=1000"],
        )
        for seed in range(options.seeds)
        for lam in CURVE_LAMBDAS
    }


def learning(made: dict[str, training.Cell]) -> dict[str, Any]:
    """Mean over the seeds of the curves, and of the mean return of whole runs (the area under a curve)."""
    out: dict[str, Any] = {}
    for lam in CURVE_LAMBDAS:
        rows = [cell["rows"] for key, cell in made.items() if key.startswith(f"lambda-{lam:g}/")]
        out[f"{lam:g}"] = training.curves(rows, EVERY)
    return out


def draw(part1: dict[str, Any], part2: dict[str, Any], seeds: int) -> Figure:
    with plt.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure, grid = plt.subplots(2, 2, figsize=(9.6, 7.0), layout="constrained")
        critics = part1["critics"]
        _parts(grid[0, 0], critics["small"], "A good critic: look near")
        _parts(grid[0, 1], critics["large"], "A critic four times as wrong: look far")
        _learning_critic(grid[1, 0], critics)
        _curves(grid[1, 1], part2, seeds)
    return figure


def _parts(axes: Axes, found: dict[str, Any], title: str) -> None:
    """Bias², variance and their sum for one critic."""
    rows = found["by_lambda"]
    lams = [row["lam"] for row in rows]
    for label, colour, values in (
        ("bias²", BIAS, [row["bias2"] for row in rows]),
        (f"variance / {VISITS}", VARIANCE, [row["variance"] / VISITS for row in rows]),
    ):
        axes.plot(lams, np.array(values) / UNIT, "o-", color=colour, label=label, markersize=3, linewidth=1.4)
    _squared_error(axes, rows, ERROR, "squared error, their sum")
    axes.set_title(f"{title}\n", loc="left", fontweight="bold")
    axes.text(
        0, 1.02, f"V off by {found['critic_rmse']:.2f}; {SHARED}", transform=axes.transAxes, color=QUIET
    )
    axes.legend(loc="center left")


def _learning_critic(axes: Axes, critics: dict[str, Any]) -> None:
    for colour, passes in zip(PASS_COLOURS, PASSES, strict=True):
        found = critics[f"td-{passes}"]
        label = f"{passes} passes (V off by {found['critic_rmse']:.2f})"
        _squared_error(axes, found["by_lambda"], colour, label)
    axes.set_title("The more a critic has learned, the nearer\n", loc="left", fontweight="bold")
    axes.text(0, 1.02, f"critics that TD(0) taught; {SHARED}", transform=axes.transAxes, color=QUIET)
    axes.legend(loc="center left")


def _squared_error(axes: Axes, rows: list[dict[str, float]], colour: str, label: str) -> None:
    """The sum, with a ring around its least."""
    mse = [row["mse"] / UNIT for row in rows]
    lams = [row["lam"] for row in rows]
    axes.plot(lams, mse, "o-", color=colour, label=label, markersize=4, linewidth=2)
    least = int(np.argmin(mse))
    axes.plot(lams[least], mse[least], "o", markersize=12, markerfacecolor="none", color=colour)
    axes.set(xlabel="λ", ylabel=f"mean of {VISITS} estimates, 10⁻³ reward²", ylim=(0, None))


def _curves(axes: Axes, part2: dict[str, Any], seeds: int) -> None:
    for colour, (lam, found) in zip(SHADES, part2.items(), strict=True):
        training.plot_curve(axes, found, colour, f"λ = {lam}")
    axes.set(xlabel="environment steps, thousands", ylabel="return of training episodes", ylim=(0, 510))
    axes.set_title("CartPole: who looks far learns sooner\n", loc="left", fontweight="bold")
    told = f"ppo-clip, mean ± standard error of {seeds} seeds"
    axes.text(0, 1.02, told, transform=axes.transAxes, color=QUIET)
    axes.legend(loc="lower right")


def main() -> None:
    parser = training.parser(__doc__ or "")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run of part 2 (default {STEPS:,})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of part 2 (default {SEEDS})")
    options = parser.parse_args()
    if not options.dirty:
        commit()
    chain = Corridor()
    part1 = estimates(chain)
    made = training.runs(NAME, wanted(options), options)
    part2 = learning(made)
    write(
        NAME,
        config={
            "corridor": chain._asdict(), "episodes": EPISODES, "longest": LONGEST, "visits": VISITS,
            "steps": options.steps, "seeds": options.seeds, "every": EVERY,
            "recipe": next(iter(made.values()))["config"] | {"lam": CURVE_LAMBDAS, "seed": [*range(options.seeds)]},
        },
        results={"estimates": part1, "curves": part2, "runs": training.origin(made)},
        figure=draw(part1, part2, options.seeds),
        dirty=options.dirty,
        packages=training.PACKAGES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
