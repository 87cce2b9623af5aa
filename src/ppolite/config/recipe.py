"""The whole recipe: its sections, their defaults, and reading one from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, ValidationError, model_validator

from ppolite.config.explaining import marked
from ppolite.config.parts import Data, Optim, Train, Trunk
from ppolite.config.ppo import PPO
from ppolite.config.reading import RECIPES, explain, put, read_override, read_tree
from ppolite.config.safety import Checkpoint, Faults, Watch
from ppolite.config.secrets import refuse_secrets
from ppolite.config.section import Section
from ppolite.types import UserError


class SFT(Section):
    """Supervised fine-tuning on people's answers."""

    data: Data
    """`messages`, or `prompt` and `completion`."""
    optim: Optim = Optim()
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""
    batch_size: int = Field(default=16, ge=1)
    """Examples in one update."""
    max_tokens: int = Field(default=1024, ge=8)
    """Longer examples are reported and left out."""
    eval_every: int | None = Field(default=None, ge=1)
    """Updates between two looks at the held-out loss; 10 when empty."""
    eval_examples: int | None = Field(default=None, ge=1)
    """Held-out examples in such a look; 64 when empty."""

    @property
    def look_every(self) -> int:
        return self.eval_every or 10

    @property
    def look_examples(self) -> int:
        return self.eval_examples or 64

    @model_validator(mode="after")
    def _agree(self) -> SFT:
        for key in ("eval_every", "eval_examples"):
            if getattr(self, key) is not None and self.data.held_out == 0:
                raise ValueError(
                    f"data.held_out is 0, so there is nothing for `{key}`; remove it or hold rows out"
                )
        return self


class Reward(Section):
    """The reward model."""

    data: Data | None = None
    """`prompt` and `response`, `score`; or `chosen`, `rejected`; or `responses`, `scores`. Left out where `iterate`
    gathers the scores."""
    kind: Literal["scores", "pairs", "rankings"] = "scores"
    """Regression, Bradley–Terry or Plackett–Luce; all on the same scalar head."""
    optim: Optim = Optim()
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""
    batch_size: int = Field(default=32, ge=1)
    """Rows (pairs, rankings) in one update."""
    max_tokens: int = Field(default=1024, ge=8)
    """Longer rows are reported and left out."""
    eval_examples: int = Field(default=400, ge=8)
    """Held-out rows on which agreement with people is measured."""
    pair_gap: float | None = Field(default=None, ge=0)
    """For `scores`: pairs whose scores differ by at least this count in the pairwise accuracy; 1 when empty."""
    norm_samples: int = Field(default=256, ge=8)
    """Samples of the SFT model on which the reward is shifted to mean 0 and scaled to deviation 1."""
    taught_by: Literal["people", "judge"] = "people"
    """Whose opinion the data is; `judge`: the judge's of the evaluation, a stand-in for people, which is then named as
    no independent witness."""

    @property
    def gap(self) -> float:
        return 1.0 if self.pair_gap is None else self.pair_gap

    @property
    def source(self) -> Data:
        """`data`. Raises UserError where it is left out."""
        if self.data is None:
            raise UserError("`reward.data` is missing; add it, or let `ppolite iterate` gather scores")
        return self.data

    @model_validator(mode="after")
    def _agree(self) -> Reward:
        if self.pair_gap is not None and self.kind != "scores":
            raise ValueError(f"kind is {self.kind}, which has no `pair_gap`; remove it or set kind: scores")
        if self.batch_size == 1 and self.kind == "scores":
            raise ValueError(
                "batch_size is 1, but scores are learned less what those of a batch have in common, and one leaves "
                "nothing; set it to 2 or more"
            )
        return self


class Iterate(Section):
    """Rounds of sample → score → reward → ppo, each from the last policy."""

    rounds: int = Field(default=2, ge=1)
    """How many; may be raised in a run that is finished."""
    by: Literal["file", "person", "judge"] = "person"
    """Who scores the candidates: whoever fills in the file, a person at this terminal, or the VADER lexicon as a
    stand-in for people."""
    prompts: int = Field(default=200, ge=2)
    """Prompts in a round, of those that PPO trains on; the next round takes the next ones."""
    candidates: int = Field(default=4, ge=2)
    """Answers to each, all compared with each other."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the prompts whose comparisons measure the reward model instead of training it; prompts that
    `ppo.prompts` or `reward.data` hold out stay held out."""


class Evaluation(Section):
    """The look at the result."""

    prompts: int = Field(default=200, ge=2)
    """Held-out prompts, never seen in training nor in choosing the best policy."""
    judge: Literal["vader", "none"] = "none"
    """An independent judge beside the reward model; `vader` is a lexicon of English sentiment."""
    samples: int = Field(default=12, ge=1)
    """Before/after pairs kept for the report."""


