"""A seed for every random stream, and fingerprints of data."""

from __future__ import annotations

import hashlib
from typing import Any


def derive_seed(master: int, *names: str | int) -> int:
    """A seed of its own for each random stream: 63 bits of SHA-256 of master seed and stream name."""
    digest = hashlib.sha256("/".join(map(str, (master, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def fingerprint_of(data: Any) -> str:
    """Of plain data and dataclasses, by how they are written."""
    return hashlib.sha256(repr(data).encode("utf-8", "backslashreplace")).hexdigest()[:16]
