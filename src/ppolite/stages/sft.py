"""Supervised fine-tuning: imitate people's answers.

    loss = −Σ log π(token) over the answers' tokens / their number in the whole batch

Prompts carry no loss. The frozen bottom is run without gradients; the result is an ordinary HF folder,
`RUN/sft`. Left out: packing several examples into a row (answers are bucketed by length instead).

    ppolite sft recipes/film.yaml
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from ppolite.config import Recipe
from ppolite.data.chat import encode_example
from ppolite.models.export import save_policy
from ppolite.models.roles import trainable
from ppolite.models.trunk import Sequences
from ppolite.stages.checkpoint import State
from ppolite.stages.doctor.quick import before_fit
from ppolite.stages.learner import Fitting, Learner, Skips, put_weights, step_together
from ppolite.stages.opening import open_model, open_trunk
from ppolite.stages.rows import batches, count_batches, load_split, shuffled
from ppolite.stages.seeds import derive_seed, fingerprint_of
from ppolite.stages.session import Session
from ppolite.types import Example, UserError

log = logging.getLogger("ppolite")

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
        self.first = [(example.prompt, example.response) for example in train[:8]]
        self.left_out = 0
        self.train = self.encode(train, self.config.data.limit)
        if not self.train:
            raise UserError(
                f"sft.data {self.config.data.path}: of {len(train)} examples to train on none fits in "
                f"{self.limit} tokens; raise sft.max_tokens, or lower sft.data.held_out"
            )
        self.held = self.encode(held, self.config.look_examples)
        self.trunk = open_trunk(recipe, self.opened, [p + r for p, r in self.train[:4]])
        self.body, _ = trainable(self.trunk.top, recipe.train, own=True)
        self.trunk.hold()
        self.body.hold({})
        self.reads = fingerprint_of((self.train, self.held))
        total = count_batches(len(self.train), self.config.batch_size, self.config.epochs)
        self.learner = Learner(self.body.trained(), self.config.optim, total)
        self.skips, self.fitting = Skips(), Fitting(self.config.optim.micro_batch_tokens)
        self.before: float | None = None
        self.after: float | None = None

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
                self.left_out += 1
                continue
            encoded.append(pair)
        return encoded

    def loss(self, rows: Sequence[Encoded], *, backward: bool) -> float:
        """Mean loss per answer token, nats; gradients are accumulated when `backward`."""
        seqs = Sequences.of([p for p, _ in rows], [r for _, r in rows], self.opened.device)
        seqs = self.trunk.bottom(seqs, self.fitting.tokens)
        tokens = sum(seqs.answers)
        total = 0.0
        with torch.set_grad_enabled(backward):
            for part in seqs.batches(self.fitting.tokens):
                logp_BR, _ = self.body.logprobs(seqs.select(part), 1.0)
                loss = -logp_BR.sum() / tokens
                if backward:
                    loss.backward()
                total += float(loss.detach())
        return total

    def held_out_loss(self) -> float | None:
        """None where nothing is held out, or where it is not finite."""
        if not self.held:
            return None
        loss = self.fitting.run(lambda: self.loss(self.held, backward=False), self.learner.clear)
        return loss if math.isfinite(loss) else None

    def run(self, *, allow_changes: bool = False) -> dict[str, float | None]:
        """Train, log, save `RUN/sft`; an interrupted run goes on. Returns the held-out loss before and after."""
        before_fit("sft", self)
        config = self.config
        with Session("sft", self, self.learner.total, allow_changes=allow_changes) as session:
            if session.begun_anew:
                self.before = self.after = self.held_out_loss()
                session.metrics.log(0, {"loss/heldout": self.before})
            stream = islice(self.stream(), session.step, None)
            for step, rows in zip(session, stream, strict=True):
                with session.untouched():
                    loss = self.gradients(rows)
                row = self.update(rows, loss)
                if step % config.look_every == 0 or step == session.total:
                    row["loss/heldout"] = self.after = self.held_out_loss()
                held_out = "" if self.after is None else f", held out {self.after:.3f}"
                session.log(row, f"loss {row['loss/train']:.3f}{held_out}")
            save_policy(self.opened.model, self.body, self.opened.tokenizer, self.run_dir / "sft")
        return {"loss_before": self.before, "loss_after": self.after}

    def stream(self) -> Iterator[list[Encoded]]:
        """The batches of all epochs."""
        size, epochs, seed = (
            self.config.batch_size,
            self.config.epochs,
            derive_seed(self.recipe.seed, "sft-order"),
        )
        return batches(self.train, size, epochs, seed, length=lambda row: len(row[0]) + len(row[1]))

    def gradients(self, rows: Sequence[Encoded]) -> float:
        """Those of one update. Returns its loss."""
        return self.fitting.run(lambda: self.loss(rows, backward=True), self.learner.clear)

    def update(self, rows: Sequence[Encoded], loss: float) -> dict[str, float | None]:
        """Apply the gradients of these rows, or skip and count them where they or the loss are not finite."""
        row: dict[str, float | None] = {"lr": self.learner.lr}
        norms = step_together(self.learner, sound=math.isfinite(loss))
        if norms is None:
            self.skips.add("the loss or its gradient was not finite", [self.text(pair) for pair in rows])
        else:
            self.skips.clear()
            row["grad_norm"] = norms[0]
        return row | {"loss/train": loss, "update/skipped": self.skips.total}

    def text(self, pair: Encoded) -> dict[str, str]:
        prompt, response = (str(self.opened.tokenizer.decode(ids)) for ids in pair)
        return {"prompt": prompt, "response": response}

    def state(self) -> State:
        return {
            "weights": self.body.trained_by_name(),
            "learner": self.learner.state(),
            "fitting": self.fitting.state(),
            "losses": [self.before, self.after],
        }

    def restore(self, state: State) -> None:
        self.go_back(state)
        self.learner.done = state["learner"]["done"]
        self.fitting.restore(state["fitting"])

    def go_back(self, state: State) -> None:
        put_weights(self.body, state["weights"])
        self.learner.restore_moments(state["learner"])
        self.before, self.after = state["losses"]
