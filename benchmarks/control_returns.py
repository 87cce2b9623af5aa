"""Returns on control tasks by the shipped recipes, beside stable-baselines3 with rl-zoo's settings.

Each seed trains by `recipes/control` and plays 100 episodes with the likeliest action; with --peer the other library
does the same on this machine. Finished runs stay in runs/results/control_returns and are not done again; what they say
goes into docs/results/control_returns.json, task by task, beside other seeds of the same settings that it has already.

    make bench-returns ARGS='CartPole-v1'                       # ppo-clip, seeds 0 1 2
    make bench-returns ARGS='CartPole-v1 --algorithm a2c'
    make bench-returns ARGS='Hopper-v5 --peer --jobs 2'         # and stable-baselines3, seed 0
    make bench-returns ARGS='HalfCheetah-v5 --seeds 2'          # one more
    make bench-returns ARGS='HalfCheetah-v5 --seeds --peer'     # stable-baselines3 alone
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.control import ONE_THREAD, peer, require_peer
from benchmarks.pool import pool
from benchmarks.record import ROOT, WRITTEN_HERE, commit, machine, today, versions
from ppolite.control.config import ALGORITHMS, Control, load_control, load_control_run
from ppolite.control.run import run_control
from ppolite.types import UserError

RUNS = ROOT / "runs" / "results" / "control_returns"
RESULT = ROOT / WRITTEN_HERE[1] / "control_returns.json"
MADE = "made.json"
"""Beside each finished run: its return, minutes, and where and with what it was made."""
PEERS = {"ppo-clip": "ppo", "a2c": "a2c"}
"""Our algorithms that the other library has."""


def own_run(config: Control, folder: Path, sha: str | None) -> dict[str, Any]:
    """One seed, trained and looked at."""
    started = time.perf_counter()
    result = run_control(config, folder)
    return _keep(folder, result, started, {"commit": sha, **versions("gymnasium", "mujoco")})


def peer_run(env: str, algorithm: str, seed: int, folder: Path) -> dict[str, Any]:
    """The same of stable-baselines3, whose run belongs to no commit here but to its settings and versions."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    result = peer(env, "--algorithm", algorithm, "--seed", str(seed))
    about = {f"sb3_env.{name}": version for name, version in result["versions"].items()}
    about["settings"] = result["settings"]
    return _keep(folder, result, started, about)


def _keep(folder: Path, result: dict[str, Any], started: float, about: dict[str, Any]) -> dict[str, Any]:
    made = {
        **{key: result[key] for key in ("return_mean", "return_std", "episodes", "steps")},
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "date": today(),
        **machine(),
        **about,
    }
    (folder / MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


def kept_run(config: Control, folder: Path) -> dict[str, Any]:
    """What an earlier call left. A run of other settings is refused, but for how often it was looked at."""
    before = load_control_run(folder)
    evaluation = config.evaluation
    if before.model_copy(update={"evaluation": evaluation}) != config:
        raise UserError(
            f"{folder}: holds a run of other settings than the recipe's; delete it, or move it away"
        )
    return json.loads((folder / MADE).read_text())


def lines(key: str, found: dict[str, Any]) -> Iterator[str]:
    for who in ("ours", "sb3"):
        if who in found:
            each = ", ".join(f"{run['return_mean']:.1f} (seed {s})" for s, run in found[who]["seeds"].items())
            yield f"{key}, {who}: mean {found[who]['mean']:.1f} of {each}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("env", help="as in recipes/control, CartPole-v1")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="ppo-clip")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="ours")
    parser.add_argument("--peer", action="store_true", help="stable-baselines3 as well")
    parser.add_argument("--peer-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument(
        "--dirty", action="store_true", help="uncommitted code: nothing goes into docs/results"
    )
    args = parser.parse_args()
    if not args.seeds and not args.peer:
        parser.error("--seeds names none, and without --peer nothing is left to run")
    if args.peer:
        require_peer()
        if args.algorithm not in PEERS:
            parser.error(f"--peer: stable-baselines3 has no {args.algorithm}")
    os.environ.update(ONE_THREAD)
    try:
        config = load_control(args.env, algorithm=args.algorithm)
        found = collect(config, args)
    except UserError as error:
        sys.exit(str(error))
    key = f"{config.env} {config.algorithm}"
    kept: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept[key] = joined(kept.get(key, {}), found)
    print(*lines(key, kept[key]), sep="\n")
    loose = [run for run in seeds_of(found, "ours").values() if run["commit"] is None]
    if loose:
        print(
            f"{len(loose)} of these runs were made of uncommitted code: nothing is written", file=sys.stderr
        )
    else:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")


def collect(config: Control, args: argparse.Namespace) -> dict[str, Any]:
    """All runs, the kept and the missing, by who made them. Only a missing one wants a commit."""
    place = RUNS / f"{config.env}-{config.algorithm}"
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    missing: dict[tuple[str, int], Future[dict[str, Any]]] = {}
    with pool(args.jobs) as processes:
        for seed in args.seeds:
            own, folder = config.model_copy(update={"seed": seed}), place / f"ours-{seed}"
            if (folder / MADE).exists():
                runs["ours", seed] = kept_run(own, folder)
            else:
                sha = None if args.dirty else commit()
                missing["ours", seed] = processes.submit(own_run, own, folder, sha)
        for seed in args.peer_seeds if args.peer else ():
            folder = place / f"sb3-{seed}"
            if (folder / MADE).exists():
                runs["sb3", seed] = json.loads((folder / MADE).read_text())
            else:
                missing["sb3", seed] = processes.submit(
                    peer_run, config.env, PEERS[config.algorithm], seed, folder
                )
        runs |= {job: future.result() for job, future in missing.items()}
    found: dict[str, Any] = {"config": config.model_dump(mode="json", exclude={"seed"})}
    for who in sorted({who for who, _ in runs}):
        found[who] = _with_mean({str(seed): runs[who, seed] for by, seed in sorted(runs) if by == who})
    return found


def seeds_of(found: dict[str, Any], who: str) -> dict[str, Any]:
    """Runs by seed; none of whoever did not run."""
    return found[who]["seeds"] if who in found else {}


def joined(kept: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What is found, beside the kept runs of other seeds. Those of other settings go, and that is said."""
    whole = dict(found)
    for who in ("ours", "sb3"):
        old, new = seeds_of(kept, who), seeds_of(found, who)
        if who == "ours":
            same = not old or _trained_by(kept["config"]) == _trained_by(found["config"])
        else:
            settings = [run["settings"] for run in [*old.values(), *new.values()]]
            same = all(one == settings[-1] for one in settings)
        if not same:
            if gone := sorted(old.keys() - new.keys()):
                print(f"{who}: seeds {', '.join(gone)} were of other settings, and go", file=sys.stderr)
            old = {}
        if seeds := old | new:
            whole[who] = _with_mean(dict(sorted(seeds.items(), key=lambda pair: int(pair[0]))))
    return whole


def _trained_by(config: dict[str, Any]) -> dict[str, Any]:
    """Without what a policy is only looked at by."""
    return {key: value for key, value in config.items() if key != "evaluation"}


def _with_mean(seeds: dict[str, Any]) -> dict[str, Any]:
    return {"mean": fmean(run["return_mean"] for run in seeds.values()), "seeds": seeds}


if __name__ == "__main__":
    main()
