"""How near an RLHF step is to the limit of the chip: operations counted, ceilings measured, phase by phase.

    executed   multiplications and additions that torch was asked for in a phase, counted while it runs
    needed     those that no way around is known for: tokens that somebody reads × layers that they go through
    usual      those of four whole models on padded prompts and responses, logits for all of them
    ceiling    the fastest matrix product of this chip, in the dtype of the arithmetic, and its memory's read rate

One step of the film critic on its own rollouts, as `rlhf_step` has it, is counted, which warms up; then the same step
is done again, from the same state, and timed. Seconds are those of this process, once: run it on an idle machine.

    python -m benchmarks.floor
    python -m benchmarks.floor --set train.kind=lora --dirty
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.figures import Book
from benchmarks.harness import BENCH, arguments
from benchmarks.inputs import SHORT, models
from ppolite import PPO, load_recipe
from ppolite.ops.packing import common_prefix
from ppolite.stages.checkpoint import read_state, write_state
from ppolite.types import Rollout

GIGA = 1e9
PHASES = ("generate", "score", "prepare", "update")


@dataclass
class Phase:
    """What a phase took, and did."""

    seconds: float = 0.0
    executed: float = 0.0
    needed: float = 0.0
    usual: float = 0.0


@dataclass
class Shape:
    """Operations (multiplications and additions) of a token, forward."""

    layer: float
    head: float
    layers: int
    split: int
    width: int
    """Attention: 4 × this for each token looked at, in each layer."""

    @classmethod
    def of(cls, ppo: PPO) -> Shape:
        model: Any = ppo.opened.model
        config, decoder = model.config, model.base_model
        weights = sum(p.numel() for p in decoder.layers[-1].parameters() if p.ndim > 1)
        return cls(
            2.0 * weights,
            2.0 * config.vocab_size * config.hidden_size,
            config.num_hidden_layers,
            ppo.roles.trunk.split,
            config.num_attention_heads
            * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        )

    @property
    def top(self) -> float:
        return self.layer * (self.layers - self.split)

    @property
    def whole(self) -> float:
        return self.layer * self.layers


@dataclass
class Tokens:
    """How many there are in a round."""

    shared: int
    own: int
    """Of the prompts behind their shared front, and of the responses."""
    responses: int
    rows: int
    padded_prompt: int
    padded_response: int

    @classmethod
    def of(cls, rollouts: list[Rollout], shared: int, longest: int) -> Tokens:
        own = sum(len(r.prompt_ids) - shared + len(r.response_ids) for r in rollouts)
        return cls(
            shared,
            own,
            sum(len(r.response_ids) for r in rollouts),
            len(rollouts),
            max(len(r.prompt_ids) for r in rollouts),
            longest,
        )


def needed(shape: Shape, t: Tokens, updates: int, *, weight_grads: bool, bodies: int = 2) -> dict[str, float]:
    """Of each phase. Left out: attention, a few percent. `bodies`: 1 where policy and critic share one."""
    tokens = t.own + t.shared
    learn = shape.top * (3 if weight_grads else 2)
    return {
        "generate": tokens * shape.whole + t.responses * shape.head,
        "score": tokens * shape.whole,  # the bottom is every role's; the reward model's top
        "prepare": tokens * (1 + bodies) * shape.top + t.responses * 2 * shape.head,  # π_old, π_ref, V
        # The head is frozen: its forward, and the gradient that it hands down.
        "update": updates * (t.own * bodies * learn + t.responses * 2 * shape.head),
    }


def usual(shape: Shape, t: Tokens, updates: int) -> dict[str, float]:
    """Four whole models, all trained, rows padded to the longest, logits for prompt and response."""
    padded = t.rows * (t.padded_prompt + t.padded_response)
    both = padded * (shape.whole + shape.head)
    return {
        "generate": padded * shape.whole + t.rows * t.padded_response * shape.head,
        "score": padded * shape.whole,
        "prepare": 2 * both + padded * shape.whole,
        "update": updates * 3 * (both + padded * shape.whole),
    }


@contextmanager
def measured(phase: Phase, *, count: bool) -> Iterator[None]:
    """Time a phase, or count its operations: counting takes time itself."""
    if count:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            yield
        phase.executed += counter.get_total_flops()
        return
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    phase.seconds += time.perf_counter() - started


def _prepacked(input_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Of a product with a prepacked weight (models/prepacked.py)."""
    return 2 * math.prod(input_shape) * weight_shape[0]


