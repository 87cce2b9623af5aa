"""Generating: a plain loop's tokens, the trainer's log-probs, answers that do not depend on the company."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor

from ppolite.config import Train
from ppolite.models.body import Body
from ppolite.models.roles import trainable
from ppolite.models.sequences import Sequences
from ppolite.models.trunk import Trunk
from ppolite.rollout.draw import uniforms
from ppolite.rollout.local import LocalGenerator
from ppolite.types import Prompt, Rollout, Sampling

NEVER = frozenset({-1})


def prompts_of(rows: list[list[int]]) -> list[Prompt]:
    return [Prompt(text=tiny.words(row)) for row in rows]


def generator(body: Body, stops: frozenset[int] = NEVER, **more: Any) -> LocalGenerator:
    return LocalGenerator(body, tiny.tokenizer(), stops, **more)


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything in float64: models, casts inside them, and what is made of Python's floats."""
    torch.set_default_dtype(torch.float64)
    try:
        with tiny.Wide():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def by_hand(
    model: Any, prompt: Sequence[int], uniform_R: Sequence[float], sampling: Sampling, stops: frozenset[int]
) -> tuple[list[int], list[float]]:
    """A row alone: HF's forward pass over all of it for every token, no cache, no padding."""
    tokens: list[int] = []
    logps: list[float] = []
    for u in uniform_R:
        logits_V = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1]
        p = (logits_V.double() / sampling.temperature).softmax(-1).tolist()
        kept, mass = set(), 0.0
        for v in sorted(range(len(p)), key=lambda v: -p[v]):
            if mass < sampling.top_p:
                kept.add(v)
                mass += p[v]
        below = 0.0
        for v in sorted(kept):
            below += p[v]
            if below > u * mass:
                tokens.append(v)
                logps.append(float(torch.tensor(p[v] / mass).log()))
                break
        if tokens[-1] in stops:
            break
    return tokens, logps


def assert_by_hand(
    model: Any, rollouts: list[Rollout], sampling: Sampling, stops: frozenset[int], seed: int, **close: float
) -> None:
    numbers = uniforms([r.prompt_ids for r in rollouts], sampling.max_new_tokens, seed).tolist()
    for rollout, uniform_R in zip(rollouts, numbers, strict=True):
        tokens, logps = by_hand(model, rollout.prompt_ids, uniform_R, sampling, stops)
        assert rollout.response_ids == tokens
        torch.testing.assert_close(rollout.logprobs_R, torch.tensor(logps), **close)


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, 0.7, 0.8)], ids=["plain", "top_p"])
@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize("name", tiny.NAMES)
@torch.no_grad()
def test_a_plain_loop_in_float64(name: str, shared: int, sampling: Sampling, float64: None) -> None:
    """Seven prompts, one three times, through two places; shorter and longer than a window; ends here and there."""
    model = tiny.model(name, dtype=torch.float64)
    rows, _ = tiny.rows(shared=shared, n=5)
    rows = [rows[4], rows[0], rows[1], rows[4], rows[3], rows[2], rows[4]]
    stops = frozenset({tiny.END, tiny.STOP, *range(6, 12)})
    made = generator(Body.of(model, 0, dtype=torch.float64), stops, max_rows=2)
    rollouts = made.generate(prompts_of(rows), sampling, seed=5)
    assert [r.prompt_ids for r in rollouts] == rows
    assert len({len(r.response_ids) for r in rollouts}) > 1
    assert_by_hand(model, rollouts, sampling, stops, 5, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("look_every", [2, 5, 100])
@torch.no_grad()
def test_looking_less_often_changes_nothing(look_every: int) -> None:
    body = Body.of(tiny.model("gemma3"), 0)
    rows, _ = tiny.rows(shared=3, n=7)
    stops = frozenset({tiny.END, 11, 12, 13})
    often, seldom = (
        generator(body, stops, max_rows=3, look_every=every).generate(prompts_of(rows), Sampling(11), seed=2)
        for every in (1, look_every)
    )
    assert {r.finish for r in often} == {"stop", "length"}
    for a, b in zip(often, seldom, strict=True):
        assert (a.response_ids, a.finish, a.text) == (b.response_ids, b.finish, b.text)
        torch.testing.assert_close(a.logprobs_R, b.logprobs_R, rtol=1e-5, atol=1e-5)


def shapes(model: Any, run: Any) -> list[tuple[int, int]]:
    """Rows and columns of all token ids that the model is asked to run."""
    seen: list[tuple[int, int]] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    run()
    hook.remove()
    return [(rows, columns) for rows, columns in seen]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        # Nine tokens once; then the tenth, eight times.
        ([range(6, 16)] * 8, [(1, 9), (8, 1)]),
        # Nothing in common: nine and six tokens, padded to nine; then six rows.
        ([range(6, 16)] * 4 + [range(20, 27)] * 2, [(2, 9), (6, 1)]),
        # Five in common.
        ([[*range(6, 11), 30, 31, 32, 33, 34]] * 4 + [[*range(6, 11), 20, 21]] * 2, [(1, 5), (2, 4), (6, 1)]),
        # They differ in the last token only.
        ([[6, 7, 8, 9 + i] for i in range(5)], [(1, 3), (5, 1)]),
        ([[6], [7], [6]], [(3, 1)]),
    ],
)
def test_a_prompt_is_run_once_however_often_it_is_answered(
    prompts: list[Sequence[int]], expected: list[tuple[int, int]]
) -> None:
    model = tiny.model()
    made = generator(Body.of(model, 0))
    given = prompts_of([list(p) for p in prompts])
    assert shapes(model, lambda: made.generate(given, Sampling(1), seed=0)) == expected


