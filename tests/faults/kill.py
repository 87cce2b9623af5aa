"""Kill runs at random instants, go on with them, and compare with a run that nobody killed: all bytes, but the times.

    python -m tests.faults.kill                      # 60 kills of a tiny three-stage run, half inside checkpoint writes
    python -m tests.faults.kill --film               # one run of the 135M film critic, killed 3 times
    python -m tests.faults.kill --film --whole       # the same of the shipped recipe without shortenings

A kill is SIGKILL: no handler, no cleanup. Each of the tiny runs is killed once, at an instant drawn uniformly from
the time that an undisturbed run takes, or as soon as the n-th checkpoint draft appears on disk; then it is continued to
its end. Compared are metrics.jsonl without its times, the weights of sft, reward and policy, rollouts and evaluation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.world import World

from ppolite.config import Recipe, load_recipe

TINY: dict[str, Any] = {
    "checkpoint__every": 1,
    "ppo__steps": 4,
    "ppo__eval_every": 2,
    "ppo__behaviour": "stale",
    "ppo__kl__target": 2.0,
    "ppo__kl__horizon": 100.0,
    "ppo__objective": "kl",
    "sft__data__limit": 48,
    "reward__data__limit": 64,
    "reward__epochs": 1,
    "ppo__min_rm_accuracy": 0,
}
"""Every part of a state is in use: a queue of waiting rollouts, two controllers, two schedules."""
SHORT = (
    "sft.data.limit=320",
    "reward.data.limit=320",
    "ppo.steps=4",
    "evaluation.prompts=32",
    "ppo.min_rm_accuracy=0",
)
"""The film critic in minutes."""


def outcome(run_dir: Path) -> dict[str, str]:
    """Digests of all that must not differ."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["stage"], row["step"]) for row in rows]
    if len(set(steps)) < len(steps):
        raise AssertionError(f"{run_dir}: a step stands in metrics.jsonl twice")
    timeless = [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]
    found = {"metrics.jsonl": _digest(json.dumps(timeless).encode())}
    files = [*run_dir.glob("*/*.safetensors"), *run_dir.glob("rollouts/*.parquet"), run_dir / "eval.json"]
    return found | {str(path.relative_to(run_dir)): _digest(path.read_bytes()) for path in sorted(files)}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def work(recipe: Recipe, run_dir: Path, threads: int) -> None:
    """The child: one run, from its start or from where it was killed."""
    import torch

    from ppolite.stages.run import run_recipe

    torch.set_num_threads(threads)
    with (run_dir.parent / f"{run_dir.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        run_recipe(recipe, run_dir)


class Runs:
    """Runs of one recipe in processes that are forked from one that has imported everything."""

    def __init__(self, recipe: Recipe, folder: Path, threads: int) -> None:
        self.recipe, self.folder, self.threads = recipe, folder, threads
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["ppolite.stages.run", "transformers.models.llama.modeling_llama"]
        )

    def start(self, name: str) -> BaseProcess:
        process = self.context.Process(target=work, args=(self.recipe, self.folder / name, self.threads))
        process.start()
        return process

    def finish(self, name: str) -> dict[str, str]:
        """Run, or go on, to the end. Raises AssertionError where it ends otherwise."""
        process = self.start(name)
        process.join()
        if process.exitcode != 0:
            raise AssertionError(f"{name} ended with {process.exitcode}:\n{self.said(name)}")
        return outcome(self.folder / name)

    def said(self, name: str) -> str:
        return "\n".join((self.folder / f"{name}.log").read_text().splitlines()[-30:])

    def kill(self, name: str, when: Callable[[], bool]) -> bool:
        """Start or go on, and kill as soon as `when` says so. False where it had ended before."""
        process = self.start(name)
        while process.is_alive() and not when():
            time.sleep(0.0005)
        killed = process.is_alive()
        process.kill()
        process.join()
        return killed and process.exitcode == -9


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def amid_a_write(run_dir: Path, number: int) -> Callable[[], bool]:
    """True once the `number`-th draft of a checkpoint is on disk."""
    seen: set[str] = set()

    def now() -> bool:
        try:
            drafts = {str(path) for path in run_dir.glob("checkpoints/*/.*.part")}
        except FileNotFoundError:  # a stage has ended while its folder was being read
            return False
        seen.update(drafts)
        return bool(drafts) and len(seen) >= number

    return now


def tiny(kills: int, seed: int, say: Callable[[str], None] = print) -> int:
    """Kill `kills` tiny runs, each once. Returns how many of them differ from the one that was not killed."""
    draw, differing = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "world").mkdir()
        runs = Runs(World(folder / "world").recipe(**TINY), folder, threads=1)
        runs.finish("warm-up")
        started = time.monotonic()
        wanted = runs.finish("whole")
        seconds = time.monotonic() - started
        say(f"an undisturbed run takes {seconds:.1f} s and writes {len(wanted)} files that are compared")
        done = 0
        while done < kills:
            name = f"run-{done}"
            if done % 2:
                number = draw.randint(1, 11)
                when, what = amid_a_write(folder / name, number), f"in checkpoint write {number}"
            else:
                at = draw.uniform(0, seconds)
                when, what = after(at), f"after {at:.2f} s"
            if not runs.kill(name, when):
                shutil.rmtree(folder / name)  # it was faster than usual, and its end is no kill
                continue
            done += 1
            found = runs.finish(name)
            apart = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
            differing += bool(apart)
            say(f"{done:3}  killed {what}: {'DIFFERS in ' + ', '.join(apart) if apart else 'equal'}")
            if not apart:
                shutil.rmtree(folder / name)
    return differing


def film(whole: bool, kills: int, folder: Path, seed: int) -> int:
    """One film run killed `kills` times at random instants, beside one that is not. 1 if they differ."""
    recipe = load_recipe("film", () if whole else SHORT)
    runs = Runs(recipe, folder, threads=2)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    wanted = runs.finish("undisturbed")
    seconds = time.monotonic() - started
    print(f"an undisturbed run takes {seconds:.0f} s", flush=True)
    draw = random.Random(seed)
    for number in range(1, kills + 1):
        # Uniform over the thirds of a run, so that the kills are spread over its stages.
        at = draw.uniform(0.1, 0.9) * seconds / kills
        if not runs.kill("killed", after(at)):
            print(f"kill {number} came too late: the run had ended", flush=True)
            break
        there = sorted(path.name for path in (folder / "killed").glob("checkpoints/*/step-*"))
        print(f"kill {number} after {at:.0f} s; checkpoints there: {', '.join(there) or 'none'}", flush=True)
    found = runs.finish("killed")
    apart = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    print("DIFFERS in " + ", ".join(apart) if apart else f"all {len(wanted)} files are equal")
    return int(bool(apart))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, help="default 60, with --film 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--film", action="store_true", help="the 135M film critic in place of a tiny model")
    parser.add_argument("--whole", action="store_true", help="with --film: without shortenings")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/kill"), help="with --film: where the runs go"
    )
    args = parser.parse_args()
    if args.film:
        shutil.rmtree(args.folder, ignore_errors=True)
        differing = film(args.whole, args.kills or 3, args.folder, args.seed)
    else:
        differing = tiny(args.kills or 60, args.seed)
        print(f"{differing} of {args.kills or 60} killed runs differ from the one that was not killed")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
