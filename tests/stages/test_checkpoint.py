"""Checkpoints as files: what comes back, what is found out, what a full disk does."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ppolite.config import Checkpoint
from ppolite.stages import checkpoint
from ppolite.stages.checkpoint import Checkpoints
from ppolite.types import UserError


def state(number: int) -> dict[str, Any]:
    return {
        "step": number,
        "weights": {"a.b": torch.full((3, 2), float(number)), "c": torch.tensor(0.1, dtype=torch.float64)},
        "queue": [[{"logprobs": torch.tensor([-0.3]), "text": "fin \u2028 \x00 é", "trainer": None}], []],
        "moments": {0: {"step": torch.tensor(2.0)}, 11: {"step": torch.tensor(3.0)}},
        "beta": 0.1 + 0.2,
    }


def same(a: Any, b: Any) -> bool:
    """Equal to the bit; keys of a dict as text, as JSON has them."""
    if isinstance(a, dict):
        return {str(k) for k in a} == set(b) and all(same(v, b[str(k)]) for k, v in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def made(folder: Path, **config: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, "ppo", Checkpoint(**config))
    checkpoints.begin()
    return checkpoints


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    checkpoints = made(tmp_path)
    assert checkpoints.latest() is None
    assert checkpoints.save(7, state(7))
    found = checkpoints.latest()
    assert found is not None
    assert found[0] == 7
    assert same(state(7), found[1])
    assert not same(state(8), found[1])


def test_the_last_few_are_kept_and_none_once_the_stage_is_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    checkpoints = made(tmp_path, keep=2)
    for step in (9, 10, 11):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == [10, 11]
    checkpoints.save(11, state(12))  # written anew, in place of the old one
    found = checkpoints.latest()
    assert found is not None
    assert found[1]["step"] == 12
    checkpoints.finish()
    assert not (tmp_path / "checkpoints").exists()
    assert "ppo: 4 checkpoints took" in caplog.text


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: flip(folder / "tensors.safetensors"),
        lambda folder: flip(folder / "state.json"),
        lambda folder: (folder / "tensors.safetensors").write_bytes(b""),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "state.json").unlink(),
    ],
    ids=["flipped weights", "flipped state", "torn weights", "torn manifest", "no manifest", "no state"],
)
def test_a_damaged_one_is_found_out_and_the_one_before_is_used(
    spoil: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = made(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    spoil(tmp_path / "checkpoints" / "ppo" / "step-00002")
    found = checkpoints.latest()
    assert found is not None
    assert (found[0], same(state(1), found[1])) == (1, True)
    assert "step-00002: " in caplog.text
    assert "it is called damaged-step-00002 now, and is not used" in caplog.text
    spoil(tmp_path / "checkpoints" / "ppo" / "step-00001")
    assert checkpoints.latest() is None
    assert checkpoints.steps() == []


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    checkpoints = made(tmp_path)
    checkpoints.save(3, state(3))
    folder = tmp_path / "checkpoints" / "ppo"
    (folder / "step-00003").rename(folder / ".step-00003.old")
    (folder / ".step-00003.part").mkdir()
    checkpoints.begin()
    assert [path.name for path in folder.iterdir()] == ["step-00003"]
    found = checkpoints.latest()
    assert found is not None
    assert same(state(3), found[1])


def test_a_run_that_goes_on_sees_it_at_once(tmp_path: Path) -> None:
    made(tmp_path).save(3, state(3))
    folder = tmp_path / "checkpoints" / "ppo"
    (folder / "step-00003").rename(folder / ".step-00003.old")
    found = made(tmp_path).latest()  # before the stage begins
    assert found is not None
    assert found[0] == 3


def test_when_one_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [step for step in range(1, 7) if made(tmp_path, every=3).due(step)] == [3, 6]
    now = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    monkeypatch.setattr(checkpoint, "write_state", lambda folder, state: tick(2))

    def tick(seconds: float) -> None:
        nonlocal now
        now += seconds

    checkpoints = made(tmp_path / "b", cost=0.1)
    assert checkpoints.due(1)  # nobody knows yet how long one takes
    checkpoints.save(1, {})
    written = 1
    for step in range(2, 100):
        tick(3)
        if checkpoints.due(step):
            checkpoints.save(step, {})
            written += 1
    # Writing takes 2 s, so that it is due after 20 s of work, 7 steps of 3 s.
    assert written == 1 + 98 // 7


def test_of_another_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = made(tmp_path)
    checkpoints.save(1, state(1))
    now = {**checkpoint.made_with(), "torch": "9"}
    monkeypatch.setattr(checkpoint, "made_with", lambda: now)
    assert checkpoints.latest() is not None
    assert f"made with torch {torch.__version__.partition('+')[0]}" in caplog.text
    assert "(now 9); the numbers to come can differ in the last digits" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = made(small_disk)
    assert checkpoints.save(1, state(1))
    large = {"weights": torch.zeros(200, 1000)}
    assert not checkpoints.save(2, large)
    assert "No space left on device" in caplog.text
    assert "the one of step 1 is good. Going on without it" in caplog.text
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00001"]
    found = checkpoints.latest()
    assert found is not None
    assert same(state(1), found[1])
    with pytest.raises(UserError, match=r"the one of step 1 is good. Free some space and start again"):
        made(small_disk, on_error="stop").save(2, large)
    assert checkpoints.save(2, state(2))
