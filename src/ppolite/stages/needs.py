"""What each stage holds in memory, part by part, in bytes. The story is in plan.py.

    always      from start to end: weights, each once, whoever shares it; the optimizer's two moments of trained ones
    phases      come and go: models as they are loaded, what autograd keeps, gradients, keys and values of a generation

With one micro-batch the gradients come as the activations go, and a stage holds either. With several, the second finds
the gradients of the first; so does PPO's critic, which follows the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ppolite.config import Recipe
from ppolite.models.body import Body
from ppolite.models.footprint import Activations, activations, blueprint, cache_size, size_of, weights_of
from ppolite.models.memory import MOST
from ppolite.models.prepacked import prepacking
from ppolite.models.roles import Norm, hand_out, scalar_head, trainable
from ppolite.models.sequences import micro_batches
from ppolite.models.trunk import Trunk
from ppolite.ops.logprobs import CHUNK
from ppolite.rollout.prefill import GROUP_TOKENS

Parts = dict[str, int]


@dataclass
class Stage:
    """A stage's parts, and those that come to them in each phase."""

    name: str
    always: Parts
    phases: dict[str, Parts] = field(default_factory=dict[str, Parts])

    @property
    def largest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.always.values()) + sum(self.phases[self.largest].values())


@dataclass(frozen=True)
class Rows:
    """Lengths, in tokens, of the rows of a stage."""

    shared: int
    """Tokens that all prompts begin with."""
    own: tuple[tuple[int, int], ...]
    """Of prompts, behind these, and of answers; the longest row first."""
    answers: int = 1
    """To each prompt, that are judged together, at most."""

    @property
    def prompt(self) -> int:
        """The longest one's own tokens."""
        return max(prompt for prompt, _ in self.own)

    @property
    def answer(self) -> int:
        return max(answer for _, answer in self.own)

    def batch(self, size: int) -> list[int]:
        """Own tokens of the longest rows, so many: batches hold rows of about one length."""
        lengths = [prompt + answer for prompt, answer in self.own]
        longest = (lengths * -(-size // len(lengths)))[:size]
        return [length for length in longest for _ in range(self.answers)]


@dataclass(frozen=True)
class Job:
    """What the stages of a recipe have in common."""

    recipe: Recipe
    config: PreTrainedConfig
    dtype: torch.dtype
    rows: dict[str, Rows]
    base: Parts
    on_cpu: bool
    has: int
    """Bytes of the device's memory."""
    counted: dict[tuple[Any, ...], Activations] = field(default_factory=dict[tuple[Any, ...], Activations])
    """Counting takes seconds, and is the same in all stages."""

    def activations(self, shared: int, *, recompute: bool) -> Activations:
        train = self.recipe.train.model_copy(update={"recompute": recompute})
        key = (train.kind, train.rank, recompute, self.dtype, shared)
        if key not in self.counted:
            self.counted[key] = activations(
                self.config,
                train,
                self.dtype,
                shared,
                trust_remote_code=self.recipe.trust_remote_code,
            )
        return self.counted[key]

    def model(self) -> PreTrainedModel:
        return blueprint(self.config, trust_remote_code=self.recipe.trust_remote_code)

    def trunk(self) -> Trunk:
        return Trunk(self.model(), self.recipe.trunk.split, self.dtype)

    def logits(self, rows: int, copies: int) -> int:
        """Of so many rows in float32, and once in half precision where that is multiplied."""
        half = self.dtype.itemsize if self.dtype.itemsize < 4 else 0
        return rows * self.config.vocab_size * (4 * copies + half)

    def hidden(self, rows: Sequence[int]) -> int:
        """What the frozen bottom gives for rows of these lengths, padded."""
        return 4 * self.config.hidden_size * len(rows) * max(rows) if self.recipe.trunk.split else 0

    def kept(self, rows: Sequence[int], budget: int) -> int:
        """What of it stays on the device for a round of PPO, at most: rounds can be shorter than the rows here."""
        keep, whole = self.recipe.trunk.keep, self.hidden(rows)
        if keep == "auto":
            return min(whole, int(MOST * self.has))
        here = keep == "device" or (keep == "cpu" and self.on_cpu)
        return whole if here else whole * min(budget, sum(rows)) // (len(rows) * max(rows))


def stages(job: Job) -> list[Stage]:
    """Those that the recipe has, in their order."""
    makers = {"sft": _sft, "reward": _reward, "ppo": _ppo}
    return [make(job) for name, make in makers.items() if name in job.rows]


def _sft(job: Job) -> Stage:
    config, trunk, rows = job.recipe.sft, job.trunk(), job.rows["sft"]
    assert config is not None
    body, _ = trainable(trunk.top, job.recipe.train, own=True)
    batch = rows.batch(config.batch_size)
    update = _Update(job, trunk, rows.shared, batch, config.optim.micro_batch_tokens)
    owned = _owned(trunk, [body])
    return Stage(
        "sft",
        job.base | owned | {"hidden states": job.hidden(batch)},
        {
            "opening": _opening(trunk, [body], owned),
            "backward": update.backward(body, [body], logits=True),
            "step": update.step([body]),
        },
    )


def _reward(job: Job) -> Stage:
    config, trunk, rows = job.recipe.reward, job.trunk(), job.rows["reward"]
    assert config is not None
    head = scalar_head(trunk.top, bias=False)
    body, _ = trainable(trunk.top.clone(embed=trunk.split == 0, score=head), job.recipe.train, own=True)
    head.requires_grad_(True)
    batch = rows.batch(config.batch_size)
    update = _Update(job, trunk, rows.shared, batch, config.optim.micro_batch_tokens)
    owned = _owned(trunk, [body, trunk.top])
    return Stage(
        "reward",
        job.base | owned,
        {
            "opening": _opening(trunk, [body, trunk.top], owned),
            "backward": update.backward(body, [body]) | {"hidden states": job.hidden(batch)},
            "step": update.step([body]),
            "agreement": {"hidden states": job.hidden(rows.batch(config.eval_examples))},
            "samples": _generation(job, trunk.top, rows, config.norm_samples),
        },
    )


def _ppo(job: Job) -> Stage:
    recipe, trunk, rows = job.recipe, job.trunk(), job.rows["ppo"]
    config = recipe.ppo
    assert config is not None
    reward = None
    if recipe.reward is not None and config.asks_model:
        head = scalar_head(trunk.top, bias=False).requires_grad_(False)
        reward = trunk.top.clone(embed=trunk.split == 0, score=head)
    # The reward model's layers are copied from the whole one, which comes to the CPU.
    whole = _loaded([trunk.model]) if reward is not None and job.on_cpu and trunk.split else 0
    roles = hand_out(
        trunk,
        recipe.train,
        reward,
        Norm(),
        separate=job.model if recipe.roles == "separate" else None,
        critic_init=config.critic_start,
        critic_body=config.critic_body,
        reward_scale=config.reward_scale,
    )
    policy, critic = learners = [roles.policy, roles.critic]
    batch = rows.batch(config.rollouts)
    budget = config.optim.micro_batch_tokens
    update = _Update(job, trunk, rows.shared, batch[: -(-len(batch) // config.minibatches)], budget)
    bodies = [*learners, roles.reference, roles.reward]
    owned = _owned(trunk, bodies)
    always = job.base | owned
    if job.on_cpu:
        always["best policy"] = size_of(policy.trained())
    at_once = max(config.rollouts, config.eval_prompts, config.stored)
    phases = {
        "opening": _opening(trunk, bodies, owned, besides=whole),
        "generate": _generation(job, policy, rows, at_once),
        "prepare": {"logits": job.logits(min(CHUNK, sum(batch)), 2)},
        "policy's backward": update.backward(policy, learners, logits=True),
        "critic's backward": update.backward(critic, learners),
        "step": update.step(learners),
    }
    if critic.borrows:
        del phases["critic's backward"]
    return Stage("ppo", always | {"hidden states": job.kept(batch, budget)}, phases)


def _owned(trunk: Trunk, bodies: Sequence[Body | None]) -> Parts:
    """Weights and moments, once all that is frozen is in the dtype of the arithmetic."""
    there = [body for body in bodies if body is not None]
    copies: dict[nn.Module, nn.Module] = {}
    trunk.hold()
    for body in there:
        body.hold(copies)
    weights = weights_of([trunk.model, *there, *(body.decoder for body in there), *copies.values()])
    adapters = {id(p) for body in there for name, p in body.layers.named_parameters() if ".lora_" in name}
    trained = {id(p) for body in there for p in body.trained()}
    return {
        "weights": size_of(p for p in weights if id(p) not in adapters),
        "adapters": size_of(p for p in weights if id(p) in adapters),
        "optimizer": 2 * size_of(p for p in weights if id(p) in trained),
    }


def _opening(trunk: Trunk, bodies: Sequence[Body | None], owned: Parts, *, besides: int = 0) -> Parts:
    """What is there besides before the first update: frozen weights are float32 until the last copy is made of them."""
    there = [body for body in bodies if body is not None]
    loaded = _loaded([trunk.model, *there, *(body.decoder for body in there)]) + besides
    return {"weights as they are loaded": max(loaded - sum(owned.values()), 0)}


def _loaded(modules: Sequence[nn.Module]) -> int:
    """In float32."""
    return 4 * sum(p.numel() for p in weights_of(modules))


class _Update:
    """Of the rows of a batch, whose own tokens are given, in micro-batches of at most `budget` tokens."""

    def __init__(self, job: Job, trunk: Trunk, shared: int, rows: Sequence[int], budget: int) -> None:
        self.job = job
        parts = micro_batches(rows, budget, packed=trunk.packed)
        self.several = len(parts) > 1
        sizes = [sum(rows[i] for i in part) for part in parts]
        if not trunk.packed:
            sizes = [len(part) * max(rows[i] for i in part) for part in parts]
        self.tokens = max(sizes)
        self.kept = job.activations(shared, recompute=job.recipe.train.recompute)
        self.work = job.activations(shared, recompute=False)

    def backward(self, body: Body, learners: Sequence[Body], *, logits: bool = False) -> Parts:
        """As it begins. The work is that of one layer; the logits are needed before it."""
        earlier = learners if self.several else learners[: [*learners].index(body)]
        work = self.work.of(1, self.tokens)
        head = 0
        if logits:
            work = max(work, self.job.logits(min(CHUNK, self.tokens), 2))
            head = self._head
        return {
            "activations": self.kept.of(len(body.layers), self.tokens),
            "logits or a layer's work": work,
            "gradients": sum(size_of(other.trained()) for other in earlier) + head,
        }

    def step(self, learners: Sequence[Body]) -> Parts:
        """All gradients, and that of an embedding which is a head as well a second time, before both are added."""
        return {"gradients": sum(size_of(body.trained()) for body in learners) + self._head}

    @property
    def _head(self) -> int:
        config: Any = self.job.config
        return 4 * config.vocab_size * config.hidden_size if self.job.recipe.train.kind == "full" else 0


def _generation(job: Job, body: Body, rows: Rows, count: int) -> Parts:
    """Every place filled to the longest answer, one layer's keys and values for all heads, copies of weights."""
    config: Any = job.config
    places, length = min(job.recipe.decode_rows, count), rows.shared + rows.prompt + rows.answer - 1
    group = max(1, min(places, GROUP_TOKENS // rows.prompt))
    tuned: list[Any] = [m for m in body.layers.modules() if isinstance(m, BaseTunerLayer)]
    pack = prepacking(body, torch.device("cpu" if job.on_cpu else "cuda"))
    # Where weights are prepacked, a merged one goes as soon as it is.
    merged = [m.get_base_layer().weight for m in tuned] if job.dtype.itemsize == 4 and not pack else []
    # Autocast keeps its casts of trained matrices for as long as the generation lasts.
    cast = [p for p in body.trained() if p.dim() > 1] if job.dtype.itemsize < 4 and not pack else []
    return {
        "KV cache": places * cache_size(config, length, job.dtype)
        + group * cache_size(config, rows.shared + rows.prompt, job.dtype),
        "logits": job.logits(places, 3),
        "attention": 2 * places * length * config.hidden_size * min(job.dtype.itemsize, 4),
        "merged adapters": size_of(merged),
        "casts of trained weights": job.dtype.itemsize * sum(p.numel() for p in cast),
        "prepacked weights": pack,
    }
