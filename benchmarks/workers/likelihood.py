"""How likely answers are to the model that was to draw them: nats a token, by plain transformers in float32.

A sampler that is fast because it draws from another distribution shows here, and in the lengths.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.workers.common import report, told


def spread(values: list[float]) -> list[float]:
    """Mean and its standard error."""
    return [statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5]


@torch.no_grad()
def main() -> None:
    spec = told()
    model: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
    prompts = [p["ids"] for p in json.loads(Path(spec["prompts"]).read_text())[1]]
    found = {}
    for name, file in spec["answers"].items():
        answers = json.loads(Path(file).read_text())[0]
        nats = []
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            nats.append(-float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean()))
        found[name] = {"nats": spread(nats), "length": spread([float(len(a)) for a in answers])}
    report("transformers", found=found)


if __name__ == "__main__":
    main()
