"""torchrl's return estimators and loss modules on plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from oracle import Plain, Tokens
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor
from torch.distributions import Categorical
from torchrl.objectives import PPOLoss
from torchrl.objectives.value import functional


def td(seen: Plain, gamma: Tensor) -> Tensor:
    return functional.td0_return_estimate(gamma, seen.next_values, seen.rewards, seen.terminated)


def monte_carlo(seen: Plain, gamma: Tensor) -> Tensor:
    s = _column(seen)
    return functional.td1_return_estimate(gamma, s.next_values, s.rewards, s.done, s.terminated)[..., 0]


def td_lambda(seen: Plain, gamma: Tensor, lam: Tensor) -> Tensor:
    s = _column(seen)
    return functional.td_lambda_return_estimate(gamma, lam, s.next_values, s.rewards, s.done, s.terminated)[
        ..., 0
    ]


def gae(seen: Plain, gamma: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    s = _column(seen)
    f = functional.generalized_advantage_estimate
    advantages, targets = f(gamma, lam, s.values, s.next_values, s.rewards, s.done, s.terminated)
    return advantages[..., 0], targets[..., 0]


def vtrace(
    seen: Plain, log_w: Tensor, gamma: Tensor, rho_max: Tensor, c_max: Tensor
) -> tuple[Tensor, Tensor]:
    """Targets and advantages; λ is 1."""
    s, log_w = _column(seen), log_w.nan_to_num()[..., None]
    advantages, targets = functional.vtrace_advantage_estimate(
        gamma,
        log_w,
        torch.zeros_like(log_w),
        s.values,
        s.next_values,
        s.rewards,
        s.done,
        s.terminated,
        rho_thresh=rho_max,
        c_thresh=c_max,
    )
    return targets[..., 0], advantages[..., 0]


def _column(seen: Plain) -> Plain:
    """torchrl wants a last axis of features."""
    return Plain(*(x[..., None] for x in seen))


class Result(NamedTuple):
    """What a loss module said."""

    out: Mapping[str, Tensor]
    gradient: Tensor
    """Of `loss_objective`, in the logits of π_θ."""
    module: Any
    data: TensorDict


def policy_loss(
    kind: type[PPOLoss], tokens: Tokens, *, masked: bool = True, prox: Tensor | None = None, **kwargs: Any
) -> Result:
    """`kind` on a policy that is a table of logits, at the places that count.

    Args:
        masked: torchrl gets the whole batch and its mask, which its diagnostics ignore; or else the True
            places and no mask.
        prox: logits of a proximal policy apart from the behaviour policy: torchrl's `delay_actor`. Then the
            data are from `tokens.behaviour`, else from `tokens.old`.
    """
    rows = torch.ones_like(tokens.mask) if masked else tokens.mask
    pick = lambda x: x.detach()[rows]  # noqa: E731
    behaviour = tokens.old if prox is None else tokens.behaviour
    data = TensorDict(
        {
            "place": torch.arange(int(rows.sum())),
            "action": pick(tokens.actions),
            "action_log_prob": pick(tokens.logprobs(behaviour)),
            "advantage": pick(tokens.advantages)[:, None],
            "logits": pick(behaviour),  # KLPENPPOLoss builds the previous policy from it
        },
        [int(rows.sum())],
    )
    if masked:
        data["shifted_valid"] = tokens.mask[:, None]
    if kind.__name__ == "A2CLoss":
        kwargs = {"critic_network": _critic(), "critic_coeff": None, **kwargs}
    loss = kind(_actor(pick(tokens.new if prox is None else prox)), entropy_coeff=0.0, **kwargs)
    loss = loss.to(tokens.new.dtype)  # its settings are float32 otherwise
    if prox is not None:  # the module has kept a copy of it, and now learns from there
        loss.actor_network_params.apply_(lambda p: p.data.copy_(pick(tokens.new)))
    out = loss(data)
    parameters = [p for p in loss.parameters() if p.requires_grad and p.shape == pick(tokens.new).shape]
    (grad,) = torch.autograd.grad(out["loss_objective"].sum(), parameters)
    whole = torch.zeros_like(tokens.new)
    whole[rows] = grad
    return Result(out, whole, loss, data)


def critic_loss(
    kind: type[PPOLoss], values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None
) -> tuple[Mapping[str, Tensor], Tensor]:
    """`kind`'s loss of the critic, squared error, and its gradient in `values`. 1-D tensors."""
    n = len(values)
    critic = _critic()
    data = TensorDict(
        {
            "prediction": values[:, None],
            "state_value": old_values[:, None],
            "value_target": returns[:, None],
            "place": torch.arange(n),
            "action": torch.zeros(n, dtype=torch.long),
            "action_log_prob": torch.zeros_like(old_values),
            "advantage": torch.zeros_like(old_values)[:, None],
        },
        [n],
    )
    actor = _actor(torch.zeros(n, 2, dtype=values.dtype))
    loss = kind(actor, critic, loss_critic_type="l2", clip_value=clip, entropy_coeff=0.0)
    out = loss(data)
    (grad,) = torch.autograd.grad(out["loss_critic"], values)
    return out, grad


def _actor(logits: Tensor) -> ProbabilisticTensorDictSequential:
    table = torch.nn.Embedding.from_pretrained(logits.clone(), freeze=False)
    return ProbabilisticTensorDictSequential(
        TensorDictModule(table, in_keys=["place"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"], out_keys=["action"], distribution_class=Categorical, return_log_prob=True
        ),
    )


def _critic() -> TensorDictModule:
    return TensorDictModule(torch.nn.Identity(), in_keys=["prediction"], out_keys=["state_value"])
