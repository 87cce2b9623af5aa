"""PPO by TRL 1.12.0, the last release that has it: rounds on given prompts, timed.

Set so that it does what ppolite does and nothing else: EOS ends an answer, one minibatch is one update (gradient
accumulation 1), no sample generations, logs or checkpoints, padding ≠ EOS, the reward in the same units, the prompts in
the given order, AdamW with ppolite's ε and betas, separate learning rates for policy and critic. What it trains:

    full       all of policy and critic
    peft       adapters on all layers of the policy, as `peft_config` puts them; all of the critic
    lora       adapters on all layers of both
    lora-top   adapters on the layers of both from `split` on
    top        the layers of both from `split` on

The last three are more than TRL offers: `choose` does what its user would have to. With adapters the reference is the
policy without them.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.workers.common import report, told
from benchmarks.workers.rounds import Clock


class Enough(Exception):  # noqa: N818
    """TRL's loop looks at no callback's wish to stop."""


class Laps(TrainerCallback):
    """Tells the clock when a round is over."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}
        self.clock: Clock | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        assert self.clock
        self.clock.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.clock
        if not self.clock.lap(**self.seen):
            raise Enough

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.seen["kl"] = logs.get("objective/kl", 0.0)

    def watch(self, pad: int, eos: int) -> None:
        """Count what `batch_generation` draws: TRL logs neither tokens nor seconds of it."""
        draw = ppo_trainer.batch_generation

        def counted(model: Any, queries: torch.Tensor, *args: Any) -> Any:
            began = time.perf_counter()
            sequences, logits = draw(model, queries, *args)
            ends = sequences[:, queries.shape[1] :] == eos
            before = ends.cumsum(1) - ends.long()
            self.seen |= {
                "generate_s": time.perf_counter() - began,
                "prompt_tokens": int((queries != pad).sum()),
                "response_tokens": int((before == 0).sum()),
                "ended": float(ends.any(1).float().mean()),
            }
            return sequences, logits

        ppo_trainer.batch_generation = counted


def scalar_model(folder: str, dtype: torch.dtype) -> Any:
    """The reward model with mean 0 and deviation 1 on the SFT model's answers, as ppolite normalises it."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    norm = model.config.ppolite_norm
    head = nn.Linear(model.score.in_features, 1).to(dtype)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / norm["std"])
        head.bias.fill_((norm["offset"] - norm["mean"]) / norm["std"])
    model.score = head
    return model


def choose(policy: Any, critic: Any, spec: dict[str, Any]) -> Any:
    """Leave a gradient to what `spec` trains. Returns the policy, with its adapters if it has some."""
    kind, split = spec["train"], spec["split"] if spec["train"].endswith("top") else 0
    if kind == "full":
        return policy
    if kind != "peft":
        critic.requires_grad_(False)
        critic.score.requires_grad_(True)
    if kind == "top":
        policy.requires_grad_(False)
        for model in (policy, critic):
            model.model.layers[split:].requires_grad_(True)
            model.model.norm.requires_grad_(True)
        return policy
    layers = critic.model.layers
    lora: dict[str, Any] = {
        "r": spec["lora"]["rank"],
        "lora_alpha": spec["lora"]["alpha"],
        "target_modules": sorted(
            {name.rpartition(".")[2] for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
        ),
        "layers_to_transform": list(range(split, len(layers))),
    }
    if kind != "peft":
        inject_adapter_in_model(LoraConfig(**lora), critic)
        critic.score.requires_grad_(True)  # the injection leaves a gradient to adapters alone
    return get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", **lora))


def trainer(spec: dict[str, Any], rounds: list[list[dict[str, Any]]], laps: Laps) -> PPOTrainer:
    ppo, weights = spec["ppo"], getattr(torch, spec["weights"])
    causal = AutoModelForCausalLM.from_pretrained
    tokenizer = AutoTokenizer.from_pretrained(f"{spec['run']}/sft", padding_side="left")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    laps.watch(tokenizer.pad_token_id, tokenizer.eos_token_id)
    policy: Any = causal(f"{spec['run']}/sft", dtype=weights)
    adapted = spec["train"] not in ("full", "top")
    reference = None if adapted else causal(f"{spec['run']}/sft", dtype=weights)
    reward, critic = (scalar_model(f"{spec['run']}/reward", weights) for _ in range(2))
    policy = choose(policy, critic, spec)
    if spec["checkpointing"]:
        policy.gradient_checkpointing_enable()
        critic.gradient_checkpointing_enable()
    size = len(rounds[0])
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        seed=spec["seed"],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1,
        num_mini_batches=ppo["minibatches"],
        num_ppo_epochs=ppo["epochs"],
        total_episodes=size * len(rounds),
        local_rollout_forward_batch_size=size,
        num_sample_generations=0,
        response_length=ppo["max_new_tokens"],
        stop_token="eos",
        temperature=ppo["temperature"],
        missing_eos_penalty=ppo["missing_eos_penalty"],
        kl_coef=ppo["kl"]["beta"],
        gamma=ppo["gamma"],
        lam=ppo["lam"],
        cliprange=ppo["clip"] or 0.2,
        cliprange_value=ppo["value_clip"] or 1e9,
        vf_coef=1.0,  # as here, where the critic's loss has its own optimizer
        gradient_checkpointing=False,  # this trainer leaves it to the model's owner
        bf16=spec["autocast"],
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    if spec["autocast"]:  # this trainer's Accelerator does not look at `bf16`
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    made = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=Dataset.from_list([{"input_ids": p["ids"]} for r in rounds for p in r]),
        eval_dataset=Dataset.from_list([{"input_ids": p["ids"]} for p in rounds[0]]),
        callbacks=[laps],
        optimizers=optimizers(policy, critic, ppo, len(rounds)),
    )
    assert made.accelerator.mixed_precision == ("bf16" if spec["autocast"] else "no")
    # As given, since the trainer shuffles.
    loader = DataLoader(made.train_dataset, batch_size=size, collate_fn=made.data_collator)
    made.dataloader = made.accelerator.prepare(loader)
    return made


def optimizers(policy: nn.Module, critic: nn.Module, ppo: dict[str, Any], rounds: int) -> Any:
    """ppolite's AdamW, each learning rate with its own schedule."""
    groups = [
        {"params": [p for p in part.parameters() if p.requires_grad], "lr": ppo[key]["lr"]}
        for part, key in ((policy, "optim"), (critic, "critic"))
    ]
    optim = ppo["optim"]
    adam = torch.optim.AdamW(
        groups, betas=(0.9, optim["beta2"]), eps=optim["adam_eps"], weight_decay=0.0, fused=True
    )

    def rate(schedule: str) -> Callable[[int], float]:
        assert schedule in ("linear", "constant")
        return (lambda done: 1 - done / rounds) if schedule == "linear" else (lambda _: 1.0)

    rates = [rate(ppo[key]["schedule"]) for key in ("optim", "critic")]
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, rates)


def main() -> None:
    spec = told()
    started = time.perf_counter()
    rounds = json.loads(Path(spec["prompts"]).read_text())["rounds"][: spec["rounds"]]
    laps = Laps()
    made = trainer(spec, rounds, laps)
    clock = laps.clock = Clock(spec, lambda folder: made.policy_model.save_pretrained(folder))
    setup = time.perf_counter() - started
    # Generation and scoring too, which the trainer runs outside of its Accelerator's own.
    half = torch.autocast(
        "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=spec["autocast"]
    )
    with contextlib.suppress(Enough), half:
        made.train()
    report("trl", "transformers", "peft", setup_s=setup, **clock.figures())


if __name__ == "__main__":
    main()
