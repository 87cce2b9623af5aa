"""Time of one RLHF step on the film critic: generate, score, prepare, update.

32 rollouts of at most 48 new tokens, 4 epochs × 2 minibatches, film prompts, settings of recipes/film.yaml. A short
SFT and reward model are trained first (kept in runs/bench), since an untuned model's answers have another length.

    make bench                                  # appends to benchmarks/results/rlhf_step.jsonl
    make bench ARGS='--steps 9 --run runs/demo' # with the models of a finished run
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

from benchmarks.record import ROOT, commit, machine, today
from ppolite import PPO, SFT, RewardModel, load_recipe

SHORT = ["sft.data.limit=320", "reward.data.limit=320", "ppo.min_rm_accuracy=0"]


def prepared(run: Path, overrides: list[str]) -> PPO:
    recipe = load_recipe(ROOT / "recipes" / "film.yaml", [*SHORT, *overrides])
    for folder, stage in (("sft", SFT), ("reward", RewardModel)):
        if not (run / folder).exists():
            stage(recipe, run).run()
    return PPO(recipe, run)


def measure(ppo: PPO, steps: int) -> list[dict[str, float]]:
    rows = []
    for step in range(steps + 1):
        started = time.perf_counter()
        rollouts = ppo.generate(ppo.next_prompts())
        generated = time.perf_counter()
        scores = ppo.score(rollouts)
        metrics = ppo.step(rollouts, scores)
        row = {
            "step_s": time.perf_counter() - started,
            "generate_s": generated - started,
            "response_tokens": sum(len(r.response_ids) for r in rollouts),
            "prompt_tokens": sum(len(r.prompt_ids) for r in rollouts),
            "kl_ref_seq": metrics["kl/ref_seq"],
        }
        print(
            f"{'warm-up' if step == 0 else step}: {row['step_s']:.1f} s, of which generating {row['generate_s']:.1f} s"
        )
        rows.append(row)
    return rows[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dirty", action="store_true", help="measure uncommitted code; nothing is recorded")
    args = parser.parse_args()
    sha = None if args.dirty else commit()
    rows = measure(prepared(args.run, args.set), args.steps)
    seconds = [row["step_s"] for row in rows]
    result = {
        "bench": "rlhf_step",
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "generate_median_s": statistics.median(row["generate_s"] for row in rows),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "steps": rows,
        "overrides": args.set,
        "commit": sha,
        "date": today(),
        **machine(),
    }
    print(f"rlhf_step: median {result['median_s']:.1f} s ({result['min_s']:.1f} to {result['max_s']:.1f})")
    if sha:
        path = ROOT / "benchmarks" / "results" / "rlhf_step.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
