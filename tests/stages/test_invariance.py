"""How rows are laid out for the machine changes no gradient: policy and critic, in float32 and in float64.

One minibatch of PPO, its experience included, is computed in the plainest way (no packs, no split, one micro-batch,
rows in order, one process). Every other way has to give the same gradients: 1e-12 of their length in float64, where
HF's own casts to float32 are taken out (`tiny.Wide`), and 1e-6 in float32.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from tests import tiny
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppolite.config import PPO, Data, Optim, Train
from ppolite.models.load import Norm
from ppolite.models.roles import Roles, build_roles, scalar_head
from ppolite.models.sequences import Sequences
from ppolite.models.trunk import Trunk
from ppolite.ops.losses import value_loss
from ppolite.rollout.experience import make_experience
from ppolite.stages.learner import Skips
from ppolite.stages.objective import policy_loss
from ppolite.stages.update import Updates
from ppolite.types import Experience, Prompt, Rollout

BOUND = {torch.float64: 1e-12, torch.float32: 1e-6}
ROWS = 7


@dataclass(frozen=True)
class Layout:
    """How a minibatch goes through the model."""

    split: int = 0
    packed: bool = False
    pack: int = 128
    budget: int = 100_000
    order: tuple[int, ...] = tuple(range(ROWS))
    shared: int = 3
    """Common tokens at the front of the prompts that the model is told to share; 0: none, by other rows beside them."""
    extra: int = 0
    """Columns of padding more than the rows need."""
    recompute: bool = False
    keep: Any = "auto"


LAYOUTS = {
    "split": Layout(split=2),
    "split, and kept nowhere": Layout(split=2, keep="none"),
    "packs": Layout(packed=True),
    "packs of one row": Layout(packed=True, pack=1),
    "packs of a few rows": Layout(packed=True, pack=25),
    "small micro-batches": Layout(budget=20),
    "one row at a time": Layout(budget=1),
    "another order": Layout(order=(4, 0, 6, 2, 1, 5, 3)),
    "no shared prefix": Layout(shared=0),
    "more padding": Layout(extra=9),
    "recomputed": Layout(recompute=True),
    "recomputed, without a prefix": Layout(recompute=True, shared=0),
    "all at once": Layout(
        split=1, packed=True, pack=25, budget=40, order=(6, 5, 4, 3, 2, 1, 0), shared=0, extra=2
    ),
    "recomputed packs": Layout(
        split=1, packed=True, pack=25, budget=40, order=(6, 5, 4, 3, 2, 1, 0), recompute=True
    ),
    "packs, kept nowhere": Layout(
        split=1, packed=True, pack=25, budget=40, order=(6, 5, 4, 3, 2, 1, 0), shared=0, keep="none"
    ),
}


TOP = 2
"""Layers from here on are moved away from the SFT model, and compared: all layouts train them."""


def world(family: str, kind: Any, layout: Layout, dtype: torch.dtype) -> Roles:
    model = tiny.model(family, dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():  # as large as those of real models: rounding grows with them
            p.mul_(0.5 if p.ndim > 1 else 1.0)
    judge = tiny.classifier(model, changed_from=TOP)
    reward: Any = (judge, judge.score, Norm(mean=0.3, std=1.7, offset=0.2))
    trunk = Trunk(model, layout.split, dtype, packed=layout.packed)
    trunk.keep = layout.keep
    rank = 2 if kind == "lora" else None
    return build_roles(trunk, Train(kind=kind, lora_rank=rank, recompute=layout.recompute), reward)


def watched(roles: Roles) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Trained weights of the upper layers, norms and heads of policy and critic, with names that no split changes."""
    for role, body in (("policy", roles.policy), ("critic", roles.critic)):
        for name, p in body.trained_by_name().items():
            absolute = _absolute(name, body.start)
            if not absolute.startswith(tuple(f"layer {i} " for i in range(TOP))):
                yield f"{role} {absolute}", p


def move(roles: Roles) -> None:
    """Away from the start, the same way in every layout, so that ratios differ from 1."""
    with torch.no_grad():
        for name, p in watched(roles):
            stream = torch.Generator().manual_seed(sum(map(ord, name)))
            noise = 0.05 * torch.randn(p.shape, generator=stream, dtype=torch.float64).to(p.dtype)
            p.copy_(noise if "lora_" in name else p + noise)  # an adapter starts at random


def _absolute(name: str, start: int) -> str:
    """Layers counted from the bottom, whatever the split."""
    head, _, rest = name.partition(".")
    index, _, tail = rest.partition(".")
    return f"layer {int(index) + start} {tail}" if head == "layers" else name


