"""Memory that a stage takes on the 135M model, beside what `ppolite plan` says it will: bar, within 15 %.

The film recipe with layers, adapters, everything trained, layers recomputed, and small budgets. Each stage runs a step
or two in a process of its own, whose peak of resident memory is read at its end. The plan is made with the same
settings; they hold little data, so that the largest batch is among the few. On a CPU alone.

    python -m benchmarks.plan
    python -m benchmarks.plan --only lora --dirty
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.figures import Book, Side
from benchmarks.harness import BENCH, OURS, arguments, measure, worker
from benchmarks.inputs import SHORT, models
from benchmarks.record import ROOT

SMALL = (
    "device=cpu", "dtype=float32", "evaluation.judge=none",
    "sft.data.limit=32", "sft.eval_examples=16",
    "reward.data.limit=32", "reward.eval_examples=64", "reward.norm_samples=32",
    "ppo.steps=1", "ppo.rollouts=32", "ppo.epochs=1", "ppo.eval_prompts=16", "ppo.min_rm_accuracy=0",
)  # fmt: skip
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "layers": ("film", []),
    "lora": ("film_lora", []),
    "budget 256": ("film", [f"{s}.optim.micro_batch_tokens=256" for s in ("sft", "reward", "ppo")]),
    "recompute": ("film", ["trunk.split=10", "train.recompute=true"]),
    "full": ("film", ["train.kind=full", "trunk.split=0", "ppo.rollouts=16"]),
}
STAGES = ("sft", "reward", "ppo")


def planned(recipe: str, overrides: list[str]) -> dict[str, float]:
    """Each stage's peak, MiB."""
    told = [word for override in overrides for word in ("--set", override)]
    command = [str(OURS), "-m", "ppolite.cli", "plan", recipe, "--json", *told]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {stage["name"]: stage["peak"] / 2**20 for stage in json.loads(said)["stages"]}


def main() -> None:
    parser = arguments(__doc__, pairs=1)
    parser.add_argument("--only", choices=SETTINGS, help="one of the settings")
    parser.add_argument("--stage", choices=STAGES, help="one of the stages")
    args = parser.parse_args()
    book = Book("plan", args)
    models(BENCH, SHORT)
    worst = 0.0
    for name in [args.only] if args.only else SETTINGS:
        recipe, more = SETTINGS[name]
        overrides = [*SMALL, *more]
        peaks = planned(recipe, overrides)
        for stage in [args.stage] if args.stage else STAGES:
            command = worker(OURS, "stage_ours", recipe=recipe, overrides=overrides, stage=stage, run=BENCH)
            took = measure(Side("ppolite", f"plan-{name}-{stage}", command), args.threads)["peak_rss_mb"]
            error = peaks[stage] / took - 1
            worst = max(worst, abs(error))
            print(
                f"{name}, {stage}: planned {peaks[stage]:,.0f} MiB, took {took:,.0f}: {error:+.1%}",
                flush=True,
            )
            book.keep(f"{name}, {stage}", planned_mib=round(peaks[stage]), took_mib=took, settings=overrides)
    print(f"off by {worst:.1%} at most")
    sys.exit(worst > 0.15)


if __name__ == "__main__":
    main()
