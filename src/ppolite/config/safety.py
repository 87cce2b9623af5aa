"""Sections about what may go wrong while nobody looks: checkpoints, and numbers that are not finite."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppolite.config.section import Section


class Checkpoint(Section):
    """The complete state of a stage on disk, from which an interrupted run goes on to the bit."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two; empty: as often as `cost` allows, which for small models is every step."""
    cost: float = Field(default=0.02, gt=0, le=1)
    """Largest share of the time that may go into writing them, where `every` is empty."""
    keep: int = Field(default=2, ge=1)
    """How many of the last ones stay. Each holds the best policy so far as well; a finished stage needs none."""
    on_error: Literal["continue", "stop"] = "continue"
    """When one cannot be written, for instance on a full disk: go on (the ones before are good), or stop."""


class Faults(Section):
    """What happens when a loss, a gradient or a score is no finite number: the update is skipped and counted."""

    skips: int = Field(default=3, ge=0)
    """Updates in a row that may be skipped. One more, and the run goes back to its last checkpoint, past the data that
    did it, of which it keeps a report in RUN/faults. (Rounds with such scores in a row: the run stops.)"""
    returns: int = Field(default=2, ge=0)
    """How often a stage may go back like that before it stops."""
