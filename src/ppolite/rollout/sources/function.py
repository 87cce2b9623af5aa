"""A Python function as a reward source.

    def right_answer(prompts, responses, answer):
        return [float(last_number(r) == a) for r, a in zip(responses, answer)]

    ppo: {rewards: [{kind: function, function: "my_rewards:right_answer"}]}

It is called by name with lists as long as the round: `prompts` (text; of a conversation the last user turn),
`messages` (the whole conversation), `responses` (text), `finish` (`stop` or `length`), and any column of the prompts'
rows that its signature names; with `**columns` it gets all of them. A parameter with a default may be missing there.
It returns a list of numbers, larger is better. Values of a column that JSON has no form for arrive as text.

It runs in a process of its own (`worker.py`), since nothing else can end a function that hangs. One process serves the
whole run, so what the module remembers stays. It is not a sandbox: the function may do what the user may.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ppolite.config import FunctionSource
from ppolite.rollout.sources import worker
from ppolite.rollout.sources.foreign import BASICS, checked, quoted, require, sent, within
from ppolite.rollout.sources.process import Process
from ppolite.types import Rollout, UserError


class FunctionScorer:
    """Asks the function once for each call of `score`. `columns` are those that a prompt's row may have.

    Raises UserError at once where there is no such function, or it asks for another column.
    """

    def __init__(self, config: FunctionSource, columns: Collection[str] = ()) -> None:
        self.config, self.columns = config, columns
        self.who = f"reward function {config.function}"
        self._process: Process | None = None
        self._signature: dict[str, Any] = {}
        self._start()
        require(self._signature["wants"], columns, self.who)

    @property
    def fingerprint(self) -> str:
        """Of the file that it is in."""
        return self._signature["source"]

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Raises UserError when the function raises, takes too long, or returns anything but finite numbers."""
        if self._process is None:
            self._start()
        names = dict.fromkeys(self._signature["wants"])
        names |= dict.fromkeys(n for n in self._signature["may"] if n in self.columns or n in BASICS)
        if self._signature["any"]:
            names |= dict.fromkeys(["prompts", "responses", *self.columns])
        scores = self._ask(sent(rollouts, names))["scores"]
        return checked(scores, len(rollouts), self.who, "mend it and start again")

    def _start(self) -> None:
        self._process = Process(worker.__file__)
        path = [str(Path.cwd()), *(entry for entry in sys.path if entry)]
        self._signature = self._ask({"function": self.config.function, "path": path})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process, timeout = self._process, self.config.timeout
        assert process is not None
        try:
            line = within(timeout, lambda: process.answer(json.dumps(request, default=str)))
        except TimeoutError:
            self._stop()
            raise UserError(
                f"{self.who} gave no answer within {timeout:g} s and was ended; mend it or raise its timeout"
            ) from None
        if not line:
            code = self._stop()
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
            raise UserError(f"{self.who} took its process down with {how}; mend it and start again")
        answer = json.loads(line)
        if "error" in answer:
            if not self._signature:
                self._stop()
            raise UserError(f"{self.who} raised {quoted(answer['error'], 300)}; mend it and start again")
        return answer

    def _stop(self) -> int:
        """Leave no process behind; the next call starts a fresh one. Returns the exit status."""
        assert self._process is not None
        code, self._process, self._signature = self._process.end(), None, {}
        assert code is not None, "it is called once"
        return code
