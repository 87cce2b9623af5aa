"""Where and with what a figure was measured: commit, date, machine, versions.

Shared by `benchmarks/` (speed) and `experiments/` (results). A figure that belongs to no commit is worth nothing,
so a working tree with changes is refused unless the caller says that nothing is to be kept.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
WRITTEN_HERE = ("benchmarks/results/", "docs/results/", "docs/benchmarks.md")
"""Changes here are results, and leave the code what it was."""


def commit() -> str:
    """The checked-out commit. Exits where the working tree has changes beside results."""
    lines = _git("status", "--porcelain").splitlines()
    if [line for line in lines if not line[3:].startswith(WRITTEN_HERE)]:
        sys.exit(
            "the working tree has changes, so that a figure would belong to no commit; commit them, or try things "
            "with --dirty"
        )
    return _git("rev-parse", "HEAD").strip()


def machine() -> dict[str, Any]:
    """Processor, GPU, threads, and the versions that numbers depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of further packages that took part."""
    return {name: importlib.metadata.version(name) for name in packages}


def today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def _git(*args: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *args], check=True, capture_output=True, text=True).stdout
