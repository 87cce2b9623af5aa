"""Rollouts on disk.

step-N.parquet    with their per-token numbers, for people to look at, a row for each response
sft.jsonl         samples that are learned from again and again: their origin, then a line for each
unscored-N.jsonl  a round that its reward source failed on: a line for each, with the prompt's other columns
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppolite.config.drafts import drafted
from ppolite.types import Experience, Finish, Prompt, Rollout, UserError

Origin = dict[str, Any]
"""What samples depend on, as plain data; they are reused where it is the same."""


def write_rollouts(
    run_dir: Path, step: int, experience: Experience, logprobs_BR: Tensor, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """`rollouts/step-N.parquet`. `logprobs_BR` are under π after the update, so the ratio is all of it."""
    ratio_BR = (logprobs_BR - experience.logprobs_BR).exp()
    rows = []
    for i, rollout in enumerate(experience.rollouts):
        n = len(rollout.response_ids)
        cut = lambda x, i=i, n=n: x[i, :n].tolist()  # noqa: E731
        rows.append(
            {
                "step": step,
                "prompt": rollout.prompt.last,
                "response": rollout.text,
                "finish": rollout.finish,
                "version": rollout.version,
                "score": float(experience.scores_B[i]),
                **{f"reward/{name}": value for name, value in rollout.rewards.items()},
                "tokens": [str(tokenizer.decode([t])) for t in rollout.response_ids],
                "sampler_logprobs": rollout.logprobs_R.tolist(),
                "behaviour_logprobs": cut(experience.behaviour_logprobs_BR),
                "old_logprobs": cut(experience.logprobs_BR),
                "logprobs": cut(logprobs_BR),
                "ref_logprobs": cut(experience.ref_logprobs_BR),
                "values": cut(experience.values_BR),
                "rewards": cut(experience.rewards_BR),
                "advantages": cut(experience.advantages_BR),
                "ratio": cut(ratio_BR),
            }
        )
    folder = run_dir / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:05d}.parquet"
    with drafted(path) as draft, draft.open("wb") as file:  # Arrow's own refusal would name the draft
        pq.write_table(pa.Table.from_pylist(rows), file)
    return path


def forget_rollouts(run_dir: Path, after: int) -> None:
    """Take out the `step-N.parquet` of later steps, which an earlier run of the stage has left."""
    for path in (run_dir / "rollouts").glob("step-*.parquet"):
        if int(path.stem.removeprefix("step-")) > after:
            path.unlink()


def write_samples(path: Path, origin: Origin, samples: Sequence[Rollout]) -> None:
    """Whole or not at all."""
    lines: list[dict[str, Any]] = [{"origin": origin}]
    _write_lines(path, lines + [_line(r) for r in samples])


def write_unscored(folder: Path, rollouts: Sequence[Rollout]) -> Path:
    """`unscored-N.jsonl` with the first N that is free. Values that JSON has no form for become text."""
    taken = {path.name for path in folder.glob("unscored-*.jsonl")}
    name = next(name for n in count(1) if (name := f"unscored-{n}.jsonl") not in taken)
    more = [
        {"messages": r.prompt.messages, "version": r.version, "columns": r.prompt.columns} for r in rollouts
    ]
    _write_lines(folder / name, [_line(r) | m for r, m in zip(rollouts, more, strict=True)])
    return folder / name


def rollout_state(r: Rollout, place: int) -> dict[str, Any]:
    """A rollout in a checkpoint; `place` is its prompt's number."""
    return {
        "place": place,
        "prompt_ids": r.prompt_ids,
        "response_ids": r.response_ids,
        "text": r.text,
        "logprobs": r.logprobs_R,
        "finish": r.finish,
        "version": r.version,
        "trainer_logprobs": r.trainer_logprobs_R,
        "rewards": r.rewards,
    }


def rollout_from(state: dict[str, Any], prompts: Sequence[Prompt]) -> Rollout:
    """The rollout of `rollout_state`."""
    return Rollout(
        prompts[state["place"]],
        state["prompt_ids"],
        state["response_ids"],
        state["text"],
        state["logprobs"],
        state["finish"],
        state["version"],
        state["trainer_logprobs"],
        state["rewards"],
    )


def _line(r: Rollout) -> dict[str, Any]:
    return {
        "prompt": r.prompt.last,
        "response": r.text,
        "finish": r.finish,
        "prompt_ids": r.prompt_ids,
        "response_ids": r.response_ids,
        "sampler_logprobs": r.logprobs_R.tolist(),
    }


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in lines)
    with drafted(path) as draft:
        # A column may hold half of a surrogate pair, which UTF-8 does not.
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_samples(
    path: Path, origin: Origin, prompts: Sequence[Prompt], say: Callable[[str], None]
) -> list[Rollout] | None:
    """The samples of `prompts`, or None where there are none of this origin, which is announced.

    Raises UserError for a file that cannot be read.
    """
    if not path.exists():
        return None
    try:
        # Not splitlines(): a response may hold one of the other characters that end a line of text.
        head, *lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
        drawn = _Head.model_validate_json(head).origin
        other = sorted(key for key in origin if drawn.get(key) != origin[key])
        if other:
            say(f"{path}: its samples were drawn with another {', '.join(other)}; drawing anew")
            return None
        rows = [_Sample.model_validate_json(line) for line in lines]
        return [
            Rollout(p, r.prompt_ids, r.response_ids, r.response, torch.tensor(r.sampler_logprobs), r.finish)
            for p, r in zip(prompts, rows, strict=True)
        ]
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read ({reason}); delete it, so that it is drawn anew") from error


class _Head(BaseModel):
    origin: Origin


class _Sample(BaseModel):
    """A line of `write_samples`."""

    prompt_ids: Annotated[list[int], Field(min_length=1)]
    response_ids: Annotated[list[int], Field(min_length=1)]
    response: str
    sampler_logprobs: list[float]
    finish: Finish

    @model_validator(mode="after")
    def _agree(self) -> _Sample:
        if len(self.sampler_logprobs) != len(self.response_ids):
            raise ValueError("sampler_logprobs and response_ids differ in length")
        return self
