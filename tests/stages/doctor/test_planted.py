"""Faults planted in the files, recipes and models of the tiny world, each found by the check that is for it.

Every case gets a run folder with SFT and reward model and a recipe that is sound but for what it plants. What a sound
recipe gives is tested as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.rollout.sources.kit import classifier
from tests.world import TEMPLATE, WORDS, World, write_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig

from ppolite.config import Recipe
from ppolite.stages.doctor.finding import Finding
from ppolite.stages.doctor.full import examine
from ppolite.stages.plan import plan
from ppolite.stages.reward import RewardModel

SOUND = {"sft__data__held_out": 0.2}
"""The same prompts are held out everywhere."""
ONLY_SFT = {"reward": None, "ppo": None}
ONLY_REWARD = {"sft": None, "ppo": None}
ONLY_PPO = {"sft": None, "reward": None}


@dataclass
class Place:
    """Where faults are planted: a run folder and a folder for other files."""

    world: World
    run: Path
    folder: Path

    def recipe(self, **changes: Any) -> Recipe:
        return self.world.recipe(**SOUND | changes)

    def data(self, name: str, change: Callable[[dict[str, Any], int], dict[str, Any] | None]) -> str:
        """Rows of the world, changed; None leaves one out."""
        lines = Path(self.world.path(name)).read_text(encoding="utf-8").splitlines()
        rows = [change(json.loads(line), i) for i, line in enumerate(lines)]
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row), encoding="utf-8")
        return str(path)

    def model(self, change: Callable[[Path], None] = lambda folder: None, **how: Any) -> str:
        """A model of its own, for recipes that begin with it."""
        shutil.rmtree(self.run)
        folder = write_model(self.folder / "model", **how)
        change(folder)
        return str(folder)


@pytest.fixture
def place(world: World, finished_run: Path, tmp_path: Path) -> Place:
    run, folder = tmp_path / "run", tmp_path / "files"
    folder.mkdir()
    run.mkdir()
    for name in ("sft", "reward"):
        shutil.copytree(finished_run / name, run / name)
    return Place(world, run, folder)


def looked(recipe: Recipe, run: Path, count: int = 32) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(recipe, run, count)}


def odd(found: dict[str, Finding]) -> dict[str, str]:
    return {name: f.verdict for name, f in found.items() if f.verdict in ("warn", "fail")}


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


def edit_weights(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, path, metadata={"format": "pt"})


# ---- sound ---------------------------------------------------------------------------------------------------


def test_a_sound_run_has_nothing_to_tell(place: Place) -> None:
    before = sorted(place.run.rglob("*"))
    found = looked(place.recipe(), place.run)
    assert odd(found) == {}
    assert {name for name, f in found.items() if f.verdict == "skipped"} == {"place/judge"}
    assert len(found) >= 35
    assert sorted(place.run.rglob("*")) == before


def test_memory_is_what_plan_says(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = place.recipe()
    peak = plan(recipe).largest.peak
    monkeypatch.setattr("ppolite.stages.plan._machine", lambda device, gpu: ("this machine", peak // 2))
    found = looked(recipe, place.run)["place/plan"]
    assert found.verdict == "warn"
    assert "--set" in found.remedy


def test_a_section_that_cannot_be_planned_hides_no_other_finding(place: Place) -> None:
    found = looked(place.recipe(sft__data__columns={"completion": "answer"}), place.run)
    assert found["place/plan"].verdict == "skipped"
    assert "fail" in odd(found).values()


def test_before_sft_what_is_missing_is_skipped(place: Place) -> None:
    found = looked(place.recipe(), place.folder / "nothing" / "there")
    assert odd(found) == {}
    why = {name: f.figure for name, f in found.items() if f.verdict == "skipped"}
    assert why == {
        "place/judge": "the recipe asks for no judge",
        "reward model/agreement": "there is no reward model yet",
        "reward model/scores": "there is no reward model yet",
        "reward model/length": "there is no reward model yet",
        "reward model/units": "there is no reward model yet",
        "ppo/critic": "what it should forecast is scored when training begins",
        "ppo/endings": "before SFT: nobody has taught it to end",
    }
    assert str(place.world.folder / "model") in found["model/opens"].figure
    assert not (place.folder / "nothing").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"train__kind": "lora", "ppo__objective": "kl"},
        {"train__kind": "full", "trunk__split": 0, "ppo__objective": "is"},
        {
            "roles": "separate",
            "trunk__split": 0,
            "ppo__top_p": 0.8,
            "ppo__objective": "a2c",
            "ppo__epochs": 1,
            "ppo__minibatches": 1,
            "ppo__samples_per_prompt": 4,
        },
        {
            "ppo__behaviour": "stale",
            "ppo__kl__where": "loss",
            "ppo__kl__estimator": "k2",
            "ppo__rewards": [{"kind": "model"}, {"kind": "length", "max": 3}],
            "dtype": "bfloat16",
        },
    ],
    ids=["lora and kl", "full and is", "separate and a2c", "stale, sources and bfloat16"],
)
def test_no_false_alarm_with_other_settings(changes: dict[str, Any], place: Place) -> None:
    if changes.get("trunk__split") == 0 and changes.get("train__kind") == "full":
        shutil.rmtree(place.run / "reward")  # its bottom is the SFT model's, so that it would do as well
    assert odd(looked(place.recipe(sft=None, **changes), place.run)) == {}


# ---- data ----------------------------------------------------------------------------------------------------


def swapped_columns(place: Place) -> Recipe:
    return place.recipe(
        sft__data__path=place.data("examples", lambda row, i: {"q": row["prompt"], "a": row["completion"]}),
        sft__data__columns={"prompt": "a", "completion": "q"},
        reward=None,
    )


def prompt_in_the_answer(place: Place) -> Recipe:
    path = place.data("examples", lambda row, i: row | {"completion": f"{row['prompt']} {row['completion']}"})
    return place.recipe(sft__data__path=path, **ONLY_SFT)


def rows_twice(place: Place) -> Recipe:
    path = place.data("examples", lambda row, i: row)
    text = Path(path).read_text()
    Path(path).write_text(text + text)
    return place.recipe(sft__data__path=path, **ONLY_SFT)


def empty_answers(place: Place) -> Recipe:
    path = place.data("examples", lambda row, i: row if i % 10 else row | {"completion": "  "})
    return place.recipe(sft__data__path=path, **ONLY_SFT)


def a_column_that_is_not_there(place: Place) -> Recipe:
    return place.recipe(sft__data__columns={"completion": "answer"}, **ONLY_SFT)


def all_scores_equal(place: Place) -> Recipe:
    return place.recipe(
        reward__data__path=place.data("scored", lambda row, i: row | {"score": 3}), **ONLY_REWARD
    )


def nearly_all_scores_equal(place: Place) -> Recipe:
    path = place.data("scored", lambda row, i: row | {"score": 0 if i % 40 else 1})
    return place.recipe(reward__data__path=path, reward__pair_gap=0, **ONLY_REWARD)


def prompts_of_tests_in_sft(place: Place) -> Recipe:
    return place.recipe(sft__data__held_out=0.1, reward=None)


def examples_too_long(place: Place) -> Recipe:
    path = place.data("examples", lambda row, i: row | {"completion": "good " * (80 if i % 3 == 0 else 2)})
    return place.recipe(sft__data__path=path, **ONLY_SFT)


def prompts_truncated(place: Place) -> Recipe:
    path = place.data("prompts", lambda row, i: {"prompt": f"{i} " + "film " * (60 if i % 4 == 0 else 2)})
    return place.recipe(ppo__prompts__path=path, **ONLY_PPO)


def no_prompt_fits(place: Place) -> Recipe:
    return place.recipe(ppo__max_new_tokens=60, **ONLY_PPO)


def too_few_tests(place: Place) -> Recipe:
    return place.recipe(ppo__eval_prompts=39, **ONLY_PPO)


# ---- tokens and template -------------------------------------------------------------------------------------


def with_template(place: Place, template: str, **changes: Any) -> Recipe:
    model = place.model(lambda folder: (folder / "chat_template.jinja").write_text(template) and None)
    return place.recipe(model=model, **changes or ONLY_SFT)


def refuses_system_turns(place: Place) -> Recipe:
    """As Gemma's template does."""

    def asked(row: dict[str, Any], _: int) -> dict[str, Any]:
        turns = [("system", "be brief"), ("user", row["prompt"])]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    prompts = place.data("prompts", asked)
    return with_template(place, refusal + TEMPLATE, ppo__prompts__path=prompts, **ONLY_PPO)


