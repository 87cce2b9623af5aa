"""A run folder belongs to one process at a time."""

from __future__ import annotations

import errno
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ppolite.obs.alone import alone
from ppolite.types import UserError

HOLDER = """
import sys, time
from pathlib import Path
from ppolite.obs.alone import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match="one: another process is at work in it; wait for its end"),
            alone(folder),
        ):
            pass
        with alone(tmp_path / "runs" / "two"):
            pass
        other.send_signal(signal.SIGKILL)
    for _ in range(2):
        with alone(folder):
            assert list(folder.iterdir()) == []


def test_a_disk_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING), alone(tmp_path):
        assert "cannot be locked (Operation not supported)" in caplog.text