def _attention(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


def _attention_backward(grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_shape, q_shape, k_shape, v_shape)


FORMULAS = {
    torch.ops.mkldnn._linear_pointwise: _prepacked,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Of operators of torch on a CPU for which its counter has none."""


def step(ppo: PPO, phases: dict[str, Phase], *, count: bool) -> list[Rollout]:
    """One step, each phase measured."""
    prompts = ppo.next_prompts()
    with measured(phases["generate"], count=count):
        rollouts = ppo.generate(prompts)
    learn(ppo, rollouts, phases, count=count)
    return rollouts


def learn(ppo: PPO, rollouts: Sequence[Rollout], phases: dict[str, Phase], *, count: bool) -> None:
    """What comes after the answers, each phase measured."""
    with measured(phases["score"], count=count):
        scores = ppo.score(rollouts)
    with measured(phases["prepare"], count=count):
        experience, seqs = ppo.prepare(rollouts, scores)
    with measured(phases["update"], count=count):
        ppo.learn(experience, seqs)


def look(ppo: PPO, shape: Shape) -> tuple[dict[str, Phase], Tokens]:
    """All phases of one step, counted and then timed, and the tokens of its round."""
    phases = {name: Phase() for name in PHASES}
    with (
        tempfile.TemporaryDirectory() as before
    ):  # on disk: a copy on a GPU would count as what the step takes
        write_state(Path(before), ppo.state())
        step(ppo, phases, count=True)
        ppo.restore(read_state(Path(before)))
    rollouts = step(ppo, phases, count=False)
    shared = common_prefix([r.prompt_ids for r in rollouts])
    tokens = Tokens.of(rollouts, shared, ppo.config.max_new_tokens)
    least = needed(
        shape,
        tokens,
        ppo.config.epochs,
        weight_grads=ppo.recipe.train.kind != "lora",
        bodies=1 if ppo.roles.critic.borrows else 2,
    )
    most = usual(shape, tokens, ppo.config.epochs)
    for name, phase in phases.items():
        phase.needed, phase.usual = least[name], most[name]
    return phases, tokens


def fastest(work: Callable[[], object], device: torch.device, seconds: float = 3.0) -> float:
    """Calls a second, of the best tenth of so many seconds. A GPU gets twenty at once, since waiting for it takes
    about as long as a small product."""
    work()
    calls = 20 if device.type == "cuda" else 1
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(took) < 5:
        started = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return calls / sorted(took)[len(took) // 10]


def ceilings(dtype: torch.dtype, device: torch.device, shape: Shape) -> dict[str, float]:
    """GFLOP/s of matrix products of several sizes, and GB/s of reading."""
    found: dict[str, float] = {}
    D, square = shape.width, 8192 if device.type == "cuda" else 2048
    for name, (m, k, n) in {
        f"{square} × {square} × {square}": (square, square, square),
        f"512 × {D} × {3 * D} (a layer, a micro-batch)": (512, D, 3 * D),
        f"32 × {D} × {3 * D} (a layer, a decoded token)": (32, D, 3 * D),
    }.items():
        a, b = (torch.randn(s, device=device, dtype=dtype) for s in ((m, k), (k, n)))
        found[f"{name}, GFLOP/s"] = fastest(lambda a=a, b=b: a @ b, device) * 2 * m * k * n / GIGA
    x = torch.randn(2**30 if device.type == "cuda" else 2**26, device=device)
    found["reading, GB/s"] = fastest(x.sum, device) * x.numel() * 4 / GIGA
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--recipe", default="film")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    book = Book("floor", args)
    models(BENCH, SHORT)
    ppo = PPO(load_recipe(args.recipe, [*args.set, "ppo.min_rm_accuracy=0"]), BENCH)
    shape = Shape.of(ppo)
    phases, tokens = look(ppo, shape)
    tops = ceilings(ppo.opened.dtype, ppo.opened.device, shape)
    report(book, args, phases, tokens, tops)


def report(
    book: Book, args: argparse.Namespace, phases: dict[str, Phase], tokens: Tokens, tops: dict[str, float]
) -> None:
    best = max(value for name, value in tops.items() if name.endswith("GFLOP/s"))
    print(
        f"{tokens}\n{'':10}{'s':>7}{'executed':>11}{'needed':>9}{'usual':>9}   TFLOP{'GFLOP/s':>10}{'of ceiling':>12}"
    )
    total = Phase()
    for name, phase in [*phases.items(), ("step", total)]:
        if phase is not total:
            for key in vars(phase):
                setattr(total, key, getattr(total, key) + getattr(phase, key))
        rate = phase.executed / phase.seconds / GIGA
        print(
            f"{name:10}{phase.seconds:7.2f}{phase.executed / 1e12:11.3f}{phase.needed / 1e12:9.3f}"
            f"{phase.usual / 1e12:9.3f}{rate:18.1f}{rate / best:12.0%}"
        )
    for name, value in tops.items():
        print(f"{name}: {value:.1f}")
    book.keep(
        "film, one step",
        phases={name: vars(phase) for name, phase in [*phases.items(), ("step", total)]},
        tokens=vars(tokens),
        ceilings=tops,
        settings=args.set,
    )


if __name__ == "__main__":
    main()
