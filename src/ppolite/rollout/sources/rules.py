"""Penalties that need no judge: 0 or less, in tokens or in responses. `weight` multiplies them.

A pattern is Python's own `re`, which may take for ever on the wrong text: `(a+)+$` on forty letters and a stop. So it
is searched for in a process of its own (`matcher.py`), which is ended when one response takes it too long.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ppolite.config import FormatSource, LengthSource
from ppolite.rollout.sources import matcher
from ppolite.rollout.sources.foreign import quoted, within
from ppolite.rollout.sources.process import Process
from ppolite.types import Rollout, UserError

LONGEST_SEARCH = 10.0
"""Seconds for one response, which a sound pattern needs a millionth of: a busy machine is no reason to stop."""


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
    """−1 for a response in which the pattern is not found; `longest` is in seconds."""

    def __init__(self, config: FormatSource, *, longest: float = LONGEST_SEARCH) -> None:
        self.config, self.longest = config, longest
        self._process: Process | None = None

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Raises UserError when the search in one response takes too long."""
        return [0.0 if self._finds(r.text) else -1.0 for r in rollouts]

    def _finds(self, text: str) -> bool:
        process = self._process = self._process or Process(matcher.__file__)
        line = json.dumps({"pattern": self.config.pattern, "text": text})
        try:
            answer = within(self.longest, lambda: process.answer(line))
        except TimeoutError:
            answer = ""
        if not answer:
            process.end()
            self._process = None
            raise UserError(
                f"rewards: `{self.config.title}` searched for {quoted(self.config.pattern)} in one response for "
                f"{self.longest:g} s and was ended ({quoted(text)}); write it without repetitions in repetitions, or "
                "as a function"
            )
        return json.loads(answer)
