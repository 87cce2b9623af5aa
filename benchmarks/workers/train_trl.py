"""SFT or reward model by today's TRL: updates on given batches, timed.

The same token ids in the same batches and order, AdamW with ppolite's numbers, gradients clipped at the same norm, loss
on answers alone. What it trains:

    full       everything
    top        layers from `split` on
    lora       adapters on all layers
    lora-top   adapters on the layers from `split` on
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.workers.common import told
from benchmarks.workers.updates import Updates


class Laps(TrainerCallback):
    def __init__(self, updates: Updates) -> None:
        self.updates = updates

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.updates.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.updates.done()

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.updates.losses.append(logs["loss"])


def settings(spec: dict[str, Any], batches: list[list[Any]]) -> dict[str, Any]:
    """For both trainers."""
    adam = spec["adam"]
    return {
        "output_dir": tempfile.mkdtemp(),
        "seed": spec["seed"],
        "per_device_train_batch_size": len(batches[0]),
        "gradient_accumulation_steps": 1,
        "max_steps": len(batches),
        "train_sampling_strategy": "sequential",
        "learning_rate": adam["lr"],
        "lr_scheduler_type": adam["schedule"],
        "warmup_steps": 0,
        "weight_decay": adam["weight_decay"],
        "adam_beta2": adam["beta2"],
        "adam_epsilon": adam["adam_eps"],
        "max_grad_norm": adam["max_grad_norm"],
        "gradient_checkpointing": spec["checkpointing"],
        "bf16": spec["autocast"],
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def adapters(model: Any, spec: dict[str, Any], task: str) -> LoraConfig | None:
    """Leave a gradient to what `spec` trains; the adapters, which the trainer puts on."""
    kind, split = spec["train"], spec["split"] if spec["train"].endswith("top") else 0
    if kind == "top":
        model.requires_grad_(False)
        model.model.layers[split:].requires_grad_(True)
        model.model.norm.requires_grad_(True)
        if task == "SEQ_CLS":
            model.score.requires_grad_(True)
    if not kind.startswith("lora"):
        return None
    layers = model.model.layers
    names = {
        name.rpartition(".")[2] for name, part in layers.named_modules() if isinstance(part, torch.nn.Linear)
    }
    return LoraConfig(
        task_type=task,
        r=spec["lora"]["rank"],
        lora_alpha=spec["lora"]["alpha"],
        target_modules=sorted(names),
        layers_to_transform=list(range(split, len(layers))),
    )


def sft(spec: dict[str, Any], updates: Updates) -> Any:
    rows = [
        {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}
        for batch in updates.batches
        for prompt, answer in batch
    ]
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["weights"]))
    config = SFTConfig(
        **settings(spec, updates.batches),
        completion_only_loss=True,
        padding_free=spec["padding_free"],
        max_length=None,
    )
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        callbacks=[Laps(updates)],
        peft_config=adapters(model, spec, "CAUSAL_LM"),
    )


def reward(spec: dict[str, Any], updates: Updates) -> Any:
    rows = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        for batch in updates.batches
        for (prompt, chosen), (_, rejected) in batch
    ]
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        spec["model"],
        num_labels=1,
        dtype=getattr(torch, spec["weights"]),
        pad_token_id=tokenizer.pad_token_id,
    )
    return RewardTrainer(
        model=model,
        args=RewardConfig(**settings(spec, updates.batches), max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Laps(updates)],
        peft_config=adapters(model, spec, "SEQ_CLS"),
    )


def main() -> None:
    spec = told()
    updates = Updates(spec)
    {"sft": sft, "reward": reward}[spec["stage"]](spec, updates).train()
    updates.report("trl", "transformers", "peft")


if __name__ == "__main__":
    main()
