"""What a recipe will need, before anything is loaded: memory by stage and part, and whether the machine has it.

    weights       exact: the bodies are built by the code that builds them later, on tensors without memory; all of them
                  in float32 at first, the frozen ones in the dtype of the arithmetic once the last copy is made
    optimizer     two moments for each trained weight; its gradient is a third
    activations   counted on layers that only pretend to run (models/footprint.py), times layers and tokens
    the rest      from shapes: keys and values, logits, hidden states of the frozen bottom, the best policy

A stage's peak is what it always holds and the largest of its phases (needs.py). Rows are read and encoded, since
their length is part of it, and every answer is taken to be as long as it may be. On a CPU the process with its
libraries counts: this one has imported what a run imports.

Left out: classifiers and foreign code of `ppo.rewards`, on a CPU with half precision the pages of the file that weights
were cast from, and what an allocator keeps for later. glibc's keeps a lot where tensors that go lie between those that
stay, as with adapters: such a process is up to a third larger than planned, unless MALLOC_MMAP_THRESHOLD_=131072
is set. `benchmarks/plan.py` compares with what runs take, on a CPU. Nobody has done so on a GPU.

    ppolite plan recipes/film.yaml
    ppolite plan mine.yaml --gpu 24GiB
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ppolite.config import Data, Recipe, parse_recipe, put, read_override
from ppolite.data.chat import encode_example, encode_prompt, prepare_tokenizer
from ppolite.models.load import compute_dtype, load_config, load_tokenizer, pick_device
from ppolite.models.memory import memory_of
from ppolite.ops.packing import common_prefix
from ppolite.stages.needs import Job, Rows, Stage, stages
from ppolite.stages.opening import resolve
from ppolite.stages.reward import ITEMS, responses_of
from ppolite.stages.rows import load_split, shuffled
from ppolite.stages.run import RESULTS
from ppolite.stages.seeds import derive_seed
from ppolite.types import UserError

SAMPLE = 512
"""Rows whose length is looked at."""
CUDA = 500 * 2**20
"""What CUDA takes for itself, about."""
UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


@dataclass
class Plan:
    """All stages of a recipe, where they are to run, and what would help where they do not fit."""

    where: str
    has: int
    """Bytes of memory there."""
    stages: list[Stage]
    changes: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """Settings, and the peak that each of them alone leads to; the smallest first."""

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def fits(self) -> bool:
        return self.largest.peak <= self.has

    def as_json(self) -> dict[str, Any]:
        """Plain data, in bytes."""
        told = [vars(stage) | {"largest": stage.largest, "peak": stage.peak} for stage in self.stages]
        return vars(self) | {"stages": told, "peak": self.largest.peak, "fits": self.fits}


def plan(recipe: Recipe, gpu: int | None = None) -> Plan:
    """For a GPU of so many bytes, or for the machine at hand. Raises UserError where config or data cannot be read."""
    if all(getattr(recipe, stage) is None for stage in RESULTS):
        raise UserError(
            "the recipe has none of the sections sft, reward and ppo, so there is nothing to plan; add one"
        )
    device = torch.device("cuda") if gpu else pick_device(recipe.device)
    source = resolve(recipe.model)
    config = load_config(source, trust_remote_code=recipe.trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.trust_remote_code)
    prepare_tokenizer(tokenizer, config)
    rows = _rows(recipe, tokenizer)
    on_cpu = device.type == "cpu"
    dtype = torch.bfloat16 if gpu and recipe.dtype == "auto" else compute_dtype(recipe.dtype, device)
    base = {"process": resident()} if on_cpu else {"CUDA": CUDA}
    where, has = _machine(device, gpu)
    job = Job(recipe, config, dtype, rows, base, on_cpu, has)
    made = Plan(where, has, stages(job))
    return made if made.fits else replace(made, changes=sorted(_changes(job, made), key=lambda pair: pair[1]))


def memory(text: str) -> int:
    """Bytes of `24GiB`. Raises UserError for anything else."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text)
    if found is None or not float(found[1]):
        raise UserError(f"--gpu {text}: expected a number and a unit ({', '.join(UNITS)}), as in 24GiB")
    return round(float(found[1]) * UNITS[found[2]])


