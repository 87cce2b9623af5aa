"""One small round through all of PPO, without a step: what should be 1, what 0, and what should agree.

    ratio         π/π_old of an update's own forward pass is 1 before the first step
    kl            the policy starts as its reference (but with `ppo.start`)
    sampler       its log-probs against the trainer's: rounding of the arithmetic, and no more
    temperature   mean −log π of what was drawn is the mean entropy, if it was drawn from π
    repeat        the same forward pass twice gives the same bits, and the same gradient (`full.py`)
    gradient      finite, and not 0
    critic        values against the returns of the round
    endings       answers end by themselves

The round leaves nothing behind: no weight, no moment, no random stream and no count is another afterwards.

Axes: B rows, R response tokens, N tokens that count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ppolite.config import PPO, Recipe
from ppolite.models.roles import Roles
from ppolite.models.sequences import Sequences
from ppolite.ops.losses import explained_variance
from ppolite.rollout.experience import make_experience, over_batches, policy_logprobs
from ppolite.rollout.local import LocalGenerator
from ppolite.rollout.score import TrunkScorer
from ppolite.stages.doctor.finding import Finding, graded, skipped
from ppolite.stages.opening import Opened
from ppolite.stages.rounds import Rounds
from ppolite.stages.seeds import derive_seed
from ppolite.stages.update import Updates
from ppolite.types import Experience, Leash, Rollout, Scorer

SAME = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest gap, nats, between log-probs that the same arithmetic gives twice."""
LEARNED = 2
"""Rows of the round whose gradient is taken: it costs three times what the log-probs do."""
ROUNDING = {torch.float32: (1e-3, 2e-2), torch.bfloat16: (0.1, 2.0)}
"""Between sampler and trainer, which get to a log-prob on different ways: largest mean and largest single gap, nats."""


class Plays(Protocol):
    """`PPO`, as far as it is looked at here."""

    recipe: Recipe
    config: PPO
    run_dir: Path
    seed: int
    opened: Opened
    roles: Roles
    scorer: Scorer
    generator: LocalGenerator
    updates: Updates
    rounds: Rounds
    leash: Leash


@dataclass
class Tried:
    """An update on a few rows that was left out, `LEARNED` of them."""

    figures: dict[str, float]
    norms: tuple[Tensor, Tensor]
    """Of the gradient of each weight of the policy, and of the critic."""


@dataclass
class Probe:
    """A round as the trainer sees it."""

    config: PPO
    dtype: torch.dtype
    rollouts: list[Rollout]
    scores: list[float] | None
    """The reward model's; None without one."""
    own: bool
    """Whether the rewards are made of these scores alone; otherwise they are stand-ins."""
    experience: Experience
    seqs: Sequences
    again_BR: Tensor
    """log π once more."""
    entropy_BR: Tensor
    tried: Tried

    @property
    def mask_BR(self) -> Tensor:
        return self.experience.mask_BR


def play(trainer: Plays, rows: int, tokens: int) -> Probe:
    """A round of `rows` answers of at most `tokens` tokens."""
    roles, config, kept = trainer.roles, trainer.config, trainer.roles.last
    devices = [trainer.opened.device] if trainer.opened.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        prompts = list(islice(cycle(trainer.rounds.given), rows))
        sampling = replace(config.sampling, max_new_tokens=min(tokens, config.max_new_tokens))
        seed = derive_seed(trainer.seed, "doctor")
        rollouts = trainer.generator.generate(prompts, sampling, seed=seed)
        budget = config.optim.micro_batch_tokens
        scores = None if roles.reward is None else TrunkScorer(roles, budget).score(rollouts)
        own = (
            scores is not None and isinstance(trainer.scorer, TrunkScorer) and all(map(math.isfinite, scores))
        )
        taken = scores if own and scores else _stand_ins(roles, rows)
        # An answer that is cut because the round is short is no fault of the policy's.
        short = sampling.max_new_tokens < config.max_new_tokens
        given = config.model_copy(update={"missing_eos_penalty": 0.0}) if short else config
        experience, seqs = make_experience(roles, rollouts, taken, given, trainer.leash.beta)
        again_BR, entropy_BR = _logprobs(roles, seqs, config)
        tried = _try(trainer.updates, experience, seqs, trainer.leash.beta)
    roles.last = kept
    return Probe(
        config, trainer.opened.dtype, rollouts, scores, own, experience, seqs, again_BR, entropy_BR, tried
    )  # fmt: skip


def examine(trainer: Plays, probe: Probe) -> list[Finding]:
    return [
        ratio(probe),
        kl(probe, begun=trainer.updates.policy.done > 0),
        sampler(probe),
        temperature(probe),
        repeat(probe),
        gradient(probe),
        critic(probe),
        endings(probe, taught=trainer.recipe.sft is None or Path(trainer.opened.source).name == "sft"),
    ]


