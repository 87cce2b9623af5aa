"""Recomputed layers: how little they keep. That no gradient changes, tests/stages/test_invariance.py shows."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor

from ppolite.config import Train
from ppolite.models.body import Body
from ppolite.models.roles import trainable
from ppolite.models.sequences import Sequences
from ppolite.models.trunk import Trunk, checked_trunk
from ppolite.types import UserError

D, SHARED = 16, 3


def body_of(
    layers: int, train: Train, *, split: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Body, Sequences]:
    trunk = Trunk(tiny.model(num_hidden_layers=layers), split, dtype)
    body, _ = trainable(trunk.top, train)
    return body, trunk.bottom(Sequences.of(*tiny.rows(shared=SHARED), tiny.CPU))


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """What is kept for the backward pass: the memory that is no weight, each piece once."""

    def __init__(self, body: Body) -> None:
        weights = {p.untyped_storage().data_ptr() for p in body.parameters()}
        self.found: dict[int, weakref.ref[torch.UntypedStorage]] = {}

        def pack(x: Tensor) -> Tensor:
            memory = x.untyped_storage()
            if memory.data_ptr() not in weights:
                self.found[memory.data_ptr()] = weakref.ref(memory)
            return x.detach()  # with its history, x would hold the graph that holds it

        super().__init__(pack, lambda x: x)

    def __enter__(self) -> Kept:
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        """Of those that are still there."""
        memories = [ref() for ref in self.found.values()]
        return sum(memory.nbytes() for memory in memories if memory is not None)


def kept(layers: int, train: Train) -> int:
    body, seqs = body_of(layers, train)
    with Kept(body) as found:
        logp_BR, _ = body.logprobs(seqs, 1.0)
    assert logp_BR.requires_grad
    return found.bytes


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_layer_keeps_its_input(kind: Any) -> None:
    train = Train(kind=kind, recompute=True)
    _, seqs = body_of(1, train)
    tokens = SHARED + sum(seqs.lengths)  # one pack without gaps
    assert len(seqs.packs) == 1
    assert kept(4, train) - kept(3, train) == tokens * D * 4
    usual = train.model_copy(update={"recompute": False})
    assert kept(4, usual) - kept(3, usual) > 10 * tokens * D * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_the_same_numbers_to_the_bit(kind: Any, dtype: torch.dtype) -> None:
    """In bfloat16 too, whose casts are made again outside of the forward pass."""
    found: list[list[Tensor]] = []
    for recompute in (False, True):
        torch.manual_seed(0)  # for the adapters
        body, seqs = body_of(3, Train(kind=kind, recompute=recompute), split=1, dtype=dtype)
        stream = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in body.trained():
                p.add_(0.1 * torch.randn(p.shape, generator=stream))
        body.hold({})
        logp_BR, entropy_BR = body.logprobs(seqs, 0.7, entropy=True)
        assert entropy_BR is not None
        (logp_BR + entropy_BR).sum().backward()
        found.append([logp_BR.detach(), *(p.grad for p in body.trained() if p.grad is not None)])
    assert len(found[0]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_not_learned_from_is_let_go() -> None:
    """A pass that ran out of memory halfway leaves a graph that nobody goes back through."""
    body, seqs = body_of(3, Train(kind="layers", recompute=True))
    with Kept(body) as found:
        logp_BR, _ = body.logprobs(seqs, 1.0)
    assert found.bytes > 0
    del logp_BR, seqs
    gc.collect()
    assert found.bytes == 0


def test_a_model_that_it_changes_is_refused() -> None:
    """Here one whose layers compute something else when they are asked within a backward pass."""
    model: Any = tiny.model()
    mlp = model.base_model.layers[-1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x if torch._C._current_graph_task_id() == -1 else 2 * x)
    rows = [[7, 8, 9, 10], [7, 9, 8, 11]]
    assert checked_trunk(model, 0, rows, print).split == 0
    with pytest.raises(UserError, match=r"train\.recompute changes LlamaForCausalLM's results"):
        checked_trunk(model, 0, rows, print, recompute=True)
