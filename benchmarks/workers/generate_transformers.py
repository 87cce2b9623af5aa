"""Answers by `generate` of transformers, timed. With several batches to a set, rows of about one length go together."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.workers.answers import Sets
from benchmarks.workers.common import told


def main() -> None:
    spec = told()
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    model.to(device).eval()
    model.generation_config.eos_token_id = None if spec["ignore_eos"] else tokenizer.eos_token_id
    torch.manual_seed(spec["seed"])

    @torch.inference_mode()
    def answers(ids: list[list[int]]) -> list[list[int]]:
        width = max(map(len, ids))
        out = model.generate(
            torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids], device=device),
            attention_mask=torch.tensor(
                [[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device
            ),
            max_new_tokens=spec["max_new_tokens"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
        return [_until(tokenizer.eos_token_id, row, spec["ignore_eos"]) for row in out[:, width:].tolist()]

    sets = Sets(spec)
    for given in sets:
        ids = [p["ids"] for p in given]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        drawn: dict[int, list[int]] = {}
        for first in range(0, len(ids), spec["batch"]):
            rows = order[first : first + spec["batch"]]
            drawn |= zip(rows, answers([ids[i] for i in rows]), strict=True)
        sets.done([drawn[i] for i in range(len(ids))])
    sets.report("transformers")


def _until(eos: int, row: list[int], ignore: bool) -> list[int]:
    return row if ignore or eos not in row else row[: row.index(eos) + 1]


if __name__ == "__main__":
    main()
