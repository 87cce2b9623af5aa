"""Broken data, one by one: never a traceback, always a place and a remedy; some through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults import tables
from tests.faults.kit import Refuse, check_sentence
from tests.world import World

from ppolite.data.readers import read_examples
from ppolite.obs.visible import visible
from ppolite.stages.reward import ITEMS
from ppolite.stages.rows import READERS
from ppolite.types import UserError


@pytest.mark.parametrize("name", tables.FILES)
def test_files(name: str, tmp_path: Path) -> None:
    path = tables.write(name, tmp_path)
    try:
        items, report = read_examples(str(path))
    except UserError as error:
        check_sentence(visible(str(error), keep=""), path)
    else:
        assert len(items) == report.used, "what is left to refuse is the split"
        assert name in tables.ONE_PROMPT


SOME = [name for i, name in enumerate(tables.FILES) if i % 9 == 0]


@pytest.mark.parametrize("name", [*SOME, *tables.ONE_PROMPT])
def test_files_of_a_run(name: str, world: World, refuse: Refuse, tmp_path: Path) -> None:
    path = tables.write(name, tmp_path)
    recipe = world.recipe_file(tmp_path / "r.yaml", sft__data__path=str(path))
    refuse(path, "sft", recipe, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", tables.ABSENT)
def test_sources_that_are_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text(tables.LINES)
    with pytest.raises(UserError) as caught:
        read_examples(name)
    check_sentence(str(caught.value), name)


@pytest.mark.parametrize(
    "name", ["", "~nobody-of-that-name/x.jsonl", "hub:../..", "x/" * 3000 + "y.jsonl", "x\x1b.jsonl"]
)
def test_sources_of_a_run(
    name: str, world: World, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = world.recipe_file(tmp_path / "r.yaml", sft__data__path=name)
    refuse(visible(name, keep=""), "sft", recipe, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", tables.ROWS)
def test_rows(name: str, tmp_path: Path) -> None:
    kind, text = tables.ROWS[name]
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    if name in tables.SOUND_ROWS:
        READERS[ITEMS.get(kind, kind)](str(path))
    else:
        with pytest.raises(UserError) as caught:
            READERS[ITEMS.get(kind, kind)](str(path))
        check_sentence(visible(str(caught.value), keep=""), path)


@pytest.mark.parametrize("name", [*tables.SOUND_ROWS, "scores: NaN", "pairs: preferred 0", "rankings: ties"])
def test_rows_of_a_run(name: str, world: World, refuse: Refuse, trained: Path, tmp_path: Path) -> None:
    kind, text = tables.ROWS[name]
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    changes = (
        {"ppo__prompts__path": str(path)}
        if kind == "prompts"
        else {"reward__data__path": str(path), "reward__kind": kind}
    )
    recipe = world.recipe_file(tmp_path / "r.yaml", **changes)
    refuse(path, "ppo" if kind == "prompts" else "reward", recipe, "--out", trained, "--again")
