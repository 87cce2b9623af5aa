"""Run folders with one broken file, through the commands that read it: always a place and a remedy."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.faults import folders, recipes
from tests.faults.folders import linked, put
from tests.faults.kit import Refuse, check_sentence
from tests.world import World, write_model

from ppolite.data.candidates import read_candidates
from ppolite.obs.run_files import Agreement, ControlEvaluation, Evaluation, Form, Rounds, read_json
from ppolite.obs.token_view import load_rollouts
from ppolite.rollout.sources.combine import Measured
from ppolite.types import UserError

SOME = ["cut", "list", "deep", "folder"]
"""Of `folders.JSON`, all of which `test_every_form` reads."""
FORMS = [Agreement, ControlEvaluation, Evaluation, Rounds, Measured]
GROUPS = {
    "eval.json": {**{name: folders.JSON[name] for name in SOME}, **folders.EVAL},
    "metrics.jsonl": folders.METRICS,
}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, group in GROUPS.items() for name in group])
def test_report(file: str, name: str, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(finished_run, tmp_path / "run")
    put(run / file, GROUPS[file][name])
    refuse(run / file, "report", run)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", folders.JSON)
def test_every_form(name: str, form: type[Form], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    put(path, folders.JSON[name])
    with pytest.raises(UserError) as caught:
        read_json(path, form, "delete it")
    check_sentence(str(caught.value), path)


@pytest.mark.parametrize("name", SOME)
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
    ["empty", "no JSON", "unknown key", "half a recipe", "folder", "loop"],
)
def test_recipe(name: str, command: str, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    texts = {
        **recipes.NO_YAML,
        "no JSON": "{",
        "unknown key": "seedd: 1\n",
        "half a recipe": "ppo: {steps: 3}\n",
        "folder": folders.a_folder,
        "loop": folders.a_loop,
    }
    run = linked(finished_run, tmp_path / "run")
    put(run / "recipe.yaml", texts[name])
    more = ["--to", tmp_path / "c.jsonl"] if command == "sample" else []
    refuse((run / "recipe.yaml", run), command, run, *more)


@pytest.mark.parametrize("name", [*SOME, *folders.AGREEMENT])
def test_agreement(name: str, world: World, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(finished_run, tmp_path / "run", "reward")
    (run / "policy").unlink()
    put(run / "reward" / "agreement.json", {**folders.JSON, **folders.AGREEMENT}[name])
    refuse(run / "reward" / "agreement.json", "ppo", run)


@pytest.mark.parametrize("name", [*SOME, *folders.ROUNDS])
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
def test_candidates(name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    put(path, folders.CANDIDATES[name])
    with pytest.raises(UserError) as caught:
        read_candidates(path)
    check_sentence(str(caught.value), path)


@pytest.mark.parametrize("name", ["empty", "score is text", "name twice", "folder"])
def test_iterate(name: str, world: World, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "round-1").mkdir(parents=True)
    (run / "sft").symlink_to(finished_run / "sft")
    put(run / "round-1" / "candidates.jsonl", folders.CANDIDATES[name])
    recipe = world.recipe_file(
        tmp_path / "r.yaml", reward={"kind": "pairs"}, iterate={"by": "file", "prompts": 8, "candidates": 2}
    )
    refuse(run / "round-1" / "candidates.jsonl", "iterate", recipe, "--out", run)


@pytest.mark.parametrize(
    ("part", "name"),
    [*(("policy", name) for name in folders.WEIGHTS), *(product(["sft", "reward"], ["empty", "pickle"]))],
)
def test_weights(name: str, part: str, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(finished_run, tmp_path / "run", part)
    put(run / part / "model.safetensors", folders.WEIGHTS[name])
    refuse(run / part, "eval", run)


@pytest.mark.parametrize("part", ["sft", "policy", "reward"])
def test_files_where_models_should_be(part: str, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(finished_run, tmp_path / "run")
    for content in ("", folders.a_folder):
        put(run / part, content)
        refuse(run / part, "eval", run)


TEMPLATES = [
    "{{ messages + 1 }}", "{% for m in", "{{ nothing.of.that() }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}", "{{ ().__class__.__bases__[0].__subclasses__() }}",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates(template: str, world: World, refuse: Refuse, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    refuse(("row", model, "chat template"), "sft", world.recipe_file(tmp_path / "r.yaml", model=str(model)))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("name", ["empty", "list", "null", "deep", "UTF-16"])
def test_model_files(name: str, file: str, finished_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(finished_run, tmp_path / "run", "sft")
    put(run / "sft" / file, folders.JSON[name])
    refuse(run / "sft", "eval", run)


@pytest.mark.parametrize("name", folders.ROLLOUTS)
def test_rollouts_are_left_out_with_a_word(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(folders.ROLLOUTS[name]), tmp_path / "step-00001.parquet")
    shown, complaints = load_rollouts(tmp_path)
    assert not shown
    assert complaints[0].startswith("step-00001.parquet was left out: ")


@pytest.mark.parametrize("name", SOME)
def test_samples(name: str, world: World, trained: Path, refuse: Refuse, tmp_path: Path) -> None:
    (trained / "rollouts").mkdir()
    put(trained / "rollouts" / "sft.jsonl", folders.JSON[name])
    recipe = world.recipe_file(tmp_path / "r.yaml", ppo__behaviour="sft", ppo__sft_samples=16)
    refuse(trained / "rollouts" / "sft.jsonl", "ppo", recipe, "--out", trained)


@pytest.mark.parametrize("name", SOME)
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


CONTROL: dict[str, dict[str, Any]] = {
    "eval.json": {**{name: folders.JSON[name] for name in SOME}, **folders.CONTROL_EVAL},
    "metrics.jsonl": {
        name: folders.METRICS[name] for name in ("no JSON", "step is text", "score is text", "folder")
    },
    "policy/policy.json": {**folders.JSON, **folders.SHEETS},
    "policy/model.safetensors": folders.WEIGHTS,
}


@pytest.mark.parametrize(("file", "name"), [(f, name) for f, group in CONTROL.items() for name in group])
def test_control_run(file: str, name: str, control_run: Path, refuse: Refuse, tmp_path: Path) -> None:
    run = linked(control_run, tmp_path / "run", "policy")
    content = CONTROL[file][name]
    if isinstance(content, dict) and content:
        content = json.loads((control_run / file).read_text()) | content
    put(run / file, content)
    command = "control" if file.startswith("policy") else "report"
    refuse((run / file, run / "policy"), command, run)
