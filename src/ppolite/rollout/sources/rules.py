"""Penalties that need no judge: 0 or less, in tokens or in responses. `weight` multiplies them.

Left out: a time limit for patterns. One like `(a+)+$` can take for ever on the wrong text; such checks belong into a
function, which has one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ppolite.config import FormatSource, LengthSource
from ppolite.types import Rollout


class LengthPenalty:
    """−1 for each token by which a response is shorter than `min` or longer than `max`."""

    def __init__(self, config: LengthSource) -> None:
        self.least, self.most = config.min or 0, config.max

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [-float(self._beyond(len(r.response_ids))) for r in rollouts]

    def _beyond(self, tokens: int) -> int:
        over = 0 if self.most is None else tokens - self.most
        return max(self.least - tokens, over, 0)


class FormatPenalty:
    """−1 for a response in which the pattern is not found."""

    def __init__(self, config: FormatSource) -> None:
        self.pattern = re.compile(config.pattern)

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [0.0 if self.pattern.search(r.text) else -1.0 for r in rollouts]
