"""What a worker tells the harness: figures on its last line, questions while it runs. Needs torch alone.

Peers run this in environments without ppolite, so nothing of it is imported here.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch


def told() -> dict[str, Any]:
    """What the harness says on the command line; `seed` is another one in each pair."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return json.loads(sys.argv[1]) | {"seed": int(os.environ["BENCH_SEED"])}


def ask(question: Any) -> Any:
    """Put a question to the harness, and wait for its answer."""
    print(json.dumps({"ask": question}), flush=True)
    return json.loads(sys.stdin.readline())


def report(*packages: str, **figures: Any) -> None:
    """The worker's last words. `packages` took part, beside torch."""
    gpu = torch.cuda.max_memory_reserved() / 2**20 if torch.cuda.is_available() else None
    print(
        json.dumps(
            figures
            | {
                "peak_rss_mb": resident("VmHWM"),
                "gpu_mb": gpu,
                "versions": {name: importlib.metadata.version(name) for name in ("torch", *packages)},
            }
        ),
        flush=True,
    )


def resident(field: str) -> float:
    """`VmRSS`, what this process holds now, or `VmHWM`, the most so far, MiB; 0 where the system does not tell.

    Not `ru_maxrss`: a child begins with that of its parent.
    """
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else 0.0


def wait() -> None:
    """Until the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
