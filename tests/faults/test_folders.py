"""Run folders with one broken file, through the commands that read it: always a place and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.faults import folders, recipes
from tests.faults.folders import linked, put
from tests.faults.kit import Refuse
from tests.world import World

from ppolite.obs.token_view import load_rollouts

READ = [name for name in folders.JSON if name != "loop"]
"""Where a file may be missing, one that links to itself is."""
GROUPS = {
    "eval.json": {**folders.JSON, **folders.EVAL},
    "metrics.jsonl": folders.METRICS,
}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, group in GROUPS.items() for name in group])
def test_report(file: str, name: str, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(finished_run, tmp_path / "run")
    put(run / file, GROUPS[file][name])
    refuse(run / file, "report", run)


@pytest.mark.parametrize("name", READ)
def test_run_with_a_broken_evaluation(name: str, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(finished_run, tmp_path / "run")
    put(run / "eval.json", folders.JSON[name])
    refuse(run / "eval.json", "run", run)


@pytest.mark.parametrize(
    "command",
    ["run", "sft", "reward", "ppo", "sample", "iterate", "eval", "chat", "report", "recipe", "control"],
)
@pytest.mark.parametrize(
    "name",
    ["empty", "list", "no JSON", "unknown key", "half a recipe", "bomb", "folder", "loop", "UTF-16, little"],
)
def test_recipe(name: str, command: str, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    texts = {
        **recipes.NO_YAML,
        "no JSON": "{",
        "unknown key": "seedd: 1\n",
        "half a recipe": "ppo: {steps: 3}\n",
        "bomb": recipes.NO_YAML["a billion values"],
        "folder": folders.a_folder,
        "loop": folders.a_loop,
    }
    run = linked(finished_run, tmp_path / "run")
    put(run / "recipe.yaml", texts[name])
    more = ["--to", tmp_path / "c.jsonl"] if command == "sample" else []
    refuse((run / "recipe.yaml", run), command, run, *more)


@pytest.mark.parametrize("name", {**folders.JSON, **folders.AGREEMENT})
def test_agreement(name: str, world: World, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(finished_run, tmp_path / "run", "reward")
    (run / "policy").unlink()
    put(run / "reward" / "agreement.json", {**folders.JSON, **folders.AGREEMENT}[name])
    refuse(run / "reward" / "agreement.json", "ppo", run)


@pytest.mark.parametrize("name", [*READ, *folders.ROUNDS])
def test_rounds(name: str, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(finished_run, tmp_path / "run")
    content: Any = {**folders.JSON, **folders.ROUNDS}[name]
    if isinstance(content, dict) and content:
        content = folders.SOUND_ROUNDS | content
    put(run / "rounds.json", content)
    refuse(run / "rounds.json", "report", run)


@pytest.mark.parametrize("name", folders.CANDIDATES)
def test_score(name: str, refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    put(path, folders.CANDIDATES[name])
    refuse(path, "score", path)


@pytest.mark.parametrize("name", folders.CANDIDATES)
def test_iterate(name: str, world: World, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "round-1").mkdir(parents=True)
    (run / "sft").symlink_to(finished_run / "sft")
    put(run / "round-1" / "candidates.jsonl", folders.CANDIDATES[name])
    recipe = world.recipe_file(
        tmp_path / "r.yaml", reward={"kind": "pairs"}, iterate={"by": "file", "prompts": 8, "candidates": 2}
    )
    refuse(run / "round-1" / "candidates.jsonl", "iterate", recipe, "--out", run)


@pytest.mark.parametrize("part", ["sft", "policy", "reward"])
@pytest.mark.parametrize("name", folders.WEIGHTS)
def test_weights(name: str, part: str, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(finished_run, tmp_path / "run", part)
    put(run / part / "model.safetensors", folders.WEIGHTS[name])
    refuse(run / part, "eval", run)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("name", folders.JSON)
def test_model_files(name: str, file: str, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    if file == "tokenizer_config.json" and name in ("folder", "loop"):
        pytest.skip("transformers does without it")
    run = linked(finished_run, tmp_path / "run", "sft")
    put(run / "sft" / file, folders.JSON[name])
    refuse(run / "sft", "eval", run)


@pytest.mark.parametrize("name", folders.ROLLOUTS)
def test_rollouts_are_left_out_with_a_word(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(folders.ROLLOUTS[name]), tmp_path / "step-00001.parquet")
    shown, complaints = load_rollouts(tmp_path)
    assert not shown
    assert complaints[0].startswith("step-00001.parquet was left out: ")


@pytest.mark.parametrize("name", READ)
def test_samples(name: str, world: World, trained: Path, refuse: Refuse, tmp_path: Path) -> None:
    (trained / "rollouts").mkdir()
    put(trained / "rollouts" / "sft.jsonl", folders.JSON[name])
    recipe = world.recipe_file(tmp_path / "r.yaml", ppo__behaviour="sft", ppo__sft_samples=16)
    refuse(trained / "rollouts" / "sft.jsonl", "ppo", recipe, "--out", trained)


@pytest.mark.parametrize("name", folders.JSON)
def test_units(name: str, world: World, trained: Path, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "w.py").write_text("def f(responses): return [len(r) for r in responses]\n")
    source = {"kind": "function", "function": f"{tmp_path / 'w.py'}:f", "shift": None}
    put(trained / "reward_units.json", folders.JSON[name])
    recipe = world.recipe_file(tmp_path / "r.yaml", ppo__rewards=[source])
    refuse(trained / "reward_units.json", "ppo", recipe, "--out", trained)


@pytest.fixture(scope="session")
def control_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gymnasium")
    from ppolite.control.config import parse_control
    from ppolite.control.run import run_control

    folder = tmp_path_factory.mktemp("control") / "run"
    tree = {
        "env": "CartPole-v1", "steps": 64, "rollout": 16, "envs": {"count": 2}, "minibatches": 1, "epochs": 1,
        "evaluation": {"episodes": 2, "gif_seconds": 0}, "log_every": 32,
    }  # fmt: skip
    run_control(parse_control(tree), folder)
    return folder


def control_cases() -> list[tuple[str, str]]:
    groups = {
        "eval.json": {**folders.JSON, **folders.CONTROL_EVAL},
        "metrics.jsonl": folders.METRICS,
        "policy/policy.json": {**folders.JSON, **folders.SHEETS},
        "policy/model.safetensors": folders.WEIGHTS,
    }
    return [(file, name) for file, group in groups.items() for name in group]


@pytest.mark.parametrize(("file", "name"), control_cases())
def test_control_run(file: str, name: str, control_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(control_run, tmp_path / "run", "policy")
    group: dict[str, Any] = {
        "eval.json": {**folders.JSON, **folders.CONTROL_EVAL},
        "metrics.jsonl": folders.METRICS,
        "policy/policy.json": {**folders.JSON, **folders.SHEETS},
        "policy/model.safetensors": folders.WEIGHTS,
    }[file]
    content: Any = group[name]
    if isinstance(content, dict) and content:
        content = json.loads((control_run / file).read_text()) | content
    put(run / file, content)
    command = "control" if file.startswith("policy") else "report"
    refuse((run / file, run / "policy"), command, run)
