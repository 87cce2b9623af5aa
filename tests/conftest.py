"""What every test wants: one thread, no hub, no window; and the real model for those who ask.

torch is not imported here, so that the recipes test of `make check` stays quick.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.world import World

# Set before torch and tokenizers are imported. Float sums depend on the number of threads, which makes
# comparisons to rounding flaky, and the suite shares its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real model first: left to the end, one worker would be alone with it for minutes."""
    items.sort(key=lambda item: "real" not in item.keywords)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Folder of the embedded 135M model, fetched if need be. Tests that take it are marked `real`."""
    from ppolite.data import embedded
    from ppolite.types import UserError

    try:
        return embedded.model_path()
    except UserError as error:
        pytest.skip(f"no embedded model: {error}")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model with data for all stages (`tests/world.py`)."""
    from tests.world import World

    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def finished_run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all stages done. To be read, or copied; never changed."""
    from ppolite.stages.run import run_recipe

    folder = tmp_path_factory.mktemp("runs") / "finished"
    run_recipe(world.recipe(), folder)
    return folder
