"""Where results go, and what stands in the way: names cannot leave runs/, and what the system refuses is said."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.faults.kit import Refuse
from tests.world import World

from ppolite.cli import main
from ppolite.config import run_folder
from ppolite.obs.refusal import refusal
from ppolite.types import UserError


@pytest.mark.parametrize(
    "name", ["x", "x.y", "电影", "a b", "module:Name-v0-a2c-0", "ALE/Pong-v5-a2c-0", "-", "a..b"]
)
def test_names_that_stay(name: str) -> None:
    assert run_folder(name, "r") == Path("runs") / name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "../../x",
        "a/../../b",
        "/tmp/x",
        "a\nb",
        "\x1b[2J",
        "a\0b",
        "\u202ex",
        "x/..",
        "./.",
    ],
)
def test_names_that_would_leave(name: str) -> None:
    with pytest.raises(UserError, match="--out"):
        run_folder(name, "r")


@pytest.mark.parametrize("name", ["..yaml", "...yaml", "a\x1b[2J.yaml", "a\nb.yaml"])
def test_recipes_named_to_leave(
    name: str, world: World, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    world.recipe_file(here / name)
    for command in ("run", "sft", "ppo", "iterate"):
        assert "--out" in refuse("yaml", command, name)
    assert [p.name for p in here.iterdir()] == [name]


@pytest.mark.parametrize("env", ["../../evil:Env-v0", "/evil-v0", "a/../../../b-v0", "..", "\x1b[2J"])
def test_environments_named_to_leave(
    env: str, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    refuse("", "control", env)
    assert not list(here.iterdir())


def test_a_recipe_from_elsewhere_writes_here(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here := tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(here)
    world.recipe_file(tmp_path / "x.yaml")
    assert main(["sft", "../../x.yaml"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "x.yaml"]
    assert (here / "runs" / "x" / "sft").is_dir()


@pytest.mark.parametrize(("command", "below"), [("run", ""), ("ppo", "below"), ("iterate", "")])
def test_out_is_a_file(command: str, below: str, world: World, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    iterated = {"reward": {"kind": "pairs"}, "iterate": {"by": "file"}} if command == "iterate" else {}
    recipe = world.recipe_file(tmp_path / "r.yaml", **iterated)
    refuse(tmp_path / "out", command, recipe, "--out", tmp_path / "out" / below)


def test_control_out_is_a_file(refuse: Refuse, tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    (tmp_path / "out").write_text("")
    refuse(tmp_path / "out", "control", "CartPole-v1", "--steps", "64", "--out", tmp_path / "out")


def test_candidates_into_a_folder_that_cannot_be(world: World, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    recipe = world.recipe_file(tmp_path / "r.yaml")
    refuse(tmp_path / "f", "sample", recipe, "--to", tmp_path / "f" / "c.jsonl", "--prompts", "2", "--n", "1")
    refuse(tmp_path, "sample", recipe, "--to", tmp_path, "--prompts", "2", "--n", "1")


@pytest.mark.parametrize(
    "command", ["eval", "chat", "report", "run", "recipe", "control", "score", "iterate"]
)
def test_names_that_no_file_can_have(command: str, refuse: Refuse) -> None:
    for name in ("x" * 300, "x" * 5000 + ".yaml"):
        refuse(name, command, name)


@pytest.mark.parametrize("command", ["eval", "chat", "report"])
def test_a_file_where_a_run_should_be(command: str, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    refuse(tmp_path / "f", command, tmp_path / "f")


def test_what_the_system_refuses_has_a_place_and_a_remedy() -> None:
    for code in (errno.EACCES, errno.ENOSPC, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EMFILE):
        said = refusal(OSError(code, os.strerror(code), "/some/where"))
        assert said
        assert said.startswith(f"/some/where: {os.strerror(code)}; ")
    assert refusal(OSError("a library's own")) is None
    assert refusal(ConnectionResetError(errno.ECONNRESET, "reset")) is None


@pytest.mark.parametrize(
    "argv",
    [
        [], ["nonesuch"], ["run"], ["run", "a", "b"], ["run", "film", "--nonesuch"], ["run", "film", "--set"],
        ["sample", "film"], ["sample", "film", "--to", "x", "--n", "many"], ["control", "X-v0", "--seed", "1.5"],
        ["recipe", "film", "--explain", "twice"], ["--set", "a=1"], ["\x1b[31m"], ["chat", "x", "--seed", "\udcff"],
    ],
)  # fmt: skip
def test_other_nonsense_on_the_command_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code in (0, 2)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert out + err


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_epochs_that_take_no_row(
    stage: str, world: World, refuse: Refuse, trained: Path, tmp_path: Path
) -> None:
    recipe = world.recipe_file(tmp_path / "r.yaml", **{f"{stage}__epochs": 1e-9})
    refuse("epochs is 1e-09", stage, recipe, "--out", trained, "--again")


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("CartPole-v1", ["envs.options={render_mode: 3}"]),
        ("CartPole-v1", ["envs.options={nonesuch: 1}"]),
        ("CartPole-v1", ["net.log_std=0"]),
        ("Pendulum-v1", ["optim.lr=1e308"]),
        ("nonesuch_module:X-v0", []),
        ("CartPole-v99", []),
        ("a b", []),
    ],
)
def test_environments(
    env: str, settings: list[str], refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gymnasium")
    monkeypatch.chdir(tmp_path)
    sets = [*settings, "minibatches=1", "epochs=1", "evaluation.gif_seconds=0", "evaluation.episodes=1"]
    place = (env, "runs/", settings[0].split("=")[0] if settings else env)
    refuse(place, "control", env, "--steps", "64", *(part for s in sets for part in ("--set", s)))
