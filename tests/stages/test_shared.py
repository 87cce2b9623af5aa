"""What the stages share: seeds, batches, the learner's schedule, and where training starts from."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from ppolite.config import Adam, Data, parse_recipe
from ppolite.obs.run_files import write_json
from ppolite.stages.learner import Learner, step_together
from ppolite.stages.opening import after_sft, resolve
from ppolite.stages.rows import WINDOW, Cycle, batches, count_batches, shuffled, split_rows
from ppolite.stages.seeds import derive_seed
from ppolite.types import Prompt


def test_seeds_differ_by_stream_and_master() -> None:
    seeds = [derive_seed(m, *names) for m in (0, 1) for names in (("a",), ("b",), ("a", 1), ("a", "1", 2))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "ppo-sample", 3) == derive_seed(0, "ppo-sample", 3)


def test_a_held_out_prompt_is_looked_at_once() -> None:
    """Else one of its copies chooses the best policy and another one judges it."""
    prompts = [
        Prompt(text=text, source=f"{i}") for i, text in enumerate(["a", "b", "A ", "c", "d", "b", "c"] * 3)
    ]
    train, held = split_rows(prompts, Data(path="x", held_out=0.5), seed=0)
    names = [prompt.text.strip().lower() for prompt in held]
    assert 0 < len(names) == len(set(names)) < 4
    kept = {name: next(p for p in prompts if p.text.strip().lower() == name) for name in names}
    assert held == list(kept.values())  # the first of each, in their order
    assert len(train) == sum(prompt.text.strip().lower() not in names for prompt in prompts)


@pytest.mark.parametrize(
    ("size", "epochs"), [(4, 1.0), (3, 2.0), (9, 1.6), (4, 1.5), (10, 0.5), (1, 1.0), (99, 2.2)]
)
def test_batches_are_counted_and_cover_the_items(size: int, epochs: float) -> None:
    items = list(range(10))
    made = list(batches(items, size, epochs, seed=1))
    assert len(made) == count_batches(10, size, epochs)
    seen = [item for batch in made for item in batch]
    assert len(seen) == round(10 * epochs)
    counts = Counter(seen)
    assert all(math.floor(epochs) <= counts[item] <= math.ceil(epochs) for item in items)
    assert made == list(batches(items, size, epochs, seed=1))
    assert max(len(batch) for batch in made) <= size + (size > 1)


def test_passes_are_shuffled_anew() -> None:
    first, second = batches(range(50), 50, 2, seed=0)
    assert first != second
    assert sorted(first) == sorted(second)


def test_cycle_gives_each_item_once_a_pass() -> None:
    stream = list(islice(Cycle(range(5), seed=2), 15))
    assert [sorted(stream[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert stream[:5] != stream[5:10] or stream[5:10] != stream[10:]
    for taken in range(15):
        assert list(islice(Cycle(range(5), seed=2, taken=taken), 15 - taken)) == stream[taken:]
    assert shuffled(range(5), 3) == shuffled(range(5), 3)


def lrs(total: int, **config: object) -> list[float]:
    """The learning rates of `total` updates."""
    weight = nn.Parameter(torch.ones(1))
    learner = Learner([weight], Adam.model_validate({"lr": 1.0, **config}), total)
    out = []
    for _ in range(total):
        out.append(learner.lr)
        weight.grad = torch.ones(1)
        assert step_together(learner) is not None
        assert learner.optimizer.param_groups[0]["lr"] == out[-1]
    return out


def test_schedules_by_hand() -> None:
    assert lrs(3, schedule="constant", warmup=0) == [1, 1, 1]
    assert lrs(4, schedule="linear", warmup=0) == [1, 0.75, 0.5, 0.25]
    assert lrs(4, schedule="cosine", warmup=0) == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    # Two updates of eight warm up, in thirds; the third is at the peak.
    assert lrs(8, schedule="linear", warmup=0.25) == pytest.approx(
        [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )
    assert lrs(4, schedule="constant", warmup=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_first_step_of_adamw_by_hand() -> None:
    """|gradient| (3, 4) has norm 5, cut to 1; Adam's first step is lr · g / (|g| + ε); decay is decoupled."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    config = Adam(lr=0.1, schedule="constant", warmup=0, weight_decay=0.5, adam_eps=0.2, max_grad_norm=1.0)
    learner = Learner([weight], config, 10)
    weight.grad = torch.tensor([3.0, 4.0])
    assert step_together(learner) == pytest.approx([5.0])
    expected = [1 - 0.1 * 0.5 * 1 - 0.1 * 0.6 / 0.8, 2 - 0.1 * 0.5 * 2 - 0.1 * 0.8 / 1.0]
    assert weight.tolist() == pytest.approx(expected, rel=1e-5)
    assert weight.grad is None


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(1))
    learner = Learner([weight], Adam(), 1)
    weight.grad = torch.full((1,), math.nan)
    assert step_together(learner) is None
    assert (weight.item(), weight.grad, learner.done) == (1, None, 0)
    weight.grad = torch.ones(1)
    assert step_together(learner, sound=False) is None  # a loss of the caller's was not finite
    assert (weight.item(), weight.grad, learner.done) == (1, None, 0)


def test_all_take_a_step_or_none() -> None:
    one, two = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    policy, critic = Learner([one], Adam(), 2), Learner([two], Adam(), 2)
    one.grad, two.grad = torch.ones(1), torch.full((1,), math.inf)
    assert step_together(policy, critic) is None
    assert (one.item(), one.grad, two.grad, policy.done) == (1, None, None, 0)
    one.grad, two.grad = torch.full((1,), 3.0), torch.full((1,), 0.5)
    assert step_together(policy, critic) == [3.0, 0.5]
    assert one.item() < 1
    assert two.item() < 1
    assert (policy.done, critic.done) == (1, 1)


def test_where_training_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = parse_recipe({"model": "m", "sft": {"data": {"path": "x.jsonl"}}})
    assert after_sft(recipe, tmp_path) is None
    assert "no sft result in it; starting from m" in caplog.text
    (tmp_path / "sft").mkdir()
    assert after_sft(recipe, tmp_path) == str(tmp_path / "sft")
    assert resolve("some/model") == "some/model"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert path.read_text() == '{\n "a": 1\n}\n'


@pytest.mark.parametrize(
    ("items", "size", "sizes"),
    [
        (10, 3, [3, 3, 4]),
        (2 * 8 * WINDOW + 1, 16, [16] * (WINDOW - 1) + [17]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_no_row_is_left_alone(items: int, size: int, sizes: list[int]) -> None:
    made = list(batches(list(range(items)), size, 1, seed=0, length=lambda n: n))
    assert sorted(len(batch) for batch in made) == sizes
    assert count_batches(items, size, 1) == len(sizes)


def test_batches_of_one_length() -> None:
    lengths = [(i * 37) % 100 for i in range(200)]
    plain = list(batches(lengths, 8, 2, seed=0))
    sorted_ = list(batches(lengths, 8, 2, seed=0, length=lambda n: n))
    assert len(sorted_) == len(plain) == count_batches(200, 8, 2)
    assert Counter(x for b in sorted_ for x in b) == Counter(x for b in plain for x in b)

    def padding(made: list[list[int]]) -> int:
        return sum(max(b) * len(b) - sum(b) for b in made)

    assert padding(sorted_) < padding(plain) / 3
    assert sorted_ != sorted(sorted_)
