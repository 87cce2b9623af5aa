"""Policy and critic learn from a round: epochs × minibatches, each update a step of both optimizers or of neither.

    loss = objective's (objective.py) + the leash in the loss, if it is there ;  value loss, on the critic's own weights

Where the critic is a second head on the policy's layers, the value loss comes to the policy's, times `value_coef`, and
one pass serves both.

A loss is divided by the minibatch's tokens before its micro-batches are summed, so that accumulation equals one large
batch. Where a loss or a gradient is not finite, both steps are left out and counted; where memory does not suffice, the
micro-batches become smaller.

Axes: B rows, R response tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ppolite.config import PPO
from ppolite.dist import add_gradients, mean_of_all, own_rows, total
from ppolite.models.roles import Roles
from ppolite.models.sequences import Sequences
from ppolite.ops.kl import AdaptivePenalty
from ppolite.ops.losses import explained_variance, value_loss
from ppolite.rollout.experience import policy_logprobs
from ppolite.stages.checkpoint import State
from ppolite.stages.learner import Fitting, Learner, Skips, put_weights, step_together
from ppolite.stages.objective import MAXIMA, policy_loss, update_kl
from ppolite.stages.seeds import derive_seed
from ppolite.types import Experience

Metrics = dict[str, float]


class Updates:
    """Both learners, and what steers them from one round to the next. `seed` is that of the shuffling."""

    def __init__(self, roles: Roles, config: PPO, skips: Skips, most_skips: int, seed: int) -> None:
        self.roles, self.config, self.skips, self.most_skips, self.seed = (
            roles,
            config,
            skips,
            most_skips,
            seed,
        )
        updates = config.steps * config.epochs * config.minibatches
        self.policy = Learner(roles.policy.trained(), config.optim, updates)
        self.critic = Learner(roles.critic.trained(), config.critic, updates)
        self.penalty = (
            AdaptivePenalty(config.penalty_beta or 1.0, config.penalty_target or 0.01)
            if config.steers_penalty
            else None
        )
        self.fitting = Fitting(config.optim.micro_batch_tokens)

    @property
    def beta(self) -> float:
        """PPO-KL's, as it is now."""
        return self.penalty.beta if self.penalty else self.config.penalty_beta or 0.0

    def run(self, experience: Experience, seqs: Sequences, *, round_: int, leash: float) -> Metrics:
        """All updates of a round. Metrics are means over those that were not skipped.

        `round_` counts rounds, for the seed of the shuffling; `leash` is the coefficient of KL(π‖π_ref).
        """
        shuffle = torch.Generator().manual_seed(derive_seed(self.seed, "ppo-shuffle", round_))
        rows: list[Metrics] = []
        for _ in range(self.config.epochs):
            everybody = int(total(torch.tensor(len(seqs), device=seqs.ids_BT.device)))
            order = torch.randperm(everybody, generator=shuffle)
            # chunk() would make fewer when they do not divide: 5 rows in 4 minibatches become 2 + 2 + 1.
            for part in order.tensor_split(min(self.config.minibatches, len(order))):
                if self.skips.in_row <= self.most_skips:
                    rows += self.update(experience, seqs, own_rows(part.tolist()), leash)
        columns: dict[str, list[float]] = {}
        for row in rows:  # one without rows of this process has no figures of a loss
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
        metrics = {key: max(x) if key in MAXIMA else sum(x) / len(x) for key, x in columns.items()}
        explained = explained_variance(experience.values_BR, experience.returns_BR, experience.mask_BR)
        metrics |= {"value/explained_variance": float(explained), "update/skipped": self.skips.total}
        if self.config.objective == "kl":
            metrics["penalty/beta"] = self.beta
            if self.penalty is not None and rows:
                # The paper's rule looks at the KL that the finished update has caused, not at its mean on the way.
                new_BR = policy_logprobs(self.roles, seqs, self.config)
                d = mean_of_all(float(update_kl(new_BR, experience)), experience.mask_BR.sum())
                if math.isfinite(d):
                    self.penalty.update(d)
        return metrics

    def update(self, experience: Experience, seqs: Sequences, rows: list[int], leash: float) -> list[Metrics]:
        """One step of both on the given rows. Its metrics, or none where it was skipped."""
        row = self.minibatch(experience, seqs, rows, leash)
        row["lr/policy"] = self.policy.lr
        odd = torch.tensor(not all(map(math.isfinite, row.values())), device=seqs.ids_BT.device)
        norms = step_together(self.policy, self.critic, sound=not total(odd.long()))
        if norms is None:
            self.skips.add("a loss or gradient was not finite", _readable(experience, rows, row))
            return []
        self.skips.clear()
        row["policy/grad_norm"], row["value/grad_norm"] = norms
        return [row]

    def minibatch(self, experience: Experience, seqs: Sequences, rows: list[int], leash: float) -> Metrics:
        """Gradients of policy and critic on the given rows, in micro-batches, by global token count.

        With several processes the rows are this one's, the gradients and the count those of all, the metrics parts.
        """
        denom = total(experience.mask_BR[rows].sum())
        # What the processes do together stays outside: only the one that ran out of memory begins anew.
        metrics = self.fitting.run(
            lambda: self.own_part(experience, seqs, rows, leash, denom=denom), self._clear
        )
        add_gradients([*self.policy.parameters, *self.critic.parameters])
        if square := metrics.pop("weight/square", 0.0):
            metrics["ess/update"] = metrics["weight/mean"] ** 2 / square  # of the minibatch's tokens
        return metrics

    def own_part(
        self, experience: Experience, seqs: Sequences, rows: list[int], leash: float, *, denom: Tensor
    ) -> Metrics:
        """What these rows add to the gradients of a minibatch of `denom` tokens, and to its metrics."""
        config = self.config
        told: dict[str, Tensor] = {}
        for micro in seqs.batches(self.fitting.tokens, rows) if rows else ():
            batch, known = seqs.select(micro), experience.select(micro)
            hidden_ND = self.roles.policy.response_hidden(batch)
            logp_BR, _ = self.roles.policy.logprobs(batch, config.temperature, hidden_ND=hidden_ND)
            loss, figures = policy_loss(logp_BR, known, config, penalty=self.beta, leash=leash, denom=denom)
            if not self.roles.critic.borrows:  # before the critic's pass: what it keeps is let go
                loss.backward()
                hidden_ND = None
            vloss, vfigures = value_loss(
                self.roles.critic.values(batch, hidden_ND=hidden_ND),
                known.values_BR,
                known.returns_BR,
                known.mask_BR,
                clip=config.value_clip,
                denom=denom,
            )
            (vloss if hidden_ND is None else loss + config.value_weight * vloss).backward()
            figures |= {"value/loss": vloss.detach(), "value/clip_fraction": vfigures["clip_fraction"]}
            for key, value in figures.items():
                figure = value.double()
                if key in told:
                    figure = told[key].maximum(figure) if key in MAXIMA else told[key] + figure
                told[key] = figure
        # Together, so that the host waits for a GPU once.
        return dict(zip(told, torch.stack(list(told.values())).tolist(), strict=True)) if told else {}

    def _clear(self) -> None:
        self.policy.clear()
        self.critic.clear()

    def state(self) -> State:
        return {
            "policy": {"weights": self.roles.policy.trained_by_name(), "learner": self.policy.state()},
            "critic": {"weights": self.roles.critic.trained_by_name(), "learner": self.critic.state()},
            "penalty": self.penalty.state_dict() if self.penalty else {},
            "fitting": self.fitting.state(),
        }

    def restore(self, state: State) -> None:
        self.go_back(state)
        self.policy.done = state["policy"]["learner"]["done"]
        self.critic.done = state["critic"]["learner"]["done"]
        self.fitting.restore(state["fitting"])

    def go_back(self, state: State) -> None:
        """Weights, moments and the penalty; the schedules stay where they are."""
        for name, body, learner in (
            ("policy", self.roles.policy, self.policy), ("critic", self.roles.critic, self.critic),
        ):  # fmt: skip
            put_weights(body, state[name]["weights"])
            learner.restore_moments(state[name]["learner"])
        if self.penalty and state["penalty"]:
            self.penalty.load_state_dict(state["penalty"])


def _readable(experience: Experience, rows: list[int], figures: Metrics) -> dict[str, Any]:
    """What a person needs to see why a minibatch came to nothing. Numbers as text: some are not finite."""

    def span(x_BR: Tensor, i: int) -> str:
        x = x_BR[i][experience.mask_BR[i]]
        return f"{float(x.min()):g} … {float(x.max()):g}"

    return {
        "figures": {key: f"{value:g}" for key, value in figures.items()},
        "rows": [
            {
                "prompt": experience.rollouts[i].prompt.last,
                "response": experience.rollouts[i].text,
                "score": f"{float(experience.scores_B[i]):g}",
                "logprobs": span(experience.logprobs_BR, i),
                "ref_logprobs": span(experience.ref_logprobs_BR, i),
                "advantages": span(experience.advantages_BR, i),
                "returns": span(experience.returns_BR, i),
            }
            for i in rows
        ],
    }
