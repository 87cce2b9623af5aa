"""A step of PPO on a GPU with models of 135M, 1.5B and 7B: how near to the chip's limits, and how fast beside TRL.

    update      operations that no way around is known for (benchmarks/floor.py), a second, of the fastest matrix
                product measured there: model-FLOP utilisation, a few percent low since attention is left out
    decode      the time of reading what generating cannot do without, at the rate measured there, of the time it took;
                the prompts' own pass counts as lost
    step        seconds beside TRL 1.12.0 in bfloat16 weights, pair by pair, memory of both

All weights are random, in the shapes of SmolLM2, Qwen2.5-1.5B and Qwen2.5-7B, so every answer is as long as it may be.
Adapters go on the upper third of the layers, on both sides; `full` trains policy and critic whole. What does
not fit or is not installed is named, and the next one begins.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --sizes 1.5B --kinds lora --without-trl
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForSequenceClassification

from benchmarks.figures import Book, Side, compared
from benchmarks.floor import GIGA
from benchmarks.harness import BENCH, OURS, Failed, arguments, in_turn, measure, worker
from benchmarks.inputs import random_model, rounds
from benchmarks.rlhf_step import FIGURES, PLAIN, STEP, own_side, peer_side
from benchmarks.scaling import SMALL

SIZES: dict[str, dict[str, int]] = {
    "135M": {**SMALL, "vocab_size": 49_152},
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151_936,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064,
    },
}  # fmt: skip
KINDS = {"lora": "lora-top", "full": "full"}
"""What of ours is trained, and what TRL's worker calls it."""
TOLD = [
    "evaluation.judge=none",
    "dtype=bfloat16",
    "ppo.min_rm_accuracy=0",
    "ppo.optim.lr=1e-6",
    "ppo.critic.lr=1e-6",
]
STEPS = 3


def random_run(name: str) -> Path:
    """`RUN/sft` and `RUN/reward` of that size, made where they are missing: one decoder, and a head that scores."""
    folder = BENCH / "gpu" / name
    if not (folder / "reward" / "config.json").exists():
        causal = random_model(folder / "sft", SIZES[name])
        config = copy.deepcopy(causal.config)
        config.num_labels = 1
        with torch.device("meta"):
            scoring = LlamaForSequenceClassification(config)
        scoring.model = causal.model
        scoring.score = nn.Linear(config.hidden_size, 1, bias=False, dtype=causal.dtype)
        scoring.config.ppolite_norm = {"mean": 0.0, "std": 1.0, "offset": 0.0}
        scoring.save_pretrained(folder / "reward")
    return folder


def split(name: str, kind: str) -> int:
    return SIZES[name]["num_hidden_layers"] * 2 // 3 if kind == "lora" else 0


def overrides(name: str, kind: str, rollouts: int, length: int) -> list[str]:
    return [
        *TOLD,
        f"train.kind={kind}",
        f"trunk.split={split(name, kind)}",
        f"ppo.rollouts={rollouts}",
        f"ppo.max_new_tokens={length}",
        f"decode_rows={rollouts}",
        "ppo.optim.micro_batch_tokens=8192",
    ]


def near_the_limits(run: dict[str, Any]) -> dict[str, float]:
    """Shares of the chip's arithmetic in the update (`executed`: with what is run twice or for nobody), and of its
    reading in generating."""
    fastest = max(rate for name, rate in run["ceilings"].items() if name.endswith("GFLOP/s")) * GIGA
    reading = run["ceilings"]["reading, GB/s"] * GIGA
    seconds = run["seconds"]
    return {
        "update_tflops": run["needed_tflop"]["update"] / seconds["update"],
        "update_share": run["needed_tflop"]["update"] * 1e12 / seconds["update"] / fastest,
        "executed_share": run["tflop"]["update"] * 1e12 / seconds["update"] / fastest,
        "decode_share": run["generate_bytes"] / reading / seconds["generate"],
    }


def profile(book: Book, args: argparse.Namespace, name: str, kind: str, told: list[str]) -> None:
    alone = [
        "sft=null",
        "reward=null",
        "ppo.critic_init=zero",
        "ppo.epochs=1",
        f"model={random_run(name) / 'sft'}",
    ]
    command = worker(OURS, "scaling", overrides=[*told, *alone], ceilings=True)
    run = measure(Side("ppolite", f"gpu-{name}-{kind}", command), args.threads)
    near = near_the_limits(run)
    print(
        f"{name}, {kind}: update {near['update_tflops']:.3g} TFLOP/s, {near['update_share']:.0%} of the fastest"
        f" product ({near['executed_share']:.0%} with all that was executed)"
        f"; decoding {near['decode_share']:.0%} of reading's rate"
        f"; {sum(run['seconds'].values()):.3g} s, {run['gpu_mb'] or run['peak_rss_mb']:,.0f} MiB",
        flush=True,
    )
    book.keep(f"{name}, {kind}: limits", **run, **near, settings=told)


def beside_trl(book: Book, args: argparse.Namespace, name: str, kind: str, told: list[str]) -> None:
    run = random_run(name)
    given = {
        "run": run,
        "prompts": rounds(run / "sft", STEPS, args.rollouts),
        "rounds": STEPS,
        "warmup": 1,
        "every": None,
        "folder": None,
    }
    spec = PLAIN | {"train": KINDS[kind], "split": split(name, kind), "weights": "bfloat16"}
    sides = [
        own_side(f"{name}, {kind}", "film", told, given),
        peer_side(f"{name}, {KINDS[kind]}, bfloat16 weights", spec, told, given),
    ]
    book.write(f"{name}, {kind}", compared(sides, in_turn(sides, STEP, args), FIGURES))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rollouts", type=int, default=64, help="answers of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    parser.add_argument("--without-trl", action="store_true", help="the limits alone")
    parser.add_argument("--cpu", action="store_true", help="go on without a GPU, to try this out")
    args = parser.parse_args()
    if not (args.cpu or torch.cuda.is_available()):
        sys.exit("there is no GPU here; --cpu tries out what would be run on one")
    book = Book("gpu", args)
    for name in args.sizes:
        for kind in args.kinds:
            told = overrides(name, kind, args.rollouts, args.length)
            for look in (profile,) if args.without_trl else (profile, beside_trl):
                try:
                    look(book, args, name, kind, told)
                except Failed as error:
                    said = str(error).splitlines()
                    print(
                        f"{name}, {kind}: left out. {' … '.join(dict.fromkeys((said[0], said[-1])))}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
