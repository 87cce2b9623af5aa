"""PPO and its family on a language model: sample, score, learn, under a leash to the SFT model.

    for each step:
        rollouts   = next_round()                         # under μ: the policy, now or n steps ago, or the SFT model
        experience = make_experience(rollouts, scores)    # π_old, μ, π_ref, V, rewards, GAE, weights π_old/μ
        for each epoch and minibatch: policy and critic take a step
        leash.update(KL to the reference)

Three policies, each with its own job and its own figures: π_old of the ratio (`kl/old_token`), μ of the importance
weights (`weight/*`, `ess/share`, `kl/behaviour_token`), π_ref of the leash (`kl/ref_seq`). What μ can be stands in
`rounds.py`, an update in `update.py`, the objectives in `objective.py`, the choice of the best policy in `heldout.py`.

The loop is open: `PPO.next_round`, `step`, `evaluate`, `save` and `checkpoint` are what `run` itself is made of, and
`generate` and `score` what a round is. Left out: several processes.

    ppolite ppo recipes/film.yaml
    ppolite ppo recipes/film.yaml --set ppo.objective=is --set ppo.behaviour=sft
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppolite.config import Recipe, save_recipe
from ppolite.data.chat import encode_prompt
from ppolite.dist import mean_of_all, total
from ppolite.models.export import load_policy, save_adapter, save_policy
from ppolite.models.load import load_causal
from ppolite.models.roles import Roles, build_roles
from ppolite.models.sequences import Sequences
from ppolite.obs.metrics import repeated_share
from ppolite.obs.sinks import step_line
from ppolite.obs.watch import Watcher
from ppolite.ops.kl import AdaptiveLeash, FixedLeash
from ppolite.rollout.experience import checked_scores, make_experience, policy_logprobs
from ppolite.rollout.record import forget_rollouts, write_rollouts, write_unscored
from ppolite.rollout.score import TrunkScorer
from ppolite.stages.checkpoint import State
from ppolite.stages.doctor.quick import before_ppo
from ppolite.stages.evaluate import judge_of
from ppolite.stages.heldout import HeldOut
from ppolite.stages.learner import Skips
from ppolite.stages.opening import after_sft, open_model, open_reward, open_trunk
from ppolite.stages.rounds import Rounds
from ppolite.stages.rows import load_prompts, tests_of
from ppolite.stages.scoring import open_scorer
from ppolite.stages.seeds import derive_seed, fingerprint_of
from ppolite.stages.session import Session, begin_again, write_checkpoint
from ppolite.stages.update import Updates
from ppolite.types import Experience, Leash, Prompt, Rollout, Scorer, UserError

log = logging.getLogger("ppolite")


class PPO:
    """The trainer. `scorer` replaces the recipe's reward sources; with neither, pass `scores` to `step`."""

    def __init__(self, recipe: Recipe, run_dir: str | Path, *, scorer: Scorer | None = None) -> None:
        if recipe.ppo is None:
            raise UserError("this recipe has no `ppo` section; add one with its `prompts`")
        self.recipe, self.config, self.run_dir = recipe, recipe.ppo, Path(run_dir)
        self.seed = recipe.seed if self.config.seed is None else self.config.seed
        self.opened = open_model(recipe, after_sft(recipe, self.run_dir))
        train, held = load_prompts(self.config.prompts, self.opened, self.config.max_new_tokens, recipe.seed)
        self.held, self.reads = held, fingerprint_of((train, held))
        self.roles = self._roles([encode_prompt(self.opened.tokenizer, p) for p in train[:4]], scorer)
        self.scorer: Scorer = scorer or open_scorer(recipe, self.run_dir, self.opened, self.roles, train)
        self.generator = self.opened.generator(self.roles.policy)
        self.skips = Skips()
        self.updates = Updates(self.roles, self.config, self.skips, recipe.faults.skips, self.seed)
        kl = self.config.kl
        self.leash: Leash = (
            AdaptiveLeash(kl.beta, kl.target, kl.reaction) if kl.target else FixedLeash(kl.beta)
        )
        self.rounds = Rounds(
            self.config,
            self.roles,
            self.generator,
            self.opened,
            train,
            lambda rollouts: self.score(rollouts),
            skips=recipe.faults.skips,
            seed=self.seed,
            path=self.run_dir / "rollouts" / "sft.jsonl",
        )
        self.heldout = HeldOut(
            self.config,
            self.roles,
            self.generator,
            held[: self.config.eval_prompts],
            lambda rollouts: self.score(rollouts),
            judge_of(recipe),
            derive_seed(recipe.seed, "heldout"),
        )
        self.watcher = Watcher(recipe.watch, self.config.max_kl)
        self.steps_done = 0
        self._told_units = False

    def _roles(self, probe: list[list[int]], scorer: Scorer | None) -> Roles:
        """Policy, reference, critic and reward model on one trunk, the policy where the recipe has it start."""
        recipe, config = self.recipe, self.config
        trunk = open_trunk(recipe, self.opened, probe)
        asks_model = scorer is None and config.asks_model
        trust = recipe.trust_remote_code
        reward = open_reward(config, self.run_dir, trust_remote_code=trust) if asks_model else None
        if reward is None and config.critic_start == "reward":
            why = f"there is no reward model in {self.run_dir}" if scorer is None else "a `scorer` is given"
            log.warning("the critic starts at zero, since %s", why)
        separate = (
            None
            if recipe.roles == "shared"
            else lambda: load_causal(self.opened.source, self.opened.device, trust_remote_code=trust)
        )
        roles = build_roles(
            trunk,
            recipe.train,
            reward,
            separate=separate,
            critic_init=config.critic_start,
            critic_body=config.critic_body,
            reward_scale=config.reward_scale,
        )
        if config.start:
            load_policy(roles, config.start, trust_remote_code=trust)
        return roles

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
                told = f"{error}. The {len(rollouts)} responses without a score are in {kept}"
                raise type(error)(told) from error
            log.warning("the scorer failed; the %d responses without a score are in %s", len(rollouts), kept)
            raise
        for rollout in rollouts:
            rollout.scored = True
        return scores

    def next_round(self) -> tuple[list[Rollout], list[float]]:
        """Rollouts of the recipe's behaviour policy, with their scores."""
        rollouts, scores = self.rounds.next()
        for rollout in rollouts:  # those of a checkpoint do not say
            rollout.scored = True
        return rollouts, scores

    def prepare(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> tuple[Experience, Sequences]:
        """All that stays fixed over the epochs, and the sequences with their cached hidden states."""
        return make_experience(self.roles, rollouts, scores, self.config, self.leash.beta)

    def step(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> dict[str, float]:
        """Learn from scored rollouts; scores may come from anywhere. Returns the step's metrics.

        Where the run has a reward model, scores count in its units, less the mean and over the deviation that it
        gives to the SFT model; pass a `scorer` to have none. That is said once where it has not scored them.
        Raises UserError where more than `faults.skips` updates in a row had to be skipped: later ones will be, too.
        """
        norm = self.roles.norm
        if not self._told_units and (norm.mean, norm.std) != (0, 1) and not all(r.scored for r in rollouts):
            self._told_units = True
            log.warning(
                "scores that are not of PPO.score count in units of the reward model in %s, as (score − %.3g) / %.3g; "
                "pass a `scorer` to PPO, or choose a folder without a reward model, to have them as they are",
                self.run_dir, norm.mean, norm.std,
            )  # fmt: skip
        metrics = self.learn(*self.prepare(rollouts, scores))
        if self.skips.in_row > self.recipe.faults.skips:
            raise UserError(
                f"{self.skips.in_row} updates in a row had to be skipped, since {self.skips.why}; lower the learning "
                "rate, or look at what is in PPO.skips.batches"
            )
        return metrics

    def learn(self, experience: Experience, seqs: Sequences) -> dict[str, float]:
        """All updates of one round, then the controllers. Metrics are means over the updates."""
        metrics = {
            **experience.diagnostics,
            "leash/beta": self.leash.beta,
            "samples/drawn": self.rounds.drawn,
            "samples/skipped": self.rounds.skipped,
            "text/repeats": repeated_share(r.response_ids for r in experience.rollouts),
        }
        metrics |= self.updates.run(experience, seqs, round_=self.steps_done, leash=self.leash.beta)
        sequences = torch.tensor([float(len(seqs))], device=seqs.ids_BT.device)
        kl = mean_of_all(metrics["kl/ref_seq"], sequences)
        if math.isfinite(kl):
            self.leash.update(kl, int(total(sequences)))
        self.steps_done += 1
        self.generator.version = self.updates.policy.done
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Score, KL to the reference, length and the judge's opinion on held-out prompts.

        Keeps the policy whose score is best within `max_kl`, and that of the start until there is one, wherever it
        is. The judge has no say in that.
        """
        return self.heldout.look(self.steps_done)

    def save(self, folder: str | Path | None = None, *, adapter: bool = False) -> Path:
        """Write the current policy as an HF folder (default `RUN/policy`), or its adapter for PEFT.

        The folder of a loop of one's own becomes a run for `ppolite chat` and its like by it.
        """
        target = Path(folder) if folder else self.run_dir / ("adapter" if adapter else "policy")
        if adapter:
            save_adapter(self.roles.policy, self.roles.lora, self.opened.source, target)
        else:
            save_policy(self.opened.model, self.roles.policy, self.opened.tokenizer, target)
            if folder is None and not (self.run_dir / "recipe.yaml").exists():
                save_recipe(self.recipe, self.run_dir / "recipe.yaml")
        return target

    def run(self, *, allow_changes: bool = False) -> dict[str, Any]:
        """Train for `ppo.steps`, or until samples are worn out; keep the best policy, save it.

        An interrupted run goes on. Returns the best policy's step and score, and where the run stopped early
        (`stopped_at`).
        """
        tests_of(self.held, self.config)  # an hour of training should not end in nothing to judge it by
        if isinstance(self.scorer, TrunkScorer) and self.roles.reward is None:
            raise UserError(
                f"{self.run_dir}: no reward model in it; train one with `ppolite reward`, or pass "
                "scores to PPO.step"
            )
        before_ppo(self)
        stopped: dict[str, Any] = {}
        with Session("ppo", self, self.config.steps, allow_changes=allow_changes) as session:
            forget_rollouts(self.run_dir, after=session.step)
            if session.begun_anew:
                session.metrics.log(0, self.evaluate())
            for step in session:
                if not self._one_step(session, step):
                    stopped = {"stopped_at": step}
                    break
            return self.finish() | stopped

    def _one_step(self, session: Session, step: int) -> bool:
        """A round, from its answers to its metrics. False where the run is to stop with it."""
        started, self.rounds.seconds = time.perf_counter(), 0.0
        with session.untouched():
            experience, seqs = self.prepare(*self.next_round())
            worn = self.worn(experience, step)
            if worn and self.config.on_low_ess == "draw":
                self.rounds.renew()
                experience, seqs = self.prepare(*self.next_round())
        if worn and self.config.on_low_ess != "draw":
            end = {"stopped": True, "samples/drawn": self.rounds.drawn}
            session.log(experience.diagnostics | worn | end | self.evaluate())
            return False
        row = self.learn(experience, seqs) | worn
        row |= {"time/generate_s": self.rounds.seconds, "time/step_s": time.perf_counter() - started}
        if step % self.config.eval_every == 0 or step == session.total:
            row |= self.evaluate()
            new_BR = policy_logprobs(self.roles, seqs, self.config)
            write_rollouts(self.run_dir, step, experience, new_BR, self.opened.tokenizer)
        alarms = self.alarms(row, step)
        step_line(step, session.total, row)
        session.log(row | {"alarms": alarms} if alarms else row)
        return not (alarms and self.recipe.watch.on_alarm == "stop")

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

    def alarms(self, row: dict[str, float], step: int) -> list[str]:
        """Names of the alarms of this step, each with a line of log, and what the recipe has done about them."""
        alarms, then = self.watcher.look(row), self.recipe.watch.on_alarm
        for alarm in alarms:
            log.warning("step %d: alarm `%s`: %s", step, alarm.name, alarm.what)
        if alarms and then == "restore":
            best = self.heldout.put_best()
            self.updates.policy.forget()
            self.watcher.forget()
            log.warning("step %d: going on from the best policy, that of step %d", step, best.step)
        elif alarms and then == "stop":
            log.warning("step %d: stopping, as watch.on_alarm has it", step)
        return [alarm.name for alarm in alarms]

    def finish(self) -> dict[str, Any]:
        """Put the best policy in place and save it; adapters for PEFT as well."""
        best = self.heldout.put_best()
        if best.step == 0:
            start = self.config.start or "the SFT model"
            log.warning(
                "no policy within ppo.max_kl = %g nats scored better than %s on held-out prompts; "
                "saving %s. Raise max_kl or kl.beta, or train longer",
                self.config.max_kl, start, start,
            )  # fmt: skip
        elif best.kl > self.config.max_kl:
            log.warning(
                "the policy of step %d is saved, kept while ppo.max_kl was higher: it is at %.2f nats, and no later "
                "one is within %g",
                best.step, best.kl, self.config.max_kl,
            )  # fmt: skip
        if self.roles.lora:
            self.save(adapter=True)
        self.save()
        return {"best_step": best.step, "heldout_score": best.score}

    # Checkpoints.

    def checkpoint(self) -> None:
        """Write the complete state as it is between two steps, for `resume` of a later process."""
        write_checkpoint("ppo", self, self.steps_done)

    def resume(self, *, allow_changes: bool = False) -> int:
        """Go on from the last checkpoint, if there is one. Returns the steps that are done.

        Raises UserError where it was made with another recipe or other data, unless `allow_changes`.
        """
        begin_again("ppo", self, allow_changes=allow_changes)
        return self.steps_done

    def state(self) -> State:
        """All that the steps to come depend on and that the recipe does not say."""
        return {
            "steps_done": self.steps_done,
            "updates": self.updates.state(),
            "leash": self.leash.state_dict(),
            "first_beta": self.config.kl.beta,
            "rounds": self.rounds.state(),
            "heldout": self.heldout.state(),
            "watcher": self.watcher.state_dict(),
        }

    def restore(self, state: State) -> None:
        """The state that `state` gave. Raises ValueError where it does not fit this recipe."""
        self.updates.restore(state["updates"])
        self._restore_leash(state)
        self.rounds.restore(state["rounds"])
        self.heldout.restore(state["heldout"])
        self.watcher.load_state_dict(state["watcher"])
        self.steps_done, self.generator.version = state["steps_done"], self.updates.policy.done

    def go_back(self, state: State) -> None:
        """Weights, moments and controllers of that state; data, seeds and schedules go on where they are."""
        self.updates.go_back(state["updates"])
        self._restore_leash(state)

    def _restore_leash(self, state: State) -> None:
        """β as it was, unless the recipe says another one since."""
        if state["first_beta"] == self.config.kl.beta:
            self.leash.load_state_dict(state["leash"])
