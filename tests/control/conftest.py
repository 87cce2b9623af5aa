"""The tiny environments, registered once; and a small run of each of them."""

from __future__ import annotations

import gymnasium as gym
import pytest
from tests.control.worlds import register


@pytest.fixture(scope="session", autouse=True)
def _worlds() -> None:
    if "tiny/Match-v0" not in gym.registry:
        register()
