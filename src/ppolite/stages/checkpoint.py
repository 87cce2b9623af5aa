"""The complete state of a stage on disk, and back to the bit.

    RUN/checkpoints/STAGE/step-00012/
        state.json           counters, controllers, waiting rollouts, the recipe, versions
        tensors.safetensors  weights, the optimizers' moments, the best policy so far
        manifest.json        size and SHA-256 of both: what is torn or was changed is found out

A state is a tree of dicts and lists with numbers, strings and tensors as leaves; `state.json` has the tree, with a
tensor's name in its place. The folder is written beside its place, synced, and renamed, so that one with its right name
is whole. The last few are kept; the one before is used, and that is said, where the last is damaged.

While `checkpoints/STAGE` is there, the stage is unfinished. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppolite.config import Checkpoint
from ppolite.config.strict_json import loads
from ppolite.models.export import replaced
from ppolite.types import UserError

log = logging.getLogger("ppolite")

State = dict[str, Any]
FILES = ("state.json", "tensors.safetensors")
VERSIONS = ("torch", "transformers", "peft")


class DamagedError(Exception):
    """A checkpoint that is not what was written."""


class Checkpoints:
    """Those of one stage of a run."""

    def __init__(self, run_dir: Path, stage: str, config: Checkpoint) -> None:
        self.run_dir, self.stage, self.config = run_dir, stage, config
        self.folder = stage_folder(run_dir, stage)
        self._begun = self._ended = 0.0
        self._took: list[float] = []
        """Seconds of each attempt to write one."""

    def begin(self) -> None:
        """The stage is unfinished from here on, whatever result of it an earlier run left."""
        self._begun = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._put_back()
        for rest in self.folder.glob(".*"):
            shutil.rmtree(rest)

    def _put_back(self) -> None:
        """What a kill between the two renames of `replaced` has left without its name."""
        for old in self.folder.glob(".*.old"):
            place = self.folder / old.name.removeprefix(".").removesuffix(".old")
            if not place.exists():
                old.rename(place)

    def steps(self) -> list[int]:
        """Of the checkpoints there, the first one first."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-*") if path.name[5:].isdigit())

    def due(self, step: int) -> bool:
        """Whether to write one after this step."""
        if self.config.every is not None:
            return step % self.config.every == 0
        return not self._took or time.monotonic() - self._ended >= self._took[-1] / self.config.share

    def save(self, step: int, state: State) -> bool:
        """Write one. Where that fails, warns and returns False, or raises UserError, as the recipe has it."""
        started = time.monotonic()
        try:
            with replaced(self._path(step)) as draft:
                write_state(draft, state)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            self._failed(error)
            return False
        finally:
            self._ended = time.monotonic()
            self._took.append(self._ended - started)
        for old in self.steps()[: -self.config.keep]:
            shutil.rmtree(self._path(old))
        return True

    def _failed(self, error: Exception) -> None:
        last = f"; the one of step {self.steps()[-1]} is good" if self.steps() else ""
        said = f"{self.folder}: no checkpoint could be written ({error}){last}"
        if self.config.on_error == "stop":
            raise UserError(f"{said}. Free some space and start again, or set checkpoint.on_error: continue")
        log.warning("%s. Going on without it", said)

    def latest(self, wanted: Callable[[State], bool] = lambda _: True) -> tuple[int, State] | None:
        """The last one that is whole and `wanted`, with its step. Damaged ones are announced, and moved aside."""
        self._put_back()
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                state = read_state(path)
            except DamagedError as error:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                log.warning("%s: %s; it is called %s now, and is not used", path, error, aside.name)
            else:
                if wanted(state):
                    return step, state
        return None

    def finish(self) -> None:
        """The stage has its result, and needs none of them any more."""
        if self._took:
            count, seconds, whole = len(self._took), sum(self._took), time.monotonic() - self._begun
            share = 100 * seconds / whole
            log.info("%s: %d checkpoints took %.1f s (%.1f %%)", self.stage, count, seconds, share)
        if self.folder.exists():
            shutil.rmtree(self.folder)
            if not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:05d}"


def stage_folder(run_dir: Path, stage: str) -> Path:
    """Where a stage's checkpoints are while it is unfinished."""
    return run_dir / "checkpoints" / stage


def write_state(folder: Path, state: State) -> None:
    """The three files, each synced; the manifest last."""
    tensors: dict[str, Tensor] = {}
    tree = _without_tensors({"state": state, "made": made_with()}, "", tensors)
    (folder / FILES[0]).write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")
    save_file(tensors, folder / FILES[1])
    manifest = {name: {"bytes": size, "sha256": digest} for name, size, digest in _fingerprints(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for name in (*FILES, "manifest.json", "."):
        _sync(folder / name)


def read_state(folder: Path) -> State:
    """What was written. Raises DamagedError for a folder that is not as it was; warns of other versions."""
    try:
        manifest = loads((folder / "manifest.json").read_bytes())
        for name, size, digest in _fingerprints(folder):
            if manifest[name] != {"bytes": size, "sha256": digest}:
                raise DamagedError(f"{name} is not as it was written")
        tree = loads((folder / FILES[0]).read_bytes())
        # Cloned into memory of torch's own: the last digit of a sum can depend on where a tensor begins.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / FILES[1]).items()}
        saved = _with_tensors(tree, tensors)
        now, state = made_with(), saved["state"]
        other = [f"{key} {was} (now {now[key]})" for key, was in saved["made"].items() if was != now[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedError(f"it cannot be read ({error!r})") from error
    if other:
        log.warning(
            "%s: made with %s; the numbers to come can differ in the last digits", folder, ", ".join(other)
        )
    return state


def made_with() -> dict[str, Any]:
    """What results to the bit depend on, beside the recipe."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {"python": platform.python_version(), **versions, "threads": torch.get_num_threads(), "gpu": gpu}


def _without_tensors(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        tensors[name] = node.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(node, Mapping):
        return {str(key): _without_tensors(sub, f"{name}/{key}", tensors) for key, sub in node.items()}
    if isinstance(node, list | tuple):
        return [_without_tensors(sub, f"{name}/{i}", tensors) for i, sub in enumerate(node)]
    return node


def _with_tensors(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if node.keys() == {"tensor"}:
            return tensors[node["tensor"]]
        return {key: _with_tensors(sub, tensors) for key, sub in node.items()}
    return [_with_tensors(sub, tensors) for sub in node] if isinstance(node, list) else node


def _fingerprints(folder: Path) -> list[tuple[str, int, str]]:
    found: list[tuple[str, int, str]] = []
    for name in FILES:
        with (folder / name).open("rb") as file:
            found.append(
                (name, os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
            )
    return found


def _sync(path: Path) -> None:
    """Until it is on the disk itself, a renamed folder may come back empty after a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
