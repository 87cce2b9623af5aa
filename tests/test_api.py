"""The public surface: what `ppolite` exports, what importing it costs, and the example of its Python API."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.world import World

import ppolite
from ppolite.cli import main

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "ppolite").rglob("*.py"))


def python(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, cwd=cwd, env=env, check=False
    )


def test_all_is_what_it_says() -> None:
    assert ppolite.__all__ == [
        "PPO", "SFT", "Message", "Prompt", "Recipe", "RewardModel", "Rollout", "Sampling", "Scorer",
        "UserError", "load_recipe",
    ]  # fmt: skip
    assert all(getattr(ppolite, name) is not None for name in ppolite.__all__)
    with pytest.raises(AttributeError, match="no attribute 'GRPO'"):
        _ = ppolite.GRPO


def test_configuration_and_command_line_do_not_import_torch() -> None:
    heavy = ("torch", "transformers", "datasets", "matplotlib", "numpy")
    code = (
        f"import sys, ppolite, ppolite.config, ppolite.cli; print([m for m in {heavy} if m in sys.modules])"
    )
    ran = python("-c", code)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_only_the_command_line_imports_the_project_inside_functions(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = [
        f"line {node.lineno}"
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
        if (isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("ppolite")))
        or (isinstance(node, ast.Import) and any(a.name.startswith("ppolite") for a in node.names))
    ]
    commands = path.parent.name == "cli" and path.stem not in {"__init__", "__main__"}
    assert bool(inside) == commands, inside


def test_example_own_reward(world: World, tmp_path: Path) -> None:
    script = ROOT / "examples" / "own_reward.py"
    assert len(script.read_text().splitlines()) <= 30
    recipe = world.recipe_file(
        tmp_path / "r.yaml", ppo__rollouts=32, ppo__optim__lr=1e-2, ppo__missing_eos_penalty=0
    )
    ran = python(str(script), str(recipe), "12", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    rewards = [
        float(line.split("reward ")[1].split(",")[0]) for line in ran.stdout.splitlines() if "reward " in line
    ]
    assert len(rewards) == 12
    assert rewards[-1] > rewards[0] + 0.2
    run = tmp_path / "runs" / "own_reward"
    assert (run / "policy" / "model.safetensors").exists()
    assert main(["eval", str(run), "--json"]) == 0  # a run like any other, but for its stages
