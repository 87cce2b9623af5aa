"""Sections about what may go wrong while nobody looks: checkpoints, numbers that are not finite, alarms."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ppolite.config.section import Section


class Checkpoint(Section):
    """The complete state of a stage on disk, from which an interrupted run goes on to the bit."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two; empty: as often as `cost` allows, which for small models is every step."""
    cost: float | None = Field(default=None, gt=0, le=1)
    """Largest share of the time that may go into writing them, where `every` is empty; 0.02 when empty."""
    keep: int = Field(default=2, ge=1)
    """How many of the last ones stay. Each holds the best policy so far as well; a finished stage needs none."""
    on_error: Literal["continue", "stop"] = "continue"
    """When one cannot be written, for instance on a full disk: go on (the ones before are good), or stop."""

    @property
    def share(self) -> float:
        """Largest share of the time that may go into writing them."""
        return self.cost or 0.02

    @model_validator(mode="after")
    def _agree(self) -> Checkpoint:
        if self.every is not None and self.cost is not None:
            raise ValueError(f"every is {self.every}, whatever it costs, so `cost` has no use; remove one")
        return self


class Faults(Section):
    """What happens when a loss, a gradient or a score is no finite number: the update is skipped and counted."""

    skips: int = Field(default=3, ge=0)
    """Updates in a row that may be skipped. One more, and the run goes back to its last checkpoint, past the data that
    did it, of which it keeps a report in RUN/faults. (Rounds with such scores in a row: the run stops.)"""
    returns: int = Field(default=2, ge=0)
    """How often a stage may go back like that before it stops."""


class Watch(Section):
    """Alarms about the policy while PPO trains. A threshold that is empty is not watched."""

    on_alarm: Literal["log", "stop", "restore"] = "log"
    """Say so and go on; end the training, keeping the best policy; or go on from the best policy so far, with an
    optimizer that has forgotten the way from there."""
    patience: int = Field(default=2, ge=1)
    """Steps in a row that must be beyond a threshold before it is an alarm."""
    kl: float | None = Field(default=2.0, gt=0)
    """KL to the SFT model (`kl/ref_seq`) above this many times `ppo.max_kl`."""
    entropy: float | None = Field(default=0.3, gt=0, lt=1)
    """`policy/entropy` below this share of the first step's: the policy says the same again and again."""
    length: float | None = Field(default=2.5, gt=1)
    """`length/mean` beyond this many times the first step's, or less than its share."""
    repeats: float | None = Field(default=0.3, gt=0, lt=1)
    """`text/repeats`, the share of a response's four-token sequences that it has had before, above this."""
    judge: float | None = Field(default=0.15, gt=0)
    """`heldout/judge` this far below its best while `heldout/score` is the best so far: the reward model is fooled."""
    ratio: float | None = Field(default=1000.0, gt=1)
    """`policy/ratio_max`, the largest π/π_old of a token, above this."""
    clip_fraction: float | None = Field(default=0.6, gt=0, lt=1)
    """`policy/clip_fraction` above this: most tokens have stopped to learn."""
    explained_variance: float | None = -2.0
    """`value/explained_variance` of the critic below this; below 0 it is worse than a constant."""
    ess: float | None = Field(default=0.1, gt=0, lt=1)
    """`ess/share`, the effective share of samples that another policy drew, below this."""
