"""Broken data, one by one, through the command line: never a traceback, always a place and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults import tables
from tests.faults.kit import Refuse
from tests.world import World

from ppolite.obs.visible import visible

STAGES = {"scores": "reward", "pairs": "reward", "rankings": "reward", "prompts": "ppo"}


@pytest.mark.parametrize("name", tables.FILES)
def test_files(name: str, world: World, refuse: Refuse, tmp_path: Path) -> None:
    path = tables.write(name, tmp_path)
    recipe = world.recipe_file(tmp_path / "r.yaml", sft__data__path=str(path))
    refuse(path, "sft", recipe, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", tables.ABSENT)
def test_sources_that_are_not_there(
    name: str, world: World, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text(tables.LINES)
    recipe = world.recipe_file(tmp_path / "r.yaml", sft__data__path=name)
    refuse(visible(name, keep=""), "sft", recipe, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", tables.ROWS)
def test_rows(name: str, world: World, refuse: Refuse, trained: Path, tmp_path: Path) -> None:
    kind, text = tables.ROWS[name]
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    stage = STAGES[kind]
    changes = (
        {"ppo__prompts__path": str(path)}
        if stage == "ppo"
        else {"reward__data__path": str(path), "reward__kind": kind}
    )
    recipe = world.recipe_file(tmp_path / "r.yaml", **changes)
    refuse(path, stage, recipe, "--out", trained)
