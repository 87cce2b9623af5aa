"""What runs before every training: it stops what is surely wrong, and changes no number of what is not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.kit import Wants, goods, outcome
from tests.world import World, put
from torch import nn

from ppolite.config import Recipe, parse_recipe
from ppolite.rollout.local import LocalGenerator
from ppolite.stages.checkpoint import Checkpoints
from ppolite.stages.doctor import model, probe, quick
from ppolite.stages.doctor.finding import Finding, graded, skipped, worst
from ppolite.stages.ppo import PPO
from ppolite.stages.reward import RewardModel
from ppolite.stages.rows import load_prompts
from ppolite.stages.run import run_stage
from ppolite.stages.sft import SFT
from ppolite.types import Prompt, Rollout, Sampling, UserError

# ---- it changes nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {
            "ppo__behaviour": "stale",
            "ppo__rewards": [{"kind": "model"}, {"kind": "length", "max": 3}],
            "dtype": "bfloat16",
        },
        {
            "ppo__behaviour": "sft",
            "ppo__sft_samples": 16,
            "ppo__on_low_ess": "draw",
            "ppo__ess_floor": 0.99,
            "train__kind": "lora",
        },
    ],
    ids=["stale", "sft"],
)
def test_ppo_is_the_same_to_the_bit_with_and_without_it(
    changes: dict[str, Any], world: World, finished_run: Path, tmp_path: Path
) -> None:
    found: dict[str, Any] = {}
    for doctor in ("off", "quick"):
        folder = tmp_path / doctor
        folder.mkdir()
        for name in ("sft", "reward"):
            (folder / name).symlink_to(finished_run / name)
        run_stage("ppo", world.recipe(doctor=doctor, ppo__epochs=1, ppo__rollouts=8, **changes), folder)
        found[doctor] = (outcome(folder), sorted(p.name for p in folder.iterdir()))
    assert found["quick"] == found["off"]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_other_stages_are_the_same_to_the_bit(stage: str, world: World, tmp_path: Path) -> None:
    found: dict[str, bytes] = {}
    for doctor in ("off", "quick"):
        without = {"sft": None} if stage == "reward" else {}
        recipe = world.recipe(doctor=doctor, reward__epochs=0.25, **without)
        run_stage(stage, recipe, tmp_path / doctor)
        found[doctor] = (tmp_path / doctor / stage / "model.safetensors").read_bytes()
    assert found["quick"] == found["off"]


def test_no_random_stream_moves(world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(), trained)
    before = torch.random.get_rng_state(), ppo.rounds.state(), ppo.roles.last
    gradients = [w.grad for w in ppo.roles.policy.parameters()]
    quick.before_ppo(ppo)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (ppo.rounds.state(), ppo.roles.last) == before[1:]
    assert [w.grad for w in ppo.roles.policy.parameters()] == gradients
    assert not ppo.updates.policy.optimizer.state
    assert not list((trained / "rollouts").glob("*")) if (trained / "rollouts").exists() else True


# ---- when it runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_it_runs_once_and_not_when_a_stage_goes_on(
    stage: str, world: World, trained: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    save = Checkpoints.save

    def save_and_die(self: Checkpoints, step: int, state: dict[str, Any]) -> bool:
        save(self, step, state)
        raise Killed

    caplog.set_level(logging.INFO, "ppolite")
    recipe = world.recipe(checkpoint__every=1, sft__data__limit=32, ppo__epochs=1, ppo__rollouts=8)
    if stage == "sft":
        for name in ("sft", "reward"):
            (trained / name).unlink()
    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        run_stage(stage, recipe, trained)
    monkeypatch.setattr(Checkpoints, "save", save)
    assert caplog.text.count(f"checks before {stage} in") == 1
    run_stage(stage, recipe, trained)
    assert caplog.text.count(f"checks before {stage} in") == 1


def test_a_scorer_of_ones_own_is_not_asked(world: World, trained: Path) -> None:
    asked: list[int] = []

    class Counts(Wants):
        def score(self, rollouts: Sequence[Rollout]) -> list[float]:
            asked.append(len(rollouts))
            return super().score(rollouts)

    quick.before_ppo(PPO(world.recipe(), trained, scorer=Counts(goods)))
    assert asked == []


def test_off_is_off(world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(doctor="off"), trained)
    nn.init.constant_(ppo.roles.policy.layers[0].mlp.down_proj.weight, 1.0)
    quick.before_ppo(ppo)
    with pytest.raises(UserError, match="ppo/kl"):
        quick.before_ppo(PPOLike(ppo, world.recipe()))


class PPOLike:
    """The same trainer under another recipe."""

    def __init__(self, ppo: PPO, recipe: Recipe) -> None:
        self.__dict__ |= {**vars(ppo), "recipe": recipe}


# ---- what stops a run ----------------------------------------------------------------------------------------


def in_training_mode(ppo: PPO) -> None:
    """As after `.train()`, which every tutorial calls."""
    ppo.roles.policy.train()
    for layer in ppo.roles.policy.layers:
        layer.self_attn.attention_dropout = 0.5


def nan(ppo: PPO) -> None:
    nn.init.constant_(ppo.roles.critic.layers[0].mlp.down_proj.weight, torch.nan)


def another_start(ppo: PPO) -> None:
    with torch.no_grad():
        ppo.roles.policy.layers[0].mlp.down_proj.weight.mul_(1.5)


def constant_scores(ppo: PPO) -> None:
    assert ppo.roles.reward is not None
    nn.init.zeros_(ppo.roles.reward.score.weight)


class Colder(LocalGenerator):
    """A sampler with a temperature of its own, as engines have that read `generation_config.json`."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        return super().generate(prompts, replace(sampling, temperature=0.2), seed=seed)


