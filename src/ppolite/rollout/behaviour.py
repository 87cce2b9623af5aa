"""What a round of another policy than the present one needs.

    sft_samples     the SFT model's responses, drawn once and kept in a file
    remember        log μ by the trainer's own forward pass, kept with rollouts that will wait

The trainer's log-probs and the sampler's of the same policy differ by rounding. A ratio is made of the trainer's
alone, so what is going to wait is passed through the trainer while its policy is still there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppolite.config import PPO
from ppolite.models.body import Body
from ppolite.models.roles import Roles
from ppolite.models.sequences import Sequences
from ppolite.rollout.experience import over_batches, sequences
from ppolite.rollout.local import LocalGenerator
from ppolite.rollout.record import Origin, read_samples, write_samples
from ppolite.types import Prompt, Rollout


def remember(
    roles: Roles, rollouts: Sequence[Rollout], config: PPO, logprobs: Callable[[Sequences], Tensor]
) -> None:
    """Keep log μ with the rollouts; `logprobs` gives it for a micro-batch, [B, R]."""
    budget = config.optim.micro_batch_tokens
    for first in range(0, len(rollouts), config.rollouts):  # hidden states of one round at a time
        round_ = rollouts[first : first + config.rollouts]
        mu_BR = over_batches(sequences(roles, round_, budget), budget, logprobs)
        for i, rollout in enumerate(round_):
            rollout.trainer_logprobs_R = mu_BR[i, : len(rollout.response_ids)].cpu().clone()


def sft_samples(
    roles: Roles,
    generator: LocalGenerator,
    prompts: Sequence[Prompt],
    config: PPO,
    *,
    seed: int,
    path: Path,
    say: Callable[[str], None],
) -> tuple[list[Rollout], bool]:
    """The reference's responses to `prompts`: those in the file when they are these, else drawn and written there.

    `generator` belongs to the reference. Returns the samples with their log μ, and whether they were drawn.
    """
    origin = origin_of(roles, prompts, config, seed)
    kept = read_samples(path, origin, prompts, say)
    samples = kept
    if samples is None:
        with roles.reference.adapters(False):
            samples = generator.generate(prompts, config.sampling, seed=seed)
        write_samples(path, origin, samples)
    remember(roles, samples, config, lambda part: roles.ref_logprobs(part, config.temperature))
    return samples, kept is None


def origin_of(roles: Roles, prompts: Sequence[Prompt], config: PPO, seed: int) -> Origin:
    """What the reference's responses to `prompts` depend on."""
    return {
        "model": fingerprint(roles.reference),
        "prompts": _digest(repr([(p.messages, p.text) for p in prompts]).encode()),
        "seed": seed,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
    }


def fingerprint(body: Body) -> str:
    """Of the frozen weights of the last layer, in bfloat16: the same whatever dtype they are held in."""
    frozen = [p for p in body.layers[-1].parameters() if not p.requires_grad]
    return _digest(*(p.detach().to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes() for p in frozen))


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
