"""Supervised fine-tuning: imitate people's answers.

    loss = −Σ log π(token) over the answers' tokens / their number in the whole batch

Prompts carry no loss. The frozen bottom is run without gradients; the result is an ordinary HF folder,
`RUN/sft`. Left out: packing several examples into a row (answers are bucketed by length instead).

    ppolite sft recipes/film.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ppolite.config import Recipe, save_recipe
from ppolite.data.chat import encode_example
from ppolite.models.export import save_policy
from ppolite.models.roles import trainable
from ppolite.models.trunk import Sequences
from ppolite.obs.sinks import MetricsLog, progress
from ppolite.ops.packing import token_batches
from ppolite.stages.loop import (
    Learner,
    batches,
    count_batches,
    derive_seed,
    load_split,
    log,
    open_model,
    open_trunk,
    shuffled,
)
from ppolite.types import Example, UserError

Encoded = tuple[list[int], list[int]]
"""Prompt ids and response ids, the ending token included."""


class SFT:
    """One supervised run: `SFT(recipe, run_dir).run()`."""

    def __init__(self, recipe: Recipe, run_dir: str | Path) -> None:
        if recipe.sft is None:
            raise UserError("this recipe has no `sft` section; add one with its `data`")
        self.recipe, self.config, self.run_dir = recipe, recipe.sft, Path(run_dir)
        self.opened = open_model(recipe)
        train, held = load_split(self.config.data, "examples", recipe.seed)
        self.train = self.encode(train, self.config.data.limit)
        if not self.train:
            raise UserError(
                f"sft.data {self.config.data.path}: of {len(train)} examples to train on none fits in "
                f"{self.limit} tokens; raise sft.max_tokens, or lower sft.data.held_out"
            )
        self.held = self.encode(held, self.config.eval_examples)
        self.trunk = open_trunk(recipe, self.opened, [p + r for p, r in self.train[:4]])
        self.body, _ = trainable(self.trunk.top, recipe.train)
        self.trunk.hold()
        self.body.hold({})

    @property
    def limit(self) -> int:
        """Most tokens of an example."""
        return min(self.config.max_tokens, self.opened.context)

    def encode(self, examples: Sequence[Example], most: int | None) -> list[Encoded]:
        """Token ids of the first `most` after shuffling; examples over the limit are reported, left out."""
        encoded: list[Encoded] = []
        for example in shuffled(examples, derive_seed(self.recipe.seed, "sft")):
            if len(encoded) == most:
                break
            pair = encode_example(self.opened.tokenizer, example.prompt, example.response)
            length = sum(map(len, pair))
            if length > self.limit:
                log.warning("%s: %d tokens, limit %d; left out", example.prompt.source, length, self.limit)
                continue
            encoded.append(pair)
        return encoded

    def loss(self, rows: Sequence[Encoded], *, backward: bool) -> float:
        """Mean loss per answer token, nats; gradients are accumulated when `backward`."""
        seqs = self.trunk.bottom(Sequences.of([p for p, _ in rows], [r for _, r in rows], self.opened.device))
        tokens = int(seqs.mask_BR.sum())
        total = 0.0
        with torch.set_grad_enabled(backward):
            for part in token_batches(seqs.lengths, self.config.optim.micro_batch_tokens):
                logp_BR, _ = self.body.logprobs(seqs.select(part), 1.0)
                loss = -logp_BR.sum() / tokens
                if backward:
                    loss.backward()
                total += float(loss.detach())
        return total

    def held_out_loss(self) -> float | None:
        return self.loss(self.held, backward=False) if self.held else None

    def run(self) -> dict[str, float | None]:
        """Train, log, save `RUN/sft`. Returns the held-out loss before and after."""
        config, folder = self.config, self.run_dir / "sft"
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_recipe(self.recipe, self.run_dir / "recipe.yaml")
        total = count_batches(len(self.train), config.batch_size, config.epochs)
        learner = Learner(self.body.trained(), config.optim, total)
        before = after = self.held_out_loss()
        order = derive_seed(self.recipe.seed, "sft-order")
        stream = batches(
            self.train, config.batch_size, config.epochs, order, length=lambda row: len(row[0]) + len(row[1])
        )
        with MetricsLog(self.run_dir) as metrics, progress("sft", total=total) as tick:
            metrics.log("sft", 0, {"loss/heldout": before})
            for step, rows in enumerate(stream, 1):
                lr = learner.lr
                row: dict[str, float | None] = {"loss/train": self.loss(rows, backward=True), "lr": lr}
                row["grad_norm"] = learner.step()
                if step % config.eval_every == 0 or step == total:
                    row["loss/heldout"] = after = self.held_out_loss()
                metrics.log("sft", step, row)
                tick(
                    1,
                    f"loss {row['loss/train']:.3f}"
                    + (f", held out {after:.3f}" if after is not None else ""),
                )
        save_policy(self.opened.model, self.body, self.opened.tokenizer, folder)
        return {"loss_before": before, "loss_after": after}
