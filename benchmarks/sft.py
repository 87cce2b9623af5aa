"""Tokens per second of supervised fine-tuning, beside SFTTrainer of TRL 1.16.0, today's.

The embedded 135M model on people's endings of film reviews, batches of 16, loss on the answers alone. Two comparisons:

    like for like     everything trained, float32; the losses of both are the same to rounding, and are recorded
    best against best the fastest of each system's settings, each of which is tried once first

How: `benchmarks/training.py`. `padding-free` is TRL's flattening of a batch; on a CPU, SDPA masks what is not of a row.

    make bench-peers ARGS=sft
"""

from __future__ import annotations

from benchmarks.figures import Book
from benchmarks.inputs import sft_batches
from benchmarks.training import PEERS, PLAIN, WARMUP, compare, parser_of
from ppolite import load_recipe
from ppolite.stages.opening import resolve

SFT_PEERS = {
    **PEERS,
    "lora-top, padding-free": PLAIN | {"train": "lora-top", "padding_free": True},
    "top, padding-free": PLAIN | {"train": "top", "padding_free": True},
}


def main() -> None:
    parser = parser_of(__doc__, SFT_PEERS)
    args = parser.parse_args()
    book = Book("sft", args)
    model = resolve(load_recipe("film", args.set).model)
    batches = sft_batches(model, args.updates + WARMUP, args.batch_size)
    compare("sft", args, book, SFT_PEERS, {"model": model, "batches": batches}, [])


if __name__ == "__main__":
    main()
