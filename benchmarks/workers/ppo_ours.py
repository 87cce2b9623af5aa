"""PPO by ppolite: rounds on given prompts, timed."""

from __future__ import annotations

import json
import time
from pathlib import Path

from benchmarks.workers.common import report, told
from benchmarks.workers.rounds import Clock
from ppolite import PPO, load_recipe
from ppolite.types import Prompt


def main() -> None:
    spec = told()
    started = time.perf_counter()
    rounds = json.loads(Path(spec["prompts"]).read_text())["rounds"][: spec["rounds"]]
    steps = [f"ppo.steps={len(rounds)}", f"ppo.seed={spec['seed']}"]
    ppo = PPO(load_recipe(spec["recipe"], [*spec["overrides"], *steps]), spec["run"])
    clock = Clock(spec, ppo.save)
    setup = time.perf_counter() - started
    clock.begin()
    for given in rounds:
        began = time.perf_counter()
        rollouts = ppo.generate([Prompt(tuple(p["messages"])) for p in given])
        generated = time.perf_counter() - began
        metrics = ppo.step(rollouts, ppo.score(rollouts))
        more = clock.lap(
            generate_s=generated,
            prompt_tokens=sum(len(r.prompt_ids) for r in rollouts),
            response_tokens=sum(len(r.response_ids) for r in rollouts),
            ended=sum(r.finish == "stop" for r in rollouts) / len(rollouts),
            kl=metrics["kl/ref_seq"],
        )
        if not more:
            break
    report("transformers", "peft", setup_s=setup, **clock.figures())


if __name__ == "__main__":
    main()
