"""Environment steps of `ppolite control`, timed: the whole of `train`, with environments made and metrics written."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.workers.common import report, told
from ppolite.control.config import load_control
from ppolite.control.train import train


def main() -> None:
    spec = told()
    config = load_control(spec["env"], algorithm=spec["algorithm"], overrides=[f"steps={spec['steps']}"])
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train(config, Path(folder))
        seconds = time.perf_counter() - started
    report("gymnasium", steps=spec["steps"], seconds=seconds, steps_per_s=spec["steps"] / seconds)


if __name__ == "__main__":
    main()
