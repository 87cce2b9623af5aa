"""TRL 1.12's own training code, on a stand-in for its `self`: scripted tensors in place of models.

ppo     `PPOTrainer.train` up to the first backward pass: its local variables
grpo    `GRPOTrainer._compute_loss`: asymmetric and two-sided clipping, CISPO, weights of the sampler
pairs   `RewardTrainer.compute_loss`
"""

from __future__ import annotations

import sys
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from trl.experimental.ppo import ppo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

PAD, END = 0, 1


class _Done(Exception):
    """The first minibatch is over."""


def ppo(
    *,
    responses: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    new_logits: Tensor,
    values: Tensor,
    new_values: Tensor,
    scores: Tensor,
    **settings: Any,
) -> SimpleNamespace:
    """Local variables of `PPOTrainer.train` at its first backward pass, over the whole batch.

    Rows of the `mb_` variables come in the order of `micro_batch_inds`. `unwhitened` holds the rewards, if they
    are whitened, and the advantages, before that.

    Args:
        responses: [B, R] token ids; what stands behind END is not read.
        logits, ref_logits, new_logits: [B, R, V] of π_old, π_ref and π_θ.
        values, new_values: [B, R], before and during the update.
        scores: [B].
        settings: of `PPOConfig`.
    """
    B, R = responses.shape
    seen = SimpleNamespace(unwhitened=[])
    one_more = lambda x: torch.cat([x, x[:, -1:]], dim=1)  # noqa: E731  (of the token after the last)

    def forward(model: Any, query_responses: Tensor, pad: int) -> Any:
        rows = query_responses[:, 0]
        if model is policy:
            output = SimpleNamespace(logits=one_more(new_logits[rows]))
            return output, one_more(new_values[rows])[..., None]
        return SimpleNamespace(logits=one_more(ref_logits[rows]))

    def get_reward(model: Any, query_responses: Tensor, pad: int, context: int) -> Any:
        return one_more(values)[..., None], scores.clone(), None

    def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        seen.unwhitened.append(x)
        return whiten(x, mask, shift_mean)

    def backward(loss: Tensor) -> None:
        vars(seen).update(sys._getframe(1).f_locals)

    def empty_cache() -> None:
        if hasattr(seen, "loss"):
            raise _Done

    policy = SimpleNamespace(train=lambda: None, value_model=None)
    whiten = ppo_trainer.masked_whiten
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        print=lambda *args: None,
        unwrap_model=lambda model: model,
        accumulate=nullcontext,
        backward=backward,
    )
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            response_length=R,
            temperature=1 - 1e-7,  # it divides by temperature + 1e-7
            num_ppo_epochs=1,
            num_mini_batches=1,
            gradient_accumulation_steps=1,
            per_device_train_batch_size=B,
            batch_size=B,
            local_batch_size=B,
            local_mini_batch_size=B,
            local_rollout_forward_batch_size=B,
            num_total_batches=1,
            total_episodes=B,
            logging_steps=None,
            eval_steps=None,
            save_steps=None,
            ds3_gather_for_generation=False,
            missing_eos_penalty=None,
            **settings,
        ),
        accelerator=accelerator,
        optimizer=SimpleNamespace(step=lambda: None, zero_grad=lambda: None),
        model=policy,
        ref_model=SimpleNamespace(),
        reward_model=None,
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=END),
        dataloader=[{"input_ids": torch.arange(B)[:, None]}],  # prompts of one token, the number of their row
        state=SimpleNamespace(episode=0),
        control=None,
        callback_handler=SimpleNamespace(on_train_begin=lambda args, state, control: control),
        is_deepspeed_enabled=False,
        train_dataset_len=B,
        stop_token_id=END,
    )
    query_responses = torch.cat([torch.arange(B)[:, None], responses], dim=1)
    scripted = mock.patch.multiple(
        ppo_trainer,
        batch_generation=lambda *args: (query_responses, logits.clone()),
        unwrap_model_for_generation=lambda *args, **kwargs: nullcontext(SimpleNamespace(policy=None)),
        forward=forward,
        get_reward=get_reward,
        masked_whiten=masked_whiten,
        empty_cache=empty_cache,
        gc=SimpleNamespace(collect=lambda: None),  # tenths of a second in a process this large
    )
    with scripted:
        try:
            ppo_trainer.PPOTrainer.train(trainer)
        except _Done:
            return seen
    raise AssertionError("TRL's loop ended without an update")


def grpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "bnpo",
    low: float = 0.2,
    high: float = 0.2,
    delta: float | None = None,
    level: str = "token",
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss, a mean over the True places, and what it logs. [B, R].

    `bnpo` clips, at 1 + `high` and 1 − `low`, and at `delta` however bad the action; `cispo` caps the weight of
    log π at `high`. `weights` are π_old/μ.
    """
    metrics: Any = defaultdict(lambda: defaultdict(list))
    same = lambda x, reduction=None: x  # noqa: E731
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=0.0,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        args=SimpleNamespace(delta=delta, steps_per_generation=1),
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, reduce=same, gather=same),
        _entropy_bonus_enabled=False,
        _metrics=metrics,
    )
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": mask.long(), "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old_logprobs, "importance_sampling_ratio": weights,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[0] for name, values in metrics["train"].items()}


def pairs(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
    """The loss of `RewardTrainer`, and what it logs."""
    same = lambda x: x  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    scores = torch.cat([chosen, rejected])
    inputs = {"attention_mask": torch.ones(1)} | ({} if margin is None else {"margin": margin})
    model = lambda **kwargs: SimpleNamespace(logits=scores[:, None])  # noqa: E731
    loss = RewardTrainer.compute_loss(trainer, model, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}
