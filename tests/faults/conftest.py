from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from tests.faults.kit import Refuse, refused


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """`refuse(place, "run", recipe, …)` → the one sentence on stderr."""
    return partial(refused, capsys)


@pytest.fixture
def trained(finished_run: Path, tmp_path: Path) -> Path:
    """A run folder with SFT and reward model, without a policy."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("sft", "reward"):
        (folder / name).symlink_to(finished_run / name)
    return folder
