"""Who owns what: policy, reference, critic and reward model as bodies on one trunk, or as whole models.

    train.kind   policy                     reference            critic                     reward model
    lora         SFT top + adapter          policy, adapter off  RM top + adapter           critic, its off
    layers       own copy of SFT top        SFT top              own copy of RM top         RM top
    full         own copy, embeddings too   SFT model            own copy, embeddings too   RM

With `ppo.critic_body: policy` the critic is a second head on the policy's layers, whatever the kind.
`roles: separate` is the same table with every top being a whole model of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppolite.config import Train
from ppolite.models.body import Body
from ppolite.models.decoder import decoder_of, front_of, layers_of
from ppolite.models.sequences import Sequences
from ppolite.models.trunk import Trunk
from ppolite.types import Rollout, UserError


@dataclass(frozen=True)
class Norm:
    """From the classifier's raw output to people's units, and on to a reward of mean 0 and deviation 1."""

    mean: float = 0.0
    """Of the score, in people's units, over the SFT model's samples."""
    std: float = 1.0
    offset: float = 0.0
    """Score = raw output + offset: HF's classifier heads have no bias to hold it."""

    def __call__(self, score: Tensor) -> Tensor:
        return (score - self.mean) / self.std


@dataclass
class Roles:
    trunk: Trunk
    policy: Body
    reference: Body
    critic: Body
    reward: Body | None
    """None: scores come from elsewhere."""
    norm: Norm
    lora: LoraConfig | None
    last: tuple[list[Rollout], Sequences] | None = None
    """Rollouts and their cached hidden states, for whoever asks for the same ones next."""

    def hold(self) -> Roles:
        """Keep what is frozen in the dtype of the arithmetic. Last: copies that are to be trained come before."""
        self.trunk.hold()
        copies: dict[nn.Module, nn.Module] = {}
        for body in (self.policy, self.reference, self.critic, self.reward):
            if body is not None:
                body.hold(copies)
        return self

    @torch.no_grad()
    def ref_logprobs(self, seqs: Sequences, temperature: float) -> Tensor:
        """log π_ref, [B, R]."""
        with self.reference.adapters(False):
            return self.reference.logprobs(seqs, temperature)[0]

    @torch.no_grad()
    def reward_scores(self, seqs: Sequences) -> Tensor:
        """The reward model's score, [B]; for one trained on scores, in people's units."""
        if self.reward is None:
            raise UserError("there is no reward model here; pass scores to step(), or name one in the recipe")
        with self.reward.adapters(False):
            return self.reward.scores(seqs) + self.norm.offset


def trainable(body: Body, train: Train, *, own: bool = False) -> tuple[Body, LoraConfig | None]:
    """A body that learns, starting where `body` is: with adapters put on it in place, or a copy of it.

    `own`: nobody else needs its weights as they are, so that no copy is made.
    """
    full, lora = train.kind == "full", None
    if train.kind == "lora":
        lora = body.add_lora(train.rank, train.alpha)
    else:
        body = body if own else body.clone(embed=full)
        for module in (body.layers, body.norm, *((body.front, body.head) if full else ())):
            if module is not None:
                module.requires_grad_(True)
    if train.recompute:
        body.recompute()
    return body, lora


def scalar_head(body: Body, *, bias: bool) -> nn.Linear:
    """A head that answers 0 everywhere, on the body's device."""
    head = nn.Linear(body.decoder.config.hidden_size, 1, bias=bias, device=body.device)
    for p in head.parameters():
        nn.init.zeros_(p)
    return head


def reward_body(trunk: Trunk, model: PreTrainedModel, score: nn.Linear) -> Body:
    """The reward model's top, running from the trunk's cached hidden states.

    Raises UserError when its bottom is not the trunk's, so that h_k would be wrong, or its vocabulary is not.
    """
    check_vocabulary(trunk.model, model)
    if not same_bottom(trunk.model, model, trunk.split, trunk.dtype):
        raise UserError(
            f"the reward model's layers below {trunk.split} differ from the policy's, so they cannot share a"
            " trunk; train it in this run, or set roles: separate and trunk.split: 0"
        )
    own = Body.of(model, trunk.split, score=score, dtype=trunk.dtype)
    # A copy, on the trunk's decoder: nobody holds the model's own bottom any more, nor its file, which stays mapped as
    # long as any of its weights is in use. Only what is copied goes to the trunk's device.
    return (own if trunk.split == 0 else own.clone().on(trunk.top)).to(trunk.top.device)


