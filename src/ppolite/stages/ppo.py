"""PPO and its family on a language model: sample, score, learn, under a leash to the SFT model.

    for each step:
        rollouts   = next_round()                         # under μ: the policy, now or n steps ago, or the SFT model
        experience = make_experience(rollouts, scores)    # π_old, μ, π_ref, V, rewards, GAE, weights π_old/μ
        for each epoch and minibatch: policy and critic take a step
        leash.update(KL to the reference)

Three policies, each with its own job and its own figures: π_old of the ratio (`kl/old_token`), μ of the importance
weights (`weight/*`, `ess/share`, `kl/behaviour_token`), π_ref of the leash (`kl/ref_seq`). The objectives stand in
`objective.py`, what μ can be in `rounds.py`.

The loop is open: `PPO.next_round`, `step`, `evaluate` and `save` are what `run` itself is made of, and `generate` and
`score` what a round is.
Left out: checkpoints within a run, several processes.

    ppolite ppo recipes/film.yaml
    ppolite ppo recipes/film.yaml --set ppo.objective=is --set ppo.behaviour=sft
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppolite.config import Recipe, save_recipe
from ppolite.data.chat import encode_prompt
from ppolite.models.export import load_policy, save_adapter, save_policy
from ppolite.models.load import load_causal
from ppolite.models.roles import build_roles
from ppolite.models.trunk import Sequences
from ppolite.obs.sinks import MetricsLog, progress, step_line
from ppolite.ops.kl import AdaptiveLeash, AdaptivePenalty, FixedLeash
from ppolite.ops.losses import explained_variance, value_loss
from ppolite.ops.packing import token_batches
from ppolite.rollout.evaluate import distance, length, mean
from ppolite.rollout.experience import checked_scores, make_experience, over_batches, source_means
from ppolite.rollout.local import LocalGenerator
from ppolite.rollout.record import write_rollouts, write_unscored
from ppolite.rollout.score import TrunkScorer
from ppolite.stages.evaluate import judge_of
from ppolite.stages.loop import (
    Learner,
    after_sft,
    derive_seed,
    load_prompts,
    log,
    open_model,
    open_reward,
    open_trunk,
    step_together,
    tests_of,
)
from ppolite.stages.objective import MAXIMA, policy_loss, update_kl
from ppolite.stages.rounds import Rounds
from ppolite.stages.scoring import open_scorer
from ppolite.types import Experience, Leash, Prompt, Rollout, Scorer, UserError


class Best(NamedTuple):
    """The best policy so far."""

    step: int
    score: float
    weights: list[Tensor]
    within: bool
    """Whether it is within `max_kl`, as all are but perhaps the one of the start."""


class PPO:
    """The trainer. `scorer` replaces the recipe's reward sources; with neither, pass `scores` to `step`."""

    def __init__(self, recipe: Recipe, run_dir: str | Path, *, scorer: Scorer | None = None) -> None:
        if recipe.ppo is None:
            raise UserError("this recipe has no `ppo` section; add one with its `prompts`")
        self.recipe, self.config, self.run_dir = recipe, recipe.ppo, Path(run_dir)
        self.seed = recipe.seed if self.config.seed is None else self.config.seed
        self.opened = open_model(recipe, after_sft(recipe, self.run_dir))
        train, held = load_prompts(self.config.prompts, self.opened, self.config.max_new_tokens, recipe.seed)
        self.held, self.held_out = held, held[: self.config.eval_prompts]
        probe = [encode_prompt(self.opened.tokenizer, p) for p in train[:4]]
        trunk = open_trunk(recipe, self.opened, probe)
        asks_model = scorer is None and self.config.asks_model
        reward = open_reward(recipe.ppo, self.run_dir, self.opened.device) if asks_model else None
        if reward is None and self.config.critic_init == "reward":
            where = "ppo.rewards" if scorer is None and not asks_model else self.run_dir
            log.warning("no reward model in %s, so the critic starts at zero", where)
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
        if self.config.start:
            load_policy(self.roles, self.config.start)
        self.scorer: Scorer = scorer or open_scorer(recipe, self.run_dir, self.opened, self.roles, train)
        self.generator = LocalGenerator(self.roles.policy, self.opened.tokenizer, self.opened.stop_ids)
        updates = self.config.steps * self.config.epochs * self.config.minibatches
        self.learner = Learner(self.roles.policy.trained(), self.config.optim, updates)
        self.critic_learner = Learner(self.roles.critic.trained(), self.config.critic, updates)
        kl = self.config.kl
        self.leash: Leash = (
            AdaptiveLeash(kl.beta, kl.target, kl.horizon) if kl.target else FixedLeash(kl.beta)
        )
        self.penalty = AdaptivePenalty(1.0, self.config.penalty_target or 0.01)
        self.rounds = Rounds(
            self.config,
            self.roles,
            self.generator,
            self.opened,
            train,
            lambda rollouts: self.score(rollouts),
            self.seed,
            self.run_dir / "rollouts" / "sft.jsonl",
        )
        self.steps_done = 0
        self.best: Best | None = None

    # What a step is made of.

    def next_prompts(self) -> list[Prompt]:
        """Prompts of one round: `rollouts / samples_per_prompt`, each as often as it is to be answered."""
        return self.rounds.prompts(self.config.rollouts)

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response of the current policy for each prompt, whatever the recipe's behaviour policy is."""
        return self.rounds.generate(prompts)

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One number for each rollout, larger is better, from the recipe's sources or the given scorer.

        Where they fail, the rollouts are kept in `RUN/rollouts/unscored-N.jsonl` before the error goes on.
        """
        try:
            scores = self.scorer.score(rollouts)
            checked_scores(scores, len(rollouts))
        except Exception as error:
            kept = write_unscored(self.run_dir / "rollouts", rollouts)
            if isinstance(error, UserError):
                raise UserError(
                    f"{error}. The {len(rollouts)} responses without a score are in {kept}"
                ) from error
            log.warning("the scorer failed; the %d responses without a score are in %s", len(rollouts), kept)
            raise
        return scores

    def next_round(self) -> tuple[list[Rollout], list[float]]:
        """Rollouts of the recipe's behaviour policy, with their scores."""
        return self.rounds.next()

    def prepare(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> tuple[Experience, Sequences]:
        """All that stays fixed over the epochs, and the sequences with their cached hidden states."""
        return make_experience(self.roles, rollouts, scores, self.config, self.leash.beta)

    def step(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> dict[str, float]:
        """Learn from scored rollouts; scores may come from anywhere. Returns the step's metrics."""
        return self.learn(*self.prepare(rollouts, scores))

    def learn(self, experience: Experience, seqs: Sequences) -> dict[str, float]:
        """All epochs and minibatches over one round, then the controllers. Metrics are means over the updates."""
        metrics = {
            **experience.diagnostics,
            "leash/beta": self.leash.beta,
            "samples/drawn": self.rounds.drawn,
        }
        if self.config.objective == "kl":
            metrics["penalty/beta"] = self.penalty.beta
        metrics |= self.update(experience, seqs)
        explained = explained_variance(experience.values_BR, experience.returns_BR, experience.mask_BR)
        metrics["value/explained_variance"] = float(explained)
        # The paper's rule looks at the KL that the finished update has caused, not at its mean on the way.
        if self.config.objective == "kl":
            self.penalty.update(float(update_kl(self.new_logprobs(seqs), experience)))
        self.leash.update(metrics["kl/ref_seq"], len(seqs))
        self.steps_done += 1
        self.generator.version = self.learner.done
        self.last = (experience, seqs)
        return metrics

    def update(self, experience: Experience, seqs: Sequences) -> dict[str, float]:
        seed = derive_seed(self.seed, "ppo-shuffle", self.steps_done)
        shuffle = torch.Generator().manual_seed(seed)
        rows: list[dict[str, float]] = []
        for _ in range(self.config.epochs):
            order = torch.randperm(len(seqs), generator=shuffle)
            # chunk() would make fewer when they do not divide: 5 rows in 4 minibatches become 2 + 2 + 1.
            for minibatch in order.tensor_split(min(self.config.minibatches, len(order))):
                row = self.minibatch(experience, seqs, minibatch.tolist())
                row["lr/policy"] = self.learner.lr
                norms = step_together(self.learner, self.critic_learner)
                row["policy/grad_norm"], row["value/grad_norm"] = norms
                rows.append(row)
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        return {key: max(x) if key in MAXIMA else sum(x) / len(x) for key, x in columns.items()}

    def minibatch(self, experience: Experience, seqs: Sequences, rows: list[int]) -> dict[str, float]:
        """Gradients of policy and critic on the given rows, in micro-batches, by global token count."""
        lengths, config = seqs.lengths, self.config
        denom = experience.mask_BR[rows].sum()
        metrics: dict[str, float] = {}
        for part in token_batches([lengths[i] for i in rows], config.optim.micro_batch_tokens):
            micro = [rows[i] for i in part]
            batch, known = seqs.select(micro), experience.select(micro)
            logp_BR, _ = self.roles.policy.logprobs(batch, config.temperature)
            loss, figures = policy_loss(
                logp_BR, known, config, penalty=self.penalty.beta, leash=self.leash.beta, denom=denom
            )
            loss.backward()
            vloss, vfigures = value_loss(
                self.roles.critic.values(batch),
                known.values_BR,
                known.returns_BR,
                known.mask_BR,
                clip=config.value_clip,
                denom=denom,
            )
            vloss.backward()
            figures |= {"value/loss": vloss.detach(), "value/clip_fraction": vfigures["clip_fraction"]}
            for key, value in figures.items():
                old = metrics.get(key, 0.0)
                metrics[key] = max(old, float(value)) if key in MAXIMA else old + float(value)
        return metrics

    def _logprobs(self, part: Sequences) -> Tensor:
        return self.roles.policy.logprobs(part, self.config.temperature)[0]

    def new_logprobs(self, seqs: Sequences) -> Tensor:
        """log π as it is now, [B, R]."""
        return over_batches(seqs, self.config.optim.micro_batch_tokens, self._logprobs)

    def evaluate(self) -> dict[str, float]:
        """Score, KL to the reference, length and the judge's opinion on held-out prompts.

        Keeps the policy whose score is best within `max_kl`, and that of the start until there is one, wherever it
        is. The judge has no say in that.
        """
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
            **{f"heldout/{key}": value for key, value in source_means(rollouts).items()},
        }
        if judge := judge_of(self.recipe):
            result["heldout/judge"] = mean(judge(rollouts))
        score, within = result["heldout/score"], result["heldout/kl_ref_seq"] <= self.config.max_kl
        best = self.best
        better = best is None or not best.within or score > best.score
        if (within and better) or (best is None and self.steps_done == 0):
            kept = [p.detach().to("cpu", copy=True) for p in self.roles.policy.trained()]
            self.best = Best(self.steps_done, score, kept, within)
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
        """Train for `ppo.steps`, or until samples are worn out; keep the best policy, save it.

        Returns its step and its score, and where the run stopped early (`stopped_at`).
        """
        tests_of(self.held, self.config)  # an hour of training should not end in nothing to judge it by
        if isinstance(self.scorer, TrunkScorer) and self.roles.reward is None:
            raise UserError(
                f"{self.run_dir}: no reward model in it; train one with `ppolite reward`, or pass "
                "scores to PPO.step"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_recipe(self.recipe, self.run_dir / "recipe.yaml")
        steps, stopped = self.config.steps, {}
        with MetricsLog(self.run_dir) as metrics, progress("ppo", total=steps) as tick:
            metrics.log("ppo", 0, self.evaluate())
            for step in range(1, steps + 1):
                started, self.rounds.seconds = time.perf_counter(), 0.0
                experience, seqs = self.prepare(*self.next_round())
                worn = self.worn(experience, step)
                if worn and self.config.on_low_ess != "draw":
                    end = {"stopped": True, "samples/drawn": self.rounds.drawn}
                    metrics.log("ppo", step, experience.diagnostics | worn | end | self.evaluate())
                    stopped = {"stopped_at": step}
                    break
                if worn:
                    self.rounds.renew()
                    experience, seqs = self.prepare(*self.next_round())
                row = self.learn(experience, seqs) | worn
                row |= {"time/generate_s": self.rounds.seconds, "time/step_s": time.perf_counter() - started}
                if step % self.config.eval_every == 0 or step == steps:
                    row |= self.evaluate()
                    write_rollouts(
                        self.run_dir, step, experience, self.new_logprobs(seqs), self.opened.tokenizer
                    )
                metrics.log("ppo", step, row)
                step_line(step, steps, row)
                tick(1)
        return self.finish() | stopped

    def worn(self, experience: Experience, step: int) -> dict[str, float]:
        """`ess/worn` where a round's effective sample size is below the floor, with a line of log; else empty."""
        share, least = experience.diagnostics.get("ess/share", 1.0), self.config.least_ess
        if share >= least:
            return {}
        then = "drawing anew from the policy" if self.config.on_low_ess == "draw" else "stopping"
        log.warning(
            "step %d: the samples are worth %.2f of their number, below ppo.ess_floor (%.2f): %s",
            step, share, least, then,
        )  # fmt: skip
        return {"ess/worn": share}

    def finish(self) -> dict[str, Any]:
        """Put the best policy in place and save it."""
        assert self.best is not None, "that of the start is kept wherever it is"
        step, score, kept, _ = self.best
        if step == 0:
            start = self.config.start or "the SFT model"
            log.warning(
                "no policy within ppo.max_kl = %g nats scored better than %s on held-out prompts; "
                "saving %s. Raise max_kl or kl.beta, or train longer",
                self.config.max_kl, start, start,
            )  # fmt: skip
        with torch.no_grad():
            for weight, best in zip(self.roles.policy.trained(), kept, strict=True):
                weight.copy_(best)
        self.save()
        return {"best_step": step, "heldout_score": score}
