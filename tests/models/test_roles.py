"""Each kind of training moves what it says, and nothing else moves, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor, nn

from ppolite.config import Train
from ppolite.models.body import Body
from ppolite.models.roles import Norm, Roles, build_roles, own_critic, reward_body, same_bottom, trainable
from ppolite.models.sequences import Sequences
from ppolite.models.trunk import Trunk
from ppolite.types import UserError

NORM = Norm(mean=0.5, std=2.0, offset=0.25)


def roles_of(name: str, kind: str, split: int, *, separate: bool = False, init: str = "reward") -> Roles:
    model = tiny.model(name)
    reward: Any = tiny.classifier(model, changed_from=split)
    train = tiny.train(kind)
    return build_roles(
        Trunk(model, split), train, (reward, reward.score, NORM),
        separate=(lambda: tiny.model(name)) if separate else None, critic_init=init, reward_scale=1.5,
    )  # fmt: skip


def seen(roles: Roles) -> tuple[Sequences, dict[str, Tensor]]:
    seqs = roles.trunk.bottom(Sequences.of(*tiny.rows(shared=2), tiny.CPU))
    with torch.no_grad():
        return seqs, {
            "policy": roles.policy.logprobs(seqs, 1.0)[0],
            "reference": roles.ref_logprobs(seqs, 1.0),
            "critic": roles.critic.values(seqs),
            "reward": roles.reward_scores(seqs),
        }


def learn(roles: Roles, seqs: Sequences) -> None:
    """One step of AdamW on both learners, each with a loss of its own."""
    params = [*roles.policy.trained(), *roles.critic.trained()]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    for _ in range(2):  # LoRA's first factor has no gradient until the second has moved
        optimizer.zero_grad()
        loss = roles.policy.logprobs(seqs, 1.0)[0].mean() + (roles.critic.values(seqs) - 1).square().mean()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    ("kind", "split"), [("lora", 2), ("lora", 0), ("layers", 2), ("layers", 0), ("full", 0)]
)
def test_learning_moves_policy_and_critic_only(kind: str, split: int, separate: bool) -> None:
    if separate and split:
        pytest.skip("separate roles share no trunk")
    for name in ("llama", "gpt2") if not separate else ("llama",):
        roles = roles_of(name, kind, split, separate=separate)
        loaded = copy.deepcopy(roles.trunk.model.state_dict())
        seqs, before = seen(roles)
        assert torch.equal(before["policy"], before["reference"])
        learn(roles, seqs)
        again, after = seen(roles)
        assert torch.equal(after["reference"], before["reference"])
        assert torch.equal(after["reward"], before["reward"])
        assert (after["policy"] - before["policy"]).abs().max() > 1e-3
        assert (after["critic"] - before["critic"]).abs().max() > 1e-3
        if split:
            assert again.h_BTD is not None
            assert torch.equal(again.h_BTD, seqs.h_BTD)
        now = roles.trunk.model.state_dict()
        assert all(torch.equal(now[k], v) for k, v in loaded.items() if "lora_" not in k)
        assert not set(map(id, roles.policy.trained())) & set(map(id, roles.critic.trained()))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("lora", {"lora_A", "lora_B"}),
        ("layers", {"layers", "norm"}),
        ("full", {"layers", "norm", "front", "head"}),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_what_is_trained(name: str, kind: str, names: set[str]) -> None:
    split = 0 if kind == "full" else 2
    model = tiny.model(name)
    body, config = trainable(Trunk(model, split).top, tiny.train(kind))
    assert (config is not None) == (kind == "lora")
    found = {n for n, p in body.named_parameters(remove_duplicate=False) if p.requires_grad}
    if kind == "lora":
        assert {part for n in found for part in n.split(".") if part.startswith("lora_")} == names
        linear = [m for m in body.layers.modules() if hasattr(m, "lora_A")]
        assert len(linear) == 2 * {"llama": 7, "gpt2": 4, "neox": 4}[name]
    else:
        assert {n.split(".")[0] for n in found} == names
        everything = {n for n, _ in body.named_parameters(remove_duplicate=False)}
        assert found == {n for n in everything if n.split(".")[0] in names}
    if kind == "full":
        assert sum(p.numel() for p in body.trained()) == sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters()) or kind == "lora"


@pytest.mark.parametrize(
    ("name", "tied"), [("llama", True), ("gpt2", True), ("gemma2", True), ("neox", False)]
)
def test_full_keeps_ties(name: str, tied: bool) -> None:
    model: Any = tiny.model(name)
    body, _ = trainable(Trunk(model, 0).top, Train(kind="full"))
    front: Any = next(m for m in body.front.values() if getattr(m, "num_embeddings", 0) == tiny.VOCAB)
    head: Any = body.head
    assert (front.weight is head.weight) == tied
    assert front.weight is not model.get_input_embeddings().weight
    with torch.no_grad():
        front.weight.add_(1.0)
    assert torch.equal(model.get_input_embeddings().weight, tiny.model(name).get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["lora", "layers", "full"])
@pytest.mark.parametrize("split", [0, 2])
def test_the_critic_starts_as_the_normalised_reward_model(kind: str, split: int) -> None:
    """V at the last token = 1.5 · (score − 0.5) / 2, with the score of HF's own classifier + 0.25."""
    if kind == "full" and split:
        pytest.skip("full trains every layer")
    model = tiny.model()
    reward: Any = tiny.classifier(model, changed_from=split)
    prompts, responses = tiny.rows(shared=3)
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    raw = [reward(input_ids=torch.tensor([row])).logits.item() for row in rows]
    train = tiny.train(kind)
    roles = build_roles(Trunk(model, split), train, (reward, reward.score, NORM), reward_scale=1.5)
    # A response of one more token: its value is read at the token before.
    seqs = roles.trunk.bottom(Sequences.of(prompts, [[*r, 9] for r in responses], tiny.CPU))
    with torch.no_grad():
        values_BR = roles.critic.values(seqs)
        scores = roles.reward_scores(roles.trunk.bottom(Sequences.of(prompts, responses, tiny.CPU)))
    for i, (r, x) in enumerate(zip(responses, raw, strict=True)):
        assert values_BR[i, len(r)].item() == pytest.approx(1.5 * (x + 0.25 - 0.5) / 2, abs=1e-5)
        assert scores[i].item() == pytest.approx(x + 0.25, abs=1e-5)


