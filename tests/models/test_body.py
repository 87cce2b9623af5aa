"""Split = whole, in log-probs and gradients, against HF's and PEFT's own forward and backward passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tests import tiny
from torch import Tensor, nn

from ppolite.config import Train
from ppolite.models.body import Body
from ppolite.models.decoder import front_of, layer_path, layers_of
from ppolite.models.roles import trainable
from ppolite.models.sequences import Sequences
from ppolite.models.trunk import Trunk
from ppolite.types import UserError

SPLITS = [0, 1, 2, tiny.LAYERS - 1]
T = 0.7


def assert_equal(ours: Tensor | None, theirs: Tensor | None, what: str = "", rtol: float = 1e-10) -> None:
    assert ours is not None, what
    assert theirs is not None, what
    gap = float(((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300)).detach())
    assert gap <= rtol, f"{what}: {gap:.1e}"


def weights_like(responses: list[list[int]]) -> list[Tensor]:
    """A weight for each token's log-prob, so that a mix-up of rows or places shows in the gradient."""
    stream = torch.Generator().manual_seed(3)
    return [torch.randn(len(r), generator=stream, dtype=torch.float64) for r in responses]


def plain_loss(
    model: Any, prompts: list[list[int]], responses: list[list[int]]
) -> tuple[list[Tensor], Tensor]:
    logps = [tiny.logprobs(model, p, r, T) for p, r in zip(prompts, responses, strict=True)]
    return logps, torch.cat(logps) @ torch.cat(weights_like(responses))


def body_loss(body: Body, seqs: Sequences, responses: list[list[int]]) -> tuple[Tensor, Tensor]:
    logp_BR, _ = body.logprobs(seqs, T)
    weights_BR = nn.utils.rnn.pad_sequence(weights_like(responses), batch_first=True)
    return logp_BR, (logp_BR * weights_BR).sum()


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_split_equals_whole_in_logprobs_and_gradients(name: str, shared: int) -> None:
    with tiny.Wide():
        model = tiny.model(name, dtype=torch.float64)
        prompts, responses = tiny.rows(shared=shared)
        oracle = copy.deepcopy(model).requires_grad_(True)
        plain, loss = plain_loss(oracle, prompts, responses)
        loss.backward()
        decoder = oracle.base_model
        for split in SPLITS:
            trunk = Trunk(copy.deepcopy(model), split, torch.float64)
            body, _ = trainable(trunk.top, Train(kind="layers" if split else "full"))
            seqs = trunk.bottom(Sequences.of(prompts, responses, tiny.CPU))
            assert seqs.prefix_P.numel() == shared
            logp_BR, loss = body_loss(body, seqs, responses)
            for i, row in enumerate(plain):
                assert_equal(logp_BR[i, : len(row)], row, f"split {split}, log-probs of row {i}")
                assert not logp_BR[i, len(row) :].any()
            loss.backward()
            pairs: dict[str, tuple[nn.Module | None, nn.Module | None]] = {
                f"layer {split + i}": (layer, layers_of(decoder)[split + i])
                for i, layer in enumerate(body.layers)
            }
            pairs["norm"] = (body.norm, getattr(decoder, layer_path(decoder)[1]))
            if split == 0:
                pairs |= {
                    "front": (body.front, front_of(decoder)),
                    "head": (body.head, oracle.get_output_embeddings()),
                }
            compared: list[nn.Parameter] = []
            for part, (ours, theirs) in pairs.items():
                assert ours is not None
                assert theirs is not None
                theirs_by_name = dict(theirs.named_parameters())
                for key, p in ours.named_parameters():
                    assert_equal(p.grad, theirs_by_name[key].grad, f"split {split}, gradient of {part} {key}")
                    compared.append(p)
            assert {id(p) for p in compared} == {id(p) for p in body.trained()}


