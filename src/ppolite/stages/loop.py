"""What the three stages share: opening a model, seeds, the optimizer with its schedule, batches."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppolite.config import PPO, Adam, Data, Recipe
from ppolite.data.chat import check_lengths, encode_prompt, prepare_tokenizer, stop_ids
from ppolite.data.embedded import model_path
from ppolite.data.readers import read_examples, read_preferences, read_prompts, read_rankings, read_scored
from ppolite.data.report import Report
from ppolite.data.split import split_by_prompt
from ppolite.models.load import compute_dtype, load_causal, load_reward, load_tokenizer, pick_device
from ppolite.models.trunk import Trunk, checked_trunk
from ppolite.obs.run_files import Agreement, read_json
from ppolite.types import Prompt, UserError

log = logging.getLogger("ppolite")
T = TypeVar("T")
Say = Callable[[str], None]


def derive_seed(master: int, *names: str | int) -> int:
    """A seed of its own for each random stream: 63 bits of SHA-256 of master seed and stream name."""
    digest = hashlib.sha256("/".join(map(str, (master, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def fingerprint_of(data: Any) -> str:
    """Of plain data and dataclasses, by how they are written."""
    return hashlib.sha256(repr(data).encode("utf-8", "backslashreplace")).hexdigest()[:16]


@dataclass
class Opened:
    """A model ready for work."""

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    context: int
    """Longest sequence, in tokens."""
    repairs: tuple[str, ...] = ()
    """What the tokenizer needed, a sentence each."""


def resolve(source: str) -> str:
    """`embedded:` names become the folder in the cache (fetched when missing)."""
    if not source.startswith("embedded:"):
        return source
    if source != "embedded:smollm2-135m":
        raise UserError(
            f"model: {source} is not embedded here; the one there is is called embedded:smollm2-135m"
        )
    return str(model_path())


def open_model(recipe: Recipe, source: str | None = None) -> Opened:
    """Load the recipe's model (or another for the same recipe) with its tokenizer, repaired where needed."""
    name = resolve(source or recipe.model)
    device = pick_device(recipe.device)
    tokenizer = load_tokenizer(name, trust_remote_code=recipe.trust_remote_code)
    model = load_causal(name, device, trust_remote_code=recipe.trust_remote_code)
    repairs = tuple(prepare_tokenizer(tokenizer, model.config))
    for repair in repairs:
        log.warning(repair)
    stops = stop_ids(tokenizer, model.generation_config)
    context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)
    # peft draws the adapters' first factor from torch's global stream.
    torch.manual_seed(derive_seed(recipe.seed, "init"))
    dtype = compute_dtype(recipe.dtype, device)
    return Opened(name, model, tokenizer, stops, device, dtype, context, repairs)


def sft_folder(run_dir: Path) -> Path:
    """`RUN/sft`; rounds of `ppolite iterate` share that of the whole run, a folder up."""
    own, whole = run_dir / "sft", run_dir.resolve().parent
    shared = run_dir.resolve() in round_folders(whole) and (whole / "recipe.yaml").exists()
    return whole / "sft" if shared and not own.exists() else own


def round_folders(run_dir: Path) -> list[Path]:
    """Rounds of `ppolite iterate` in a run, the first one first."""
    numbers = [re.fullmatch(r"round-([1-9]\d*)", folder.name) for folder in run_dir.glob("round-*")]
    return [run_dir / f"round-{n}" for n in sorted(int(found[1]) for found in numbers if found)]


def after_sft(recipe: Recipe, run_dir: Path) -> str | None:
    """The SFT result, or None for the recipe's model; a recipe whose `sft` has not been done gets a warning."""
    folder = sft_folder(run_dir)
    if folder.exists():
        return str(folder)
    if recipe.sft is not None:
        log.warning(
            "%s: no sft result in it; starting from %s. `ppolite sft` comes first", run_dir, recipe.model
        )
    return None


def open_trunk(recipe: Recipe, opened: Opened, probe: Sequence[Sequence[int]]) -> Trunk:
    """Cut the model at `trunk.split` after comparing with its plain forward pass on the rows of `probe`."""
    return checked_trunk(
        opened.model, recipe.trunk.split, probe, log.warning, opened.dtype, recompute=recipe.train.recompute
    )