def no_generation_prompt(place: Place) -> Recipe:
    return with_template(place, TEMPLATE.partition("{% if add")[0])


def another_generation_prompt(place: Place) -> Recipe:
    return with_template(place, TEMPLATE.replace("<|start|>assistant ", "<|start|>user "))


def drops_the_answer(place: Place) -> Recipe:
    return with_template(
        place, TEMPLATE.replace("m['content']", "(m['content'] if m['role'] == 'user' else '')")
    )


def drops_what_was_thought(place: Place) -> Recipe:
    """As templates do that leave out all before `</think>`."""
    path = place.data("examples", lambda row, i: row | {"completion": f"{row['completion']} so good film"})
    template = TEMPLATE.replace("m['content']", "m['content'].split(' so ')[-1]")
    return with_template(place, template, sft__data__path=path, **ONLY_SFT)


def ends_no_turn(place: Place) -> Recipe:
    return with_template(place, TEMPLATE.replace("'<|end|>'", "' '"))


def more_than_the_answer(place: Place) -> Recipe:
    return with_template(
        place,
        TEMPLATE.replace(
            "m['content'] +", "(m['content'] if m['role'] == 'user' else 'so ' + m['content']) +"
        ),
    )


def begins_with_start(folder: Path) -> None:
    """Texts begin with a BOS of the tokenizer, as Llama's do."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", pair="<|start|> $A $B", special_tokens=[("<|start|>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", lambda tree: tree.update(bos_token="<|start|>"))


def bos_stripped(place: Place) -> Recipe:
    recipe = with_template(place, TEMPLATE.replace("'<|start|>' + m['role']", "m['role']"))
    begins_with_start(Path(recipe.model))
    return recipe


def bos_twice(place: Place) -> Recipe:
    recipe = with_template(place, "{{ '<|start|>' }}" + TEMPLATE)
    begins_with_start(Path(recipe.model))
    return recipe


def pad_is_eos_and_nothing_else_will_do(place: Place) -> Recipe:
    def spoil(folder: Path) -> None:
        text = (folder / "tokenizer.json").read_text().replace('"<|pad|>"', '"nil"')
        (folder / "tokenizer.json").write_text(text.replace('"unk_token":"<|unk|>"', '"unk_token":"<|end|>"'))
        edit(folder / "tokenizer.json", lambda tree: tree["model"].update(unk_token="<|end|>"))
        edit(folder / "tokenizer.json", lambda tree: tree.update(added_tokens=[
            token for token in tree["added_tokens"] if token["content"] in ("<|start|>", "<|end|>")
        ]))  # fmt: skip
        edit(
            folder / "tokenizer_config.json",
            lambda tree: tree.update(pad_token="<|end|>", unk_token="<|end|>"),
        )

    return place.recipe(model=place.model(spoil), **ONLY_SFT)


def eos_outside_the_vocabulary(place: Place) -> Recipe:
    def spoil(folder: Path) -> None:
        edit(folder / "tokenizer_config.json", lambda tree: tree.update(eos_token="</s>"))

    return place.recipe(model=place.model(spoil), **ONLY_SFT)


def another_language(place: Place) -> Recipe:
    path = place.data("examples", lambda row, i: {"prompt": f"电影 {i}", "completion": "很 好看"})
    return place.recipe(sft__data__path=path, **ONLY_SFT)


# ---- models --------------------------------------------------------------------------------------------------

KEY = "model.layers.2.mlp.down_proj.weight"


def broken(weight: Tensor) -> Tensor:
    weight[0, 0] = torch.nan
    return weight


def nan_in_the_model(place: Place) -> Recipe:
    edit_weights(place.run / "sft", KEY, broken)
    return place.recipe()


def nan_in_the_reward_model(place: Place) -> Recipe:
    edit_weights(place.run / "reward", KEY, broken)
    return place.recipe(**ONLY_PPO)


def logits_scaled(place: Place) -> Recipe:
    """Granite divides its logits: another temperature, which stands in the model's configuration."""
    folder = Path(place.model())
    made = AutoModelForCausalLM.from_config(
        GraniteConfig(
            vocab_size=7 + len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, logits_scaling=3.0, initializer_range=0.5,
            bos_token_id=None, eos_token_id=2, pad_token_id=None, max_position_embeddings=64,
        )
    )  # fmt: skip
    made.save_pretrained(folder)
    return place.recipe(model=str(folder), **ONLY_SFT)