def ratio(probe: Probe) -> Finding:
    """By KL(π_old‖π), which is ½ log² ρ for small log ρ, and which all objectives tell but a2c, that has no ratio."""
    off = math.sqrt(2 * abs(probe.tried.figures.get("kl/old_token", 0.0)))
    again = float((probe.again_BR - probe.experience.logprobs_BR)[probe.mask_BR].abs().max())
    return graded(
        "ppo/ratio",
        f"1 ± {off:.1g} in an update before the first step, 1 ± {again:.1g} when it is taken twice",
        "something in the model is drawn at random (dropout, noise): switch it off",
        fail=not (off < ROUNDING[probe.dtype][0] and again < SAME[probe.dtype]),
    )


def kl(probe: Probe, *, begun: bool) -> Finding:
    ours, theirs = probe.experience.logprobs_BR, probe.experience.ref_logprobs_BR
    largest = float((ours - theirs)[probe.mask_BR].abs().max())
    seq, config = probe.experience.diagnostics["kl/ref_seq"], probe.config
    if config.start or begun:
        return graded(
            "ppo/kl",
            f"{seq:.3g} nats a sequence from the reference at the start, ppo.max_kl is {config.max_kl:g}",
            "raise ppo.max_kl, or start nearer: no policy beyond it is kept",
            warn=seq > config.max_kl,
        )
    return graded(
        "ppo/kl",
        f"0 ± {largest:.1g} nats a token from the reference at the start",
        "the policy is not the model that its leash is tied to: begin with the SFT model, or name ppo.start",
        fail=not largest < SAME[probe.dtype],
    )


def sampler(probe: Probe) -> Finding:
    """The sampler's log-probs are of what `top_p` leaves: up to −log top_p above the trainer's."""
    of_sampler_BR = nn.utils.rnn.pad_sequence([r.logprobs_R for r in probe.rollouts], batch_first=True)
    gap_N = (of_sampler_BR.to(probe.mask_BR.device) - probe.experience.logprobs_BR)[probe.mask_BR]
    cut = -math.log(probe.config.top_p)
    excess_N = torch.maximum(-gap_N, gap_N - cut).clamp(min=0)
    mean, most = ROUNDING[probe.dtype]
    found = float(excess_N.mean()), float(excess_N.max())
    return graded(
        "ppo/sampler",
        f"log-probs {found[0]:.1g} from the trainer's on average, {found[1]:.1g} at most; {str(probe.dtype)[6:]} has "
        f"{mean:g} and {most:g}",
        "give the sampler the trainer's weights, temperature and arithmetic: ratios would be wrong",
        warn=not found[1] < most,
        fail=not found[0] < mean,
    )


def temperature(probe: Probe) -> Finding:
    """For a token drawn from π, E[−log π] is π's entropy: their differences are a martingale's, z of deviation 1."""
    name, T = "ppo/temperature", probe.config.temperature
    if probe.config.top_p < 1:
        return skipped(name, f"top_p {probe.config.top_p:g} cuts what is drawn from")
    surprise_N, entropy_N = -probe.experience.logprobs_BR[probe.mask_BR], probe.entropy_BR[probe.mask_BR]
    off_N = surprise_N - entropy_N
    z = float(off_N.sum() / off_N.square().sum().sqrt().clamp(min=1e-12))
    return graded(
        name,
        f"{float(surprise_N.mean()):.3f} nats a token drawn at {T:g}, entropy {float(entropy_N.mean()):.3f}, z "
        f"{z:+.1f}",
        f"the sampler draws {'colder' if z < 0 else 'hotter'} than log-probs are taken: give both one temperature",
        fail=not abs(z) < 5,
    )


def repeat(probe: Probe) -> Finding:
    a_N, b_N = probe.experience.logprobs_BR[probe.mask_BR], probe.again_BR[probe.mask_BR]
    return _same("ppo/repeat", "log-probs", a_N, b_N)


def repeat_gradient(trainer: Plays, probe: Probe) -> Finding:
    """By the norms of the weights' gradients: the backward pass may add in an order that threads decide."""
    # Both here: the one of `play` began where the first of these does in the random stream, with the same noise.
    a, b = (_try(trainer.updates, probe.experience, probe.seqs, trainer.leash.beta) for _ in range(2))
    return _same("ppo/repeat gradient", "norms", torch.cat(a.norms), torch.cat(b.norms))


def _same(name: str, what: str, a_N: Tensor, b_N: Tensor) -> Finding:
    differ = int((a_N != b_N).sum())
    return graded(
        name,
        f"{differ} of {len(a_N)} {what} are others the second time"
        if differ
        else f"{len(a_N)} {what}, the same bits twice",
        "an interrupted run will not go on to the bit: fewer threads, or from Python "
        "torch.use_deterministic_algorithms(True), on a GPU with CUBLAS_WORKSPACE_CONFIG=:4096:8",
        warn=differ > 0,
    )