@torch.no_grad()
def test_places_are_filled_while_prompts_wait() -> None:
    """Row-steps are as many as tokens drawn; the batch shrinks only when nobody waits."""
    model = tiny.model()
    rows, _ = tiny.rows(shared=0, n=20)
    stops = frozenset({tiny.END, 9, 11, 12, 13})
    made = generator(Body.of(model, 0), stops, max_rows=4)
    rollouts: list[Rollout] = []
    seen = shapes(model, lambda: rollouts.extend(made.generate(prompts_of(rows), Sampling(9), seed=0)))
    batches = [rows for rows, columns in seen if columns == 1]
    lengths = [len(r.response_ids) for r in rollouts]
    assert len(set(lengths)) > 3
    assert sum(batches) == sum(lengths)
    assert batches[0] == 4
    assert batches == sorted(batches, reverse=True)
    assert Counter(batches)[4] >= len(batches) - 9


@pytest.mark.parametrize("look_every", [1, 4])
@pytest.mark.parametrize("name", ["gpt2", "neox", "mistral"])
@torch.no_grad()
def test_up_to_the_last_position(name: str, look_every: int) -> None:
    """GPT-2 has 64 learned positions, and a 65th would be an error."""
    model = tiny.model(name)
    rows = [[6 + i % 30 for i in range(54)], [7, 8]]
    made = generator(Body.of(model, 0), max_rows=1 if look_every > 1 else 2, look_every=look_every)
    for order in (rows, rows[::-1]):
        rollouts = made.generate(prompts_of(order), Sampling(10), seed=0)
        assert [len(r.response_ids) for r in rollouts] == [10, 10]
        assert_by_hand(model, rollouts, Sampling(10), NEVER, 0, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prompts_of_several_groups() -> None:
    """2,000 tokens of prompts: more than are run at once."""
    model = tiny.model("gemma2")
    rows = [[6 + (7 * i + j * j) % 30 for j in range(30 + i % 20)] for i in range(50)]
    seen = shapes(
        model,
        lambda: generator(Body.of(model, 0), max_rows=8).generate(prompts_of(rows), Sampling(2), seed=0),
    )
    assert sum(columns > 1 for _, columns in seen) > 1
    rollouts = generator(Body.of(model, 0), max_rows=8).generate(prompts_of(rows), Sampling(2), seed=0)
    for r in rollouts:
        alone = tiny.logprobs(model, r.prompt_ids, r.response_ids)
        torch.testing.assert_close(r.logprobs_R, alone, rtol=1e-5, atol=1e-5)


def own_logprobs(body: Body, trunk: Trunk, rollouts: list[Rollout], temperature: float) -> list[Tensor]:
    """Each rollout alone through the trainer's path."""
    out: list[Tensor] = []
    for r in rollouts:
        seqs = trunk.bottom(Sequences.of([r.prompt_ids], [r.response_ids], tiny.CPU))
        out.append(body.logprobs(seqs, temperature)[0][0])
    return out


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize("name", tiny.NAMES)
@torch.no_grad()
def test_logprobs_are_the_trainer_s_and_hf_s(name: str, shared: int) -> None:
    """For every family, ragged prompts, responses beyond the window, adapters on."""
    model = tiny.model(name)
    prompts, _ = tiny.rows(shared=shared)
    plain = tiny.model(name)
    trunk = Trunk(model, 2)
    body, _ = trainable(trunk.top, Train(kind="lora", lora_rank=2))
    rollouts = generator(body).generate(prompts_of(prompts), Sampling(9, 0.8), seed=1)
    assert [r.prompt_ids for r in rollouts] == prompts
    assert all(len(r.response_ids) == 9 and r.finish == "length" for r in rollouts)
    for r, ours in zip(rollouts, own_logprobs(body, trunk, rollouts, 0.8), strict=True):
        assert r.logprobs_R.dtype == torch.float32
        torch.testing.assert_close(r.logprobs_R, ours, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            r.logprobs_R, tiny.logprobs(plain, r.prompt_ids, r.response_ids, 0.8), rtol=1e-5, atol=1e-5
        )
    for p in body.trained():
        p.add_(0.03)
    rollouts = generator(body).generate(prompts_of(prompts), Sampling(5), seed=1)
    for r, ours in zip(rollouts, own_logprobs(body, trunk, rollouts, 1.0), strict=True):
        torch.testing.assert_close(r.logprobs_R, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", tiny.NAMES)
@torch.no_grad()
def test_answers_do_not_depend_on_the_company(name: str) -> None:
    body = Body.of(tiny.model(name), 0)
    rows, _ = tiny.rows(shared=4, n=6)
    stops = frozenset({tiny.END, tiny.STOP, 11, 12, 13})
    sampling = Sampling(8)
    answers = {
        tuple(r.prompt_ids): r.response_ids
        for r in generator(body, stops).generate(prompts_of(rows), sampling, seed=3)
    }
    assert len({len(a) for a in answers.values()}) > 1
    company = [[9], [30] * 14]
    for order, max_rows in ((rows[::-1], 64), (rows, 1), (rows, 4), ([*company, *rows[3:], *rows[:3]], 3)):
        for r in generator(body, stops, max_rows=max_rows).generate(prompts_of(order), sampling, seed=3):
            assert r.response_ids == answers.get(tuple(r.prompt_ids), r.response_ids)
    alone = generator(body, stops).generate(prompts_of(rows[2:3]), sampling, seed=3)[0]
    assert alone.response_ids == answers[tuple(rows[2])]
    longer = generator(body, stops).generate(prompts_of(rows), Sampling(12), seed=3)
    assert all(r.response_ids[:8] == answers[tuple(r.prompt_ids)] for r in longer)


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize("name", tiny.NAMES)
@torch.no_grad()
def test_the_greedy_limit_is_hf_s(name: str, shared: int) -> None:
    """Each row alone, unpadded, in HF's generate: what a sliding window and left padding must not change."""
    model: Any = tiny.model(name)
    prompts, _ = tiny.rows(shared=shared)
    stops = frozenset({tiny.END, 17, 23})
    rollouts = generator(Body.of(model, 0), stops).generate(prompts_of(prompts), Sampling(12, 1e-4), seed=0)
    for r in rollouts:
        input_ids = torch.tensor([r.prompt_ids])
        theirs = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=sorted(stops),
            pad_token_id=tiny.PAD,
        )
        assert r.response_ids == theirs[0, len(r.prompt_ids) :].tolist()


@torch.no_grad()
def test_every_stop_id_ends() -> None:
    body = Body.of(tiny.model("gpt2"), 0)
    stops = frozenset({tiny.END, tiny.STOP, 20})
    prompts = prompts_of([[6 + i % 30, 7 + i % 29] for i in range(150)])
    ticks: list[int] = []
    rollouts = generator(body, stops, tick=ticks.append).generate(prompts, Sampling(10), seed=0)
    assert sum(ticks) == len(prompts)
    ended = {r.response_ids[-1] for r in rollouts if r.finish == "stop"}
    assert ended == stops
    for r in rollouts:
        assert not stops & set(r.response_ids[:-1])
        assert len(r.response_ids) == len(r.logprobs_R)
        if r.finish == "stop":
            assert r.text.split() == [f"w{t}" for t in r.response_ids[:-1] if t >= len(tiny.SPECIAL)]
        else:
            assert (len(r.response_ids), r.response_ids[-1] in stops) == (10, False)
    assert {r.finish for r in rollouts} == {"stop", "length"}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_prompts_of_one_token_and_answers_of_one_token(name: str) -> None:
    model = tiny.model(name)
    prompts = [[7], [8], [7], [9, 10, 11]]
    rollouts = generator(Body.of(model, 0)).generate(prompts_of(prompts), Sampling(1), seed=0)
    for r in rollouts:
        assert (len(r.response_ids), r.finish) == (1, "length")
        torch.testing.assert_close(
            r.logprobs_R, tiny.logprobs(model, r.prompt_ids, r.response_ids), rtol=1e-5, atol=1e-5
        )


def test_a_version_is_written_on_rollouts() -> None:
    maker = generator(Body.of(tiny.model(), 0))
    maker.version = 7
    assert maker.generate(prompts_of([[8]]), Sampling(1), seed=0)[0].version == 7
    assert maker.generate([], Sampling(1), seed=0) == []


# ---- the policy as it is ---------------------------------------------------------------------------------


def gap(body: Body, trunk: Trunk, rollouts: list[Rollout]) -> float:
    """Mean distance between the sampler's log-probs and the trainer's. The largest is a matter of one sharp place."""
    ours = own_logprobs(body, trunk, rollouts, 1.0)
    return float(torch.cat([r.logprobs_R - x for r, x in zip(rollouts, ours, strict=True)]).abs().mean())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("kind", ["lora", "layers", "full"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_the_next_answers_are_those_of_the_updated_weights(
    name: str, kind: Any, dtype: torch.dtype, rounding: float
) -> None:
    """One generator through three updates: its log-probs are the trainer's of now, and far from those of before."""
    torch.manual_seed(0)  # of which PEFT draws
    model = tiny.model(name)
    first = copy.deepcopy(model)
    trunk = Trunk(model, 0 if kind == "full" else 2, dtype)
    body, _ = trainable(trunk.top, Train(kind=kind, lora_rank=2 if kind == "lora" else None))
    trunk.hold()
    body.hold({})
    rows, _ = tiny.rows(shared=3)
    made, stream = generator(body), torch.Generator().manual_seed(0)
    for update in range(4):
        rollouts = made.generate(prompts_of(rows), Sampling(8), seed=update)
        assert gap(body, trunk, rollouts) < rounding
        moved = [r.logprobs_R - tiny.logprobs(first, r.prompt_ids, r.response_ids) for r in rollouts]
        assert update == 0 or torch.cat(moved).abs().mean() > 3 * rounding
        for p in body.trained():
            p.add_(0.2 * torch.randn(p.shape, generator=stream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_with_adapters_off_the_reference_answers(dtype: torch.dtype) -> None:
    model = tiny.model()
    plain = copy.deepcopy(model)
    trunk = Trunk(model, 2, dtype)
    body, _ = trainable(trunk.top, Train(kind="lora", lora_rank=2))
    for p in body.trained():
        p.add_(0.3)
    rows, _ = tiny.rows(shared=0)
    expected = generator(Body.of(plain, 0, dtype=dtype)).generate(prompts_of(rows), Sampling(8), seed=0)
    with body.adapters(False):
        off = generator(body).generate(prompts_of(rows), Sampling(8), seed=0)
    on = generator(body).generate(prompts_of(rows), Sampling(8), seed=0)
    assert [r.response_ids for r in off] == [r.response_ids for r in expected]
    assert [r.response_ids for r in on] != [r.response_ids for r in expected]


@pytest.mark.parametrize("name", tiny.NAMES)
@torch.no_grad()
def test_half_precision_is_the_trainer_s(name: str) -> None:
    """Keys and values are kept in bfloat16, the dtype in which the trainer's attention multiplies them."""
    model = tiny.model(name)
    trunk = Trunk(model, 2, torch.bfloat16)
    trunk.hold()
    trunk.top.hold({})
    rows, _ = tiny.rows(shared=4, n=6)
    rollouts = generator(trunk.top, max_rows=2).generate(prompts_of(rows), Sampling(10), seed=0)
    assert gap(trunk.top, trunk, rollouts) < 0.1


def test_learning_goes_on_after_generating() -> None:
    """Rotary tables of this kind are made anew, and kept, when a longer row comes: here while generating."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    trunk = Trunk(tiny.model(max_position_embeddings=6, rope_parameters=rope), 2)
    body, _ = trainable(trunk.top, Train(kind="lora", lora_rank=2))
    rows, _ = tiny.rows(shared=3)
    rollouts = generator(body).generate(prompts_of(rows), Sampling(8), seed=0)
    seqs = trunk.bottom(
        Sequences.of([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], tiny.CPU)
    )
    logp_BR, _ = body.logprobs(seqs, 1.0)
    (logp_BR * torch.stack([r.logprobs_R for r in rollouts])).sum().backward()
    assert all(p.grad is not None for p in body.trained())
