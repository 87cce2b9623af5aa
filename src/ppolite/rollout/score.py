"""The reward model on the trunk as a `Scorer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppolite.models.roles import Roles
from ppolite.rollout.experience import over_batches, sequences
from ppolite.types import Rollout


@dataclass
class TrunkScorer:
    """The reward model's score of each rollout; for one trained on scores, in people's units."""

    roles: Roles
    budget: int

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        seqs = sequences(self.roles, rollouts, self.budget)
        return over_batches(seqs, self.budget, self.roles.reward_scores).tolist()