class Recipe(Section):
    """A whole run."""

    model: str = "embedded:smollm2-135m"
    """`embedded:smollm2-135m`, a folder in HF format, a .gguf file, or a hub id."""
    trust_remote_code: bool = False
    """Run Python that a model's folder brings along."""
    seed: int = 0
    """Every random stream derives from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the arithmetic; weights that are trained stay float32. `auto`: bfloat16 on a GPU that has it, and on
    CPUs that multiply it faster than float32 (AMX; AMD with AVX512-BF16)."""
    decode_rows: int = Field(default=64, ge=1)
    """Most answers that are generated at once: more of them take more memory, and fewer passes through the model."""
    roles: Literal["shared", "separate"] = "shared"
    """One trunk for policy, reference, critic and reward model, or four whole models."""
    trunk: Trunk = Trunk()
    train: Train = Train()
    sft: SFT | None = None
    """Left out: the model is taken as it is."""
    reward: Reward | None = None
    """Left out: `ppo.rewards` says who scores, or the Python API trains with scores of its own."""
    ppo: PPO | None = None
    iterate: Iterate | None = None
    """Read by `ppolite iterate` alone."""
    doctor: Literal["quick", "off"] = "quick"
    """Each stage is examined before its first step, and does not begin where something is surely wrong; `ppolite
    doctor` looks closer."""
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    watch: Watch = Watch()

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        if self.train.kind == "full" and self.trunk.split:
            raise ValueError(
                f"train.kind: full trains every layer, but trunk.split is {self.trunk.split}; set it to 0 or "
                "train.kind to layers"
            )
        if self.roles == "separate" and self.trunk.split:
            raise ValueError(
                f"roles: separate shares nothing, but trunk.split is {self.trunk.split}; set it to 0 or "
                "roles to shared"
            )
        return self

    @model_validator(mode="after")
    def _hold_out_alike(self) -> Recipe:
        data = self.reward.data if self.reward else None
        if data and not self.iterate and data.fewest_held_out < 8:
            raise ValueError(
                f"reward.data.held_out is {data.held_out:g}, but the reward model is measured on 8 held-out rows or "
                "more; raise it"
            )
        stages = {"sft.data": self.sft and self.sft.data, "reward.data": data}
        for name, other in stages.items():
            prompts = self.ppo and self.ppo.prompts
            if other and prompts and other.path == prompts.path and other.held_out != prompts.held_out:
                raise ValueError(
                    f"{name} and ppo.prompts read {other.path}, but hold out {other.held_out:g} and "
                    f"{prompts.held_out:g}: what one stage trains on, another would be judged on; give both the same"
                )
        return self


def parse_recipe(
    tree: dict[str, Any], *, where: str = "recipe", overrides: list[str] | tuple[str, ...] = ()
) -> Recipe:
    """Check a recipe given as plain data. Raises UserError with the first thing that is wrong, and `where`.

    `overrides` are `section.key=value` that are in it already, for the one that is wrong to be named.
    """
    refuse_secrets(tree, where)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise explain(error, where, Recipe, overrides) from None


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(source: str | Path) -> Path:
    """The file that is meant: a path, or the name of a shipped recipe."""
    path = Path(source)
    if not path.exists() and str(source) in shipped():
        return RECIPES / f"{source}.yaml"
    return path


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a YAML recipe, or the shipped one of that name; `overrides` are `section.key=value`.

    Relative data paths count from the working folder.
    Raises UserError: file missing, no YAML, unknown key (with the nearest), wrong type, contradiction.
    """
    path = recipe_path(path)
    tree = read_tree(path, shipped())
    for override in overrides:
        put(tree, *read_override(override))
    if "env" in tree:
        raise UserError(
            f"{path}: a recipe of control, since it names an `env`; `ppolite control {path}` runs it"
        )
    return parse_recipe(tree, where=str(path), overrides=overrides)


def recipe_origins(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Where the values of `load_recipe` come from: the file or `--set`, by key."""
    path = recipe_path(path)
    tree = marked(read_tree(path, shipped()), path.name)
    for override in overrides:
        key, value = read_override(override)
        put(tree, key, marked(value, "--set"))
    return tree


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys, sorted, whose values differ between two recipes as plain data."""
    a, b = _flat(old), _flat(new)
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"ppo.kl.beta": 0.05, …}`"""
    if not isinstance(tree, dict):
        return {prefix: tree}
    sections = cast("dict[str, Any]", tree)
    return {
        k: v
        for key, sub in sections.items()
        for k, v in _flat(sub, f"{prefix}.{key}" if prefix else key).items()
    }
