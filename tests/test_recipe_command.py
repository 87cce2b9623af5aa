"""`ppolite recipe`: what it prints is a recipe again, and what it explains is true."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from ppolite.cli import main
from ppolite.config import Recipe, load_recipe, save_recipe, shipped
from ppolite.control.config import ALGORITHMS, Control, load_control, shipped_control

Shown = Callable[..., str]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Shown:
    """What the command prints."""

    def call(*argv: str | Path) -> str:
        capsys.readouterr()
        assert main(["recipe", *map(str, argv)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return call


@pytest.mark.parametrize("name", shipped())
def test_what_is_printed_is_the_recipe(name: str, shown: Shown, tmp_path: Path) -> None:
    for more in ([], ["--explain"]):
        (tmp_path / "r.yaml").write_text(shown(name, *more), encoding="utf-8")
        assert load_recipe(tmp_path / "r.yaml") == load_recipe(name)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", shipped_control())
def test_and_so_is_that_of_control(name: str, algorithm: str, shown: Shown, tmp_path: Path) -> None:
    for more in ([], ["--explain"]):
        (tmp_path / "r.yaml").write_text(
            shown(name, "--set", f"algorithm={algorithm}", *more), encoding="utf-8"
        )
        assert load_control(str(tmp_path / "r.yaml")) == load_control(name, algorithm=algorithm)


def test_without_a_name_it_lists_what_is_shipped(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown().splitlines()
    assert [line.split()[2] for line in lines] == [*shipped(), *shipped_control()]
    said = {line.split()[2]: line for line in lines}
    assert said["film"].startswith("ppolite run film ")
    assert said["film_iterate"].startswith("ppolite iterate film_iterate ")
    assert said["pendulum"].startswith("ppolite control pendulum ")
    assert said["zh_pairs"].endswith(" to ShareGPT conversations (to be downloaded).")
    assert main(["recipe", "--explain"]) == 2
    assert "which recipe?" in capsys.readouterr().err


def test_names_files_folders_and_environments(shown: Shown, tmp_path: Path) -> None:
    for recipe, name in ((load_recipe("film"), "film"), (load_control("cartpole"), "cartpole")):
        save_recipe(recipe, tmp_path / "recipe.yaml")
        assert shown(tmp_path) == shown(tmp_path / "recipe.yaml") == shown(name)
    assert shown("CartPole-v1") == shown("cartpole")


def lines_of(text: str) -> dict[str, str]:
    """Each line with a value by its key; the path of keys is that of the indentation."""
    path: list[str] = []
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := re.match(r"( *)(\w+):(?: (.*))?$", line):
            indent, key, rest = match.groups()
            path = [*path[: len(indent) // 2], key]
            if rest is not None:
                found[".".join(path)] = rest
    return found


def test_where_values_come_from(shown: Shown, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "seed: 0\ntrain: {kind: full}\nppo:\n  prompts: {path: x.jsonl}\n  steps: 7\n  optim: {lr: 1e-3}\n"
        "  kl: {beta: 0.2, estimator: k2}\n"
    )
    sets = ["--set", "ppo.steps=9", "--set", "ppo.kl={beta: 0.3}", "--set", "ppo.epochs=4"]
    said = lines_of(shown(tmp_path / "mine.yaml", "--explain", *sets))
    assert said["seed"] == "0  # mine.yaml, as by default"
    assert said["train.kind"] == "full  # mine.yaml; default lora"
    assert said["ppo.prompts.path"] == "x.jsonl  # mine.yaml"
    assert said["ppo.steps"] == "9  # --set; default 50"
    assert said["ppo.epochs"] == "4  # --set, as by default"
    assert said["ppo.kl.beta"] == "0.3  # --set; default 0.05"
    assert said["ppo.kl.estimator"] == "k1  # default", "--set has replaced the whole section"
    assert said["ppo.optim.lr"] == "0.001  # mine.yaml; default 3.0e-05"
    assert said["ppo.optim.schedule"] == "constant  # default", (
        "the default of ppo.optim, not of any optimizer"
    )
    assert said["sft"] == "null  # default"


def test_where_values_of_control_come_from(shown: Shown) -> None:
    said = lines_of(shown("cartpole", "--explain", "--set", "algorithm=a2c", "--set", "optim.eps=1e-3"))
    assert said["env"] == "CartPole-v1  # cartpole.yaml"
    assert said["optim.kind"] == "rmsprop  # default"
    assert said["optim.schedule"] == "constant  # cartpole.yaml, algorithms.a2c; default linear"
    assert said["optim.eps"] == "0.001  # --set; default 1.0e-05"


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, info in section.model_fields.items():
        inner = [o for o in (info.annotation, *get_args(info.annotation)) if isinstance(o, type)]
        sections = [o for o in inner if issubclass(o, BaseModel)]
        if sections:
            yield from keys(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name, str(info.description)


@pytest.mark.parametrize(("root", "argv"), [(Recipe, ["film_iterate"]), (Control, ["hopper"])])
def test_every_key_is_there_with_its_meaning(root: type[BaseModel], argv: list[str], shown: Shown) -> None:
    """Every section of `film_iterate` is used but `reward.data`."""
    text = shown(*argv, "--explain", *(["--set", "reward.data={path: x.jsonl}"] if root is Recipe else []))
    said = lines_of(text)
    prose = " ".join(re.sub(r"^ *#", "", line).strip() for line in text.splitlines() if re.match(" *#", line))
    for key, meaning in keys(root):
        assert key in said, key
        assert " ".join(meaning.split()) in " ".join(prose.split()), key


def test_sources_are_explained_one_by_one(shown: Shown) -> None:
    sources = "ppo.rewards=[{kind: model}, {kind: length, max: 30, weight: 0.1}]"
    text = shown("film", "--explain", "--set", sources)
    tree: Any = yaml.safe_load(text)
    assert [source["kind"] for source in tree["ppo"]["rewards"]] == ["model", "length"]
    assert "      max: 30  # --set; default null\n" in text
    assert "# A penalty of 1 for each response token" in text


def test_a_terminal_gets_colours_and_the_same_text(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ppolite.cli", "recipe", "film", "--explain"]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80"}
    piped = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    assert "\x1b" not in piped
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, env=env)
    os.close(theirs)
    read = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            read += chunk
    except OSError:  # Linux says so when the other end has closed
        pass
    os.close(ours)
    assert process.wait() == 0
    coloured = read.decode().replace("\r\n", "\n")
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == piped


def test_only_the_beginning_is_wanted() -> None:
    command = f"{sys.executable} -m ppolite.cli recipe film --explain | head -1"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("# ")
    assert ran.stderr == ""


def test_a_terminal_that_knows_ascii_alone() -> None:
    command = [sys.executable, "-m", "ppolite.cli", "recipe", "film", "--explain"]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ran = subprocess.run(command, capture_output=True, check=True, env=env)
    assert b"\\u03c0" in ran.stdout, "π"
    assert ran.stderr == b""
