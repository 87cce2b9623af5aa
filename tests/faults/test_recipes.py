"""Broken recipes, one by one, through the command line: never a traceback, always a place and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults import recipes
from tests.faults.kit import Refuse, check_sentence

from ppolite.config import parse_recipe
from ppolite.control.config import parse_control
from ppolite.types import UserError

SECRET = "s3cret"


@pytest.mark.parametrize("name", recipes.NO_YAML)
def test_what_is_no_recipe(name: str, refuse: Refuse, tmp_path: Path) -> None:
    text, path = recipes.NO_YAML[name], tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refuse(path, "recipe", path)


@pytest.mark.parametrize("command", ["run", "sft", "reward", "ppo", "iterate", "sample", "control"])
@pytest.mark.parametrize(
    "name", ["empty", "list", "latin 1", "key twice", "a billion values", "Python object"]
)
def test_what_is_no_recipe_for_every_command(name: str, command: str, refuse: Refuse, tmp_path: Path) -> None:
    text, path = recipes.NO_YAML[name], tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refuse(path, command, path, *(["--to", tmp_path / "c.jsonl"] if command == "sample" else []))


def test_wrong_values_of_every_key() -> None:
    count = 0
    for check, cases in ((parse_recipe, recipes.wrong_values()), (parse_control, recipes.control_values())):
        for key, _, tree in cases:
            with pytest.raises(UserError) as caught:
                check(tree, where="r.yaml")
            said = check_sentence(str(caught.value), "r.yaml")
            section, _, last = key.rpartition(".")
            # A validator of the whole section names the section before the key.
            assert f"`{key}" in said or f"{section}: `{last}`" in said, (key, said)
            count += 1
    assert count > 400


@pytest.mark.parametrize("name", recipes.CONTRADICTIONS)
def test_contradictions(name: str, refuse: Refuse, tmp_path: Path) -> None:
    says, tree = recipes.CONTRADICTIONS[name]
    path = tmp_path / "r.yaml"
    path.write_text(recipes.text_of(tree))
    assert says in refuse(path, "run", path)


@pytest.mark.parametrize("name", recipes.CONTROL_TEXTS)
def test_control(name: str, refuse: Refuse, tmp_path: Path) -> None:
    says, text = recipes.CONTROL_TEXTS[name]
    path = tmp_path / "r.yaml"
    path.write_text(text)
    said = refuse(path, "control", path)
    assert says in said
    assert SECRET not in said


@pytest.mark.parametrize("name", recipes.SECRETS)
def test_secrets_are_refused_and_not_shown(name: str, refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipes.text_of(recipes.SECRETS[name]))
    assert SECRET not in refuse(path, "run", path).lower()


@pytest.mark.parametrize("name", recipes.SETS)
def test_set(name: str, refuse: Refuse, tmp_path: Path) -> None:
    override, path = recipes.SETS[name], tmp_path / "r.yaml"
    path.write_text(recipes.text_of({"ppo": {"prompts": recipes.DATA, "rewards": [recipes.FUNCTION]}}))
    said = refuse(("--set", path), "run", path, "--set", override)
    if name == "secret":
        assert SECRET not in said
