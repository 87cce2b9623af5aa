"""Environment steps per second on CartPole-v1, beside stable-baselines3 with the same settings.

PPO: 8 environments × 32 steps, one minibatch of 256, 20 epochs. A2C: 8 × 5, RMSprop. Nets 64-64 tanh, one thread each.
Ours is the time of the whole `train`, with environments made and metrics written; theirs that of `learn` alone.

    make bench-control                                  # appends to benchmarks/results/control.jsonl
    make bench-control ARGS='--pairs 3 --steps 25600'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.figures import MEMORY, Book, Figure, Side, compared
from benchmarks.harness import OURS, arguments, in_turn, worker
from benchmarks.record import ROOT

ENV = "CartPole-v1"
ALGORITHMS = {"ppo": "ppo-clip", "a2c": "a2c"}
"""Theirs, ours."""
PEER = ROOT / ".venv-oracles" / "bin" / "python"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
RATE = Figure("steps_per_s", "steps/s", "rate")


def require_peer() -> None:
    if not (ROOT / ".venv-oracles" / ".installed").exists():
        sys.exit(
            "stable-baselines3 has no environment here (.venv-oracles); make .venv-oracles/.installed brings it"
        )


def peer_command(env: str, *options: str) -> tuple[str, ...]:
    return (str(PEER), str(ROOT / "benchmarks" / "sb3.py"), env, *options)


def peer(env: str, *options: str) -> dict[str, Any]:
    """What one run of benchmarks/sb3.py prints. Ends the program where that fails, having said why."""
    run = subprocess.run(
        peer_command(env, *options), env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True
    )
    if run.returncode:
        sys.exit("stable-baselines3 did not come to a result; what it said is above")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument(
        "--steps", type=int, default=51_200, help="a multiple of 1280, so that rounds are whole"
    )
    args = parser.parse_args()
    if args.steps % 1280:
        parser.error(
            f"--steps {args.steps}: expected a multiple of 1280, where rounds of 256 and of 40 steps both end"
        )
    require_peer()
    book = Book("control", args)
    for theirs, ours in ALGORITHMS.items():
        options = ("--algorithm", theirs, "--steps", str(args.steps), "--episodes", "0")
        sides = [
            Side("ppolite", ours, worker(OURS, "control_ours", env=ENV, algorithm=ours, steps=args.steps)),
            Side("stable-baselines3", theirs, peer_command(ENV, *options)),
        ]
        book.write(f"{ENV} {theirs}", compared(sides, in_turn(sides, RATE, args), (RATE, MEMORY)))


if __name__ == "__main__":
    main()
