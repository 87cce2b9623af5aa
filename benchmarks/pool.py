"""Long runs beside one another, each in a process of its own, none of which outlives the one that asked for it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import active_children, get_context

import psutil


@contextmanager
def pool(jobs: int) -> Generator[ProcessPoolExecutor]:
    """`jobs` processes. What ends this one early, an error, Ctrl-C or SIGTERM, ends them and all they have started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    executor = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        yield executor
        executor.shutdown()
    except BaseException:
        _end_workers()
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_workers() -> None:
    """All at once: when one is gone, the executor ends the others, and nobody knows any more what they had started."""
    family: list[psutil.Process] = []
    for worker in active_children():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(worker.pid)
            process.suspend()  # else it would begin its next run when the one it waits for has gone
            family += [process, *process.children(recursive=True)]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
