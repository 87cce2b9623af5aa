"""Look at a policy: score and distance from the SFT model on held-out prompts, by plain transformers.

The same code for the policies of both sides, and neither side's own. The score is the reward model's in people's units;
KL(π‖π_ref) is the mean of Σ_t log π/π_ref over the policy's own answers, nats a sequence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.workers.common import report, told


def causal(folder: str) -> Any:
    """A policy that was saved whole."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def policy_of(folder: str, sft: str) -> Any:
    """A policy that was saved whole, or as adapters of the SFT model."""
    if (Path(folder) / "adapter_config.json").exists():
        return PeftModel.from_pretrained(causal(sft), folder).merge_and_unload()
    return causal(folder)


@torch.no_grad()
def answers(model: Any, ids: list[list[int]], most: int, pad: int, eos: int, seed: int) -> list[list[int]]:
    """One answer for each prompt, EOS included; prompts padded left."""
    torch.manual_seed(seed)
    width = max(map(len, ids))
    out = model.generate(
        torch.tensor([[pad] * (width - len(row)) + row for row in ids]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        max_new_tokens=most,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    rows = out[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


@torch.no_grad()
def logprob(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Σ log p of an answer's tokens."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


@torch.no_grad()
def main() -> None:
    spec = told()
    tokenizer = AutoTokenizer.from_pretrained(spec["sft"])
    ids = [p["ids"] for p in json.loads(Path(spec["prompts"]).read_text())["held_out"]]
    policy, reference = policy_of(spec["policy"], spec["sft"]), causal(spec["sft"])
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    drawn = answers(policy, ids, spec["max_new_tokens"], pad, eos, spec["seed"])
    pairs = list(zip(ids, drawn, strict=True))
    kl = [float(logprob(policy, p, a) - logprob(reference, p, a)) for p, a in pairs]
    reward = AutoModelForSequenceClassification.from_pretrained(spec["reward"], dtype=torch.float32).eval()
    offset = reward.config.ppolite_norm["offset"]
    scores = [float(reward(torch.tensor([p + a])).logits) + offset for p, a in pairs]
    report(
        "transformers",
        score=sum(scores) / len(scores),
        kl=sum(kl) / len(kl),
        tokens=sum(map(len, drawn)) / len(drawn),
    )


if __name__ == "__main__":
    main()