def open_reward(config: PPO, run_dir: Path, device: torch.device) -> Any:
    """`RUN/reward` with its head and units, or None; UserError when it agrees too little with people."""
    folder = run_dir / "reward"
    if not folder.exists():
        return None
    report = read_agreement(folder)
    floor, accuracy = config.least_accuracy, report["pair_accuracy"] if report else 0.0
    if report is None and floor:
        raise UserError(
            f"{folder}: no agreement.json says how well this reward model agrees with people; train it "
            "here with `ppolite reward`, or go on with --set ppo.min_rm_accuracy=0"
        )
    if accuracy < floor:
        raise UserError(
            f"{folder}: the reward model is right on only {accuracy:.1%} of held-out pairs, below "
            f"ppo.min_rm_accuracy ({floor:.1%}); improve its data, or go on "
            "with --set ppo.min_rm_accuracy=0"
        )
    return load_reward(str(folder), device)


def read_agreement(reward: Path) -> dict[str, Any] | None:
    """How well a reward model agrees with people, as `ppolite reward` left it beside the model."""
    return read_json(reward / "agreement.json", Agreement, f"train {reward} again with `ppolite reward`")


READERS = {
    "examples": read_examples,
    "scored": read_scored,
    "preferences": read_preferences,
    "rankings": read_rankings,
    "prompts": read_prompts,
}


def read_rows(data: Data, kind: str) -> tuple[list[Any], Report]:
    """The rows of a source that can be used, and an account of all of them."""
    return READERS[kind](data.path, data.columns, plain=data.plain)


def split_rows(rows: list[Any], data: Data, seed: int) -> tuple[list[Any], list[Any]]:
    """`(train, held out)`, as the section of the recipe asks."""
    held_out = data.held_out if data.held_out < 1 else int(data.held_out)
    return split_by_prompt(rows, held_out, seed, source=data.path)


def load_split(data: Data, kind: str, seed: int) -> tuple[list[Any], list[Any]]:
    """`(train, held out)` of a source; what its rows suffer from is logged, row by row."""
    rows, report = read_rows(data, kind)
    for line in report.lines():
        log.info(line)
    return split_rows(rows, data, seed)


