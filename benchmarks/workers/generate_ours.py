"""Answers by ppolite's own decode loop on a whole model, timed."""

from __future__ import annotations

from benchmarks.workers.answers import Sets
from benchmarks.workers.common import told
from ppolite import load_recipe
from ppolite.models.body import Body
from ppolite.rollout.local import LocalGenerator
from ppolite.stages.opening import open_model
from ppolite.types import Prompt, Sampling


def main() -> None:
    spec = told()
    opened = open_model(load_recipe("film", [f"dtype={spec['dtype']}"]), spec["model"])
    body = Body.of(opened.model, 0, dtype=opened.dtype)
    body.hold({})
    stops = frozenset() if spec["ignore_eos"] else opened.stop_ids
    generator = LocalGenerator(body, opened.tokenizer, stops, max_rows=spec["size"])
    sampling = Sampling(max_new_tokens=spec["max_new_tokens"])
    sets = Sets(spec)
    for given in sets:
        prompts = [Prompt(tuple(p["messages"])) for p in given]
        sets.done([r.response_ids for r in generator.generate(prompts, sampling, seed=spec["seed"])])
    sets.report("transformers")


if __name__ == "__main__":
    main()
