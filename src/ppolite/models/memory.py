"""How much memory there is, where hidden states stay in it, and whether an error says that it was too little.

    kept_at("auto", size, device)      "device", "cpu" or "none": where `size` bytes of them stay

All sizes are bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

Place = Literal["device", "cpu", "none"]
Keep = Place | Literal["auto"]

CONTAINER = Path("/sys/fs/cgroup")
"""Where a container says how much memory it may take."""
MOST = 0.25
"""Share of a memory that hidden states may fill without being told to."""


def memory_of(device: torch.device) -> int:
    """Bytes of that GPU, or of the machine, or what its container may take, whoever uses them."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(has, _container_limit() or has)


def free_memory(device: torch.device) -> int | None:
    """Bytes that nobody uses; None where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    table = Path("/proc/meminfo")
    lines = table.read_text(encoding="ascii").splitlines() if device.type == "cpu" and table.exists() else []
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    limit = _container_limit()
    if free is None or limit is None:
        return free
    return min(free, max(limit - int((CONTAINER / "memory.current").read_text()), 0))


def _container_limit() -> int | None:
    """None where there is no container, or no limit."""
    path = CONTAINER / "memory.max"
    said = path.read_text().strip() if path.exists() else ""
    return int(said) if said.isdigit() else None


def kept_at(keep: Keep, size: int, device: torch.device) -> Place:
    """Where `size` bytes of hidden states stay that are made on this device.

    `auto`: on the device where they fill at most a quarter of it, else with the CPU by the same measure, else nowhere.
    Free memory has no say: when a run goes on, the choice has to be the one that it began with.
    """
    if keep != "auto":
        return keep
    if size <= MOST * memory_of(device):
        return "device"
    return "cpu" if size <= MOST * memory_of(torch.device("cpu")) else "none"


def is_out_of_memory(error: Exception) -> bool:
    """Whatever raises it: CUDA, torch's CPU allocator, a library's own."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in said
