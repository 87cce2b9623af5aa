"""What PPO did to each token: rollouts as coloured text, with the numbers behind every token.

A token's colour is its advantage (blue: made likelier, orange: made rarer); a line under it shows where the
update moved its probability by more than 10 %. Rollouts come from the first and the last step on file: of
each the best, the middle and the worst by score.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from ppolite.obs.visible import visible

MOVED = 0.10
"""A token is underlined where the ratio left 1 ± this."""

# column, heading, format
NUMBERS = [
    ("advantages", "advantage", "+.3f"),
    ("ratio", "ratio π/π_old", ".3f"),
    ("logprobs", "log π", ".3f"),
    ("old_logprobs", "log π_old", ".3f"),
    ("ref_logprobs", "log π_ref", ".3f"),
    ("values", "value", "+.3f"),
    ("rewards", "reward", "+.3f"),
]

Record = Mapping[str, Any]
Numbers = list[float | None] | None


class Shown(BaseModel):
    """What a row of a rollouts file must be to be shown; a run without a critic has no values."""

    model_config = ConfigDict(strict=True)
    step: int
    prompt: str
    score: float | None
    tokens: list[str]
    advantages: Numbers = None
    ratio: Numbers = None
    logprobs: Numbers = None
    old_logprobs: Numbers = None
    ref_logprobs: Numbers = None
    values: Numbers = None
    rewards: Numbers = None


def load_rollouts(folder: Path) -> tuple[list[Record], list[str]]:
    """The rollouts to show, and a sentence for each file that cannot be read (a killed run leaves such)."""
    tables: list[tuple[int, Path]] = []
    complaints: list[str] = []
    for path in sorted(folder.glob("*.parquet")):
        try:
            steps = pq.read_table(path, columns=["step"])["step"].cast(pa.int64()).to_pylist()
        except (pa.ArrowException, OSError, KeyError) as error:
            complaints.append(_left_out(path, error))
            continue
        tables += [(step, path) for step in {*steps} - {None}]
    shown: list[Record] = []
    for step, path in [min(tables), max(tables)][: len({step for step, _ in tables})] if tables else []:
        try:
            rows = [Shown.model_validate(row).model_dump() for row in pq.read_table(path).to_pylist()]
        except (pa.ArrowException, OSError, ValueError) as error:
            complaints.append(_left_out(path, error))
            continue
        shown += _best_middle_worst([r for r in rows if r["step"] == step and r["tokens"]])
    return shown, complaints


def _left_out(path: Path, error: Exception) -> str:
    return f"{path.name} was left out: {' '.join(str(error).split())[:200]}"


def _best_middle_worst(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ranked = sorted(records, key=lambda r: -math.inf if r["score"] is None else r["score"], reverse=True)
    return [ranked[i] for i in sorted({0, len(ranked) // 2, len(ranked) - 1})] if ranked else []


def token_view(rollouts: Sequence[Record]) -> str:
    """HTML of the legend and of each rollout. Colours share one scale, the 95th percentile of |advantage|."""
    sizes = [abs(a) for r in rollouts for a in r.get("advantages") or [] if a is not None and np.isfinite(a)]
    scale = float(np.quantile(sizes, 0.95)) if sizes else 0.0
    return _legend(scale) + "".join(_rollout(r, scale or 1.0) for r in rollouts)


def _legend(scale: float) -> str:
    return f"""<div class="legend">
<span>advantage −{scale:.2f}<span class="ramp"></span>+{scale:.2f}</span>
<span><span class="t up">likelier</span> the update raised its probability by more than {MOVED:.0%}</span>
<span><span class="t down">rarer</span> lowered by more than {MOVED:.0%}</span>
<span>point at a token for its numbers</span></div>"""


def _rollout(record: Record, scale: float) -> str:
    numbers = [_numbers(record, i) for i in range(len(record["tokens"]))]
    spans = "".join(_span(t, n, scale) for t, n in zip(record["tokens"], numbers, strict=True))
    score = _format(record["score"], "+.2f")
    return f"""<div class="rollout">
<div class="label">training rollout, step {record["step"]}, score {score} (proxy)</div>
<div class="prompt">{html.escape(visible(str(record["prompt"])))}</div>
<div class="tokens">{spans}</div>
{_table(record["tokens"], numbers)}</div>
"""


def _numbers(record: Record, i: int) -> dict[str, float]:
    """The numbers that this token has; a run without a critic has no values."""
    found: dict[str, float] = {}
    for column, _, _ in NUMBERS:
        values = record.get(column) or []
        if i < len(values) and values[i] is not None:
            found[column] = values[i]
    return found


def _span(token: str, numbers: Mapping[str, float], scale: float) -> str:
    advantage, ratio = numbers.get("advantages", 0.0), numbers.get("ratio", 1.0)
    classes = ["t", "p" if advantage > 0 else "n"]
    if abs(ratio - 1) > MOVED:
        classes.append("up" if ratio > 1 else "down")
    alpha = min(abs(advantage) / scale, 1.0) * 0.8 if np.isfinite(advantage) else 0.0
    title = "\n".join(
        [repr(token)] + [f"{head} {numbers[c]:{form}}" for c, head, form in NUMBERS if c in numbers]
    )
    shown = html.escape(visible(token, keep="\n\t")).replace("\n", "<i>↵</i>\n")
    return (
        f'<span class="{" ".join(classes)}" style="--a:{alpha:.2f}" title="{html.escape(visible(title))}">'
        f"{shown or '<i>∅</i>'}</span>"
    )


def _table(tokens: Sequence[str], numbers: Sequence[Mapping[str, float]]) -> str:
    columns = [c for c in NUMBERS if any(c[0] in n for n in numbers)]
    head = "".join(f"<th>{label}</th>" for _, label, _ in columns)
    rows = "".join(
        f"<tr><td>{html.escape(visible(token, keep=''))}</td>"
        + "".join(f"<td>{_format(n.get(key), form)}</td>" for key, _, form in columns)
        + "</tr>"
        for token, n in zip(tokens, numbers, strict=True)
    )
    return (
        '<details><summary>all numbers</summary><div class="numbers"><table>'
        f"<thead><tr><th>token</th>{head}</tr></thead>{rows}</table></div></details>"
    )


def _format(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}".replace("-", "−")
