"""Downloads: pinned, checked before anything runs, whole or absent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ppolite.data.pypi import Archive, download, finished
from ppolite.types import UserError

Make = Callable[[dict[str, bytes]], Archive]
WRONG = "0" * 64


def test_wheel_arrives_and_is_not_fetched_twice(
    tmp_path: Path, index: Path, make_wheel: Make, pip_here: tuple[str, ...]
) -> None:
    archive = make_wheel({"a.txt": b"hello"})
    said: list[str] = []
    path = download(archive, tmp_path / "to", said.append, pip_options=pip_here)
    assert path.read_bytes() == (index / archive.filename).read_bytes()
    assert [p.name for p in path.parent.iterdir()] == [archive.filename]
    (index / archive.filename).unlink()
    assert download(archive, tmp_path / "to", said.append, pip_options=pip_here) == path
    assert len(said) == 1


def test_sdist_arrives_as_a_source_archive(
    tmp_path: Path, make_sdist: Make, pip_here: tuple[str, ...]
) -> None:
    archive = make_sdist({"a.txt": b"hello"})
    path = download(archive, tmp_path / "to", pip_options=pip_here)
    assert path.name == "tiny_data-1.tar.gz"
    assert (tmp_path / "ran").exists()  # so the next test's absence means something


def test_wrong_hash_is_refused_before_the_archive_runs(
    tmp_path: Path, make_sdist: Make, pip_here: tuple[str, ...]
) -> None:
    archive = make_sdist({"a.txt": b"hello"})
    wrong = replace(archive, sha256=WRONG)
    with pytest.raises(UserError) as caught:
        download(wrong, tmp_path / "to", pip_options=pip_here)
    for part in (archive.filename, WRONG, archive.sha256, "ppolite fetch"):
        assert part in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert list((tmp_path / "to").iterdir()) == []


def test_a_damaged_download_is_refused_and_removed_then_fetched_anew(
    tmp_path: Path, make_wheel: Make, pip_here: tuple[str, ...]
) -> None:
    archive = make_wheel({"a.txt": b"hello"})
    path = tmp_path / archive.filename
    path.write_bytes(b"half of it")
    with pytest.raises(UserError, match=archive.sha256) as caught:
        download(archive, tmp_path, pip_options=pip_here)
    # printf 'half of it' | sha256sum
    assert "79fc9ae17531330efc8af533faae64e2d1c7bc44edf22e4723ae19da32dc8d82" in str(caught.value)
    assert str(path) in str(caught.value)
    assert not path.exists()
    assert download(archive, tmp_path, pip_options=pip_here) == path


def test_absent_package_and_absent_pip_say_what_to_do(
    tmp_path: Path, pip_here: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = Archive("tiny-model==9", "tiny_model-9-py3-none-any.whl", WRONG, "0 B")
    with pytest.raises(UserError, match=r"tiny-model==9 did not arrive .*put tiny_model-9"):
        download(nowhere, tmp_path, pip_options=pip_here)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match="ensurepip"):
        download(nowhere, tmp_path, pip_options=pip_here)


def test_finished_leaves_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "piece"

    def interrupted() -> None:
        with finished(target) as unfinished:
            unfinished.mkdir()
            (unfinished / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    left_by_a_kill = tmp_path / ".piece.unfinished"
    left_by_a_kill.mkdir()
    (left_by_a_kill / "half").write_text("x")
    with finished(target) as unfinished:
        unfinished.mkdir()
        (unfinished / "whole").write_text("y")
    assert [p.name for p in tmp_path.iterdir()] == ["piece"]
    assert [p.name for p in target.iterdir()] == ["whole"]
