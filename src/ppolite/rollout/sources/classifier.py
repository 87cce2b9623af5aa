"""A sequence classifier of Hugging Face as a reward source, with a tokenizer of its own.

    rollout → text in the classifier's chat template (or a pair, or the response) → its ids → one number

A reward model of ppolite reads what it was trained on: up to the token that ends the answer's turn, or to the answer's
last one where the answer was cut, and not what the template writes after it.

The number is the logit of a classifier with one output. Of several labels it is the log-odds of one: of its logit
against the logsumexp of the others, or the logit itself where each label is judged alone (`multi_label_classification`,
`regression`). Rows are batched by tokens, padded right; a classifier without a pad token gets them one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppolite.config import ClassifierSource
from ppolite.data.chat import encode_example
from ppolite.data.tables import nearest
from ppolite.models.load import compute_dtype, load_classifier, load_tokenizer
from ppolite.ops.packing import token_batches
from ppolite.types import Prompt, Rollout, UserError

log = logging.getLogger("ppolite")

NO_LIMIT = 1 << 20
"""Tokenizers write a very large number where they know no limit."""

Row = dict[str, list[int]]
"""`input_ids` and what else the tokenizer gives for each token."""


class ClassifierScorer:
    """Loads the classifier; `budget` is the most tokens that go through it at once."""

    def __init__(self, config: ClassifierSource, device: torch.device, budget: int) -> None:
        self.config, self.budget = config, budget
        self.who = f"classifier {config.model}"
        foreign = config.trust_remote_code
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model, trust_remote_code=foreign)
        if config.reads == "chat" and not self.tokenizer.chat_template:
            raise UserError(f"{self.who}: its tokenizer has no chat template; set reads to pair or response")
        dtype = compute_dtype(config.dtype, device)
        self.model: PreTrainedModel = load_classifier(config.model, device, dtype, trust_remote_code=foreign)
        self.pad: int | None = self.tokenizer.pad_token_id  # pyright: ignore[reportAttributeAccessIssue]
        if self.pad is not None:
            self.model.config.pad_token_id = self.pad
        else:
            log.warning("%s: its tokenizer names no pad token, so it reads one response at a time", self.who)
        own = getattr(self.model.config, "ppolite_norm", None) is not None
        self.reads_as_trained = own and config.reads == "chat"
        self.label = self._label()
        self.most = self._most()
        self._told = False

    @property
    def fingerprint(self) -> list[Any]:
        """Of its weights: names, sizes and times of the files; empty where it is no folder."""
        files = sorted(Path(self.config.model).glob("*.safetensors"))
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        rows = [self._row(r) for r in rollouts]
        lengths = [len(row["input_ids"]) for row in rows]
        parts = [[i] for i in range(len(rows))] if self.pad is None else token_batches(lengths, self.budget)
        scores = [0.0] * len(rows)
        for part in parts:
            logits_BC = self.model(**self._batch([rows[i] for i in part])).logits.float()
            for i, score in zip(part, self._chosen(logits_BC).tolist(), strict=True):
                scores[i] = score
        return scores

    def _row(self, rollout: Rollout) -> Row:
        prompt, answer = rollout.prompt, rollout.text
        if self.reads_as_trained or (self.config.reads == "chat" and prompt.messages):
            row = self._as_trained(rollout) if self.reads_as_trained else self._conversation(prompt, answer)
            return self._cut(row, lambda: {k: v[-self.most :] for k, v in row.items()})
        if self.config.reads == "pair":
            row = self._encoded(prompt.last, answer)
            return self._cut(row, lambda: self._cut_pair(prompt.last, answer))
        # A plain prompt is continued by its response, so that together they are one text.
        text = prompt.text + answer if self.config.reads == "chat" else answer
        row = self._encoded(text)
        return self._cut(row, lambda: self._encoded(text, truncation=True, max_length=self.most))

    def _as_trained(self, rollout: Rollout) -> Row:
        prompt_ids, response_ids = encode_example(self.tokenizer, rollout.prompt, rollout.text)
        ids = [*prompt_ids, *(response_ids[:-1] if rollout.finish == "length" else response_ids)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def _conversation(self, prompt: Prompt, answer: str) -> Row:
        turns = [*prompt.messages, {"role": "assistant", "content": answer}]
        try:
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # a template may stumble over anything
            raise UserError(
                f"{self.who}: its chat template refuses the conversation of {prompt.source or 'a prompt'} "
                f"({error}); set reads to pair or response"
            ) from error
        # The template writes its own beginning of text.
        return self._encoded(text, add_special_tokens=False)

    def _encoded(self, *texts: str, **how: Any) -> Row:
        tokenizer: Any = self.tokenizer
        return dict(tokenizer(*texts, verbose=False, **how))

    def _cut_pair(self, prompt: str, answer: str) -> Row:
        # With a response that alone is too long no prompt is left, and it is cut too.
        room = self.most - len(self._encoded("", answer)["input_ids"])
        kind = "only_first" if room > 0 else "longest_first"
        return self._encoded(prompt, answer, truncation=kind, max_length=self.most)

    def _cut(self, row: Row, shorter: Any) -> Row:
        if len(row["input_ids"]) <= self.most:
            return row
        if not self._told:
            self._told = True
            log.warning(
                "%s: an input has %d tokens, of which it takes %d; it is cut, and so are others without a word",
                self.who, len(row["input_ids"]), self.most,
            )  # fmt: skip
        return shorter()

    def _batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        T = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad or 0}
        return {
            key: torch.tensor(
                [row[key] + [fill.get(key, 0)] * (T - len(row[key])) for row in rows],
                device=self.model.device,
            )
            for key in rows[0]
        }

    def _chosen(self, logits_BC: Tensor) -> Tensor:
        if logits_BC.shape[1] == 1:
            return logits_BC[:, 0]
        mine_B = logits_BC[:, self.label]
        if self.model.config.problem_type in ("multi_label_classification", "regression"):
            return mine_B
        others = [i for i in range(logits_BC.shape[1]) if i != self.label]
        return mine_B - logits_BC[:, others].logsumexp(1)

    def _label(self) -> int:
        label, count = self.config.label, int(self.model.config.num_labels or 1)
        names = {str(name): int(i) for i, name in (self.model.config.id2label or {}).items()}
        if count == 1:
            if label is not None:
                raise UserError(
                    f"{self.who}: it has one output, so there is no label to choose; remove `label`"
                )
            return 0
        known = [name for name, _ in sorted(names.items(), key=lambda item: item[1])]
        if label is None:
            raise UserError(
                f"{self.who}: it has {count} labels ({', '.join(known)}); set `label` to one of them"
            )
        found = names.get(str(label), label if isinstance(label, int) and 0 <= label < count else None)
        if not isinstance(found, int):
            raise UserError(
                f"{self.who}: it has no label {label!r}{nearest(str(label), known) or '; it has ' + ', '.join(known)}"
            )
        return found

    def _most(self) -> int:
        config = self.model.config.get_text_config()
        known = [
            self.tokenizer.model_max_length,
            (getattr(config, "max_position_embeddings", None) or NO_LIMIT) - _before_the_first(self.model),
        ]
        takes = min(int(min(n, NO_LIMIT)) for n in known)
        if self.config.max_tokens is not None and self.config.max_tokens > takes:
            raise UserError(
                f"{self.who}: it takes {takes} tokens; lower its max_tokens ({self.config.max_tokens})"
            )
        return self.config.max_tokens or takes


def _before_the_first(model: nn.Module) -> int:
    """Places of the position table that no token gets: RoBERTa counts from behind the one for padding."""
    tables = (getattr(module, "position_embeddings", None) for module in model.modules())
    padding = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
    return 1 + padding[0] if padding and padding[0] is not None else 0
