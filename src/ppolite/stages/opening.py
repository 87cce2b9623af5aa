"""Opening what a stage works on: the recipe's model, cut at its layer, and what earlier stages left in the run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppolite.config import PPO, Recipe
from ppolite.data.chat import prepare_tokenizer, stop_ids
from ppolite.data.embedded import model_path
from ppolite.models.body import Body
from ppolite.models.load import compute_dtype, load_causal, load_reward, load_tokenizer, pick_device
from ppolite.models.trunk import Trunk, checked_trunk
from ppolite.obs.run_files import Agreement, read_json
from ppolite.rollout.local import LocalGenerator
from ppolite.stages.seeds import derive_seed
from ppolite.types import UserError

log = logging.getLogger("ppolite")


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
    decode_rows: int
    repairs: tuple[str, ...] = ()
    """What the tokenizer needed, a sentence each."""

    def generator(self, body: Body, *, tick: Callable[[int], None] | None = None) -> LocalGenerator:
        """Answers of a body of this model, `decode_rows` at once."""
        return LocalGenerator(body, self.tokenizer, self.stop_ids, max_rows=self.decode_rows, tick=tick)


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
    return Opened(name, model, tokenizer, stops, device, dtype, context, recipe.decode_rows, repairs)


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
    trunk = checked_trunk(
        opened.model, recipe.trunk.split, probe, log.warning, opened.dtype, recompute=recipe.train.recompute
    )
    trunk.keep = recipe.trunk.keep
    return trunk


def open_reward(config: PPO, run_dir: Path, *, trust_remote_code: bool) -> Any:
    """`RUN/reward` on the CPU with its head and units, or None; UserError when it agrees too little with people."""
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
    return load_reward(str(folder), torch.device("cpu"), trust_remote_code=trust_remote_code)


def read_agreement(reward: Path) -> dict[str, Any] | None:
    """How well a reward model agrees with people, as `ppolite reward` left it beside the model."""
    return read_json(reward / "agreement.json", Agreement, f"train {reward} again with `ppolite reward`")
