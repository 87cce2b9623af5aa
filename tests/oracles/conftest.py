"""One thread, no hub, float64 in jax; and the list of who vouches for what, as pytest has collected it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

# Before torch, jax and TRL are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["COMPOSITE_LP_AGGREGATE"] = "0"  # torchrl's new names; the old ones warn

settings.register_profile(
    "oracles", derandomize=True, deadline=None, max_examples=25, phases=set(Phase) - {Phase.explain}
)
settings.load_profile("oracles")

COLLECTED = pytest.StashKey[list[pytest.Item]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write", action="store_true", help="write the table into docs/oracles.md")


@pytest.hookimpl(tryfirst=True)  # before -k takes items away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = list(items)


@pytest.fixture
def witnesses(request: pytest.FixtureRequest) -> list[pytest.Mark]:
    """The `oracle` marks of all tests here, once each, in the order of the files."""
    items = request.config.stash[COLLECTED]
    if {item.path for item in items} != set(Path(__file__).parent.glob("test_*.py")):
        pytest.skip("only a part of tests/oracles was collected")
    marks = [mark for item in items for mark in item.iter_markers("oracle")]
    return [mark for i, mark in enumerate(marks) if mark not in marks[:i]]
