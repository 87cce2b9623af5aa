"""One process at a time in a run folder: two would write over each other's metrics and checkpoints.

    with alone(run_dir):        the folder is made where it is missing, and locked until here ends

The lock is on the folder itself (`flock`), so that it leaves no file, and a process that is killed none either.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppolite.types import UserError

log = logging.getLogger("ppolite")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raises UserError where another process is at work in the folder. Disks that know no locks are warned of."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is at work in it; wait for its end, or choose another folder with --out"
            ) from None
        except OSError as error:
            log.warning(
                "%s cannot be locked (%s); start no second run in it meanwhile", folder, error.strerror
            )
        yield
    finally:
        os.close(handle)
