"""Rollouts on disk with their per-token numbers, for people to look at (parquet, a row for each response)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppolite.types import Experience


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
                "score": float(experience.scores_B[i]),
                "tokens": [str(tokenizer.decode([t])) for t in rollout.response_ids],
                "sampler_logprobs": rollout.logprobs_R.tolist(),
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
    draft = folder / f".{path.name}.part"
    pq.write_table(pa.Table.from_pylist(rows), draft)
    draft.rename(path)
    return path
