"""Environment steps per second on CartPole-v1, beside stable-baselines3 with the same settings.

PPO: 8 environments × 32 steps, one minibatch of 256, 20 epochs. A2C: 8 × 5, RMSprop. Nets 64-64 tanh, one thread each,
a fresh process each, alternating (ours, theirs, ours, …), so that a busy machine slows both. The ratio is taken within
each pair; the median of the ratios is the result. Ours is the time of the whole `train`, with environments made and
metrics written; theirs that of `learn` alone.

    make bench-control                                  # appends to benchmarks/results/control.jsonl
    make bench-control ARGS='--pairs 3 --steps 25600'
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, commit, machine, today, versions
from ppolite.control.config import load_control
from ppolite.control.train import train

ENV = "CartPole-v1"
ALGORITHMS = {"ppo": "ppo-clip", "a2c": "a2c"}
"""Theirs, ours."""
PEER = ROOT / ".venv-oracles" / "bin" / "python"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def require_peer() -> None:
    if not (ROOT / ".venv-oracles" / ".installed").exists():
        sys.exit(
            "stable-baselines3 has no environment here (.venv-oracles); make .venv-oracles/.installed brings it"
        )


def peer(env: str, *options: str) -> dict[str, Any]:
    """What one run of benchmarks/sb3.py prints."""
    command = [str(PEER), str(ROOT / "benchmarks" / "sb3.py"), env, *options]
    run = subprocess.run(command, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def own_seconds(algorithm: str, steps: int) -> float:
    config = load_control(ENV, algorithm=ALGORITHMS[algorithm], overrides=[f"steps={steps}"])
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train(config, Path(folder))
        return time.perf_counter() - started


def in_own_process(algorithm: str, steps: int) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(own_seconds, algorithm, steps).result()


def measure(algorithm: str, steps: int, pairs: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Steps per second, ours and theirs, pair by pair; and theirs' versions."""
    rates, about = [], {}
    for _ in range(pairs):
        ours = steps / in_own_process(algorithm, steps)
        about = peer(ENV, "--algorithm", algorithm, "--steps", str(steps), "--episodes", "0")
        theirs = about["steps"] / about["seconds"]
        print(f"{algorithm}: {ours:,.0f} and {theirs:,.0f} steps/s, ratio {ours / theirs:.2f}")
        rates.append([round(ours), round(theirs)])
    return rates, {key: value for key, value in about.items() if key.startswith("sb3_env.")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=51_200, help="a multiple of 1280, so that rounds are whole"
    )
    parser.add_argument("--dirty", action="store_true", help="measure uncommitted code; nothing is recorded")
    args = parser.parse_args()
    if args.steps % 1280:
        parser.error(
            f"--steps {args.steps}: expected a multiple of 1280, where rounds of 256 and of 40 steps both end"
        )
    require_peer()
    sha = None if args.dirty else commit()
    os.environ.update(ONE_THREAD)
    for algorithm in ALGORITHMS:
        rates, about = measure(algorithm, args.steps, args.pairs)
        ratios = [ours / theirs for ours, theirs in rates]
        ours, theirs = (statistics.median(side) for side in zip(*rates, strict=True))
        result = {
            "bench": "control",
            "env": ENV,
            "algorithm": algorithm,
            "steps": args.steps,
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "steps_per_s_median": ours,
            "sb3_steps_per_s_median": theirs,
            "pairs": rates,
            "commit": sha,
            "date": today(),
            **machine(),
            "threads": 1,
            **versions("gymnasium"),
            **about,
        }
        print(
            f"{algorithm}: median {ours:,.0f} and {theirs:,.0f} steps/s, ratio {result['ratio_median']:.2f} "
            f"({result['ratio_min']:.2f} to {result['ratio_max']:.2f})"
        )
        if sha:
            path = ROOT / "benchmarks" / "results" / "control.jsonl"
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
