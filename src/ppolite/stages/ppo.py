"""PPO on a language model: sample, score, learn, under a leash to the SFT model.

    for each step:
        rollouts   = generate(prompts)                    # under μ = π_old
        experience = make_experience(rollouts, scores)    # π_old, π_ref, V, rewards, GAE
        for each epoch and minibatch: policy and critic take a step
        leash.update(KL to the reference)

The loop is open: `PPO.generate`, `score`, `step`, `evaluate` and `save` are what `run` itself is made of.
Left out: other behaviours than fresh rollouts, checkpoints within a run, several processes.

    ppolite ppo recipes/film.yaml
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppolite.config import Recipe, save_recipe
from ppolite.data.chat import encode_prompt
from ppolite.models.export import save_adapter, save_policy
from ppolite.models.load import load_causal, load_reward
from ppolite.models.roles import build_roles
from ppolite.models.trunk import Sequences
from ppolite.obs.sinks import MetricsLog, progress, step_line
from ppolite.ops.kl import AdaptiveLeash, AdaptivePenalty, FixedLeash, kl_estimate
from ppolite.ops.losses import clip_loss, explained_variance, kl_penalty_loss, value_loss
from ppolite.ops.masked import masked_mean
from ppolite.ops.packing import token_batches
from ppolite.rollout.evaluate import distance, length, mean
from ppolite.rollout.experience import make_experience, over_batches
from ppolite.rollout.local import LocalGenerator
from ppolite.rollout.record import write_rollouts
from ppolite.rollout.score import TrunkScorer
from ppolite.stages.loop import (
    Learner,
    after_sft,
    cycle,
    derive_seed,
    load_prompts,
    log,
    open_model,
    open_trunk,
    tests_of,
)
from ppolite.types import Experience, Leash, Prompt, Rollout, Scorer, UserError


class PPO:
    """The trainer. `scorer` replaces the recipe's reward model; with neither, pass `scores` to `step`."""

    def __init__(self, recipe: Recipe, run_dir: str | Path, *, scorer: Scorer | None = None) -> None:
        if recipe.ppo is None:
            raise UserError("this recipe has no `ppo` section; add one with its `prompts`")
        self.recipe, self.config, self.run_dir = recipe, recipe.ppo, Path(run_dir)
        self.opened = open_model(recipe, after_sft(recipe, self.run_dir))
        train, held = load_prompts(self.config.prompts, self.opened, self.config.max_new_tokens, recipe.seed)
        self.held, self.held_out = held, held[: self.config.eval_prompts]
        probe = [encode_prompt(self.opened.tokenizer, p) for p in train[:4]]
        trunk = open_trunk(recipe, self.opened, probe)
        reward = None if scorer else self._load_reward()
        if reward is None and self.config.critic_init == "reward":
            log.warning("no reward model in %s, so the critic starts at zero", self.run_dir)
        separate = (
            None
            if recipe.roles == "shared"
            else lambda: load_causal(
                self.opened.source, self.opened.device, trust_remote_code=recipe.trust_remote_code
            )
        )
        self.roles = build_roles(
            trunk,
            recipe.train,
            reward,
            separate=separate,
            critic_init=self.config.critic_init,
            reward_scale=self.config.reward_scale,
        )
        self.scorer: Scorer = scorer or TrunkScorer(self.roles, self.config.optim.micro_batch_tokens)
        self.generator = LocalGenerator(self.roles.policy, self.opened.tokenizer, self.opened.stop_ids)
        updates = self.config.steps * self.config.epochs * self.config.minibatches
        self.learner = Learner(self.roles.policy.trained(), self.config.optim, updates)
        self.critic_learner = Learner(self.roles.critic.trained(), self.config.critic, updates)
        kl = self.config.kl
        self.leash: Leash = (
            AdaptiveLeash(kl.beta, kl.target, kl.horizon) if kl.target else FixedLeash(kl.beta)
        )
        self.penalty = AdaptivePenalty(1.0, self.config.penalty_target or 0.01)
        self.steps_done = 0
        self.best: tuple[int, float, dict[str, Tensor]] | None = None
        self._prompts = cycle(train, derive_seed(recipe.seed, "ppo-prompts"))

    def _load_reward(self) -> Any:
        folder = self.run_dir / "reward"
        if not folder.exists():
            return None
        report = folder / "agreement.json"
        floor, accuracy = self.config.min_rm_accuracy, 0.0
        if report.exists():
            accuracy = json.loads(report.read_text(encoding="utf-8"))["pair_accuracy"]
        elif floor:
            raise UserError(
                f"{folder}: no agreement.json says how well this reward model agrees with people; train it "
                "here with `ppolite reward`, or go on with --set ppo.min_rm_accuracy=0"
            )
        if accuracy < floor:
            raise UserError(
                f"{folder}: the reward model ranks only {accuracy:.1%} of held-out pairs as people do, below "
                f"ppo.min_rm_accuracy ({floor:.1%}); improve its data, or go on "
                "with --set ppo.min_rm_accuracy=0"
            )
        return load_reward(str(folder), self.opened.device)

    # The four things a step is made of.

    def next_prompts(self) -> list[Prompt]:
        """Prompts of one round: `rollouts / samples_per_prompt`, each as often as it is to be answered."""
        n = self.config.samples_per_prompt
        return [p for _ in range(self.config.rollouts // n) for p in [next(self._prompts)] * n]

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response of the current policy for each prompt."""
        seed = derive_seed(self.recipe.seed, "ppo-sample", self.steps_done)
        return self.generator.generate(prompts, self.config.sampling, seed=seed)

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One number for each rollout, larger is better, from the reward model or the given scorer."""
        return self.scorer.score(rollouts)

    def step(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> dict[str, float]:
        """Learn from scored rollouts; scores may come from anywhere. Returns the step's metrics."""
        experience, seqs = make_experience(self.roles, rollouts, scores, self.config, self.leash.beta)
        metrics = {**experience.diagnostics, "leash/beta": self.leash.beta}
        if self.config.objective == "kl":
            metrics["penalty/beta"] = self.penalty.beta
        metrics |= self.update(experience, seqs)
        self.leash.update(metrics["kl/ref_seq"], len(rollouts))
        self.steps_done += 1
        self.generator.version = self.learner.done
        self.last = (experience, seqs)
        return metrics

    def update(self, experience: Experience, seqs: Sequences) -> dict[str, float]:
        """All epochs and minibatches over one round. Metrics are means over the updates."""
        seed = derive_seed(self.recipe.seed, "ppo-shuffle", self.steps_done)
        shuffle = torch.Generator().manual_seed(seed)
        rows: list[dict[str, float]] = []
        for _ in range(self.config.epochs):
            order = torch.randperm(len(seqs), generator=shuffle)
            # chunk() would make fewer when they do not divide: 5 rows in 4 minibatches become 2 + 2 + 1.
            for minibatch in order.tensor_split(min(self.config.minibatches, len(order))):
                row = self.minibatch(experience, seqs, minibatch.tolist())
                row["policy/grad_norm"] = self.learner.step()
                row["value/grad_norm"] = self.critic_learner.step()
                rows.append(row)
        metrics = {k: sum(r[k] for r in rows) / len(rows) for k in rows[0] if k != "policy/ratio_max"}
        metrics["policy/ratio_max"] = max(r["policy/ratio_max"] for r in rows)
        explained = explained_variance(experience.values_BR, experience.returns_BR, experience.mask_BR)
        metrics["value/explained_variance"] = float(explained)
        metrics["lr/policy"] = self.learner.lr
        # The paper's rule looks at the KL that the finished update has caused, not at its mean on the way.
        if self.config.objective == "kl":
            self.penalty.update(self.moved(experience, seqs))
        return metrics

    def minibatch(self, experience: Experience, seqs: Sequences, rows: list[int]) -> dict[str, float]:
        """Gradients of policy and critic on the given rows, in micro-batches, by global token count."""
        lengths = seqs.lengths
        denom = experience.mask_BR[rows].sum()
        metrics: dict[str, float] = {}
        for part in token_batches([lengths[i] for i in rows], self.config.optim.micro_batch_tokens):
            micro = [rows[i] for i in part]
            batch = seqs.select(micro)
            R, mask = batch.mask_BR.shape[1], batch.mask_BR
            pick = lambda x, micro=micro, R=R: x[micro, :R]  # noqa: E731
            loss, figures = self.policy_loss(experience, batch, pick, denom)
            loss.backward()
            vloss, vfigures = value_loss(
                self.roles.critic.values(batch),
                pick(experience.values_BR),
                pick(experience.returns_BR),
                mask,
                clip=self.config.value_clip,
                denom=denom,
            )
            vloss.backward()
            for key, value in {
                **figures,
                "value/loss": vloss.detach(),
                "value/clip_fraction": vfigures["clip_fraction"],
            }.items():
                old = metrics.get(key, 0.0)
                metrics[key] = max(old, float(value)) if key == "policy/ratio_max" else old + float(value)
        return metrics

    def policy_loss(
        self, experience: Experience, batch: Sequences, pick: Callable[[Tensor], Tensor], denom: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO-clip or PPO-KL, and the leash when it is in the loss."""
        config, mask = self.config, batch.mask_BR
        logp_BR, _ = self.roles.policy.logprobs(batch, config.temperature)
        args = (logp_BR, pick(experience.logprobs_BR), pick(experience.advantages_BR), mask)
        if config.objective == "clip":
            loss, figures = clip_loss(*args, clip=config.clip or 0.2, denom=denom)
        else:
            loss, figures = kl_penalty_loss(*args, beta=self.penalty.beta, denom=denom)
        named = {_NAMES[k]: v for k, v in figures.items() if k in _NAMES} | {"policy/loss": loss.detach()}
        if config.kl.where == "loss":
            # Differentiable: the samples are π_old's, so this is a first-order leash, exact at ratio 1.
            kl_BR = kl_estimate(logp_BR, pick(experience.ref_logprobs_BR), config.kl.estimator)
            leash = self.leash.beta * masked_mean(kl_BR, mask, denom=denom)
            loss = loss + leash
            named["leash/loss"] = leash.detach()
        return loss, named

    def new_logprobs(self, seqs: Sequences) -> Tensor:
        """log π after the update, [B, R]."""
        T = self.config.temperature
        return over_batches(
            seqs, self.config.optim.micro_batch_tokens, lambda s: self.roles.policy.logprobs(s, T)[0]
        )

    def moved(self, experience: Experience, seqs: Sequences) -> float:
        """KL(π_old‖π) of the finished update, nats a token, k3 on π_old's samples."""
        kl_BR = kl_estimate(experience.logprobs_BR, self.new_logprobs(seqs), "k3")
        return float(masked_mean(kl_BR, experience.mask_BR))

    def evaluate(self) -> dict[str, float]:
        """Score, KL to the reference and length on held-out prompts; keeps the best policy in `max_kl`."""
        prompts, sampling = self.held_out, self.config.sampling
        if not prompts:
            raise UserError(
                f"{self.config.prompts.path}: no prompts are held out; raise ppo.prompts.held_out"
            )
        rollouts = self.generator.generate(prompts, sampling, seed=derive_seed(self.recipe.seed, "heldout"))
        result = {
            "heldout/score": mean(self.score(rollouts)),
            "heldout/kl_ref_seq": mean(distance(self.roles, rollouts, self.config)),
            "heldout/length": length(rollouts),
        }
        within = result["heldout/kl_ref_seq"] <= self.config.max_kl
        if within and (self.best is None or result["heldout/score"] > self.best[1]):
            state = {k: v.detach().cpu().clone() for k, v in self.roles.policy.state_dict().items()}
            self.best = (self.steps_done, result["heldout/score"], state)
        return result

    def save(self, folder: str | Path | None = None, *, adapter: bool = False) -> Path:
        """Write the current policy as an HF folder (default `RUN/policy`), or its adapter for PEFT."""
        target = Path(folder) if folder else self.run_dir / ("adapter" if adapter else "policy")
        if adapter:
            save_adapter(self.roles.policy, self.roles.lora, self.opened.source, target)
        else:
            save_policy(self.opened.model, self.roles.policy, self.opened.tokenizer, target)
        return target

    def run(self) -> dict[str, Any]:
        """Train for `ppo.steps`, keep the best policy, save it. Returns its step and its score."""
        tests_of(self.held, self.config)  # an hour of training should not end in nothing to judge it by
        if isinstance(self.scorer, TrunkScorer) and self.roles.reward is None:
            raise UserError(
                f"{self.run_dir}: no reward model in it; train one with `ppolite reward`, or pass "
                "scores to PPO.step"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_recipe(self.recipe, self.run_dir / "recipe.yaml")
        with MetricsLog(self.run_dir) as metrics, progress("ppo", total=self.config.steps) as tick:
            metrics.log("ppo", 0, self.evaluate())
            for step in range(1, self.config.steps + 1):
                started = time.perf_counter()
                rollouts = self.generate(self.next_prompts())
                generated = time.perf_counter()
                row = self.step(rollouts, self.score(rollouts))
                row |= {"time/generate_s": generated - started, "time/step_s": time.perf_counter() - started}
                if step % self.config.eval_every == 0 or step == self.config.steps:
                    row |= self.evaluate()
                    experience, seqs = self.last
                    write_rollouts(
                        self.run_dir, step, experience, self.new_logprobs(seqs), self.opened.tokenizer
                    )
                metrics.log("ppo", step, row)
                step_line(step, self.config.steps, row)
                tick(1)
        return self.finish()

    def finish(self) -> dict[str, Any]:
        """Put the best policy in place and save it."""
        assert self.best is not None, "the untrained policy is within every leash"
        step, score, state = self.best
        if step == 0:
            log.warning(
                "no policy within ppo.max_kl = %g nats scored better than the SFT model on held-out prompts; "
                "saving the SFT model. Raise max_kl or kl.beta, or train longer",
                self.config.max_kl,
            )
        self.roles.policy.load_state_dict(copy.copy(state))
        self.save()
        return {"best_step": step, "heldout_score": score}


_NAMES = {
    "clip_fraction": "policy/clip_fraction",
    "approx_kl": "kl/old_token",
    "ratio_mean": "policy/ratio_mean",
    "ratio_max": "policy/ratio_max",
}
