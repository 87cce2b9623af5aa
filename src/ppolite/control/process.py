"""What a run settles for its process: random streams, and threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch


def seeds(master: int, use: Literal["training", "evaluation"]) -> list[int]:
    """Four independent seeds for one use: environments, nets, noise, order of the minibatches, in training."""
    branch = np.random.SeedSequence(master, spawn_key=(("training", "evaluation").index(use),))
    return [int(s) for s in branch.generate_state(4)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Nets this small lose more in waking threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
