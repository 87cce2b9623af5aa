"""Every setting of a control recipe does something: each is changed, and what it should change is looked at.

The keys come from the pydantic model, so a new setting without a case here fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from ppolite.config import put, read_override
from ppolite.control import envs as envs_module
from ppolite.control import run as run_module
from ppolite.control.config import Control, parse_control
from ppolite.control.run import run_control

Changes = dict[str, Any]
BASE: Changes = {
    "env": "tiny/Match-v0", "steps": 96, "rollout": 12, "epochs": 2, "minibatches": 2, "log_every": 24,
    "envs": {"count": 2}, "net": {"hidden": [8]}, "optim": {"lr": 0.01},
    "evaluation": {"episodes": 3, "gif_seconds": 0.0},
}  # fmt: skip


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


@dataclass
class Outcome:
    """What a run left behind."""

    rows: list[dict[str, Any]]
    weights: dict[str, Tensor]
    result: dict[str, Any]
    frames: int
    kind: type

    def column(self, key: str) -> list[Any]:
        return [row[key] for row in self.rows if key in row]

    @property
    def moved(self) -> float:
        return sum(
            float(w.double().abs().sum()) for name, w in self.weights.items() if "obs_norm" not in name
        )


Sees = Callable[[Outcome, Outcome], bool]


@dataclass
class Case:
    """Change the key to `value`; `given` holds other settings of both runs."""

    value: Any
    sees: Sees = lambda a, b: a.moved != b.moved
    given: Changes = field(default_factory=dict)


def differs(key: str) -> Sees:
    return lambda a, b: a.column(key) != b.column(key)


def size(outcome: Outcome) -> int:
    return sum(w.numel() for w in outcome.weights.values())


def count(key: str) -> Callable[[Outcome], int]:
    return lambda a: len(a.column(key))


A2C = {"algorithm": "a2c", "epochs": 1, "minibatches": 1}
KL, IS = {"algorithm": "ppo-kl"}, {"algorithm": "is-pg"}
BOX = {"env": "tiny/Aim-v0"}


def unmoved(sees: Sees) -> Sees:
    """The policy is the same, and this is seen."""
    return lambda a, b: a.moved == b.moved and sees(a, b)


def moved(sees: Sees) -> Sees:
    """The policy is another one, and this is seen."""
    return lambda a, b: a.moved != b.moved and sees(a, b)


def less(key: str, margin: float = 0.0) -> Sees:
    """The column's sum falls."""
    return lambda a, b: sum(b.column(key)) < sum(a.column(key)) - margin


CASES: dict[str, Case] = {
    "env": Case("tiny/Aim-v0", lambda a, b: size(a) != size(b)),
    "algorithm": Case("ppo-kl", differs("penalty/beta")),
    "seed": Case(1),
    "steps": Case(144, lambda a, b: b.rows[-1]["step"] == 144 > a.rows[-1]["step"]),
    "rollout": Case(6, moved(lambda a, b: count("policy/loss")(a) == count("policy/loss")(b) == 4)),
    "epochs": Case(1),
    "minibatches": Case(1),
    "gamma": Case(0.5),
    "lam": Case(0.0),
    "normalise_advantages": Case(False),
    "value_coef": Case(0.0),
    "value_clip": Case(1e-4),
    "entropy_coef": Case(0.5),
    "clip": Case(1e-3, lambda a, b: sum(b.column("policy/clip_fraction")) > sum(a.column("policy/clip_fraction"))),
    "clip_high": Case(0.5, less("policy/clip_fraction"), given={"clip": 1e-3}),
    "dual_clip": Case(1.0001, lambda a, b: less("policy/clip_fraction")(b, a), given={"clip": 0.9}),
    "clip_schedule": Case("linear", lambda a, b: b.column("policy/clip")[-1] < b.column("policy/clip")[0] == 0.2),
    "beta": Case(50.0, less("kl/old_step"), given=KL),
    "kl_target": Case(1e9, lambda a, b: b.column("penalty/beta")[-1] == 2**-4, given=KL),
    "max_weight": Case(0.5, differs("policy/clip_fraction"), given=IS),
    "log_every": Case(48, lambda a, b: [r["step"] for r in b.rows] == [48, 96] and len(a.rows) == 4),
    "envs.count": Case(4, lambda a, b: a.rows[0]["episodes"] == 2 and b.rows[0]["episodes"] == 4),
    "envs.options": Case({"length": 4}, lambda a, b: (a.rows[0]["length/mean"], b.rows[0]["length/mean"]) == (8, 4)),
    "envs.vectorization": Case("async", unmoved(lambda a, b: (a.kind, b.kind) == (SyncVectorEnv, AsyncVectorEnv))),
    "envs.normalise_obs": Case(True, moved(lambda a, b: "obs_norm.mean" in b.weights)),
    "envs.normalise_reward": Case(True, moved(lambda a, b: a.rows[0]["return/max"] == b.rows[0]["return/max"])),
    "net.hidden": Case([4, 4], lambda a, b: size(a) != size(b)),
    "net.activation": Case("relu"),
    "net.shared": Case(True, lambda a, b: size(b) < size(a)),
    "net.log_std": Case(-1.0, less("policy/entropy", 4.0), given=BOX),
    "optim.kind": Case("rmsprop"),
    "optim.lr": Case(0.02, moved(lambda a, b: b.column("lr")[0] == 0.02)),
    "optim.schedule": Case("constant", moved(lambda a, b: b.column("lr") == [0.01] * 4)),
    "optim.eps": Case(0.1),
    "optim.max_grad_norm": Case(1e-4),
    "evaluation.episodes": Case(4, unmoved(lambda a, b: (a.result["episodes"], b.result["episodes"]) == (3, 4))),
    "evaluation.every": Case(24, lambda a, b: (count("eval/return_mean")(a), count("eval/return_mean")(b)) == (1, 4)),
    "evaluation.gif_seconds": Case(0.4, unmoved(lambda a, b: a.frames == 0 < b.frames)),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Changes], Outcome]:
    """A run for each set of changes, once."""
    folder, numbers = tmp_path_factory.mktemp("settings"), iter(range(1000))

    @lru_cache
    def cached(text: str) -> Outcome:
        tree = json.loads(json.dumps(BASE))
        for key, value in json.loads(text).items():
            put(tree, *read_override(f"{key}={json.dumps(value)}"))
        return run(parse_control(tree), folder / str(next(numbers)))

    return lambda changes: cached(json.dumps(changes))


def run(config: Control, folder: Path) -> Outcome:
    made: list[type] = []
    real = envs_module.gym.make_vec

    def watched(*args: Any, **kwargs: Any) -> Any:
        envs = real(*args, **kwargs)
        made.append(type(envs))
        return envs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs_module.gym, "make_vec", watched)
        patch.setattr(
            run_module, "write_control_report", lambda run: run
        )  # no setting is about it, and it is slow
        result = run_control(config, folder)
    rows: dict[int, dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k[:4] != "time"})
    frames = 0
    if (folder / "agent.gif").exists():
        with Image.open(folder / "agent.gif") as gif:
            frames = gif.n_frames  # type: ignore[attr-defined]
    return Outcome(
        list(rows.values()), load_file(folder / "policy" / "model.safetensors"), result, frames, made[0]
    )


def test_all_settings_have_a_case() -> None:
    assert set(leaves(Control)) == set(CASES)


@pytest.mark.parametrize("key", [*leaves(Control)])
def test_setting_does_something(key: str, outcome: Callable[[Changes], Outcome]) -> None:
    case = CASES[key]
    assert case.sees(outcome(case.given), outcome({**case.given, key: case.value}))
