"""The table of a GPU, as far as it can be tried without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import tiny

from benchmarks import gpu
from ppolite import load_recipe
from ppolite.models.load import load_causal, load_reward
from ppolite.models.roles import same_bottom

SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 49_152,
}  # fmt: skip


@pytest.mark.parametrize("kind", gpu.KINDS)
@pytest.mark.parametrize("name", gpu.SIZES)
def test_every_row_is_a_recipe(name: str, kind: str) -> None:
    recipe = load_recipe("film", gpu.overrides(name, kind, 64, 128))
    assert recipe.train.kind == kind
    assert recipe.trunk.split == gpu.split(name, kind)
    assert recipe.ppo
    assert recipe.decode_rows == recipe.ppo.rollouts == 64


@pytest.mark.real
def test_random_models_are_a_run(real_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert real_model.exists()  # whose tokenizer they have
    monkeypatch.setattr(gpu, "BENCH", tmp_path)
    monkeypatch.setitem(gpu.SIZES, "tiny", SHAPE)
    run = gpu.random_run("tiny")
    causal = load_causal(str(run / "sft"), tiny.CPU)
    reward, head, norm = load_reward(str(run / "reward"), tiny.CPU)
    assert causal.config.num_hidden_layers == 3
    assert same_bottom(causal, reward, 3, torch.float32)
    assert (head.in_features, norm.std) == (16, 1.0)


def test_shares_of_the_chips_limits() -> None:
    """2 TFLOP in a second of a chip that does 4 a second; 60 GB in 2 of one that reads 100 GB a second."""
    run = {
        "ceilings": {"small, GFLOP/s": 1000.0, "large, GFLOP/s": 4000.0, "reading, GB/s": 100.0},
        "seconds": {"update": 1.0, "generate": 2.0},
        "tflop": {"update": 2.4},
        "needed_tflop": {"update": 2.0},
        "generate_bytes": 60e9,
    }
    near = gpu.near_the_limits(run)
    assert near == pytest.approx(
        {"update_tflops": 2.0, "update_share": 0.5, "executed_share": 0.6, "decode_share": 0.3}
    )


def test_without_a_gpu_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="there is no GPU here; --cpu"):
        gpu.main()