def gradient(probe: Probe) -> Finding:
    policy, value = norms = [float(of_weights.norm()) for of_weights in probe.tried.norms]
    return graded(
        "ppo/gradient",
        f"norm {policy:.3g} of the policy's, {value:.3g} of the critic's",
        "nothing can be learned from it: look at model/weights, and at the rewards",
        warn=not all(norm > 0 for norm in norms),
        fail=not all(map(math.isfinite, norms)),
    )


def critic(probe: Probe) -> Finding:
    name, known, config = "ppo/critic", probe.experience, probe.config
    values_N, returns_N = known.values_BR[known.mask_BR], known.returns_BR[known.mask_BR]
    if not values_N.isfinite().all():
        return Finding(name, "fail", "its values are not finite", "set ppo.critic_init to zero")
    if not probe.own:
        return skipped(name, "what it should forecast is scored when training begins")
    gap = float((values_N - returns_N).square().mean().sqrt())
    unit = max(float(returns_N.std(correction=0)), config.reward_scale)
    rounds = abs(float((values_N - returns_N).mean())) / config.value_clip if config.value_clip else 0.0
    explained = float(explained_variance(known.values_BR, known.returns_BR, known.mask_BR))
    slow = rounds > max(5, config.steps / 4)
    return graded(
        name,
        f"values {gap:.2g} from the returns, whose deviation is {float(returns_N.std(correction=0)):.2g}; explained "
        f"variance {explained:.2g}",
        f"within ppo.value_clip it takes {rounds:.0f} rounds to get there: set it to null, or critic_init to zero"
        if slow
        else "set ppo.critic_init to zero, or give rewards a mean near 0 (`shift`)",
        warn=gap > 5 * unit or slow,
    )


def endings(probe: Probe, *, taught: bool) -> Finding:
    name = "ppo/endings"
    if not taught:
        return skipped(name, "before SFT: nobody has taught it to end")
    cut = sum(r.finish == "length" for r in probe.rollouts)
    most = max(len(r.response_ids) for r in probe.rollouts)
    if cut and most < probe.config.max_new_tokens:
        return skipped(
            name, f"the round is of {most} tokens, ppo.max_new_tokens {probe.config.max_new_tokens}"
        )
    return graded(
        name,
        f"{cut} of {len(probe.rollouts)} answers are cut after {most} tokens",
        "raise ppo.max_new_tokens, or look at the stop tokens: an answer that is cut is penalised whatever it says",
        warn=cut > 0.9 * len(probe.rollouts),
    )


def standstill(trainer: Plays, probe: Probe) -> Finding:
    """All updates of a round with a learning rate of 0, which the trainer must have: they change nothing."""
    updates, roles = trainer.updates, trainer.roles
    trained = [*roles.policy.trained(), *roles.critic.trained()]
    before = [weight.detach().clone() for weight in trained]
    updates.run(probe.experience, probe.seqs, round_=0, leash=trainer.leash.beta)
    moved = sum(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    new_BR = policy_logprobs(roles, probe.seqs, trainer.config)
    off = float((new_BR - probe.experience.logprobs_BR)[probe.mask_BR].abs().max())
    return graded(
        "ppo/learning rate 0",
        f"{updates.policy.done} updates, {updates.skips.total} skipped: {moved} weights moved, ratio 1 ± {off:.1g}",
        "the model changes by itself, or its gradients are not finite: look for layers that keep a state",
        fail=moved + updates.skips.total > 0 or not off < SAME[probe.dtype],
    )


def _stand_ins(roles: Roles, rows: int) -> list[float]:
    """Scores that are worth +1 and −1 in turn."""
    return [roles.norm.mean + roles.norm.std * (-1) ** i for i in range(rows)]


def _logprobs(roles: Roles, seqs: Sequences, config: PPO) -> tuple[Tensor, Tensor]:
    """log π and entropy, [B, R] each, in one pass."""
    budget, entropies = config.optim.micro_batch_tokens, list[Tensor]()

    def both(part: Sequences) -> Tensor:
        logp_BR, entropy_BR = roles.policy.logprobs(part, config.temperature, entropy=True)
        assert entropy_BR is not None
        entropies.append(entropy_BR)
        return logp_BR

    logp_BR = over_batches(seqs, budget, both)
    return logp_BR, over_batches(seqs, budget, lambda _: entropies.pop(0))


def _try(updates: Updates, experience: Experience, seqs: Sequences, beta: float) -> Tried:
    def clear() -> None:
        updates.policy.clear()
        updates.critic.clear()

    rows = list(range(min(len(seqs), LEARNED)))
    figures = updates.fitting.run(lambda: updates.minibatch(experience, seqs, rows, beta), clear)
    norms = _norms(updates.policy.parameters), _norms(updates.critic.parameters)
    clear()
    return Tried(figures, norms)


def _norms(weights: Iterable[nn.Parameter]) -> Tensor:
    return torch.stack([w.new_zeros(()) if w.grad is None else w.grad.norm() for w in weights])
