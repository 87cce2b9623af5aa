"""Nothing is unpickled, by our source or by what it calls, with pickles in every place where tools leave some."""

from __future__ import annotations

import ast
import os
import pickle
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.kit import Refuse
from tests.world import World, write_model
from transformers import AutoModelForCausalLM

import ppolite
from ppolite.cli import main
from ppolite.models.load import load_causal, load_tokenizer
from ppolite.types import UserError

SOURCE = Path(ppolite.__file__).parent
MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "numpy.lib.format"}
CALLS = {
    "torch.load", "np.load", "numpy.load", "np.fromfile", "pd.read_pickle", "pandas.read_pickle", "yaml.load",
    "yaml.full_load", "yaml.unsafe_load", "eval", "exec", "compile",
}  # fmt: skip


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_the_source_has_no_way_to_unpickle() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not MODULES & {alias.name for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert node.module not in MODULES, path
            if isinstance(node, ast.Call):
                assert called(node) not in CALLS, f"{path}: {called(node)}"
                assert "allow_pickle" not in {k.arg for k in node.keywords}, path


@pytest.fixture(scope="module")
def looked_up() -> list[str]:
    """Every class that an unpickler looks up from now on: Python tells its audit hooks. They stay for ever."""
    seen: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            seen.append(str(args))

    sys.addaudithook(hook)
    return seen


@pytest.fixture
def unpickled(looked_up: list[str]) -> list[str]:
    """The same, of this test alone."""
    looked_up.clear()
    return looked_up


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


PLACES = [
    "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "tf_model.h5", "flax_model.msgpack", "vocab.pkl", "tokenizer.pkl", "model.ckpt", "consolidated.00.pth",
]  # fmt: skip


def test_the_hook_sees(unpickled: list[str], tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "gone")))
    assert unpickled
    assert (tmp_path / "gone").exists()


def test_a_whole_run_beside_pickles(world: World, unpickled: list[str], tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "marker"))
    model = write_model(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(world.path("examples"), data / "examples.jsonl")
    for folder in (model, data):
        for name in PLACES:
            (folder / name).write_bytes(bomb)
    recipe = world.recipe_file(
        tmp_path / "r.yaml", model=str(model), sft__data__path=str(data / "examples.jsonl"), reward__epochs=1,
        ppo__steps=1, ppo__min_rm_accuracy=0,
    )  # fmt: skip
    out = ["--out", str(tmp_path / "out")]
    assert [main([stage, str(recipe), *out]) for stage in ("sft", "reward", "ppo")] == [0, 0, 0]
    for part in ("sft", "reward", "policy"):
        for name in PLACES:
            (tmp_path / "out" / part / name).write_bytes(bomb)
    assert main(["eval", str(tmp_path / "out"), "--set", "evaluation.prompts=2"]) == 0
    assert not (tmp_path / "marker").exists()
    assert unpickled == []


@pytest.mark.parametrize("name", PLACES)
def test_a_folder_with_a_pickle_alone(
    name: str, world: World, refuse: Refuse, unpickled: list[str], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    said = refuse(model, "sft", world.recipe_file(tmp_path / "r.yaml", model=str(model)))
    assert "safetensors" in said
    assert not (tmp_path / "marker").exists()
    assert unpickled == []


def test_a_model_with_an_adapter_in_it(
    world: World, refuse: Refuse, unpickled: list[str], tmp_path: Path
) -> None:
    """transformers loads it unasked, from adapter_model.bin where there is no other."""
    model = write_model(tmp_path / "model")
    (model / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "x", "r": 2}'
    )
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    assert "merge" in refuse(model, "sft", world.recipe_file(tmp_path / "r.yaml", model=str(model)))
    assert not (tmp_path / "marker").exists()
    assert unpickled == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_the_command_that_converts(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a 'model'")
    before = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(before.state_dict(), folder / name)
    (folder / "model.safetensors").unlink()
    for source in (folder, folder / name) if name.endswith(".pt") else (folder,):
        with pytest.raises(UserError, match="is a pickle") as caught:
            load_causal(str(source), torch.device("cpu"))
    python, option, code = shlex.split(str(caught.value).split("model.safetensors: ")[1])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    after = load_causal(str(folder), torch.device("cpu"))
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))
    load_tokenizer(str(folder))
