from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def trained(finished_run: Path, tmp_path: Path) -> Path:
    """A run folder with SFT and reward model, without a policy."""
    for name in ("sft", "reward"):
        (tmp_path / name).symlink_to(finished_run / name)
    return tmp_path
