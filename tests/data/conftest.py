"""Small stand-ins for the embedded archives: real GGUF, wheel and sdist files of a few kilobytes."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from ppolite.data.pypi import Archive

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_gguf(path: Path, width: int = 32) -> None:
    """A Llama of one layer with byte-level tokens, its matrices in Q4_1 like the real file's."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, "in", "an"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(width // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["i n", "a n"])  # two: transformers 5.17 takes a list of one for its item
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)  # as in the real file
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens), width),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ffn_norm.weight": (width,),
        "output_norm.weight": (width,),
        "blk.0.attn_q.weight": (width, width),
        "blk.0.attn_k.weight": (width // 2, width),
        "blk.0.attn_v.weight": (width // 2, width),
        "blk.0.attn_output.weight": (width, width),
        "blk.0.ffn_gate.weight": (2 * width, width),
        "blk.0.ffn_up.weight": (2 * width, width),
        "blk.0.ffn_down.weight": (width, 2 * width),
    }
    for name, shape in shapes.items():
        weights = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 2:
            quantised = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, members: dict[str, bytes]) -> Archive:
    """A wheel `tiny-model==1` that pip accepts."""
    path = folder / "tiny_model-1-py3-none-any.whl"
    info = "tiny_model-1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return Archive("tiny-model==1", path.name, _sha256(path), "few bytes")


def write_sdist(folder: Path, members: dict[str, bytes], marker: Path) -> Archive:
    """A source archive `tiny-data==1` whose build code, if it ever runs, leaves a file at `marker`."""
    path = folder / "tiny_data-1.tar.gz"
    backend = f"""
import pathlib
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    pathlib.Path({str(marker)!r}).touch()
    info = pathlib.Path(folder) / "tiny_data-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-data\\nVersion: 1\\n")
    return info.name
def build_wheel(*args, **options):
    raise NotImplementedError
"""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    everything = {"backend.py": backend.encode(), "pyproject.toml": project.encode(), **members}
    path.write_bytes(tar_bytes({f"tiny_data-1/{name}": content for name, content in everything.items()}))
    return Archive("tiny-data==1", path.name, _sha256(path), "few bytes", source=True)


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


@pytest.fixture
def pack() -> Callable[[dict[str, bytes]], bytes]:
    """The bytes of a tar.gz with these members."""
    return tar_bytes


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("PPOLITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder that pip searches instead of PyPI."""
    folder = tmp_path / "index"
    folder.mkdir()
    return folder


@pytest.fixture
def pip_here(index: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return ("--no-index", "--find-links", str(index))


@pytest.fixture
def make_wheel(index: Path) -> Callable[[dict[str, bytes]], Archive]:
    return lambda members: write_wheel(index, members)


@pytest.fixture
def make_sdist(index: Path, tmp_path: Path) -> Callable[[dict[str, bytes]], Archive]:
    return lambda members: write_sdist(index, members, tmp_path / "ran")