def rollouts(shared: int) -> list[Rollout]:
    prompts, responses = tiny.rows(shared=shared, n=ROWS)
    finish: Any = itertools.cycle(["stop", "length"])
    return [
        Rollout(Prompt(text=f"{i}"), p, r, "", torch.full((len(r),), -1.0), next(finish))
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
    ]


def gradients(
    layout: Layout, family: str, kind: str, dtype: torch.dtype, share: Callable[[list[int]], list[int]] = list
) -> dict[str, Tensor]:
    """Of the watched weights, by name. `share`: the rows of this process."""
    config = PPO(
        prompts=Data(path="x"), optim=Optim(micro_batch_tokens=layout.budget), rollouts=ROWS, value_clip=None,
        kl={"beta": 0.1},  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppolite.models.packs.LENGTH", layout.pack)
        patch.setattr(
            Sequences,
            "of",
            classmethod(_laid_out(Sequences.of.__func__, layout)),  # type: ignore[attr-defined]
        )
        roles = world(family, kind, layout, dtype)
        rows = share(list(layout.order))
        drawn = rollouts(3)
        scores = [0.3 * i - 1 for i in range(ROWS)]
        experience, seqs = make_experience(
            roles, [drawn[i] for i in rows], [scores[i] for i in rows], config, beta=0.1
        )
        move(roles)
        updates = Updates(roles, config, Skips(), 3, seed=0)
        updates.minibatch(experience, seqs, list(range(len(rows))), 0.1)
    assert all(p.grad is not None for _, p in watched(roles))
    return {name: p.grad.double() for name, p in watched(roles) if p.grad is not None}


def after_a_round(
    layout: Layout, dtype: torch.dtype, share: Callable[[list[int]], list[int]] = list
) -> dict[str, Tensor]:
    """Watched weights and β of PPO1's penalty after as many minibatches as rows: some processes have none of one."""
    config = PPO(
        prompts=Data(path="x"), optim=Optim(micro_batch_tokens=layout.budget), rollouts=ROWS, value_clip=None,
        objective="kl", epochs=1, minibatches=ROWS, kl={"beta": 0.1},  # type: ignore[arg-type]
    )  # fmt: skip
    roles = world("llama", "layers", layout, dtype)
    rows, drawn = share(list(range(ROWS))), rollouts(3)
    experience, seqs = make_experience(
        roles, [drawn[i] for i in rows], [0.3 * i - 1 for i in rows], config, beta=0.1
    )
    move(roles)
    updates = Updates(roles, config, Skips(), 3, seed=0)
    updates.run(experience, seqs, round_=0, leash=0.1)
    after = {name: p.detach().double() for name, p in watched(roles)}
    return after | {"beta": torch.tensor(updates.penalty.beta)}


def with_one_body(layout: Layout, kind: str) -> tuple[Roles, Updates, tuple[Experience, Sequences]]:
    """The critic a second head on the policy's layers, both moved away from the start."""
    roles = world("llama", kind, layout, torch.float64)
    roles.critic = roles.policy.second_head(scalar_head(roles.policy, bias=True))
    config = PPO(
        prompts=Data(path="x"), optim=Optim(micro_batch_tokens=layout.budget), rollouts=ROWS, value_clip=None,
        critic_body="policy", value_coef=0.3,
    )  # fmt: skip
    scores = [0.3 * i - 1 for i in range(ROWS)]
    known = make_experience(roles, rollouts(3), scores, config, beta=0.1)
    move(roles)
    return roles, Updates(roles, config, Skips(), 3, seed=0), known


def _laid_out(original: Any, layout: Layout) -> Any:
    """`Sequences.of` with more padding, and without a shared prefix."""

    def of(cls: type[Sequences], prompts: Any, responses: Any, device: torch.device) -> Sequences:
        if not layout.shared:  # a stranger's prompt shares nothing; its row is taken out again
            seqs = original(cls, [*prompts, [tiny.STOP, tiny.END]], [*responses, [tiny.END]], device)
            seqs = seqs.select(range(len(prompts)))
        else:
            seqs = original(cls, prompts, responses, device)
        B = len(seqs)
        more = seqs.ids_BT.new_zeros(B, layout.extra)
        return replace(
            seqs,
            ids_BT=torch.cat([seqs.ids_BT, more], 1),
            mask_BT=torch.cat([seqs.mask_BT, more.bool()], 1),
        )

    return of


def compare(found: dict[str, Tensor], plain: dict[str, Tensor], bound: float) -> None:
    """Each role's gradient as one vector: the distance of the two relative to its length."""
    for role in ("policy", "critic"):
        names = sorted(name for name in found if name.startswith(role))
        assert names
        a, b = (torch.cat([grads[name].flatten() for name in names]) for grads in (found, plain))
        assert b.norm() > 0.01
        gap = float((a - b).norm() / b.norm())
        assert gap < bound, f"{role}: {gap:.1e}"


@contextlib.contextmanager
def width(dtype: torch.dtype) -> Iterator[None]:
    """float64 through and through, or float32 as it is."""
    if dtype == torch.float32:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    # torch switches such a mode off in the backward pass, where layers are computed again.
    again = partial(checkpoint, context_fn=lambda: (contextlib.nullcontext(), tiny.Wide()))
    try:
        with pytest.MonkeyPatch.context() as patch, tiny.Wide():
            patch.setattr("ppolite.models.recompute.checkpoint", again)
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_one_pass_for_policy_and_critic_gives_the_gradients_of_two(kind: str) -> None:
    """loss + c · value loss, of one pass, beside both of a pass of their own."""
    with width(torch.float64):
        layout = Layout()
        (one, updates, known), (two, *_) = (with_one_body(layout, kind) for _ in range(2))
        updates.minibatch(*known, list(range(ROWS)), 0.1)
        found = {name: p.grad for name, p in watched(one) if p.grad is not None}
        config, (experience, seqs) = updates.config, known
        denom = experience.mask_BR.sum()
        logp_BR, _ = two.policy.logprobs(seqs, config.temperature)
        loss, _ = policy_loss(logp_BR, experience, config, penalty=1.0, leash=0.1, denom=denom)
        loss.backward()
        vloss, _ = value_loss(
            two.critic.values(seqs), experience.values_BR, experience.returns_BR, experience.mask_BR,
            clip=config.value_clip, denom=denom,
        )  # fmt: skip
        (config.value_weight * vloss).backward()
        plain = {name: p.grad for name, p in watched(two) if p.grad is not None}
    assert found.keys() == plain.keys()
    compare(found, plain, BOUND[torch.float64])


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", ["layers", "lora"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_one_gradient(name: str, kind: str, dtype: torch.dtype) -> None:
    with width(dtype):
        plain, found = (gradients(layout, "llama", kind, dtype) for layout in (Layout(), LAYOUTS[name]))
    assert found.keys() == plain.keys()
    compare(found, plain, BOUND[dtype])


@pytest.mark.parametrize("name", ["all at once", "recomputed packs"])
@pytest.mark.parametrize("family", tiny.NAMES)
def test_in_every_family(family: str, name: str) -> None:
    with width(torch.float64):
        plain, found = (
            gradients(layout, family, "layers", torch.float64) for layout in (Layout(), LAYOUTS[name])
        )
    compare(found, plain, BOUND[torch.float64])


def test_the_comparison_sees_a_wrong_row() -> None:
    with width(torch.float64):
        plain = gradients(Layout(), "llama", "layers", torch.float64)
        other = gradients(Layout(order=(0, 1, 2, 3, 4, 5, 5)), "llama", "layers", torch.float64)
    with pytest.raises(AssertionError, match="policy"):
        compare(other, plain, 1e-3)


def _process(rank: int, size: int, port: int, path: str) -> None:
    """One of several processes, with every `size`-th row; writes what it has: gradients, and what a round made."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    layout = Layout(split=1, packed=True, pack=25, budget=30)
    made: dict[torch.dtype, Any] = {}

    def share(rows: list[int]) -> list[int]:
        return rows[rank::size]

    try:
        for dtype in BOUND:
            with width(dtype):
                found = gradients(layout, "llama", "layers", dtype, share)
                made[dtype] = found, after_a_round(layout, dtype, share)
        torch.save(made, f"{path}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[torch.dtype, Any]]:
    """gloo on this machine; 4 and 3 rows."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (2, port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_two_processes_are_one(dtype: torch.dtype, two_processes: list[dict[torch.dtype, Any]]) -> None:
    """Whitening, token counts and the distance that steers a penalty over both."""
    (first, learned), (second, same) = (made[dtype] for made in two_processes)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(learned[name], same[name]) for name in learned)
    with width(dtype):
        plain = gradients(Layout(split=1), "llama", "layers", dtype)
        alone = after_a_round(Layout(split=1), dtype)
    compare(first, plain, BOUND[dtype])
    assert float(learned["beta"]) == float(alone["beta"]) != 1
    # AdamW divides by a root, which is small where gradients are.
    compare(learned, alone, 100 * BOUND[dtype])
