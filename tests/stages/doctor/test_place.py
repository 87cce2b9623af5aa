"""Rights, room and packages, on real file systems."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tests.world import World
from torch import nn

from ppolite.config import Checkpoint
from ppolite.stages.checkpoint import Checkpoints
from ppolite.stages.doctor import place, quick
from ppolite.stages.doctor.place import Need
from ppolite.stages.ppo import PPO
from ppolite.stages.sft import SFT

Mount = Callable[[str], Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mount]:
    """File systems of their own, with the options given."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(places)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no right to mount a file system: {done.stderr.strip()}")
        places.append(folder)
        return folder

    yield mount
    for folder in places:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    found = place.rights(tmp_path / "runs" / "mine")
    assert (found.verdict, found.figure) == ("ok", f"{tmp_path} can be written to")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder(mounted: Mount) -> None:
    folder = mounted("ro")
    found = place.rights(folder / "runs" / "mine")
    assert (found.verdict, found.figure) == ("fail", f"{folder}: Read-only file system")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert place.rights(tmp_path / "runs" / "mine").verdict == "fail"


@pytest.mark.parametrize(
    ("size", "on_error", "verdict"),
    [
        ("400k", "continue", "ok"),
        ("200k", "continue", "warn"),
        ("200k", "stop", "fail"),
        ("80k", "continue", "fail"),
    ],
)
def test_room_for_results_and_checkpoints(size: str, on_error: str, verdict: str, mounted: Mount) -> None:
    """100 KiB of results; three checkpoints of 60 KiB, two that stay and one that is being written."""
    folder = mounted(f"size={size}")
    need = [
        Need(checkpoint=60 * 1024, result=60 * 1024),
        Need(checkpoint=10 * 1024, result=40 * 1024),
    ]
    found = place.disk(folder / "mine", Checkpoint.model_validate({"on_error": on_error}), need)
    assert found.verdict == verdict
    assert found.figure.endswith("free, 100 KiB of results and up to 180 KiB of checkpoints to come")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_a_checkpoint_is_as_large_as_was_said(
    kind: str, world: World, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the files that a run writes; names and shapes of tensors take some bytes, too."""
    written: dict[str, int] = {}
    save = Checkpoints.save

    def save_and_look(self: Checkpoints, step: int, state: dict[str, object]) -> bool:
        done = save(self, step, state)
        written[self.stage] = folder_bytes(self.folder / f"step-{step:05d}")
        return done

    monkeypatch.setattr(Checkpoints, "save", save_and_look)
    recipe = world.recipe(train__kind=kind, checkpoint__every=1, sft__data__limit=32, ppo__steps=1)
    sft, ppo = SFT(recipe, tmp_path / "other"), PPO(recipe, trained)
    sft.run()
    ppo.run()
    headers = 0.3 if kind == "lora" else 0.1  # the tiny world's adapters are smaller than their names
    for stage, need in {"sft": quick.need_of_fit(sft), "ppo": quick.need_of_ppo(ppo)}.items():
        assert need.checkpoint == pytest.approx(written[stage], rel=headers)
    assert quick.need_of_ppo(ppo).result == pytest.approx(folder_bytes(trained / "policy"), rel=0.1)


def test_weights_that_two_heads_share_count_once() -> None:
    tied = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)])
    tied[1].weight = tied[0].weight
    assert Need.of(tied, [tied[0].weight], best=[tied[0].weight]) == Need(4 * 400, 400, 400)
    assert tied[0].weight.dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is told by Linux alone")
@pytest.mark.parametrize(("share", "verdict"), [(0.01, "ok"), (0.9, "warn"), (1.5, "fail")])
def test_room_for_gradients_and_moments(share: float, verdict: str) -> None:
    """Beside what psutil says is available."""
    need = Need(checkpoint=int(share * psutil.virtual_memory().available), result=0)
    found = place.memory(torch.device("cpu"), need)
    assert found.verdict == verdict, found


def test_the_best_weights_lie_in_the_cpus_memory() -> None:
    need = Need(checkpoint=7, result=0, best=1)
    assert [need.memory(torch.device(name)) for name in ("cpu", "cuda")] == [7, 6]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is told by Linux alone")
@pytest.mark.parametrize(("most", "verdict"), [("1000000", "fail"), ("max", "ok")])
def test_a_container_may_have_less(
    most: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(f"{most}\n")
    (tmp_path / "memory.current").write_text("900000\n")
    monkeypatch.setattr("ppolite.models.memory.CONTAINER", tmp_path)
    assert place.memory(torch.device("cpu"), Need(200_000, 0)).verdict == verdict


def test_where_free_memory_is_not_told() -> None:
    """Of devices but CUDA and the CPU nobody says."""
    found = place.memory(torch.device("meta"), Need(1, 0))
    assert (found.verdict, found.figure) == (
        "skipped",
        "this system does not say how much memory of meta is free",
    )


def test_the_judge_is_looked_for_where_he_is_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.judge(world.recipe()).verdict == "skipped"
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)  # as where it is not installed
    found = place.judge(world.recipe(evaluation__judge="vader"))
    assert found.verdict == "fail"
    assert "pip install vaderSentiment" in found.remedy


def test_disk_of_this_machine(tmp_path: Path) -> None:
    """Free is what the system says: a need one byte beyond it fails."""
    free = shutil.disk_usage(tmp_path).free
    assert place.disk(tmp_path, Checkpoint(), [Need(0, 2 * free)]).verdict == "fail"
    assert place.disk(tmp_path, Checkpoint(), [Need(0, free // 2)]).verdict == "ok"