# PEFT reads a property that transformers 5 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_adapters_have_peft_s_gradients(name: str, split: int) -> None:
    with tiny.Wide():
        model = tiny.model(name, dtype=torch.float64)
        prompts, responses = tiny.rows(shared=3)
        plain = copy.deepcopy(model)
        trunk = Trunk(model, split, torch.float64)
        body, config = trainable(trunk.top, Train(kind="lora", lora_rank=2, lora_alpha=3.0))
        assert config is not None
        seqs = trunk.bottom(Sequences.of(prompts, responses, tiny.CPU))

        def rows(logp_BR: Tensor) -> list[Tensor]:
            return [logp_BR[i, : len(r)] for i, r in enumerate(responses)]

        with torch.no_grad():
            before, _ = plain_loss(plain, prompts, responses)
            started = body.logprobs(seqs, T)[0]  # B starts at 0
            for p in body.trained():
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
            trained = body.logprobs(seqs, T)[0]
            with body.adapters(False):
                off = body.logprobs(seqs, T)[0]
        for ours, theirs in zip(rows(started), before, strict=True):
            assert_equal(ours, theirs, "start")
        assert torch.equal(off, started)
        assert (trained - off).abs().max() > 1e-2

        theirs = copy.deepcopy(config)
        theirs.layers_to_transform = list(range(split, tiny.LAYERS))
        theirs.layers_pattern = layer_path(plain.base_model)[0]
        oracle: Any = get_peft_model(plain, theirs)
        ours_by_name = {n: p for n, p in body.layers.named_parameters() if p.requires_grad}
        their_layers = layers_of(oracle.get_base_model().base_model)[split:]
        theirs_by_name = {n: p for n, p in their_layers.named_parameters() if p.requires_grad}
        assert set(ours_by_name) == set(theirs_by_name)
        with torch.no_grad():
            for key, p in ours_by_name.items():
                theirs_by_name[key].copy_(p)
        peft_rows, peft_loss = plain_loss(oracle, prompts, responses)
        peft_loss.backward()
        logp_BR, loss = body_loss(body, seqs, responses)
        loss.backward()
        for ours, row in zip(rows(logp_BR), peft_rows, strict=True):
            assert_equal(ours, row, "log-probs")
        for key, p in ours_by_name.items():
            assert_equal(p.grad, theirs_by_name[key].grad, key)
        assert {id(p) for p in body.trained()} == {id(p) for p in ours_by_name.values()}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_layout_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row order, neighbours (hence padding and shared prefix), micro-batches and packs change no number."""
    with tiny.Wide(), torch.no_grad():
        trunk = Trunk(tiny.model(name, dtype=torch.float64), 2, torch.float64)
        body = trunk.top.clone(score=nn.Linear(16, 1, dtype=torch.float64))
        policy = trunk.top
        prompts, responses = tiny.rows(shared=5)
        seqs = trunk.bottom(Sequences.of(prompts, responses, tiny.CPU))
        logp_BR, entropy_BR = policy.logprobs(seqs, T, entropy=True)
        assert entropy_BR is not None
        values_BR, scores_B = body.values(seqs), body.scores(seqs)

        def same(part: Sequences, rows: list[int]) -> None:
            R = part.mask_BR.shape[1]
            logp, entropy = policy.logprobs(part, T, entropy=True)
            assert_equal(logp, logp_BR[rows, :R], "log-probs")
            assert_equal(entropy, entropy_BR[rows, :R], "entropy")
            assert_equal(body.values(part), values_BR[rows, :R], "values")
            assert_equal(body.scores(part), scores_B[rows], "scores")

        for rows in ([2], [3, 0], [1, 1], [3, 2, 1, 0]):
            same(seqs.select(rows), rows)
            alone = Sequences.of([prompts[i] for i in rows], [responses[i] for i in rows], tiny.CPU)
            same(trunk.bottom(alone), rows)
            same(trunk.bottom(alone, budget=7), rows)
        long = Sequences.of([*prompts, [9] * 20], [*responses, [9] * 20], tiny.CPU)  # no prefix, much padding
        assert long.prefix_P.numel() == 0
        same(trunk.bottom(long, budget=64).select([0, 1, 2, 3]), [0, 1, 2, 3])

        assert seqs.packed
        assert len(seqs.packs) == 1
        padded = Trunk(trunk.model, 2, torch.float64, packed=False).bottom(
            Sequences.of(prompts, responses, tiny.CPU)
        )
        assert not padded.packed
        same(padded, [0, 1, 2, 3])
        for length, packs in ((1, 3), (20, 2)):
            monkeypatch.setattr("ppolite.models.packs.LENGTH", length)
            several = trunk.bottom(Sequences.of(prompts, responses, tiny.CPU))
            assert len(several.packs) == packs
            same(several, [0, 1, 2, 3])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_values_and_scores_are_read_where_they_should(name: str) -> None:
    with torch.no_grad():
        model = tiny.model(name)
        head = nn.Linear(16, 1)
        trunk = Trunk(model, 1)
        body = trunk.top.clone(score=head)
        prompts, responses = tiny.rows(shared=2)
        seqs = trunk.bottom(Sequences.of(prompts, responses, tiny.CPU))
        values_BR, scores_B = body.values(seqs), body.scores(seqs)
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
            all_T = head(tiny.hidden(model, [*p, *r]))[:, 0]
            assert_equal(
                values_BR[i, : len(r)], all_T[len(p) - 1 : -1], "a value is before its token", rtol=1e-5
            )
            assert not values_BR[i, len(r) :].any()
            torch.testing.assert_close(scores_B[i], all_T[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_bfloat16_arithmetic_on_float32_weights(name: str) -> None:
    model = tiny.model(name)
    prompts, responses = tiny.rows(shared=4)
    with torch.no_grad():
        exact = [tiny.logprobs(model, p, r) for p, r in zip(prompts, responses, strict=True)]
    trunk = Trunk(model, 2, torch.bfloat16)
    body, _ = trainable(trunk.top, Train(kind="lora", lora_rank=2))
    seqs = trunk.bottom(Sequences.of(prompts, responses, tiny.CPU))
    logp_BR, _ = body.logprobs(seqs, 1.0)
    assert logp_BR.dtype == torch.float32
    for i, row in enumerate(exact):
        assert (logp_BR[i, : len(row)] - row).abs().max() < 0.5
    logp_BR.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in body.trained())
    assert body.clone(score=nn.Linear(16, 1)).values(seqs).dtype == torch.float32


def test_temperature_and_soft_cap_by_hand() -> None:
    model = tiny.model("gemma2")
    body = Body.of(model, 0)
    hidden_BD = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    logits_BV = body.logits(hidden_BD)
    plain = hidden_BD.double() @ model.get_output_embeddings().weight.double().T
    torch.testing.assert_close(logits_BV.double(), 3.0 * torch.tanh(plain / 3.0), rtol=0, atol=1e-5)
    assert logits_BV.abs().max() < 3.0


def test_adapters_are_switched_back_even_after_an_error() -> None:
    body, _ = trainable(Trunk(tiny.model(), 2).top, Train(kind="lora", lora_rank=2))
    for p in body.trained():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    seqs = Sequences.of([[7]], [[8, 9]], tiny.CPU)
    seqs = Trunk(tiny.model(), 2).bottom(seqs)
    on = body.logprobs(seqs, 1.0)[0]
    with body.adapters(False), body.adapters(True):
        assert torch.equal(body.logprobs(seqs, 1.0)[0], on)
    with pytest.raises(RuntimeError), body.adapters(False):
        raise RuntimeError
    assert torch.equal(body.logprobs(seqs, 1.0)[0], on)
    with body.adapters(False):
        with body.adapters(False):
            pass
        assert not torch.equal(body.logprobs(seqs, 1.0)[0], on)
    assert all(p.requires_grad for n, p in body.layers.named_parameters() if "lora_" in n)


def test_a_body_needs_its_bottom() -> None:
    body = Trunk(tiny.model(), 2).top
    with pytest.raises(ValueError, match=r"trunk\.bottom"):
        body.logprobs(Sequences.of([[7]], [[8]], tiny.CPU), 1.0)


def test_a_decoder_of_another_build_is_refused() -> None:
    model = tiny.model()
    model.base_model.second_norm = nn.LayerNorm(16)
    with pytest.raises(UserError, match="cannot find its layer list"):
        Trunk(model, 0)


def test_sequences_by_hand() -> None:
    seqs = Sequences.of([[1, 2, 3], [1, 2], [1, 2, 3, 4]], [[7], [8, 9, 9], [6, 5]], tiny.CPU)
    assert seqs.prefix_P.tolist() == [1]  # the second prompt keeps a token of its own
    assert seqs.ids_BT.tolist() == [[2, 3, 7, 0, 0], [2, 8, 9, 9, 0], [2, 3, 4, 6, 5]]
    assert seqs.lengths == [3, 4, 5]
    assert seqs.starts_B.tolist() == [2, 1, 3]
    assert seqs.mask_BR.tolist() == [[True, False, False], [True] * 3, [True, True, False]]
    assert seqs.predictors_BR()[seqs.mask_BR].tolist() == [1, 0, 1, 2, 2, 3]
    assert seqs.responses_BR()[seqs.mask_BR].tolist() == [7, 8, 9, 9, 6, 5]
    part = seqs.select([0])
    assert part.ids_BT.tolist() == [[2, 3, 7]]
    assert part.mask_BR.tolist() == [[True]]
    with pytest.raises(ValueError, match="no tokens"):
        Sequences.of([[1], []], [[2], [3]], tiny.CPU)
