"""Time and memory of log-probs from hidden states, forward and backward, beside the plain way with all logits.

    ours     ops/logprobs.token_logprobs: chunks of rows, forward and backward, no entropy
    plain    logits → log_softmax → gather, and autograd

Random hidden states of width 576 (that of SmolLM2-135M), with gradients for the hidden states alone (frozen head,
LoRA) and with those of the head's weights, V × 576 floats. Extra memory is the peak of a call over what was there
before, gradients included. The sum of log-probs and the norm of the gradient must agree, or the benchmark ends.

    make bench-peers ARGS=logprobs
    make bench-peers ARGS='logprobs --sizes 4096x49152'
"""

from __future__ import annotations

import math
import sys

from benchmarks.figures import Book, Figure, Run, Side, compared
from benchmarks.harness import OURS, arguments, in_turn, worker
from ppolite.models.load import compute_dtype, pick_device

TIME = Figure("ms", "ms", "time")
FIGURES = (TIME, Figure("extra_mb", "MiB of extra memory", "size"))
SIZES = ("512x49152", "1024x49152", "2048x49152", "4096x49152", "1024x16384", "1024x151936")
"""Tokens × vocabulary. 4 × 1,024 tokens of SmolLM2 are among them; the last vocabulary is that of Qwen."""


def agree(ours: Run, theirs: Run, dtype: str) -> None:
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for mine, other in zip(ours["checks"], theirs["checks"], strict=True):
        if not math.isclose(mine, other, rel_tol=tolerance):
            sys.exit(f"logprobs: the two ways differ, {mine} and {other}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="TxV")
    parser.add_argument(
        "--repeats", type=int, default=5, help="calls timed in each process, after one that is not"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="the recipe's `auto`")
    args = parser.parse_args()
    dtype = args.dtype or str(compute_dtype("auto", pick_device("auto"))).removeprefix("torch.")
    book = Book("logprobs", args)
    for size in args.sizes:
        tokens, vocabulary = map(int, size.split("x"))
        for weights in (False, True):
            told = {"tokens": tokens, "vocabulary": vocabulary, "hidden": 576, "dtype": dtype}
            sides = [
                Side(
                    name,
                    dtype,
                    worker(OURS, "logprobs", way=way, weights=weights, repeats=args.repeats, **told),
                )
                for name, way in (("ppolite", "chunked"), ("plain", "plain"))
            ]
            runs = in_turn(sides, TIME, args)
            for ours, theirs in zip(*runs, strict=True):
                agree(ours, theirs, dtype)
            what = "hidden states and weights" if weights else "hidden states"
            book.write(
                f"{tokens:,} tokens × {vocabulary:,}, gradients of {what}", compared(sides, runs, FIGURES)
            )


if __name__ == "__main__":
    main()