@pytest.mark.parametrize("kind", ["lora", "layers", "full"])
def test_a_critic_from_zero(kind: str) -> None:
    roles = roles_of("llama", kind, 0, init="zero")
    seqs, before = seen(roles)
    assert not before["critic"].any()
    learn(roles, seqs)
    _, after = seen(roles)
    assert after["critic"].any()
    assert torch.equal(after["reference"], before["reference"])
    assert torch.equal(after["reward"], before["reward"])


def test_without_a_reward_model_the_critic_starts_at_zero() -> None:
    roles = build_roles(Trunk(tiny.model(), 2), Train(kind="lora"), None)
    seqs = roles.trunk.bottom(Sequences.of(*tiny.rows(shared=2), tiny.CPU))
    assert not roles.critic.values(seqs).any()
    with pytest.raises(UserError, match=r"pass scores to step\(\)"):
        roles.reward_scores(seqs)


@pytest.mark.parametrize("kind", ["lora", "layers", "full"])
@pytest.mark.parametrize("separate", [False, True])
def test_a_critic_on_the_policys_layers(kind: str, separate: bool) -> None:
    """It has a head to train and nothing else; its loss reaches the policy's weights; the others are as they were."""
    model = tiny.model()
    reward: Any = tiny.classifier(model, changed_from=0 if separate else 2)
    roles = build_roles(
        Trunk(model, 0 if separate or kind == "full" else 2), tiny.train(kind), (reward, reward.score, NORM),
        separate=tiny.model if separate else None, critic_body="policy",
    )  # fmt: skip
    before = {name: x for name, x in seen(roles)[1].items() if name != "policy"}
    assert not before["critic"].any()
    assert set(roles.critic.trained_by_name()) == {"score.weight", "score.bias"}
    assert not set(map(id, roles.policy.trained())) & set(map(id, roles.critic.trained()))
    with torch.no_grad():
        for p in (*roles.policy.trained(), *roles.critic.trained()):
            p.add_(0.1 * torch.randn_like(p))
    seqs, after = seen(roles)
    assert after["critic"].any()
    for name in before.keys() - {"critic"}:
        assert torch.equal(after[name], before[name])
    roles.critic.values(seqs).sum().backward()
    assert all(p.grad is not None for p in roles.critic.trained())
    assert any(p.grad is not None and p.grad.any() for p in roles.policy.trained())


