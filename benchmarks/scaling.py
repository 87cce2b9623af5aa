"""How a step of PPO grows with the batch, the answers' length, the model and its vocabulary.

    batch          8, 16, 32 answers of 48 tokens
    length         16 answers of 24, 48, 96 tokens
    model          the shapes of SmolLM2-135M, SmolLM2-360M and Qwen2.5-0.5B, which brings its vocabulary with it
    vocabulary     49,152, 98,304 and 151,936 words on the shape of SmolLM2-135M

Seconds, operations and memory of one step by the film critic's recipe, with its prompts: the upper third of the layers
is trained, in one epoch; scores are given, so that there is no reward model. Every answer is as long as it may be.
Models other than the embedded one have random weights. Each point is measured once, after the same step was counted:
run it on an idle machine. Memory is what `ppolite plan` says; `benchmarks/plan.py` compares that with what is taken.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --only batch --dirty
"""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.figures import Book, Side
from benchmarks.harness import BENCH, OURS, arguments, measure, worker
from benchmarks.inputs import EMBEDDED, random_model
from benchmarks.plan import planned
from benchmarks.record import ROOT

SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2-360M": {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
        "num_key_value_heads": 5, "vocab_size": 49_152,
    },
    "Qwen2.5-0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151_936,
    },
}  # fmt: skip
SMALL = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3,
}  # fmt: skip
"""SmolLM2-135M, but for its vocabulary."""
SHAPES |= {f"135M, {words:,} words": {**SMALL, "vocab_size": words} for words in (98_304, 151_936)}


class Point(NamedTuple):
    rollouts: int = 16
    length: int = 48
    model: str = EMBEDDED


BASE = Point()
SERIES = {
    "batch": {f"{n} answers": BASE._replace(rollouts=n) for n in (8, 16, 32)},
    "length": {f"{n} tokens": BASE._replace(length=n) for n in (24, 48, 96)},
    "model": {"SmolLM2-135M": BASE, **{m: BASE._replace(model=m) for m in ("SmolLM2-360M", "Qwen2.5-0.5B")}},
    "vocabulary": {
        "49,152 words": BASE,
        **{f"{n:,} words": BASE._replace(model=f"135M, {n:,} words") for n in (98_304, 151_936)},
    },
}


def model(name: str) -> str:
    """Folder of a model of that shape with random weights, made where it is missing."""
    if name == EMBEDDED:
        return name
    folder = BENCH / "models" / name.replace(", ", "-").replace(" ", "-")
    if not (folder / "config.json").exists():
        random_model(folder, SHAPES[name])
    return str(folder.relative_to(ROOT))


def overrides(point: Point) -> list[str]:
    layers = SHAPES.get(point.model, SMALL)["num_hidden_layers"]
    return [
        "sft=null",
        "reward=null",
        "evaluation.judge=none",
        "ppo.epochs=1",
        "ppo.critic_init=zero",
        f"model={model(point.model)}",
        f"trunk.split={layers * 2 // 3}",
        f"ppo.rollouts={point.rollouts}",
        f"ppo.max_new_tokens={point.length}",
    ]


def main() -> None:
    parser = arguments(__doc__, pairs=1)
    parser.add_argument("--only", nargs="+", choices=SERIES, default=list(SERIES), help="these series")
    args = parser.parse_args()
    book = Book("scaling", args)
    measured: dict[Point, dict[str, Any]] = {}
    for series in args.only:
        print(f"{series:20}{'s':>8}{'TFLOP':>8}{'GFLOP/s':>9}{'MiB planned':>13}")
        for name, point in SERIES[series].items():
            told = overrides(point)
            if point not in measured:
                side = Side("ppolite", f"scaling-{name}", worker(OURS, "scaling", overrides=told))
                measured[point] = measure(side, args.threads) | {
                    "planned_mib": round(planned("film", told)["ppo"])
                }
            run = measured[point]
            seconds, tflop = sum(run["seconds"].values()), sum(run["tflop"].values())
            print(
                f"{name:20}{seconds:8.1f}{tflop:8.2f}{1000 * tflop / seconds:9.1f}{run['planned_mib']:13,}",
                flush=True,
            )
            book.keep(f"{series}: {name}", **run, settings=told)


if __name__ == "__main__":
    main()
