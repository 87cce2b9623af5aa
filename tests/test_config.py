"""The recipe: what is read, what is refused and how, and that a saved one is the same again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from ppolite.config import PPO, SOURCES, Recipe, load_recipe, parse_recipe, recipe_path, save_recipe
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
        "iterate",
        "evaluation",
        "optim",
        "critic",
        "kl",
        "checkpoint",
        "faults",
        "watch",
    )
    for section in (*sections(Recipe), *SOURCES.values()):
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
    assert ppo(behaviour="sft", sft_samples=32, ess_floor=0) == (0, 32, 0.0)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_recipe({}).seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sedd": 1}, "r: unknown key `sedd`; did you mean `seed`?"),
        ({"train": {"rank": 1}}, "unknown key `train.rank`; did you mean `train.lora_rank`?"),
        ({"learning_rate": 1}, "unknown key `learning_rate`; did you mean `sft.optim.lr`?"),
        ({"sft": {"data": DATA, "lr": 1}}, "unknown key `sft.lr`; did you mean `sft.optim.lr`?"),
        ({"ppo": {"prompts": DATA, "kl_coef": 1}}, "unknown key `ppo.kl_coef`; did you mean `ppo.kl.beta`?"),
        ({"ppo": {"prompts": DATA, "gae_lambda": 1}}, "unknown key `ppo.gae_lambda`; did you mean `ppo.lam`?"),
        ({"ppo": {"prompts": DATA, "held_out": 1}}, "did you mean `ppo.prompts.held_out`?"),
        ({"ppo": {"prompts": DATA, "xyz": 1}}, "unknown key `ppo.xyz`; known here: prompts, start,"),
        ({"ppo": {"prompts": DATA, "kl": 0.1}}, "`ppo.kl` is 0.1, but it is a section; set `ppo.kl.beta`,"),
        ({"trunk": 20}, "`trunk` is 20, but it is a section; set `trunk.split` or `trunk.keep`"),
        ({"ppo": {"prompts": DATA, "kl": 1}}, "or another key of it"),
        ({"ppo": {"prompts": DATA, "kl": {"betta": 1}}}, "unknown key `ppo.kl.betta`; did you mean `ppo.kl.beta`?"),
        ({"trunk": {"zzz": 1}}, "unknown key `trunk.zzz`; known here: split"),
        ({"ppo": {}}, "`ppo.prompts` is missing; add it"),
        ({"ppo": {"promts": DATA}}, "unknown key `ppo.promts`; did you mean `ppo.prompts`?"),
        ({"seed": "one"}, "`seed` is 'one'; input should be a valid integer"),
        ({"train": {"kind": "all"}}, "`train.kind` is 'all'; input should be 'lora', 'layers' or 'full'"),
        ({"ppo": 3}, "`ppo` is 3"),
        ({"ppo": {"prompts": DATA, "critic": {"micro_batch_tokens": 5}}}, "`ppo.critic.micro_batch_tokens`"),
        ({"ppo": {"prompts": DATA, "clip": 0.1, "objective": "kl"}}, "ppo: objective is `kl`"),
        ({"ppo": {"prompts": DATA, "penalty_target": 0.1}}, "ppo: objective is `clip`"),
        ({"ppo": {"prompts": DATA, "penalty_beta": 2.0}}, "have no `penalty_beta`; remove it or set objective: kl"),
        ({"ppo": {"prompts": DATA, "objective": "kl", "dual_clip": 3.0}}, "no `dual_clip`; remove it or set objective"),
        ({"ppo": {"prompts": DATA, "clip": 0.3, "clip_high": 0.28}}, "ppo: clip_high (0.28) is below clip (0.3)"),
        ({"ppo": {"prompts": DATA, "dual_clip": 1.0}}, "`ppo.dual_clip` is 1.0; input should be greater than 1"),
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
        ({"iterate": {"by": "me"}}, "`iterate.by` is 'me'; input should be 'file', 'person' or 'judge'"),
        ({"iterate": {"candidates": 1}}, "`iterate.candidates` is 1; input should be greater"),
        ({"iterate": {"n": 4}}, "unknown key `iterate.n`; known here: rounds, by, prompts, candidates, held_out"),
        ({"roles": "separate", "trunk": {"split": 1}}, "roles: separate shares nothing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tree: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        parse_recipe(tree, where="r")
    assert str(caught.value).startswith("r: ")
    assert "\n" not in str(caught.value)


FUNCTION = {"kind": "function", "function": "m:f"}
HTTP = {"kind": "http", "url": "https://a.test/score"}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([{**FUNCTION, "tmeout": 3}], "key `ppo.rewards.0.tmeout`; did you mean `ppo.rewards.0.timeout`?"),
        ([FUNCTION, {**HTTP, "token": "x"}], "`ppo.rewards.1.token`; did you mean `ppo.rewards.1.token_env`?"),
        ([{"kind": "htpp"}], "`ppo.rewards.0` has the kind `htpp`; did you mean `http`?"),
        ([{"function": "m:f"}], "`ppo.rewards.0` has no `kind`; known here: model, function, http, classifier, length"),
        ([{"kind": "function"}], "`ppo.rewards.0.function` is missing; add it"),
        (["model"], "`ppo.rewards.0` is 'model'"),
        ([{**FUNCTION, "function": "f"}], "`f` names no function; write MODULE:NAME or FILE.py:NAME"),
        ([{**FUNCTION, "function": "m:f(x)"}], "names no function"),
        ([{**FUNCTION, "timeout": 0}], "`ppo.rewards.0.timeout` is 0; input should be greater than 0"),
        ([{**FUNCTION, "weight": 0}], "`ppo.rewards.0.weight` is 0"),
        ([{**FUNCTION, "weight": 2}], "`f` is the only judge, so its weight has nothing to be weighed against"),
        ([FUNCTION, FUNCTION], "`f` is taken; give that source another `name`"),
        ([{**FUNCTION, "name": "shaped_mean"}], "`shaped_mean` is taken"),
        ([{**FUNCTION, "name": "a b"}], "`ppo.rewards.0.name` is 'a b'"),
        ([{"kind": "model"}, {"kind": "model", "name": "x"}], "a run has one reward model"),
        ([{**HTTP, "url": "file:///etc/passwd"}], "expected an address that begins with http:// or https://"),
        ([{**HTTP, "url": "https:///x"}], "expected an address that begins with"),
        ([{**HTTP, "url": "https://a.test:port/"}], "it is no address; write https://HOST/PATH"),
        ([{**HTTP, "url": "https://a.test/b c"}], "it holds characters that an address has not"),
        ([{**HTTP, "deadline": 1}], "deadline (1 s) must not be below timeout (30 s)"),
        ([{**HTTP, "url": "http://a.test/", "token_env": "T"}], "a.test would get the token of T unencrypted"),
        ([{**HTTP, "url": "http://127.a.test/", "token_env": "T"}], "127.a.test would get the token"),
        ([{"kind": "length"}], "a length penalty needs `min`, `max` or both"),
        ([{"kind": "length", "min": 5, "max": 4}], "min (5) exceeds max (4)"),
        ([{"kind": "length", "max": 128}], "`length` allows 128 tokens, which no response of max_new_tokens (128)"),
        ([{"kind": "format", "pattern": "("}], "`(` is no regular expression"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_rewards_is_said(rewards: list[object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        parse_recipe({"ppo": {"prompts": DATA, "rewards": rewards}}, where="r")
    assert str(caught.value).startswith("r: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"disagreement": 1}, "disagreement is one of two judges or more, but rewards has 0"),
        ({"disagreement": 1, "rewards": [FUNCTION, {"kind": "length", "max": 9}]}, "but rewards has 1"),
        ({"unit_samples": 64}, "no source of rewards has an empty shift or scale"),
        ({"unit_samples": 64, "rewards": [FUNCTION, {"kind": "model"}]}, "no source of rewards has an empty"),
    ],
)
def test_settings_of_rewards_that_would_do_nothing(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe({"ppo": {"prompts": DATA, **keys}})


@pytest.mark.parametrize(
    "source",
    [
        {"url": "https://me:s3cret@a.test/"},
        {"url": "https://s3cret@a.test/"},
        {"url": "https://a.test/?api_key=s3cret"},
        {"url": "https://a.test/?x=1&access_token=s3cret"},
        {"url": "https://a.test/?sig=s3cret"},
        {"url": "ftp://me:s3cret@a.test/"},
        {"url": "https://me:s3cret@a.test:x/"},
        {"token_env": "sk-s3cret"},
        {"token_env": "hf_s3cret"},
        {"token": "s3cret"},
    ],
)
def test_a_secret_in_a_recipe_is_refused_without_being_shown(source: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe({"ppo": {"prompts": DATA, "rewards": [{**HTTP, **source}]}})
    assert "s3cret" not in str(caught.value)


def test_addresses_and_tokens_that_are_fine() -> None:
    for source in (
        {"url": "http://localhost:8000/", "token_env": "T"},
        {"url": "http://127.0.0.1:8000/score?model=a&n=1", "token_env": "MY_TOKEN"},
        {"url": "http://[::1]:8000/", "token_env": "T"},
        {"url": "https://a.test/", "token_env": "T"},
        {"url": "http://a.test/?design=x"},
    ):
        parse_recipe({"ppo": {"prompts": DATA, "rewards": [{**HTTP, **source}]}})


def test_who_scores() -> None:
    def ppo(*rewards: object) -> PPO:
        return PPO.model_validate({"prompts": DATA, "rewards": rewards})

    assert ppo().asks_model
    assert ppo({"kind": "model"}, {"kind": "length", "max": 9}).asks_model
    assert not ppo(FUNCTION).asks_model
    named = ppo(FUNCTION, HTTP, {"kind": "length", "max": 9, "name": "brief"}, {"kind": "model"})
    assert [source.title for source in named.rewards] == ["f", "http", "brief", "model"]


def test_recipes_with_rewards_are_saved_and_read_again(tmp_path: Path) -> None:
    rewards = [FUNCTION, HTTP, {"kind": "classifier", "model": "x", "label": 1}, {"kind": "model"},
               {"kind": "length", "max": 9}, {"kind": "format", "pattern": r"\d+"}]  # fmt: skip
    recipe = parse_recipe({"ppo": {"prompts": DATA, "rewards": rewards, "disagreement": 1}})
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe
    (tmp_path / "s.yaml").write_text("ppo: {prompts: {path: x}}\n")
    changed = load_recipe(tmp_path / "s.yaml", ["ppo.rewards=[{kind: length, max: 9}]"])
    assert changed.ppo is not None
    assert changed.ppo.rewards[0].title == "length"


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
    with pytest.raises(UserError, match=r"^--set ppo\.x=1: unknown key `ppo\.x`"):
        load_recipe(path, ["seed=2", "ppo.x=1"])
    path.write_text("sed: 1\n")
    with pytest.raises(UserError, match=r"r\.yaml: unknown key `sed`"):
        load_recipe(path, ["seed=2"])


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


@pytest.mark.parametrize(
    "text",
    [
        "sk-learn-text-classifier-of-mine-2",
        "hf_mirror/model",
        "a/b@v2",
        "embedded:film",
        "https://a.test/x",
        "key",
    ],
)
def test_what_is_no_secret(text: str) -> None:
    assert parse_recipe({"model": text}).model == text


def test_a_section_given_in_part_keeps_its_other_defaults() -> None:
    recipe = parse_recipe(
        {"ppo": {"prompts": DATA, "optim": {"micro_batch_tokens": 64}, "critic": {"warmup": 0.5}}}
    )
    assert recipe.ppo is not None
    assert (recipe.ppo.optim.lr, recipe.ppo.optim.schedule, recipe.ppo.optim.micro_batch_tokens) == (
        3e-5,
        "constant",
        64,
    )
    assert (recipe.ppo.critic.lr, recipe.ppo.critic.schedule, recipe.ppo.critic.warmup) == (
        5e-5,
        "constant",
        0.5,
    )


EMPTY = {
    "train": {"kind": "layers"},
    "sft": {"data": {"path": "a", "held_out": 0}},
    "reward": {"data": {"path": "b"}, "kind": "pairs"},
    "ppo": {"prompts": {"path": "c"}, "rewards": [FUNCTION]},
    "checkpoint": {"every": 3},
}


def test_a_saved_recipe_loads_whatever_it_has_no_use_for(tmp_path: Path) -> None:
    """All keys stand in it; those that others turn off are empty."""
    recipe = parse_recipe(EMPTY)
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert recipe.train.rank == 16
    assert recipe.sft is not None
    assert (recipe.sft.look_every, recipe.sft.look_examples) == (10, 64)
    assert recipe.ppo is not None
    assert (recipe.ppo.kl.reaction, recipe.ppo.critic_start, recipe.ppo.least_accuracy) == (1000, "zero", 0.6)


def test_a_control_recipe_is_sent_to_its_command(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("env: CartPole-v1\n")
    with pytest.raises(UserError, match=rf"`ppolite control {path}` runs it"):
        load_recipe(path)
