"""Every shipped recipe loads and says how to run it; the pairs of others are read by recipe alone.

`make check` runs this file, so nothing here imports torch.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import yaml

from ppolite.config import RECIPES, load_recipe, parse_recipe, save_recipe, shipped
from ppolite.data.readers import read_preferences

NAMES = shipped()
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
PAIRS = {"llmbar_pairs": ("llmbar_Natural.json", 100), "zh_pairs": ("dpo_zh_500.jsonl", 500)}
"""The file that a recipe is for, and its rows."""


def test_the_shipped_ones() -> None:
    assert {"film", "film_lora", "film_kl", "film_iterate", "llmbar_pairs", "zh_pairs"} <= set(NAMES)
    assert (ROOT / "recipes").resolve() == RECIPES.resolve()


@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads_and_says_how_to_run_it(name: str, tmp_path: Path) -> None:
    path = RECIPES / f"{name}.yaml"
    recipe = load_recipe(path)
    assert recipe == load_recipe(name)
    head = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert f" recipes/{name}.yaml" in head
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize("name", NAMES)
def test_stages_of_a_recipe_hold_out_the_same_prompts(name: str) -> None:
    recipe = load_recipe(name)
    sources = [s for s in (recipe.sft and recipe.sft.data, recipe.reward and recipe.reward.data,
                           recipe.ppo and recipe.ppo.prompts) if s]  # fmt: skip
    assert len({(s.path, s.held_out) for s in sources}) == 1


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_read_by_recipe_alone(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.reward is not None
    data = recipe.reward.data
    file, rows = PAIRS[name]
    path = SHARED / file
    if not path.exists():
        pytest.skip(f"{path} is not there")
    pairs, report = read_preferences(str(path), data.columns, plain=data.plain)
    assert report.rows == rows
    assert len(pairs) > 0.98 * report.rows
    assert all(pair.prompt.messages[-1]["role"] == "user" and pair.chosen != pair.rejected for pair in pairs)


def test_chinese_prompts_are_questions() -> None:
    path = SHARED / "dpo_zh_500.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    recipe = load_recipe("zh_pairs")
    assert recipe.reward is not None
    pairs, _ = read_preferences(str(path), recipe.reward.data.columns)
    assert "果汁" in pairs[0].prompt.last


def test_sections_of_a_shipped_recipe_stand_alone() -> None:
    """A recipe is small: taking away any of its keys must leave a recipe that loads."""
    for name in NAMES:
        tree = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        for key in tree:
            parse_recipe({k: v for k, v in tree.items() if k != key})


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_recipes_of_the_readme_load(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^( *)```yaml\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    trees = [yaml.safe_load(textwrap.dedent(block)) for _, block in blocks]
    assert [sorted(tree) for tree in trees] == [["model", "ppo", "reward", "sft", "train", "trunk"], ["ppo"]]
    for tree in trees:
        parse_recipe(tree)
