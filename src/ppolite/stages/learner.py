"""Updates of a set of weights: AdamW with its schedule, what does not fit or is not finite, and weights put back."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ppolite.config import Adam
from ppolite.models.body import Body
from ppolite.models.memory import is_out_of_memory

log = logging.getLogger("ppolite")
T = TypeVar("T")


class Learner:
    """AdamW with warm-up, schedule and gradient clipping over one set of parameters."""

    def __init__(self, parameters: list[nn.Parameter], config: Adam, total: int) -> None:
        self.parameters, self.config, self.total = parameters, config, max(total, 1)
        self.done = 0
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=config.lr,
            betas=(0.9, config.beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        c, warm = self.config, self.config.warmup * self.total
        if self.done < warm:
            return c.lr * (self.done + 1) / (math.floor(warm) + 1)
        progress = min((self.done - warm) / max(self.total - warm, 1), 1.0)
        factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return c.lr * factor[c.schedule]

    def clip(self) -> float:
        """Scale the gradients down to the norm allowed. Returns the norm before."""
        return float(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))

    def apply(self) -> None:
        """Update, and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.clear()
        self.done += 1

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """The moments, which belong to weights that are no longer there."""
        self.optimizer.state.clear()

    def state(self) -> dict[str, Any]:
        """Updates done and the optimizer's moments."""
        return {"done": self.done, "moments": self.optimizer.state_dict()["state"]}

    def restore_moments(self, state: dict[str, Any]) -> None:
        """Without `done`: where the schedule stands is the caller's to say."""
        groups = self.optimizer.state_dict()["param_groups"]
        moments = {int(i): of_one for i, of_one in state["moments"].items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def step_together(*learners: Learner, sound: bool = True) -> list[float] | None:
    """One update of each, or of none: all gradients are looked at before any is used. Returns their norms.

    None where a gradient is not finite, or the caller's losses were not `sound`: then no weight has changed.
    """
    norms = [learner.clip() for learner in learners]
    if not sound or not all(map(math.isfinite, norms)):
        for learner in learners:
            learner.clear()
        return None
    for learner in learners:
        learner.apply()
    return norms


class Fitting:
    """The token budget of updates: halved where memory does not suffice, and kept so."""

    def __init__(self, tokens: int) -> None:
        self.tokens = self.told = tokens
        self._said = False

    def run(self, work: Callable[[], T], clear: Callable[[], None]) -> T:
        """`work()`, again with half the budget while it does not fit; `clear` undoes a half-done one.

        Raises the last error when it does not fit one row at a time either.
        """
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.tokens == 1:
                    raise
            # Not in the handler: the error would keep the tensors of all its frames alive.
            clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.tokens = max(self.tokens // 2, 1)
            if not self._said:
                self._said = True
                log.warning(
                    "an update did not fit into memory; going on with at most %d tokens at once, and fewer if need be. "
                    "Results stay the same; set micro_batch_tokens to say so from the start",
                    self.tokens,
                )

    def state(self) -> dict[str, int]:
        return {"tokens": self.tokens, "told": self.told}

    def restore(self, state: Mapping[str, int]) -> None:
        """What it was halved to, unless the recipe says another one since."""
        if state["told"] == self.told:
            self.tokens = state["tokens"]


class Skips:
    """Updates that were skipped since something in them was not finite: nothing has changed by them."""

    def __init__(self) -> None:
        self.total = self.in_row = 0
        self.why = ""
        self.batches: list[Any] = []
        """Of those in a row, for people to read."""

    def add(self, why: str, batch: Any) -> None:
        self.total += 1
        self.in_row += 1
        self.why = why
        self.batches.append({"why": why, "batch": batch})

    def clear(self) -> None:
        """An update was sound, or the run has gone back."""
        self.in_row = 0
        self.batches.clear()

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "in_row": self.in_row, "why": self.why, "batches": list(self.batches)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.total, self.in_row, self.why = state["total"], state["in_row"], state["why"]
        self.batches = list(state["batches"])


def put_weights(body: Body, saved: Mapping[str, Tensor]) -> None:
    """Into the weights that are trained. Raises ValueError where these are others than the saved ones."""
    mine = body.trained_by_name()
    if {k: w.shape for k, w in mine.items()} != {k: w.shape for k, w in saved.items()}:
        raise ValueError("the weights that are trained have other names or shapes")
    with torch.no_grad():
        for name, weight in mine.items():
            weight.copy_(saved[name])
