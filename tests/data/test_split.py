"""The split: no prompt on both sides, and the same answer whatever the order of rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppolite.data.split import prompt_key, split_by_prompt, stable_hash
from ppolite.types import Example, Prompt, UserError


def asks(text: str) -> Prompt:
    return Prompt(messages=({"role": "user", "content": text},))


ITEMS = st.lists(
    st.builds(Example, st.sampled_from("abcdefgh").map(asks), st.text(max_size=3)), min_size=1, max_size=40
)


@given(
    items=ITEMS, held_out=st.floats(0, 0.99) | st.integers(0, 10), seed=st.integers(0, 5), order=st.randoms()
)
def test_split(items: list[Example], held_out: float | int, seed: int, order) -> None:
    prompts = {prompt_key(item.prompt) for item in items}
    try:
        train, held = split_by_prompt(items, held_out, seed)
    except UserError:
        assert len(prompts) == 1 or held_out > len(items) - max(map(len, prompts)) or held_out >= 1
        return
    in_train, in_held = ({prompt_key(item.prompt) for item in side} for side in (train, held))
    assert not in_train & in_held
    assert in_train | in_held == prompts
    assert in_train
    assert bool(in_held) == bool(held_out)
    if isinstance(held_out, int):
        assert len(held) >= held_out
    shuffled = order.sample(items, len(items))
    assert {prompt_key(item.prompt) for item in split_by_prompt(shuffled, held_out, seed)[1]} == in_held


def test_a_fraction_holds_out_that_share_and_the_same_prompts_in_every_file() -> None:
    prompts = [asks(f"question {i}") for i in range(10_000)]
    held = split_by_prompt(prompts, 0.2, seed=1)[1]
    assert len(held) == pytest.approx(2000, abs=4 * 40)  # 4 standard deviations of a binomial
    some = [p for i, p in enumerate(prompts) if i % 3]
    chosen = {prompt.last for prompt in held}
    assert split_by_prompt(some, 0.2, seed=1)[1] == [p for p in some if p.last in chosen]
    assert split_by_prompt(prompts, 0.2, seed=2)[1] != held
    assert len(split_by_prompt(prompts, 300)[1]) == 300


def test_a_file_of_what_another_split_left_has_held_out_rows_too() -> None:
    """Candidates are drawn for training prompts, whose numbers are all above the fraction."""
    train, _ = split_by_prompt([asks(f"prompt {i}") for i in range(1000)], 0.1)
    candidates = [Example(prompt, answer) for prompt in train[:200] for answer in "abcd"]
    assert len(split_by_prompt(candidates, 0.1)[1]) == 40
    assert len(split_by_prompt(candidates[:80], 0.2)[1]) >= 8


def test_case_and_spacing_do_not_make_another_prompt() -> None:
    same = [asks("The  Film is"), asks("the film IS"), asks("the\nfilm is"), asks("the film was")]
    train, held = split_by_prompt(same, 0.5)
    assert {len(train), len(held)} == {1, 3}
    assert prompt_key(Prompt(text="a")) != prompt_key(asks("a"))


def test_what_cannot_be_split_says_so() -> None:
    with pytest.raises(UserError, match="same prompt"):
        split_by_prompt([asks("a"), asks("A")], 0.1)
    with pytest.raises(UserError, match="leaves none of 2"):
        split_by_prompt([asks("a"), asks("b")], 2)
    for wrong in (1.0, -0.1, -1):
        with pytest.raises(UserError, match="fraction"):
            split_by_prompt([asks("a"), asks("b")], wrong)
    assert split_by_prompt([asks("a")], 0) == ([asks("a")], [])


def test_the_hash_is_the_same_in_another_process() -> None:
    code = "from ppolite.data.split import stable_hash; print(stable_hash(1, 'ü'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == stable_hash(1, "ü")
    assert stable_hash("a", "b") != stable_hash("ab", "")