def same_bottom(a: PreTrainedModel, b: PreTrainedModel, split: int, dtype: torch.dtype) -> bool:
    """Whether what runs below `split` is equal to the bit in `dtype`, so that h_k of one serves the other.

    In `dtype`, since a model that was trained in half precision is saved with its frozen weights so rounded.
    """
    if split == 0:
        return True
    if type(a.base_model) is not type(b.base_model):
        return False
    bottoms = [
        [*front_of(decoder).state_dict().items(), *layers_of(decoder)[:split].state_dict().items()]
        for decoder in (decoder_of(a), decoder_of(b))
    ]
    return len(bottoms[0]) == len(bottoms[1]) and all(
        name == other and torch.equal(p.to(dtype), q.to(p.device, dtype))
        for (name, p), (other, q) in zip(*bottoms, strict=True)
    )


def check_vocabulary(policy: PreTrainedModel, reward: PreTrainedModel) -> None:
    """Raises UserError when the two do not count the same number of tokens."""
    a, b = policy.config.vocab_size, reward.config.vocab_size
    if a != b:
        raise UserError(
            f"the reward model has a vocabulary of {b} tokens and the policy one of {a}; use a reward model"
            " that was made from a model with the policy's tokenizer"
        )


def own_critic(
    trunk: Trunk, reward: Body | None, norm: Norm, train: Train, init: str, reward_scale: float
) -> Body:
    """The critic: the reward model's body, its output the value of a prefix, or the SFT body with head 0.

    The value starts at reward_scale · norm(score). With adapters, the SFT body is copied first, since the
    policy puts its own on it; a reward body keeps the critic's, switched off for scores.
    """
    start = trunk.top if reward is None or init == "zero" else reward
    head = scalar_head(start, bias=True)
    if start.score is not None:
        with torch.no_grad():
            head.weight.copy_(start.score.weight * (reward_scale / norm.std))
            head.bias.fill_((norm.offset - norm.mean) / norm.std * reward_scale)
    if start is trunk.top and train.kind == "lora":
        start = start.clone(score=head)
    else:
        start = Body(
            start.decoder, start.start, start.layers, start.norm, start.front, score=head, dtype=start.dtype
        )
    body, _ = trainable(start, train)
    assert body.score is not None
    body.score.requires_grad_(True)
    return body


def build_roles(
    trunk: Trunk,
    train: Train,
    reward: tuple[PreTrainedModel, nn.Linear, Norm] | None,
    *,
    separate: Callable[[], PreTrainedModel] | None = None,
    critic_init: str = "reward",
    critic_body: str = "own",
    reward_scale: float = 1.0,
) -> Roles:
    """Hand out the bodies. `separate` loads one more whole SFT model (`roles: separate`); None: one trunk."""
    reward_top, norm = None, Norm()
    if reward is not None:
        model, score, norm = reward
        if separate is None:
            reward_top = reward_body(trunk, model, score)
        else:
            check_vocabulary(trunk.model, model)
            reward_top = Body.of(model, 0, score=score, dtype=trunk.dtype).to(trunk.top.device)
    return hand_out(
        trunk,
        train,
        reward_top,
        norm,
        separate=separate,
        critic_init=critic_init,
        critic_body=critic_body,
        reward_scale=reward_scale,
    )


def hand_out(
    trunk: Trunk,
    train: Train,
    reward: Body | None,
    norm: Norm,
    *,
    separate: Callable[[], PreTrainedModel] | None,
    critic_init: str,
    critic_body: str,
    reward_scale: float,
) -> Roles:
    """`build_roles` from the reward model's body on."""
    own = None
    if critic_body == "own":  # before the policy: it may be a copy of what that puts its adapters on
        start = reward.clone(embed=True) if reward and separate else reward
        own = own_critic(trunk, start, norm, train, critic_init, reward_scale)
    policy, lora = trainable(trunk.top, train)
    critic = policy.second_head(scalar_head(policy, bias=True)) if own is None else own
    reference = trunk.top if separate is None else Body.of(separate(), 0, dtype=trunk.dtype)
    return Roles(trunk, policy, reference, critic, reward, norm, lora).hold()
