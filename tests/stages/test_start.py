"""A PPO that goes on from a saved policy: exactly that policy, under the same reference, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.kit import Wants, goods
from tests.world import World

from ppolite.rollout.experience import policy_logprobs
from ppolite.stages.ppo import PPO
from ppolite.stages.sft import SFT
from ppolite.types import UserError

KINDS: list[dict[str, Any]] = [
    {"train__kind": "layers"},
    {"train__kind": "lora"},
    {"train__kind": "full", "trunk__split": 0},
    {"train__kind": "layers", "roles": "separate", "trunk__split": 0},
    {"train__kind": "layers", "dtype": "bfloat16"},
    {"train__kind": "lora", "dtype": "bfloat16"},
]


def trainer(world: World, folder: Path, **changes: Any) -> PPO:
    return PPO(world.recipe(sft=None, **changes), folder, scorer=Wants(goods))


def saved(world: World, folder: Path, **changes: Any) -> tuple[PPO, Path]:
    """A PPO that has learned for two steps, and where its policy is."""
    ppo = trainer(world, folder, ppo__optim__lr=1e-2, **changes)
    for _ in range(2):
        ppo.step(*ppo.next_round())
    return ppo, ppo.save(adapter=ppo.roles.lora is not None)


@pytest.mark.parametrize("changes", KINDS, ids=lambda c: "-".join(map(str, c.values())))
def test_log_probs_are_those_of_the_saved_policy_and_the_reference_stays(
    changes: dict[str, Any], world: World, tmp_path: Path
) -> None:
    first, folder = saved(world, tmp_path / "a", **changes)
    second = trainer(world, tmp_path / "b", ppo__start=str(folder), **changes)
    rollouts = first.generate(first.next_prompts())
    (old, seqs), (new, again) = (ppo.prepare(rollouts, [0.0] * len(rollouts)) for ppo in (first, second))
    assert torch.equal(old.logprobs_BR, new.logprobs_BR)
    assert torch.equal(old.ref_logprobs_BR, new.ref_logprobs_BR)
    now, then = (policy_logprobs(ppo.roles, x, ppo.config) for ppo, x in ((first, seqs), (second, again)))
    assert torch.equal(now, then)
    assert float(new.diagnostics["kl/ref_seq"]) == float(old.diagnostics["kl/ref_seq"])
    assert (new.logprobs_BR - new.ref_logprobs_BR).abs().max() > 1e-3
    assert all(p.dtype == torch.float32 for p in second.roles.policy.trained())
    second.step(*second.next_round())
    assert torch.equal(second.roles.ref_logprobs(again, 1.0), old.ref_logprobs_BR)
    assert not torch.equal(policy_logprobs(second.roles, again, second.config), new.logprobs_BR)


def test_a_seed_of_its_own_changes_streams_and_not_what_is_held_out(world: World, tmp_path: Path) -> None:
    one, same, other = (trainer(world, tmp_path, ppo__seed=seed) for seed in (None, 0, 5))
    assert one.heldout.prompts == other.heldout.prompts
    assert one.evaluate() == other.evaluate()
    prompts = [ppo.next_prompts() for ppo in (one, same, other)]
    assert prompts[0] == prompts[1] != prompts[2]
    answers = [[r.response_ids for r in ppo.generate(prompts[0])] for ppo in (one, same, other)]
    assert answers[0] == answers[1] != answers[2]


def start_refused(world: World, tmp_path: Path, start: Path | str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        trainer(world, tmp_path / "b", ppo__start=str(start), **changes)
    assert "\n" not in str(caught.value)
    assert str(start) in str(caught.value)
    return str(caught.value)


def test_another_policy_is_refused(world: World, tmp_path: Path) -> None:
    _, folder = saved(world, tmp_path / "a", train__kind="layers")
    lora = {"train__kind": "lora"}
    _, adapter = saved(world, tmp_path / "c", **lora)
    assert "the folder `adapter` of an earlier one" in start_refused(world, tmp_path, folder, **lora)
    assert "the folder `policy` of an earlier one" in start_refused(world, tmp_path, adapter)
    assert "keeps frozen" in start_refused(world, tmp_path, folder, trunk__split=2)
    assert "set train.lora_rank: 16" in start_refused(world, tmp_path, adapter, train__lora_rank=4, **lora)
    assert "other layers or shapes" in start_refused(world, tmp_path, adapter, trunk__split=2, **lora)
    assert "no such folder" in start_refused(world, tmp_path, tmp_path / "none")
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    assert "cannot be read" in start_refused(world, tmp_path, adapter, **lora)


def test_a_policy_of_another_sft_model_is_refused(world: World, tmp_path: Path) -> None:
    """Trained on two layers of three, from another SFT model, whose first layer is another too."""
    full = {"train__kind": "full", "trunk__split": 0}
    SFT(world.recipe(**full), tmp_path / "other").run()
    ppo = PPO(world.recipe(train__kind="layers"), tmp_path / "other", scorer=Wants(goods))
    assert "its SFT model" in start_refused(world, tmp_path, ppo.save())
    # Trained in full, with embeddings that this run would not take over.
    _, folder = saved(world, tmp_path / "a", **full)
    assert "its SFT model" in start_refused(world, tmp_path, folder, train__kind="layers", trunk__split=0)


def test_a_start_beyond_the_leash_is_kept_until_a_policy_is_within(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = saved(world, tmp_path / "a")
    ppo = trainer(world, tmp_path / "b", ppo__start=str(folder))
    far = ppo.evaluate()
    assert ppo.finish()["best_step"] == 0
    assert f"scored better than {folder} on held-out prompts; saving {folder}" in caplog.text

    leash = far["heldout/kl_ref_seq"] / 2
    ppo = trainer(world, tmp_path / "b", ppo__start=str(folder), ppo__max_kl=leash)
    assert ppo.evaluate() == far
    start = [p.detach().clone() for p in ppo.roles.policy.trained()]
    ppo.steps_done = 1
    ppo.evaluate()
    best = ppo.heldout.best
    assert best is not None
    assert (best.step, best.kl) == (0, far["heldout/kl_ref_seq"])
    with torch.no_grad():
        theirs = dict(ppo.roles.reference.named_parameters())
        for name, weight in ppo.roles.policy.named_parameters():
            weight.copy_(theirs[name])
    ppo.steps_done = 2
    near = ppo.evaluate()
    assert near["heldout/kl_ref_seq"] == pytest.approx(0, abs=1e-5)
    assert near["heldout/score"] < far["heldout/score"]  # worse, but within
    best = ppo.heldout.best
    assert best is not None
    assert (best.step, best.kl) == (2, near["heldout/kl_ref_seq"])
    with torch.no_grad():
        for weight, value in zip(ppo.roles.policy.trained(), start, strict=True):
            weight.copy_(value)
    ppo.steps_done = 3
    ppo.evaluate()
    assert ppo.finish() == {"best_step": 2, "heldout_score": near["heldout/score"]}
