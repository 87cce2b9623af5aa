"""`ppolite control` as a person uses it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppolite.cli import main
from ppolite.control.policy import Policy

Run = Callable[..., tuple[int, str, str]]
SMALL = ["--set", "evaluation.episodes=5", "--set", "evaluation.gif_seconds=0.5", "--steps", "300"]
MATCH = ["tiny/Match-v0", *SMALL, "--set", "rollout=16", "--set", "minibatches=2"]


@pytest.fixture
def ppolite(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control") / "run"
    assert main(["control", *MATCH, "--out", str(folder)]) == 0
    return folder


def refuse(ppolite: Run, *argv: str | Path) -> str:
    code, _, noted = ppolite(*argv)
    assert code == 2, noted
    said = [line for line in noted.splitlines() if line.startswith("ppolite: ")]
    assert len(said) == 1
    return said[0]


def test_a_run_leaves_everything(finished: Path) -> None:
    names = {"recipe.yaml", "metrics.jsonl", "tensorboard", "policy", "eval.json", "agent.gif", "control.png",
             "report.html"}  # fmt: skip
    assert {p.name for p in finished.iterdir()} == names
    result = json.loads((finished / "eval.json").read_text())
    assert (result["env"], result["algorithm"], result["episodes"]) == ("tiny/Match-v0", "ppo-clip", 5)
    page = (finished / "report.html").read_text()
    for part in ("tiny/Match-v0, ppo-clip", 'id="curves"', "data:image/png", "data:image/gif", "gamma: 0.99"):
        assert part in page
    assert "http" not in page.replace("http-equiv", "")
    assert Policy.load(finished / "policy").obs_size == 3


def test_results_go_to_a_folder_named_after_the_run(ppolite: Run) -> None:
    code, said, noted = ppolite(
        "control", "CartPole-v1", "--algorithm", "a2c", "--seed", "3", *SMALL[:-1], "80"
    )
    assert code == 0, noted
    assert "CartPole-v1, a2c, 80 steps, seed 3: return" in said
    assert (Path("runs") / "cartpole-a2c-3" / "policy").exists()


def test_a_finished_run_is_looked_at_again_and_not_overwritten(
    finished: Path, ppolite: Run, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "again"))
    before = json.loads((run / "eval.json").read_text())
    code, said, noted = ppolite("control", run)
    assert code == 0, noted
    assert json.loads((run / "eval.json").read_text()) == before
    code, said, _ = ppolite("control", run, "--set", "evaluation.episodes=9")
    assert code == 0
    assert "over 9 episodes" in said
    assert "--out" in refuse(ppolite, "control", *MATCH, "--out", run)
    assert "only --set evaluation" in refuse(ppolite, "control", run, "--set", "gamma=0.5")
    assert "only --set evaluation" in refuse(ppolite, "control", run, "--seed", "1")


def test_an_interrupted_run_starts_anew(finished: Path, ppolite: Run, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "torn"))
    lines = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "policy")
    (run / "metrics.jsonl").write_text(lines.splitlines(True)[0] + '{"stage": "con')
    assert ppolite("control", *MATCH, "--out", run)[0] == 0

    def numbers(text: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in json.loads(line).items() if k[:4] != "time"} for line in text.splitlines()]

    assert numbers((run / "metrics.jsonl").read_text()) == numbers(lines)


def test_an_interrupted_run_says_how_to_start_anew(
    ppolite: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("ppolite.control.run.train", stop)
        code, _, said = ppolite("control", *MATCH, "--out", run)
    assert code == 130
    again = f"`ppolite control {run}/recipe.yaml --out {run}` starts anew"
    assert f"interrupted before a policy was saved; {again}" in said
    assert again in refuse(ppolite, "control", run)
    assert ppolite("control", run / "recipe.yaml", "--out", run)[0] == 0


def test_other_folders_are_left_alone(ppolite: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text("precious")
    assert "is not empty, and no control run" in refuse(
        ppolite, "control", *MATCH, "--out", tmp_path / "mine"
    )
    assert (tmp_path / "mine" / "metrics.jsonl").read_text() == "precious"


def test_report_of_a_control_run(finished: Path, ppolite: Run, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "again"))
    (run / "report.html").unlink()
    code, said, _ = ppolite("report", run)
    assert (code, said.strip()) == (0, str(run / "report.html"))
    assert "tiny/Match-v0" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["CartPol-v1"], "did you mean CartPole-v1?"),
        (["CartPole-v1", "--algorithm", "ppo"], "unknown algorithm 'ppo'; did you mean ppo-clip"),
        (["CartPole-v1", "--set", "gama=1"], "unknown key `gama`; did you mean `gamma`?"),
        (["CartPole-v1", "--algorithm", "a2c", "--set", "clip=0.1"], "a2c, which has no `clip`"),
        (["CartPole-v1", "--set", "net.log_std=-1"], "net.log_std: the actions of CartPole-v1 are discrete"),
        (["tiny/Wild-v0", "--set", "envs.options={actions: multi}"], "MultiDiscrete"),
        (["nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["film"], "film: a recipe of RLHF, not of control; `ppolite run film` runs it"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(argv: list[str], expected: str, ppolite: Run) -> None:
    assert expected in refuse(ppolite, "control", *argv)
    assert not Path("runs").exists()


def test_a_missing_extra_is_named(ppolite: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install '.[control]'" in refuse(ppolite, "control", "CartPole-v1")


def test_help_imports_neither_torch_nor_gymnasium() -> None:
    code = "import sys, ppolite.cli; print({'torch', 'gymnasium'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
