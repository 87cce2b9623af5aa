"""The recipe: what is read, what is refused and how, and that a saved one is the same again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from ppolite.config import PPO, Recipe, load_recipe, parse_recipe, recipe_path, save_recipe
from ppolite.types import Sampling, UserError

DATA = {"path": "x.jsonl"}
A2C = {"prompts": DATA, "objective": "a2c", "epochs": 1, "minibatches": 1}
STALE = {"prompts": DATA, "behaviour": "stale"}
OLD = {"prompts": DATA, "behaviour": "sft"}


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for info in model.model_fields.values():
        for option in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from sections(option)


def test_every_setting_is_explained() -> None:
    told = (
        "data",
        "prompts",
        "model",
        "trunk",
        "train",
        "sft",
        "reward",
        "ppo",
        "evaluation",
        "optim",
        "critic",
        "kl",
    )
    for section in sections(Recipe):
        assert section.__doc__, section
        for name, info in section.model_fields.items():
            assert info.description or name in told, f"{section.__name__}.{name}"


def test_defaults_work() -> None:
    recipe = parse_recipe({"ppo": {"prompts": DATA}})
    assert recipe.ppo is not None
    assert recipe.ppo.sampling == Sampling(128, 1.0, 1.0)
    assert recipe.sft is None


def test_whose_rollouts() -> None:
    def ppo(**keys: object) -> tuple[int, int, float]:
        made = PPO.model_validate({"prompts": DATA, "rollouts": 32, **keys})
        return made.lag, made.stored, made.least_ess

    assert ppo() == ppo(objective="is", weight_kind="trajectory", weight_cap=3) == (0, 0, 0.0)
    assert ppo(behaviour="stale") == (1, 0, 0.0)
    assert ppo(behaviour="stale", stale_steps=0, weight_cap=1) == (0, 0, 0.0)
    assert ppo(behaviour="stale", stale_steps=3, objective="kl", penalty_target=0.1) == (3, 0, 0.0)
    assert ppo(behaviour="sft", objective="is") == (0, 256, 0.5)
    assert ppo(behaviour="sft", sft_samples=32, ess_floor=0, on_low_ess="draw") == (0, 32, 0.0)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_recipe({}).seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sedd": 1}, "r: unknown key `sedd`; did you mean `seed`?"),
        ({"train": {"rank": 1}}, "unknown key `train.rank`; did you mean `lora_rank`?"),
        ({"ppo": {"prompts": DATA, "kl": {"betta": 1}}}, "unknown key `ppo.kl.betta`; did you mean `beta`?"),
        ({"trunk": {"zzz": 1}}, "unknown key `trunk.zzz`; known here: split"),
        ({"ppo": {}}, "`ppo.prompts` is missing; add it"),
        ({"ppo": {"promts": DATA}}, "unknown key `ppo.promts`; did you mean `prompts`?"),
        ({"seed": "one"}, "`seed` is 'one'; input should be a valid integer"),
        ({"train": {"kind": "all"}}, "`train.kind` is 'all'; input should be 'lora', 'layers' or 'full'"),
        ({"ppo": 3}, "`ppo` is 3"),
        ({"ppo": {"prompts": DATA, "critic": {"micro_batch_tokens": 5}}}, "`ppo.critic.micro_batch_tokens`"),
        ({"ppo": {"prompts": DATA, "clip": 0.1, "objective": "kl"}}, "ppo: objective is `kl`"),
        ({"ppo": {"prompts": DATA, "penalty_target": 0.1}}, "ppo: objective is `clip`"),
        ({"ppo": {**A2C, "epochs": 4}}, "learns once from fresh rollouts, but epochs is 4 and minibatches 1"),
        ({"ppo": {**A2C, "behaviour": "stale"}}, "fresh rollouts only, but behaviour is `stale`; set objective: is"),
        ({"ppo": {**A2C, "clip": 0.1}}, "behaviour `fresh`, which have no `clip`; remove it or set objective: clip"),
        ({"ppo": {**A2C, "weight_kind": "step"}}, "no `weight_kind`; remove it or set objective: is, or behaviour"),
        ({"ppo": {"prompts": DATA, "weight_cap": 2}}, "`clip` and behaviour `fresh`, which have no `weight_cap`"),
        ({"ppo": {**STALE, "weight_cap": 0.5}}, "`ppo.weight_cap` is 0.5; input should be greater"),
        ({"ppo": {"prompts": DATA, "stale_steps": 1}}, "no `stale_steps`; remove it or set behaviour: stale"),
        ({"ppo": {"prompts": DATA, "behaviour": "stale(2)"}}, "`ppo.behaviour` is 'stale(2)'; input should be 'fresh'"),
        ({"ppo": {**STALE, "sft_samples": 64}}, "no `sft_samples`; remove it or set behaviour: sft"),
        ({"ppo": {**STALE, "ess_floor": 0.1}}, "no `ess_floor`; remove it or set behaviour: sft"),
        ({"ppo": {**STALE, "on_low_ess": "stop"}}, "no `on_low_ess`; remove it or set behaviour: sft"),
        ({"ppo": {**STALE, "stale_steps": -1}}, "`ppo.stale_steps` is -1"),
        ({"ppo": {**OLD, "sft_samples": 100}}, "sft_samples (100) must be a multiple of rollouts (64)"),
        ({"ppo": {"prompts": DATA, "minibatches": 65}}, "minibatches (65) exceed rollouts (64)"),
        ({"ppo": {"prompts": DATA, "kl": {"target": 1, "horizon": 12}}}, "kl.horizon (12) must exceed"),
        ({"roles": "separate", "trunk": {"split": 1}}, "roles: separate shares nothing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tree: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        parse_recipe(tree, where="r")
    assert str(caught.value).startswith("r: ")
    assert "\n" not in str(caught.value)


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("seed: 1\nppo:\n  prompts: {path: x.jsonl}\n")
    sets = [
        "seed=7",
        "ppo.kl.beta=1e-3",
        "ppo.reward_clip=null",
        "train.kind=full",
        "ppo.prompts.columns={prompt: q}",
    ]
    recipe = load_recipe(path, sets)
    assert recipe.ppo is not None
    assert (recipe.seed, recipe.ppo.kl.beta, recipe.ppo.reward_clip) == (7, 1e-3, None)
    assert recipe.ppo.prompts.columns == {"prompt": "q"}
    assert load_recipe(path, ["ppo=null"]).ppo is None
    with pytest.raises(UserError, match=r"r\.yaml: unknown key `ppo\.x`"):
        load_recipe(path, ["ppo.x=1"])


def test_saved_and_read_again(tmp_path: Path) -> None:
    recipe = parse_recipe(
        {"sft": {"data": {"path": "数据.jsonl"}}, "ppo": {"prompts": DATA, "objective": "kl"}}
    )
    save_recipe(recipe, tmp_path / "r.yaml")
    text = (tmp_path / "r.yaml").read_text(encoding="utf-8")
    assert "数据.jsonl" in text
    assert set(PPO.model_fields) <= set(re.findall(r"^  (\w+):", text, re.MULTILINE))
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_a_name_is_a_shipped_recipe_unless_a_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_path("film").name == "film.yaml"
    (tmp_path / "film").write_text("seed: 5\n")
    assert load_recipe("film").seed == 5