OWN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

first = [None]

class Config(LlamaConfig):
    model_type = "NAME"

class Layer(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states + EXTRA, *args, **kwargs)

class Decoder(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        first[0] = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=first[0], **kwargs)

class Model(LlamaForCausalLM):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
"""


def own_code(place: Place, name: str, extra: str) -> Recipe:
    """A model that brings Python of its own: a Llama whose layers get `extra` on top of what the last one gave."""

    def write(folder: Path) -> None:
        auto = {"AutoConfig": f"{name}.Config", "AutoModelForCausalLM": f"{name}.Model"}
        edit(folder / "config.json", lambda tree: tree.update(auto_map=auto, model_type=name))
        (folder / f"{name}.py").write_text(OWN.replace("NAME", name).replace("EXTRA", extra))

    return place.recipe(model=place.model(write), trust_remote_code=True, **ONLY_PPO)


def layers_that_communicate(place: Place) -> Recipe:
    """Every layer sees the embeddings, which a top that begins at layer 1 never has."""
    return own_code(place, "communicating", "first[0]")


def layers_with_noise(place: Place) -> Recipe:
    return own_code(place, "noisy", "1e-6 * torch.randn_like(hidden_states)")


def dropout_that_is_always_on(place: Place) -> Recipe:
    """Too little for the comparison at the start to see it."""
    return own_code(
        place, "dropping", "2e-4 * torch.nn.functional.dropout(hidden_states, 0.5, training=True)"
    )


def another_reward_model(place: Place) -> Recipe:
    """Its weights were exchanged, and `agreement.json` was not."""
    edit_weights(place.run / "reward", "score.weight", lambda w: w[:, torch.randperm(w.shape[1])])
    return place.recipe(**ONLY_REWARD)


def constant_reward_model(place: Place) -> Recipe:
    edit_weights(place.run / "reward", "score.weight", torch.zeros_like)
    return place.recipe(**ONLY_REWARD)


def counting_reward_model(place: Place) -> Recipe:
    """Its head was fitted to the number of tokens, by least squares on what it reads."""
    recipe = place.recipe(reward__eval_examples=24, **ONLY_REWARD)
    trainer = RewardModel(recipe, place.run)
    trainer.take(place.run / "reward")
    read: list[Tensor] = []
    assert trainer.body.score is not None
    trainer.body.score.register_forward_hook(lambda head, given, score: read.append(given[0]))
    for row in trainer.held:
        trainer.predict([row])
    tokens_N1 = torch.tensor([[float(len(row.encoded[0][1]))] for row in trainer.held])
    head_D1 = torch.linalg.lstsq(torch.cat(read), tokens_N1).solution
    edit_weights(place.run / "reward", "score.weight", lambda w: head_D1.T)
    edit(place.run / "reward" / "agreement.json", lambda tree: tree.update(pair_accuracy=0.0))
    return recipe


def units_of_another_model(place: Place) -> Recipe:
    edit(place.run / "reward" / "config.json", lambda tree: tree["ppolite_norm"].update(mean=40.0, std=2.0))
    return place.recipe(**ONLY_PPO)


def start_of_another_split(place: Place) -> Recipe:
    policy = write_model(place.folder / "policy", seed=5)
    return place.recipe(ppo__start=str(policy), **ONLY_PPO)


def start_too_far_away(place: Place) -> Recipe:
    policy = Path(shutil.copytree(place.run / "sft", place.folder / "policy"))
    edit_weights(policy, KEY, lambda w: 3 * w)
    return place.recipe(ppo__start=str(policy), ppo__max_kl=0.01, **ONLY_PPO)


def value_clip_that_holds_the_critic(place: Place) -> Recipe:
    return place.recipe(ppo__value_clip=0.001, **ONLY_PPO)


def embeddings_of_zero(place: Place) -> Recipe:
    """They are the head as well: whatever the layers say, all tokens are equally likely."""
    model = place.model()
    edit_weights(Path(model), "model.embed_tokens.weight", torch.zeros_like)
    return place.recipe(model=model, **ONLY_PPO)


# ---- reward sources ------------------------------------------------------------------------------------------


def function(place: Place, body: str, **more: Any) -> Recipe:
    path = place.folder / "own.py"
    path.write_text(f"import time\ndef mine(responses):\n    {body}\n")
    source = {"kind": "function", "function": f"{path}:mine", **more}
    return place.recipe(ppo__rewards=[source], **ONLY_PPO)


def function_that_raises(place: Place) -> Recipe:
    return function(place, "raise ValueError('no such column')")


def function_that_says_one_thing(place: Place) -> Recipe:
    return function(place, "return [1.0 for r in responses]")


def server_that_is_not_there(place: Place) -> Recipe:
    source = {"kind": "http", "url": "http://127.0.0.1:9/score", "timeout": 0.5, "deadline": 300.0}
    return place.recipe(ppo__rewards=[source], **ONLY_PPO)


def classifier_without_that_label(place: Place) -> Recipe:
    folder = classifier(place.folder / "judge", num_labels=2)
    source = {"kind": "classifier", "model": str(folder), "label": "GOOD"}
    return place.recipe(ppo__rewards=[source], **ONLY_PPO)


def reward_model_that_nobody_asks(place: Place) -> Recipe:
    return place.recipe(ppo__rewards=[{"kind": "length", "max": 4, "weight": 0.1}])


PLANTED: dict[Callable[[Place], Recipe], tuple[str, str]] = {
    swapped_columns: ("sft/columns", "fail"),
    prompt_in_the_answer: ("sft/columns", "fail"),
    rows_twice: ("sft/columns", "warn"),
    empty_answers: ("sft/data", "warn"),
    a_column_that_is_not_there: ("sft/data", "fail"),
    all_scores_equal: ("reward/scores", "fail"),
    nearly_all_scores_equal: ("reward/scores", "warn"),
    prompts_of_tests_in_sft: ("data/held out", "warn"),
    examples_too_long: ("sft/lengths", "warn"),
    prompts_truncated: ("ppo/lengths", "warn"),
    no_prompt_fits: ("ppo/lengths", "fail"),
    too_few_tests: ("ppo/tests", "fail"),
    no_generation_prompt: ("chat/template", "warn"),
    another_generation_prompt: ("chat/template", "warn"),
    drops_the_answer: ("model/opens", "fail"),
    drops_what_was_thought: ("chat/template", "fail"),
    ends_no_turn: ("chat/template", "warn"),
    refuses_system_turns: ("chat/template", "fail"),
    more_than_the_answer: ("chat/mask", "warn"),
    bos_stripped: ("chat/begin", "warn"),
    bos_twice: ("chat/begin", "fail"),
    pad_is_eos_and_nothing_else_will_do: ("model/opens", "fail"),
    eos_outside_the_vocabulary: ("chat/tokens", "fail"),
    another_language: ("chat/round trip", "fail"),
    nan_in_the_model: ("model/weights", "fail"),
    nan_in_the_reward_model: ("model/weights", "fail"),
    logits_scaled: ("model/split", "fail"),
    layers_that_communicate: ("model/split", "warn"),
    layers_with_noise: ("ppo/repeat", "warn"),
    dropout_that_is_always_on: ("ppo/ratio", "fail"),
    another_reward_model: ("reward model/agreement", "fail"),
    constant_reward_model: ("reward model/scores", "fail"),
    counting_reward_model: ("reward model/length", "warn"),
    reward_model_that_nobody_asks: ("reward model/asked", "warn"),
    units_of_another_model: ("reward model/units", "warn"),
    start_of_another_split: ("ppo/opens", "fail"),
    start_too_far_away: ("ppo/kl", "warn"),
    value_clip_that_holds_the_critic: ("ppo/critic", "warn"),
    embeddings_of_zero: ("ppo/gradient", "warn"),
    function_that_raises: ("source/mine", "fail"),
    function_that_says_one_thing: ("source/mine", "warn"),
    server_that_is_not_there: ("source/http", "fail"),
    classifier_without_that_label: ("source/classifier", "fail"),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_is_planted_is_found(plant: Callable[[Place], Recipe], place: Place) -> None:
    name, verdict = PLANTED[plant]
    found = looked(plant(place), place.run, count=8)
    assert found[name].verdict == verdict, found[name]
    assert found[name].remedy
