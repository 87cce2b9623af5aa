"""Where each token lies, by hand: slots are positions, or positions modulo the window."""

from __future__ import annotations

import pytest
import torch
from tests import tiny
from torch import Tensor
from transformers import DynamicCache, Gemma3TextConfig, Llama4TextConfig

from ppolite.models.slots import SlotCache, windows
from ppolite.types import UserError


def states(*rows: list[int]) -> Tensor:
    """Keys [rows, 1 head, tokens, 1] that are just these numbers."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, :, None]


def numbers(seen: Tensor) -> list[list[float]]:
    return seen[:, 0, :, 0].tolist()


def two_layers(window: int, rows: int, length: int, dtype: torch.dtype = torch.float32) -> SlotCache:
    """A layer that sees everything, then one with a window."""
    kinds = ["full_attention", "sliding_attention"]
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=kinds, sliding_window=window)
    return SlotCache(config, rows, length, dtype)


def prompts(*rows: list[int]) -> DynamicCache:
    cache = DynamicCache()
    for layer in (0, 1):
        cache.update(states(*rows), -states(*rows), layer)
    return cache


def step(cache: SlotCache, layer: int, *tokens: int) -> list[list[float]]:
    keys, values = cache.update(states(*([t] for t in tokens)), -states(*([t] for t in tokens)), layer)
    assert torch.equal(keys, -values)
    return numbers(keys)


def test_rows_of_any_age() -> None:
    """Tokens are numbered 10·row + position. Padding of a prompt is 99, and is seen by nobody."""
    cache = two_layers(window=3, rows=3, length=8)
    cache.put([1, 0], prompts([20, 21, 22, 23, 24], [10, 11, 99, 99, 99]), [0, 1], [5, 2])
    cache.at(torch.tensor([2, 5]), 2, 5)
    assert cache.mask_BT is not None
    assert cache.mask_BT.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    assert cache.get_mask_sizes(1, 0) == (6, 0)
    assert cache.get_mask_sizes(1, 1) == (3, 0)
    everything = step(cache, 0, 12, 25)
    assert everything[0][:3] == [10, 11, 12]
    assert everything[1] == [20, 21, 22, 23, 24, 25]
    # The windows: positions 0, 1, 2 in their slots, and 3, 4, 5 where 0, 1, 2 were.
    assert step(cache, 1, 12, 25) == [[10, 11, 12], [23, 24, 25]]

    cache.at(torch.tensor([3, 6]), 3, 6)
    assert step(cache, 0, 13, 26)[1] == [20, 21, 22, 23, 24, 25, 26]
    assert step(cache, 1, 13, 26) == [[13, 11, 12], [26, 24, 25]]

    # Row 0 ends, and the other one takes its place; a new one comes beside it.
    cache.move([1], [0])
    cache.put([1], prompts([30]), [0], [1])
    cache.at(torch.tensor([7, 1]), 1, 7)
    everything = step(cache, 0, 27, 31)
    assert everything[0] == [20, 21, 22, 23, 24, 25, 26, 27]
    assert everything[1][:2] == [30, 31]
    window = step(cache, 1, 27, 31)
    assert window[0] == [26, 27, 25]
    assert window[1][:2] == [30, 31]


def test_one_prompt_in_many_places_and_nothing_to_put() -> None:
    cache = two_layers(window=9, rows=3, length=4)
    cache.put([2, 0, 1], prompts([10, 11], [20, 21]), [1, 0, 1], [2, 2, 2])
    cache.at(torch.tensor([2, 2, 2]), 2, 2)
    assert cache.mask_BT is None
    assert not cache.is_compileable
    for layer in (0, 1):
        assert step(cache, layer, 12, 22, 22) == [[10, 11, 12], [20, 21, 22], [20, 21, 22]]
    empty = two_layers(window=9, rows=2, length=4)
    empty.put([0, 1], DynamicCache(), [0, 0], [0, 0])
    empty.at(torch.tensor([0, 0]), 0, 0)
    assert step(empty, 0, 5, 6) == [[5], [6]]


def test_what_nobody_wrote_is_no_nan() -> None:
    """A masked value is multiplied by 0."""
    cache = two_layers(window=5, rows=2, length=6)
    cache.at(torch.tensor([0, 5]), 0, 5)
    assert step(cache, 0, 1, 2) == [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2]]


@pytest.mark.parametrize(
    ("compute", "given", "kept"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_what_it_is_kept_in(compute: torch.dtype, given: torch.dtype, kept: torch.dtype) -> None:
    cache = two_layers(window=5, rows=2, length=6, dtype=compute)
    cache.at(torch.tensor([0, 0]), 0, 0)
    keys, values = cache.update(states([1], [2]).to(given), states([1], [2]).to(given), 0)
    assert (keys.dtype, values.dtype) == (kept, kept)


def test_windows_of_the_families() -> None:
    W = tiny.WINDOW
    assert {name: windows(tiny.config(name)) for name in tiny.NAMES} == {
        "llama": [None] * 4,
        "mistral": [W] * 4,
        "qwen2": [None, None, W, W],
        "qwen3": [None] * 4,
        "gemma2": [W, None, W, None],
        "gemma3": [W, None, W, None],
        "gpt2": [None] * 4,
        "neox": [None] * 4,
    }
    with pytest.raises(
        UserError, match="llama4_text: ppolite cannot generate with layers of kind chunked_attention"
    ):
        windows(Llama4TextConfig(num_hidden_layers=4))
