"""Tokens per second of a reward model from pairs, beside RewardTrainer of TRL 1.16.0, today's.

The SFT model learns which of two film reviews that begin alike people rated higher: batches of 16 pairs, made from
people's ratings, since TRL's trainer takes pairs only. Two comparisons:

    like for like     everything trained, float32; only the head's start differs
    best against best the fastest of each system's settings, each of which is tried once first

How: `benchmarks/training.py`.

    make bench-peers ARGS=reward
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures import Book
from benchmarks.harness import BENCH
from benchmarks.inputs import SHORT, models, reward_batches
from benchmarks.training import PEERS, WARMUP, compare, parser_of


def main() -> None:
    parser = parser_of(__doc__, PEERS)
    parser.add_argument("--run", type=Path, default=BENCH, help="where the sft model is, or goes")
    args = parser.parse_args()
    book = Book("reward", args)
    models(args.run, SHORT)
    model = args.run / "sft"
    pairs, batches = reward_batches(model, args.updates + WARMUP, args.batch_size)
    data = ["reward.kind=pairs", f"reward.data.path={pairs}"]
    compare("reward", args, book, PEERS, {"model": model, "batches": batches}, data)


if __name__ == "__main__":
    main()