def _machine(device: torch.device, gpu: int | None) -> tuple[str, int]:
    if gpu:
        return "a GPU of that size", gpu
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).name, memory_of(device)
    return "this machine", memory_of(device)


def resident() -> int:
    """Bytes of this process in memory; where the system does not tell, the most so far."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmRSS:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Rows]:
    """Of each stage that the recipe has."""
    found: dict[str, Rows] = {}
    prompts: list[list[int]] = []
    if recipe.ppo is not None:
        items = _some(recipe.ppo.prompts, "prompts", recipe.seed, "prompts", "train")
        prompts = [encode_prompt(tokenizer, item) for item in items]
    if recipe.sft is not None:
        examples = _some(recipe.sft.data, "examples", recipe.seed, "sft")
        pairs = [encode_example(tokenizer, item.prompt, item.response) for item in examples]
        found["sft"] = _lengths([(p, len(r)) for p, r in pairs], recipe.sft.max_tokens)
    if (reward := recipe.reward) is not None and reward.data is not None:
        items = _some(reward.data, ITEMS[reward.kind], recipe.seed, "reward")
        judged = [
            [encode_example(tokenizer, item.prompt, r) for r in responses_of(item)[0]] for item in items
        ]
        longest = [(row[0][0], max(len(r) for _, r in row)) for row in judged]
        found["reward"] = replace(_lengths(longest, reward.max_tokens), answers=max(map(len, judged)))
    elif reward is not None and recipe.ppo is not None:  # candidates of `iterate`, compared in pairs
        answered = [(p, recipe.ppo.max_new_tokens) for p in prompts]
        found["reward"] = replace(_lengths(answered, reward.max_tokens), answers=2)
    if recipe.ppo is not None:
        found["ppo"] = _lengths([(p, recipe.ppo.max_new_tokens) for p in prompts])
    return found


def _some(data: Data, kind: str, seed: int, *stream: str) -> list[Any]:
    """Some of the training rows, in the order in which the stage shuffles them."""
    train, _ = load_split(data, kind, seed)
    if not train:
        raise UserError(f"{data.path}: no rows to train on; see held_out ({data.held_out:g})")
    return shuffled(train, derive_seed(seed, *stream))[: min(data.limit or SAMPLE, SAMPLE)]


def _lengths(rows: Sequence[tuple[list[int], int]], most: int | None = None) -> Rows:
    """Of prompts and the number of their answers' tokens; rows over `most` tokens are left out, as the stage does."""
    kept = [(p, answer) for p, answer in rows if most is None or len(p) + answer <= most]
    if not kept:
        raise UserError(f"none of {len(rows)} rows has at most {most} tokens; raise max_tokens")
    shared = common_prefix([p for p, _ in kept])
    own = sorted(((len(p) - shared, answer) for p, answer in kept), key=sum, reverse=True)
    return Rows(shared, tuple(own))


def _changes(job: Job, made: Plan) -> Iterator[tuple[str, int]]:
    """Settings that the recipe does not have and that take less, each with its peak."""
    recipe, stage = job.recipe, made.largest.name
    layers, split = job.config.num_hidden_layers, recipe.trunk.split
    optim = getattr(recipe, stage).optim
    wanted = {
        "train.recompute=true": not recipe.train.recompute,
        f"{stage}.optim.micro_batch_tokens={optim.micro_batch_tokens // 4}": optim.micro_batch_tokens >= 8,
        "train.kind=lora": recipe.train.kind != "lora",
        f"trunk.split={(split + layers) // 2}": recipe.train.kind != "full" and recipe.roles == "shared",
        "trunk.keep=cpu": bool(split) and not job.on_cpu,
        "trunk.keep=none": bool(split),
        f"decode_rows={recipe.decode_rows // 4}": recipe.decode_rows >= 8,
        "roles=shared": recipe.roles == "separate",
        "dtype=bfloat16": job.dtype == torch.float32 and not job.on_cpu,
    }
    for change in (change for change, possible in wanted.items() if possible):
        tree = recipe.model_dump(mode="json")
        put(tree, *read_override(change))
        other = replace(job, recipe=parse_recipe(tree))
        if change.startswith("dtype"):
            other = replace(other, dtype=torch.bfloat16)
        if (peak := max(s.peak for s in stages(other))) < made.largest.peak:
            yield change, peak
