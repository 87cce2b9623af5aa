"""A process beside ours that answers lines of JSON with lines of JSON: it may hang or crash without taking us along."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path


class Process:
    """Runs a script, which imports nothing of ppolite. It is ended with what it has started when nobody holds it."""

    def __init__(self, script: str | Path) -> None:
        # -P: the folder of the script must not be searched for modules, since it has an http.py.
        self._popen = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        self.end = weakref.finalize(self, _end, self._popen)
        """Ends it at once, and returns its exit status; None the second time."""

    def answer(self, line: str) -> str:
        """Empty when the process has gone; its exit status is known then."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(line + "\n")
            self._popen.stdin.flush()
        line = self._popen.stdout.readline()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(1)
        return line


def _end(popen: subprocess.Popen[str]) -> int:
    """Kill the process and its group. Returns the exit status, which it may have had before."""
    popen.poll()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    code = popen.wait()
    for pipe in (popen.stdin, popen.stdout):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()
    return code
