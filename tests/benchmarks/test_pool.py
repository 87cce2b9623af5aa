"""Runs beside one another end with the process that asked for them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from benchmarks.record import ROOT

LONG = """
import subprocess, sys
from benchmarks.pool import pool

def work():
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])

if __name__ == "__main__":
    with pool(2) as processes:
        [processes.submit(work) for _ in range(3)][0].result()
"""


def test_sigterm_leaves_no_process_behind(tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text(LONG)
    asked = subprocess.Popen(
        [sys.executable, script], env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    begun: list[psutil.Process] = []
    while sum("time.sleep(600)" in process.cmdline()[-1] for process in begun) < 2:
        assert time.monotonic() < deadline, "the runs never started"
        time.sleep(0.1)
        begun = psutil.Process(asked.pid).children(recursive=True)
    asked.send_signal(signal.SIGTERM)
    _, said = asked.communicate(timeout=30)
    assert (asked.returncode, said) == (128 + signal.SIGTERM, "")
    assert not psutil.wait_procs(begun, timeout=10)[1]
