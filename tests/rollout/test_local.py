"""Drawing: the right distribution, the trainer's own log-probs, answers that do not depend on the company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tests import tiny
from torch import Tensor

from ppolite.config import Train
from ppolite.models.body import Body
from ppolite.models.roles import trainable
from ppolite.models.sequences import Sequences
from ppolite.models.trunk import Trunk
from ppolite.rollout.local import LocalGenerator, draw, uniforms
from ppolite.types import Prompt, Rollout, Sampling

NEVER = frozenset({-1})


def prompts_of(rows: list[list[int]]) -> list[Prompt]:
    return [Prompt(text=tiny.words(row)) for row in rows]


def generator(body: Body, stops: frozenset[int] = NEVER, **more: Any) -> LocalGenerator:
    return LocalGenerator(body, tiny.tokenizer(), stops, **more)


# ---- draw ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 1.0), (1.0, 0.8), (0.6, 0.5)]
)
def test_frequencies(temperature: float, top_p: float) -> None:
    """Chi-square against softmax, cut by hand in float64; and the log-prob is of what was drawn from."""
    logits = [2.0, -1.0, 0.5, 1.9, -30.0, 0.0]
    scaled = torch.tensor(logits, dtype=torch.float64) / temperature
    p = (scaled.exp() / scaled.exp().sum()).tolist()
    kept, mass = [], 0.0
    for token in sorted(range(6), key=lambda v: -p[v]):
        if mass < top_p:
            kept.append(token)
            mass += p[token]
    expected = [p[v] / mass if v in kept else 0.0 for v in range(6)]

    n = 20_000
    uniform_B = torch.rand(n, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(1, temperature, top_p)
    token_B, logp_B = draw(torch.tensor(logits).expand(n, -1), uniform_B, sampling)
    counts = torch.bincount(token_B, minlength=6).tolist()
    assert all(counts[v] == 0 for v in range(6) if expected[v] < 1e-9)
    likely = [v for v in range(6) if expected[v] >= 1e-9]
    if len(likely) > 1:
        assert chisquare([counts[v] for v in likely], [expected[v] * n for v in likely]).pvalue > 1e-3
    torch.testing.assert_close(
        logp_B.double(), torch.tensor(expected, dtype=torch.float64)[token_B].log(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_the_ends_of_the_unit_interval_never_pick_the_impossible(top_p: float) -> None:
    last = 1 - 2.0**-24  # the largest float32 below 1
    row = torch.full((50_000,), -torch.inf)
    row[1000:49_000] = torch.randn(48_000, generator=torch.Generator().manual_seed(0))
    for u in (0.0, 1e-12, last, 1.0):
        token_B, logp_B = draw(row[None], torch.tensor([u]), Sampling(1, 1.0, top_p))
        assert torch.isfinite(logp_B).all()
        assert 1000 <= token_B.item() < 49_000
    sure = torch.tensor([[-torch.inf, 3.0, -torch.inf]])
    for u in (0.0, last):
        token_B, logp_B = draw(sure, torch.tensor([u]), Sampling(1, 1.0, top_p))
        assert (token_B.item(), logp_B.item()) == (1, 0.0)


def test_a_tiny_top_p_is_greedy() -> None:
    logits_BV = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    token_B, logp_B = draw(logits_BV, torch.linspace(0, 0.99, 20), Sampling(1, 1.0, 1e-6))
    assert torch.equal(token_B, logits_BV.argmax(-1))
    assert not logp_B.any()


# ---- generate --------------------------------------------------------------------------------------------


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


def test_streams_of_uniform_numbers() -> None:
    ids = [[7, 8], [7, 8], [9], [7, 8]]
    u = uniforms(ids, 5, 0)
    assert u.shape == (4, 5)
    assert torch.equal(u, uniforms(ids, 5, 0))
    assert torch.equal(uniforms([[9], [7, 8]], 5, 0), u[[2, 0]])  # the order of different prompts is nothing
    assert len({tuple(row.tolist()) for row in [*u, *uniforms(ids, 5, 1)]}) == 8  # copies and seeds differ
    many = uniforms([[i] for i in range(2000)], 10, 0)
    counts = torch.histc(many, 20, 0, 1)
    assert chisquare(counts.tolist()).pvalue > 1e-3
    for column in (0, 9):
        assert chisquare(torch.histc(many[:, column], 20, 0, 1).tolist()).pvalue > 1e-3


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
