"""Runs beside one another end with the process that asked for them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from benchmarks.record import ROOT

LONG = """
import subprocess, sys, time
from benchmarks.pool import pool

def work():
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])

def fail():
    time.sleep(5)
    raise ValueError("a run of its own")

if __name__ == "__main__":
    with pool(2) as processes:
        runs = [processes.submit(work if name == "work" else fail) for name in sys.argv[1:]]
        runs[-1].result()
"""


def started(folder: Path, *runs: str) -> subprocess.Popen[str]:
    script = folder / "long.py"
    script.write_text(LONG)
    environment = {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, script, *runs], env=environment, stderr=subprocess.PIPE, text=True
    )


def busy(asked: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    """All that it has started, once `count` runs are under way."""
    deadline = time.monotonic() + 60
    begun: list[psutil.Process] = []
    while sum("time.sleep(600)" in process.cmdline()[-1] for process in begun) < count:
        assert time.monotonic() < deadline, "the runs never started"
        time.sleep(0.1)
        begun = psutil.Process(asked.pid).children(recursive=True)
    return begun


def test_sigterm_leaves_no_process_behind(tmp_path: Path) -> None:
    asked = started(tmp_path, "work", "work", "work")
    begun = busy(asked, 2)
    asked.send_signal(signal.SIGTERM)
    _, said = asked.communicate(timeout=30)
    assert (asked.returncode, said) == (128 + signal.SIGTERM, "")
    assert not psutil.wait_procs(begun, timeout=10)[1]


def test_a_run_that_fails_ends_the_others(tmp_path: Path) -> None:
    asked = started(tmp_path, "work", "fail")
    begun = busy(asked, 1)
    _, said = asked.communicate(timeout=60)
    assert asked.returncode == 1
    assert "a run of its own" in said
    assert not psutil.wait_procs(begun, timeout=10)[1]