def load_prompts(
    data: Data, opened: Opened, max_new_tokens: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """`(train, held out)` prompts, each shuffled; those without room for an answer are reported."""
    split: list[list[Prompt]] = []
    for name, prompts in zip(("train", "held"), load_split(data, "prompts", seed), strict=True):
        order = shuffled(prompts, derive_seed(seed, "prompts", name))
        ids = [encode_prompt(opened.tokenizer, p) for p in order]
        limit = opened.context - max_new_tokens
        what = f"the model's context of {opened.context:,} less {max_new_tokens:,} for the answer"
        keep, too_long = check_lengths(ids, limit, [p.source for p in order], what=what)
        for line in too_long:
            log.warning(line)
        split.append([order[i] for i in keep])
    train, held = split
    if not train:
        raise UserError(f"{data.path}: no prompts to train on; see held_out ({data.held_out:g})")
    return train[: data.limit], held


def tests_of(held: Sequence[Prompt], config: PPO) -> list[Prompt]:
    """The held-out prompts behind the `eval_prompts` first, which serve to choose the best policy.

    Raises UserError where fewer than two are left.
    """
    prompts = list(held[config.eval_prompts :])
    if len(prompts) < 2:
        raise UserError(
            f"{config.prompts.path}: {len(held)} prompts are held out, of which {config.eval_prompts} serve "
            "to choose the best policy, and too few are left to judge it; raise ppo.prompts.held_out or "
            "lower ppo.eval_prompts"
        )
    return prompts


class Learner:
    """AdamW with warm-up, schedule and gradient clipping over one set of parameters."""

    def __init__(self, parameters: list[nn.Parameter], config: Adam, total: int) -> None:
        self.parameters, self.config, self.total = parameters, config, max(total, 1)
        self.done = 0
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=config.lr,
            betas=(0.9, config.beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        c, warm = self.config, self.config.warmup * self.total
        if self.done < warm:
            return c.lr * (self.done + 1) / (math.floor(warm) + 1)
        progress = min((self.done - warm) / max(self.total - warm, 1), 1.0)
        factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return c.lr * factor[c.schedule]

    def clip(self) -> float:
        """Scale the gradients down to the norm allowed. Returns the norm before."""
        return float(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))

    def apply(self) -> None:
        """Update, and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.clear()
        self.done += 1

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """The moments, which belong to weights that are no longer there."""
        self.optimizer.state.clear()

    def state(self) -> dict[str, Any]:
        """Updates done and the optimizer's moments."""
        return {"done": self.done, "moments": self.optimizer.state_dict()["state"]}

    def restore_moments(self, state: dict[str, Any]) -> None:
        """Without `done`: where the schedule stands is the caller's to say."""
        groups = self.optimizer.state_dict()["param_groups"]
        moments = {int(i): of_one for i, of_one in state["moments"].items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def step_together(*learners: Learner, sound: bool = True) -> list[float] | None:
    """One update of each, or of none: all gradients are looked at before any is used. Returns their norms.

    None where a gradient is not finite, or the caller's losses were not `sound`: then no weight has changed.
    """
    norms = [learner.clip() for learner in learners]
    if not sound or not all(map(math.isfinite, norms)):
        for learner in learners:
            learner.clear()
        return None
    for learner in learners:
        learner.apply()
    return norms


class Fitting:
    """The token budget of updates: halved where memory does not suffice, and kept so."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._said = False

    def run(self, work: Callable[[], T], clear: Callable[[], None]) -> T:
        """`work()`, again with half the budget while it does not fit; `clear` undoes a half-done one.

        Raises the last error when it does not fit one row at a time either.
        """
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.tokens == 1:
                    raise
            # Not in the handler: the error would keep the tensors of all its frames alive.
            clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.tokens = max(self.tokens // 2, 1)
            if not self._said:
                self._said = True
                log.warning(
                    "an update did not fit into memory; going on with at most %d tokens at once, and fewer if need be. "
                    "Results stay the same; set micro_batch_tokens to say so from the start",
                    self.tokens,
                )


def is_out_of_memory(error: Exception) -> bool:
    """Whatever raises it: CUDA, torch's CPU allocator, a library's own."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in said


class Skips:
    """Updates that were skipped since something in them was not finite: nothing has changed by them."""

    def __init__(self) -> None:
        self.total = self.in_row = 0
        self.why = ""
        self.batches: list[Any] = []
        """Of those in a row, for people to read."""

    def add(self, why: str, batch: Any) -> None:
        self.total += 1
        self.in_row += 1
        self.why = why
        self.batches.append({"why": why, "batch": batch})

    def clear(self) -> None:
        """An update was sound, or the run has gone back."""
        self.in_row = 0
        self.batches.clear()


def weights_of(body: nn.Module) -> dict[str, nn.Parameter]:
    """Those that are trained, by name."""
    return {name: weight for name, weight in body.named_parameters() if weight.requires_grad}


def put_weights(body: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Into the weights that are trained. Raises ValueError where these are others than the saved ones."""
    mine = weights_of(body)
    if {k: w.shape for k, w in mine.items()} != {k: w.shape for k, w in saved.items()}:
        raise ValueError("the weights that are trained have other names or shapes")
    with torch.no_grad():
        for name, weight in mine.items():
            weight.copy_(saved[name])


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


WINDOW = 8
"""Batches whose rows are sorted by length together."""


def batches(
    items: Sequence[T], size: int, epochs: float, seed: int, length: Callable[[T], int] | None = None
) -> Iterator[list[T]]:
    """`epochs` passes in batches, each pass shuffled anew; the last batch of a pass may be short.

    With `length`, rows of about one length go together: within windows of a few batches they are sorted, and
    the batches shuffled. Padding falls from about 40 % to 5 % on film reviews.
    """
    remaining = round(len(items) * epochs)
    epoch = 0
    while remaining > 0:
        order = shuffled(items, derive_seed(seed, "epoch", epoch))[:remaining]
        made: list[list[T]] = []
        for first in range(0, len(order), size * WINDOW):
            window = order[first : first + size * WINDOW]
            if length is not None:
                window.sort(key=length)
            made += [window[i : i + size] for i in range(0, len(window), size)]
        yield from made if length is None else shuffled(made, derive_seed(seed, "batches", epoch))
        remaining -= len(order)
        epoch += 1


def count_batches(items: int, size: int, epochs: float) -> int:
    """Raises UserError where `epochs` is so small a share that no row is trained on."""
    whole, part = divmod(round(items * epochs), items)
    if not whole and not part:
        raise UserError(f"epochs is {epochs:g}, which of {items} rows takes none; raise it")
    return whole * math.ceil(items / size) + math.ceil(part / size)


class Cycle(Iterator[T]):
    """Endless passes over the items, each shuffled anew. `taken` is all there is to remember of it."""

    def __init__(self, items: Sequence[T], seed: int, taken: int = 0) -> None:
        self.items, self.seed, self.taken = items, seed, taken
        self._pass: tuple[int, list[T]] = -1, []

    def __next__(self) -> T:
        number, place = divmod(self.taken, len(self.items))
        if number != self._pass[0]:
            self._pass = number, shuffled(self.items, derive_seed(self.seed, "cycle", number))
        self.taken += 1
        return self._pass[1][place]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(
        json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    draft.rename(path)