def test_norm_by_hand() -> None:
    assert Norm(mean=1.0, std=4.0)(torch.tensor([1.0, 3.0, -7.0])).tolist() == [0.0, 0.5, -2.0]
    assert Norm()(torch.tensor(3.0)).item() == 3.0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_another_bottom_is_refused(name: str) -> None:
    model = tiny.model(name)
    for changed, split, shares in ((2, 2, True), (1, 2, False), (0, 1, False), (0, 0, True)):
        reward: Any = tiny.classifier(model, changed_from=changed)
        assert same_bottom(model, reward, split, torch.float32) == shares
        if shares:
            reward_body(Trunk(model, split), reward, reward.score)
        else:
            with pytest.raises(UserError, match=f"layers below {split} differ .* cannot share"):
                reward_body(Trunk(model, split), reward, reward.score)


def test_what_else_can_differ_below_the_split() -> None:
    """Learned positions; the number of layers; the family."""
    model = tiny.model("gpt2")
    moved: Any = tiny.classifier(model, changed_from=2)
    with torch.no_grad():
        moved.base_model.wpe.weight[5].add_(1e-3)
    others = (moved, tiny.model("gpt2", num_hidden_layers=1), tiny.model("llama"))
    assert not any(same_bottom(model, other, 2, torch.float32) for other in others)


def test_a_bottom_that_was_rounded_on_saving_is_the_same_in_that_dtype() -> None:
    model = tiny.model()
    reward: Any = tiny.classifier(model, changed_from=2)
    for layer in reward.base_model.layers[:2]:
        for p in layer.parameters():
            p.data = p.data.bfloat16().float()
    assert same_bottom(model, reward, 2, torch.bfloat16)
    assert not same_bottom(model, reward, 2, torch.float32)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "layers"])
def test_held_weights_give_the_numbers_of_autocast(kind: str, name: str) -> None:
    """To the bit, in every role; what is trained, and what is tied to an embedding, stays float32."""
    prompts, responses = tiny.rows(shared=3)
    rows = Sequences.of(prompts, responses, tiny.CPU)

    def numbers(roles: Roles) -> list[torch.Tensor]:
        seqs = roles.trunk.bottom(rows)
        with torch.no_grad():
            return [
                roles.policy.logprobs(seqs, 1.0)[0],
                roles.ref_logprobs(seqs, 1.0),
                roles.critic.values(seqs),
                roles.reward_scores(seqs),
            ]

    def made(hold: bool) -> Roles:
        torch.manual_seed(0)
        model = tiny.model(name)
        reward: Any = tiny.classifier(model, changed_from=2)
        with pytest.MonkeyPatch.context() as patch:
            if not hold:
                patch.setattr(Roles, "hold", lambda self: self)
            return build_roles(
                Trunk(model, 2, torch.bfloat16),
                tiny.train(kind),
                (reward, reward.score, NORM),
            )

    cast, held = made(hold=False), made(hold=True)
    for ours, theirs in zip(numbers(held), numbers(cast), strict=True):
        assert torch.equal(ours, theirs)
    weights = [p for body in (held.policy, held.critic, held.reference) for p in body.layers.parameters()]
    assert {p.dtype for p in weights if p.requires_grad} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in weights}
    assert held.trunk.model.get_input_embeddings().weight.dtype == torch.float32


def test_another_vocabulary_is_refused() -> None:
    reward: Any = tiny.classifier(tiny.model(vocab_size=44))
    for separate in (None, tiny.model):
        with pytest.raises(UserError, match="a vocabulary of 44 tokens and the policy one of 40"):
            build_roles(Trunk(tiny.model(), 0), Train(), (reward, reward.score, Norm()), separate=separate)


def test_a_critic_body_may_be_put_on_a_body_without_a_head() -> None:
    trunk = Trunk(tiny.model(), 1)
    critic = own_critic(trunk, None, Norm(), Train(kind="layers"), "reward", 1.0)
    assert isinstance(critic, Body)
    assert isinstance(critic.score, nn.Linear)
    assert critic.head is None
    assert all(p.requires_grad for p in critic.score.parameters())