class ColderUnseen(Colder):
    """Its log-probs are those of temperature 1 all the same, as some engines have them."""

    ppo: PPO

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        rollouts = super().generate(prompts, sampling, seed=seed)
        experience, _ = self.ppo.prepare(rollouts, [0.0] * len(rollouts))
        for i, rollout in enumerate(rollouts):
            rollout.logprobs_R = experience.logprobs_BR[i, : len(rollout.response_ids)]
        return rollouts


def colder(ppo: PPO) -> None:
    ppo.generator = Colder(ppo.roles.policy, ppo.opened.tokenizer, ppo.opened.stop_ids)


def colder_unseen(ppo: PPO) -> None:
    ppo.generator = ColderUnseen(ppo.roles.policy, ppo.opened.tokenizer, ppo.opened.stop_ids)
    ppo.generator.ppo = ppo


def other_weights(ppo: PPO) -> None:
    """A sampler that still has the weights of the run before."""
    old = ppo.roles.trunk.top.clone()
    with torch.no_grad():
        old.layers[0].mlp.down_proj.weight.mul_(1.5)
    ppo.generator = LocalGenerator(old, ppo.opened.tokenizer, ppo.opened.stop_ids)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (in_training_mode, "model/dropout"),
        (nan, "model/weights"),
        (another_start, "ppo/kl"),
        (constant_scores, "reward model/scores"),
        (colder, "ppo/sampler"),
        (colder_unseen, "ppo/temperature"),
        (other_weights, "ppo/sampler"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_ppo_does_not_begin(spoil: Callable[[PPO], None], name: str, world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(), trained)
    spoil(ppo)
    before = sorted(path.name for path in trained.iterdir())
    with pytest.raises(
        UserError, match=rf"^{name}: .*; .*\. `ppolite doctor` tells more, and --set doctor=off"
    ):
        ppo.run()
    assert sorted(path.name for path in trained.iterdir()) == before


def test_sft_and_the_reward_model_do_not_begin(world: World, tmp_path: Path) -> None:
    sft, rm = SFT(world.recipe(), tmp_path / "sft"), RewardModel(world.recipe(sft=None), tmp_path / "rm")
    for trainer, layer in ((sft, "model model.layers.2"), (rm, "reward layers.1")):
        nn.init.constant_(trainer.body.layers[1].mlp.down_proj.weight, torch.inf)
        with pytest.raises(UserError, match=rf"model/weights: {layer}.mlp.down_proj.weight not finite"):
            trainer.run()


def test_what_is_odd_is_logged_and_training_goes_on(
    world: World, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ppo = PPO(world.recipe(ppo__steps=1), trained)
    with torch.no_grad():
        ppo.roles.critic.score.bias += 30
    ppo.run()
    assert "doctor: ppo/critic: values 27 from the returns" in caplog.text
    assert "within ppo.value_clip it takes 136 rounds" in caplog.text
    assert (trained / "policy").exists()


# ---- checks on their own -------------------------------------------------------------------------------------


@pytest.fixture
def played(world: World, trained: Path) -> probe.Probe:
    return probe.play(PPO(world.recipe(), trained), 16, 48)


def test_the_temperature_is_told_from_the_tokens_alone(played: probe.Probe) -> None:
    """Tokens drawn by torch from known distributions: at their own temperature z has mean 0 and deviation 1."""
    torch.manual_seed(0)
    mask_BR = torch.ones(16, 24, dtype=torch.bool)
    logits_BRV = torch.randn(*mask_BR.shape, 24)
    logp_BRV = logits_BRV.log_softmax(-1)
    entropy_BR = -(logp_BRV.exp() * logp_BRV).sum(-1)

    def drawn_at(temperature: float) -> Finding:
        probs_NV = (logits_BRV / temperature).softmax(-1).flatten(0, 1)
        ids_BR = probs_NV.multinomial(1).view(mask_BR.shape)
        logp_BR = logp_BRV.gather(-1, ids_BR[..., None])[..., 0]
        known = replace(played.experience, logprobs_BR=logp_BR, mask_BR=mask_BR)
        return probe.temperature(replace(played, experience=known, entropy_BR=entropy_BR))

    z = torch.tensor([float(drawn_at(1.0).figure.rpartition("z ")[2]) for _ in range(400)])
    assert abs(float(z.mean())) < 3 / 400**0.5
    assert float(z.std()) == pytest.approx(1, abs=0.15)
    for temperature, told in ((0.2, "draws colder"), (5.0, "draws hotter")):
        found = drawn_at(temperature)
        assert found.verdict == "fail"
        assert told in found.remedy


def test_a_gradient_that_is_another_the_second_time(world: World, trained: Path) -> None:
    """As with sums whose order the threads decide: the forward pass is the same to the bit."""
    ppo = PPO(world.recipe(), trained)
    ppo.roles.policy.trained()[0].register_hook(lambda grad: grad + 1e-4 * torch.randn_like(grad))
    played = probe.play(ppo, 4, 4)
    assert probe.repeat(played).verdict == "ok"
    found = probe.repeat_gradient(ppo, played)
    assert found.verdict == "warn"
    assert "norms are others the second time" in found.figure


def test_top_p_lets_the_samplers_log_probs_be_higher_by_as_much_as_it_cuts(
    world: World, trained: Path
) -> None:
    """0.5 leaves up to log 2 = 0.69 nats; the same gaps without top_p are an error."""
    ppo = PPO(world.recipe(ppo__top_p=0.5), trained)
    cut = probe.play(ppo, 16, 48)
    assert probe.sampler(cut).verdict == "ok"
    assert cut.experience.diagnostics["sampler/gap_max"] > 0.3
    whole = replace(cut, config=cut.config.model_copy(update={"top_p": 1.0}))
    assert probe.sampler(whole).verdict == "fail"


def test_a_learning_rate_of_0_moves_nothing_and_another_does(world: World, trained: Path) -> None:
    tree = world.tree()
    for lr, verdict in ((0.0, "ok"), (1e-2, "fail")):
        put(tree, "ppo.optim.lr", lr)
        put(tree, "ppo.critic.lr", lr)
        ppo = PPO(parse_recipe(tree), trained)
        found = probe.standstill(ppo, probe.play(ppo, 16, 48))
        assert found.verdict == verdict, found
        assert found.figure.startswith("4 updates, 0 skipped: ")


def test_the_critics_distance_is_that_of_its_values(world: World, trained: Path, played: probe.Probe) -> None:
    assert probe.critic(played).verdict == "ok"
    known = played.experience
    far = replace(played, experience=replace(known, values_BR=known.values_BR + 100.0))
    found = probe.critic(far)
    assert found.verdict == "warn"
    assert found.figure.startswith("values 1e+02 from the returns")


def test_answers_that_the_round_itself_cuts_are_no_alarm(world: World, trained: Path) -> None:
    one_word = PPO(world.recipe(ppo__max_new_tokens=1), trained)
    assert probe.endings(probe.play(one_word, 8, 48), taught=True).verdict == "warn"
    found = probe.endings(probe.play(PPO(world.recipe(), trained), 8, 1), taught=True)
    assert (found.verdict, found.figure) == ("skipped", "the round is of 1 tokens, ppo.max_new_tokens 6")


def test_prompts_are_repeated_where_they_are_few(world: World, trained: Path) -> None:
    ppo = PPO(world.recipe(ppo__prompts__limit=3), trained)
    assert len({id(r.prompt) for r in probe.play(ppo, 8, 4).rollouts}) == 3
    train, _ = load_prompts(ppo.config.prompts, ppo.opened, 6, 0)
    assert len(train) == 3


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.attention_dropout = 0.1


def test_dropout_is_seen_where_it_acts() -> None:
    made = nn.Sequential(nn.Linear(2, 2), Half())
    assert (
        model.dropout({"policy": made}).figure == "acts in policy 1 (attention_dropout 0.1) and 1 more places"
    )
    made[1].drop.eval()
    assert "and 0 more places" in model.dropout({"policy": made}).figure
    assert model.dropout({"policy": made.eval()}) == Finding("model/dropout", "ok", "off")


def test_the_worst_of_one_name_is_told() -> None:
    found = [
        graded("a/x", "1", "mend"),
        skipped("b/y", "no"),
        graded("a/z", "2", "mend", warn=True),
        graded("b/y", "3", "mend"),
        graded("a/x", "4", "mend", warn=True, fail=True),
    ]
    assert worst(found) == [
        Finding("a/x", "fail", "4", "mend"), Finding("a/z", "warn", "2", "mend"), Finding("b/y", "ok", "3"),
    ]  # fmt: skip
