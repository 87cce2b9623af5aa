"""Long runs beside one another, each in a process of its own, none of which outlives the one that asked for it."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context

import psutil


@contextmanager
def pool(jobs: int) -> Generator[ProcessPoolExecutor]:
    """`jobs` processes. Ctrl-C and SIGTERM end them at once, with all that they have started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as executor:
            try:
                yield executor
            except (KeyboardInterrupt, SystemExit):  # the executor would wait for what is under way
                for worker in active_children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        _end(psutil.Process(worker.pid))
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(worker: psutil.Process) -> None:
    worker.suspend()  # else it would begin its next run when the one it waits for has gone
    for process in [*worker.children(recursive=True), worker]:
        process.kill()
