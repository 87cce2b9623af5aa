import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppolite.ops.packing import common_prefix, even_batches, token_batches


def test_batches_by_hand():
    """In order of length 5, 4, 3, 3, 1: two rows as long as 5 would be 10 tokens, as 4 they are 8."""
    assert token_batches([3, 5, 1, 3, 4], 8) == [[1], [4, 0], [3, 2]]
    assert token_batches([3, 5, 1, 3, 4], 10) == [[1, 4], [0, 3, 2]]
    assert token_batches([3, 99, 3], 8) == [[1], [0, 2]]
    assert token_batches([], 8) == []


def fewest_batches(lengths, budget):
    """Over all ways to cut the sorted rows (dynamic programming)."""
    rows = sorted(lengths, reverse=True)
    best = [0]
    for end in range(1, len(rows) + 1):
        fits = [s for s in range(end) if end - s == 1 or (end - s) * rows[s] <= budget]
        best.append(min(best[s] + 1 for s in fits))
    return best[-1]


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 100))
def test_batches(lengths: list[int], budget: int):
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    assert len(batches) == fewest_batches(lengths, budget)


def test_even_batches_by_hand():
    """12 tokens in two batches of 6; rows of 5, 4, 3, 3, 1 want three batches of 7."""
    assert even_batches([1, 2, 3, 3, 2, 1], 7) == [[2, 1, 0], [3, 4, 5]]
    assert even_batches([5, 4, 3, 3, 1], 7) == [[2, 3], [0], [1, 4]]
    assert even_batches([3, 99, 3], 8) == [[1], [0, 2]]
    assert even_batches([], 8) == []


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 100))
def test_even_batches(lengths: list[int], budget: int):
    batches = even_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in batch) for batch in batches]
    assert all(len(batch) == 1 or tokens <= budget for batch, tokens in zip(batches, sums, strict=True))
    together = [tokens for batch, tokens in zip(batches, sums, strict=True) if len(batch) > 1]
    longest = max((n for n in lengths if n <= budget), default=0)
    assert max(together, default=0) - min(sums, default=0) <= longest or len(batches) > len(together)


def counted(lengths: list[int], budget: int) -> int:
    """The fewest batches that balancing finds, by trying every number from one on."""
    for count in itertools.count(1):
        tokens = [0] * count
        for n in sorted(lengths, reverse=True):
            tokens[tokens.index(min(tokens))] += n
        if max(tokens) <= budget:
            return count
    raise AssertionError


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(40, 100))
def test_no_number_of_batches_is_passed_over(lengths: list[int], budget: int):
    assert len(even_batches(lengths, budget)) == counted(lengths, budget)


def test_rows_over_half_a_pack():
    assert len(even_batches([70] * 3_000, 128)) == 3_000  # minutes, if every smaller number were tried


def test_prefix_by_hand():
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([[1, 2, 3], [1, 2, 3]], keep=0) == 3
    assert common_prefix([[1, 2], (1, 2, 3, 4)], keep=2) == 0
    assert common_prefix([[7, 8, 9]]) == 2
    assert common_prefix([[1, 2], [2, 1]]) == 0
    assert common_prefix([]) == 0


@given(
    st.lists(st.integers(0, 2), max_size=5),
    st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=5), min_size=1, max_size=4),
    st.integers(0, 2),
)
def test_prefix(shared: list[int], tails: list[list[int]], keep: int):
    rows = [shared + tail for tail in tails]
    n = common_prefix(rows, keep=keep)
    assert len({tuple(row[:n]) for row in rows}) == 1
    assert all(len(row) - n >= keep for row in rows)
    longer = any(len(row) - n - 1 < keep for row in rows) or len({tuple(row[: n + 1]) for row in rows}) > 1
    assert longer  # not one token more


def test_refusals():
    with pytest.raises(ValueError, match="budget is 0"):
        token_batches([1], 0)
    for split in (token_batches, even_batches):
        with pytest.raises(ValueError, match="row 1 has a negative length"):
            split([1, -1], 5)
    with pytest.raises(ValueError, match="row 1 has 0 tokens; expected at least 1"):
        common_prefix([[1], []])
    with pytest.raises(ValueError, match="keep is -1"):
        common_prefix([[1]], keep=-1)
