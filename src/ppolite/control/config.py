"""The recipe of a control run: typed, frozen, importable without torch and Gymnasium.

A recipe is a YAML file of the keys of `Control`. Its section `algorithms` holds what one algorithm wants
otherwise, so that one file serves all four:

    config = load_control("cartpole", algorithm="a2c", overrides=["optim.lr=1e-3"])

Later stands over earlier: the algorithm's defaults, the file, its section `algorithms`, overrides. The name of
an environment stands for the shipped recipe that names it, or for the defaults if there is none.
"""

from __future__ import annotations

import copy
import difflib
import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from ppolite.config import (
    NAMES_SECRET,
    RECIPES,
    Section,
    explain,
    marked,
    put,
    read_override,
    read_tree,
    refuse_secrets,
)
from ppolite.types import UserError

Algorithm = Literal["a2c", "is-pg", "ppo-kl", "ppo-clip"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

DEFAULTS: dict[Algorithm, dict[str, Any]] = {
    "a2c": {
        "rollout": 5,
        "lam": 1.0,
        "normalise_advantages": False,
        "optim": {"kind": "rmsprop", "lr": 7e-4},
    },
    "is-pg": {"epochs": 4},
    "ppo-kl": {"epochs": 10, "minibatches": 16, "beta": 1.0, "kl_target": 0.01},
    "ppo-clip": {"epochs": 10, "minibatches": 16, "clip": 0.2},
}
"""What an algorithm wants when the recipe says nothing."""

OWN = {
    "clip": "ppo-clip",
    "clip_high": "ppo-clip",
    "dual_clip": "ppo-clip",
    "beta": "ppo-kl",
    "kl_target": "ppo-kl",
    "max_weight": "is-pg",
}
"""Settings that one algorithm alone has."""


class Envs(Section):
    """The environments that run side by side."""

    count: int = Field(default=8, ge=1)
    """How many."""
    options: dict[str, Any] = Field(default={})
    """Keyword arguments of `gymnasium.make`."""
    vectorization: Literal["sync", "async"] = "sync"
    """One after another in this process, or each in a process of its own; the numbers are the same."""
    normalise_obs: bool = False
    """Observations less their running mean, over their running deviation, cut at ±10."""
    normalise_reward: bool = False
    """Rewards over the running deviation of the discounted return, cut at ±10; metrics stay in true units."""

    @field_validator("options")
    @classmethod
    def _tell_no_secret(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            if NAMES_SECRET.search(name):
                raise ValueError(
                    f"`{name}` sounds like a secret, and recipes are saved and shown; let the environment read it "
                    "from an environment variable"
                )
        return options


class Net(Section):
    """Policy and critic."""

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (64, 64)
    """Width of each hidden layer."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Between the layers."""
    shared: bool = False
    """One net with two heads, or two nets."""
    log_std: float | None = Field(default=None, ge=-20, le=20)
    """Where the log of the action's standard deviation starts (box actions only); 0 when empty."""


class Optim(Section):
    """The optimizer of both nets."""

    kind: Literal["adam", "rmsprop"] = "adam"
    """Adam, or RMSprop as A2C was published with."""
    lr: float = Field(default=3e-4, gt=0)
    """Learning rate at the start."""
    schedule: Literal["constant", "linear"] = "linear"
    """`linear` falls to 0 at the end of the run."""
    eps: float = Field(default=1e-5, gt=0)
    """The optimizer's ε."""
    max_grad_norm: float = Field(default=0.5, gt=0)
    """Gradients of both nets together are scaled down to this norm."""


class Evaluation(Section):
    """Episodes with the likeliest action, on frozen statistics."""

    episodes: int = Field(default=100, ge=1)
    """Episodes in one look."""
    every: int | None = Field(default=None, ge=1)
    """Environment steps between two looks during training; empty: one look, at the end."""
    gif_seconds: float = Field(default=8.0, ge=0)
    """Length of the GIF of one episode; 0: none."""


class Control(Section):
    """A whole control run."""

    env: str
    """A Gymnasium id, `CartPole-v1`, or `module:Name-v0` for an environment of one's own."""
    algorithm: Algorithm = "ppo-clip"
    """Which of the four learns."""
    seed: int = Field(default=0, ge=0)
    """Every random stream derives from it."""
    steps: int = Field(default=100_000, ge=1)
    """Environment steps, over all environments; the last round is played to its end."""
    envs: Envs = Envs()
    net: Net = Net()
    optim: Optim = Optim()
    evaluation: Evaluation = Evaluation()
    rollout: int = Field(default=128, ge=1)
    """Steps in each environment before the policy learns from them: one round."""
    epochs: int = Field(default=1, ge=1)
    """Passes over one round."""
    minibatches: int = Field(default=1, ge=1)
    """Updates in one pass."""
    gamma: float = Field(default=0.99, gt=0, le=1)
    """Discount per step."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's λ."""
    normalise_advantages: bool = True
    """Shift and scale the advantages of each minibatch to mean 0 and standard deviation 1 (ddof 0). Where they deviate
    by less than 1e-3 they are scaled up by less; envs.normalise_reward is for rewards that small."""
    value_coef: float = Field(default=1.0, ge=0)
    """Weight of the critic's loss, ½ of the squared error; 1 here is `vf_coef: 0.5` elsewhere."""
    value_clip: float | None = Field(default=None, gt=0)
    """How far a value may move from the old one before its loss is clipped; empty: no clipping."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy in the loss."""
    clip: float | None = Field(default=None, gt=0, lt=1)
    """ppo-clip: ε at the start."""
    clip_high: float | None = Field(default=None, gt=0)
    """ppo-clip: ε above, at least `clip`, so that a ratio may rise further than it may fall; `clip` when empty."""
    dual_clip: float | None = Field(default=None, gt=1)
    """ppo-clip: where A < 0, a ratio counts at most this much; empty: in full."""
    clip_schedule: Literal["constant", "linear"] = "constant"
    """ppo-clip: `linear` lets ε, above and below, fall to 0 at the end of the run."""
    beta: float | None = Field(default=None, ge=0)
    """ppo-kl: weight of KL(π_old‖π_θ), at the start when there is a target."""
    kl_target: float | None = Field(default=None, gt=0)
    """ppo-kl: nats a step that β is doubled and halved towards after each round; empty: β is fixed."""
    max_weight: float | None = Field(default=None, gt=0)
    """is-pg: a weight π_θ/μ counts at most this much; empty: in full."""
    log_every: int = Field(default=2_000, ge=1)
    """Environment steps between two lines of metrics."""

    @property
    def round_size(self) -> int:
        """Environment steps of one round."""
        return self.rollout * self.envs.count

    @property
    def whole_steps(self) -> int:
        """`steps`, up to the end of the last round."""
        return math.ceil(self.steps / self.round_size) * self.round_size

    @model_validator(mode="before")
    @classmethod
    def _algorithm_defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        tree = cast("dict[str, Any]", given)
        algorithm = tree.get("algorithm", "ppo-clip")
        return merged(DEFAULTS[algorithm], tree) if algorithm in ALGORITHMS else tree

    @model_validator(mode="after")
    def _agree(self) -> Control:
        for name, owner in OWN.items():
            if getattr(self, name) is not None and self.algorithm != owner:
                raise ValueError(f"algorithm is {self.algorithm}, which has no `{name}`; {owner} has")
        if self.clip_schedule != "constant" and self.algorithm != "ppo-clip":
            raise ValueError(f"algorithm is {self.algorithm}, which has no `clip_schedule`; ppo-clip has")
        if self.algorithm == "a2c" and (self.epochs, self.minibatches) != (1, 1):
            raise ValueError(
                "algorithm is a2c, which learns from a round in one update; set epochs and minibatches to 1, or "
                "take is-pg, which weights what is older"
            )
        if self.algorithm == "ppo-clip" and self.clip is None:
            raise ValueError("algorithm is ppo-clip, which needs `clip`; is-pg is the one without")
        if self.clip is not None and self.clip_high is not None and self.clip_high < self.clip:
            raise ValueError(
                f"clip_high ({self.clip_high:g}) is below clip ({self.clip:g}), but it is the wider bound; raise "
                "it, or lower clip"
            )
        if self.algorithm == "ppo-kl" and (self.beta is None or (self.kl_target and self.beta == 0)):
            raise ValueError(
                "algorithm is ppo-kl, which needs `beta`, above 0 where kl_target steers it by factors; set it"
            )
        if self.minibatches > self.round_size:
            raise ValueError(
                f"minibatches ({self.minibatches}) exceed the {self.round_size} steps of a round "
                "(rollout × envs.count); lower them"
            )
        if self.normalise_advantages and self.round_size < 2 * self.minibatches:
            raise ValueError(
                f"normalise_advantages makes 0 of the advantage of a minibatch of one step, and the {self.round_size} "
                f"steps of a round (rollout × envs.count) make {self.minibatches} minibatches; lower minibatches, "
                "lengthen the rollout, or turn it off"
            )
        return self


def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`high` over `low`, section by section."""
    out = copy.deepcopy(low)
    for key, value in high.items():
        both = isinstance(out.get(key), dict) and isinstance(value, dict)
        out[key] = merged(out[key], cast("dict[str, Any]", value)) if both else copy.deepcopy(value)
    return out


def shipped_control() -> dict[str, Path]:
    """The control recipes that come with the package, by name."""
    return {path.stem: path for path in sorted((RECIPES / "control").glob("*.yaml"))}


def control_recipe(source: str) -> Path | None:
    """The recipe that is meant: a file, a shipped name, or an environment that a shipped recipe names."""
    if Path(source).suffix in {".yaml", ".yml"} or Path(source).is_file():
        return Path(source)
    recipes = shipped_control()
    named = [path for path in recipes.values() if read_tree(path, []).get("env") == source]
    return recipes.get(source) or (named[0] if named else None)


def load_control(
    source: str,
    *,
    algorithm: str | None = None,
    overrides: Sequence[str] = (),
) -> Control:
    """The configuration of a recipe file, a shipped recipe, or an environment, for one algorithm.

    Raises UserError: no such file, unknown key (with the nearest), wrong type, contradiction.
    """
    layers = _layers(source, algorithm, overrides)
    tree = merged(layers.file, layers.variant)
    for key, value in layers.sets:
        put(tree, key, value)
    return parse_control(tree | {"algorithm": layers.algorithm}, where=layers.where, overrides=overrides)


def control_origins(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same layers as `load_control`, with the name of a layer in the place of each value."""
    layers = _layers(source, None, overrides)
    name = Path(layers.where).name
    tree = merged(marked(layers.file, name), marked(layers.variant, f"{name}, algorithms.{layers.algorithm}"))
    for key, value in layers.sets:
        put(tree, key, marked(value, "--set"))
    return tree


class _Layers(NamedTuple):
    """What a recipe consists of, later parts standing over earlier ones."""

    where: str
    algorithm: str
    file: dict[str, Any]
    variant: dict[str, Any]
    """What the file wants otherwise for this algorithm."""
    sets: list[tuple[str, Any]]


def _layers(source: str, algorithm: str | None, overrides: Sequence[str]) -> _Layers:
    path = control_recipe(source)
    tree: dict[str, Any] = read_tree(path, [*shipped_control()]) if path else {"env": source}
    if language := {"sft", "reward", "ppo"} & tree.keys():
        raise UserError(
            f"{path}: a recipe of language models, with a section `{min(language)}`; `ppolite run {path}` runs it"
        )
    where, sets = str(path or source), [read_override(override) for override in overrides]
    variants = tree.pop("algorithms", None) or {}
    if not isinstance(variants, dict):
        raise UserError(f"{where}: `algorithms` is no section; write it as {{ppo-clip: {{KEY: VALUE}}}}")
    variants = cast("dict[str, Any]", variants)
    top = copy.deepcopy(tree)
    for key, value in sets:
        put(top, key, value)
    chosen: str = algorithm or top.get("algorithm", "ppo-clip")
    set_here = [override for override in overrides if override.startswith("algorithm=")]
    _known(chosen, "--algorithm" if algorithm else f"--set {set_here[-1]}" if set_here else where)
    for name in variants:
        _known(name, where)
    variant = variants.get(chosen) or {}
    if not isinstance(variant, dict):
        raise UserError(
            f"{where}: `algorithms.{chosen}` is no section; give it keys of a recipe, or leave it out"
        )
    return _Layers(where, chosen, tree, cast("dict[str, Any]", variant), sets)


def load_control_run(folder: Path, overrides: Sequence[str] = ()) -> Control:
    """The configuration that a run folder was made with. Raises UserError where it is none of ours."""
    if not is_control_run(folder):
        raise UserError(
            f"{folder}: no control run (its recipe.yaml names no `env`); `ppolite control ENV` makes one"
        )
    return load_control(str(folder / "recipe.yaml"), overrides=overrides)


def parse_control(tree: dict[str, Any], *, where: str = "recipe", overrides: Sequence[str] = ()) -> Control:
    """Check a control recipe given as plain data. Raises UserError with the first thing that is wrong."""
    refuse_secrets(tree, where)
    try:
        return Control.model_validate(tree)
    except ValidationError as error:
        raise explain(error, where, Control, overrides) from None


def is_control_run(folder: Path) -> bool:
    """Whether a run folder was made by `ppolite control`: its recipe names an environment."""
    path = folder / "recipe.yaml"
    return path.exists() and "env" in read_tree(path, [])


def _known(name: object, where: str) -> None:
    if name not in ALGORITHMS:
        near = (
            ["ppo-clip"]
            if name == "ppo"
            else difflib.get_close_matches(str(name), ALGORITHMS, n=1, cutoff=0.3)
        )
        hint = f"did you mean {near[0]}? There" if near else "there"
        raise UserError(
            f"{where}: unknown algorithm {reprlib.repr(name)}; {hint} are {', '.join(ALGORITHMS)}"
        )
