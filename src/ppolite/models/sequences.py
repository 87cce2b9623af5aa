"""Prompts with responses as padded tensors; tokens that all rows share at the front stand once.

    prefix_P      the common front of all prompts (system prompt, instruction): run once for the whole batch
    ids_BT        what is left of each prompt, then its response, right-padded
    mask_BR       the response tokens, counted from the response's first

Axes: B rows, T tokens after the shared prefix, P prefix tokens, R response tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ppolite.models.packs import Packs
from ppolite.ops.packing import common_prefix, even_batches, token_batches


def micro_batches(lengths: Sequence[int], budget: int, *, packed: bool) -> list[list[int]]:
    """Rows that go through the model together: `budget` tokens in all, or, where rows are padded, padding included."""
    return even_batches(lengths, budget) if packed else token_batches(lengths, budget)


@dataclass
class Sequences:
    """Rows of prompt + response, right-padded, the common front kept once."""

    prefix_P: Tensor
    ids_BT: Tensor
    mask_BT: Tensor
    """True on tokens, False on padding."""
    starts_B: Tensor
    """Column of ids_BT at which the response begins (at least 1)."""
    mask_BR: Tensor
    """True on response tokens."""
    lengths: list[int]
    """Tokens of each row after the shared prefix; known here, so that nobody waits for a GPU to hear of them."""
    answers: list[int]
    """Those of its response."""
    h_prefix_1PD: Tensor | None = None
    h_BTD: Tensor | None = None
    """Output of the frozen bottom, when it has been run and is kept; perhaps not on the device of the rest."""
    again: Callable[[Sequences], Tensor] | None = None
    """Runs the bottom, where its output is not kept."""
    packed: bool = False
    """Whether the model is to see the rows end to end."""

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
    ) -> Sequences:
        """Lay out token ids.

        Raises ValueError for a prompt without tokens, since its last one predicts the response's first.
        """
        if any(not p for p in prompts):
            raise ValueError("a prompt has no tokens")
        shared = common_prefix(prompts)
        rows = [[*p[shared:], *r] for p, r in zip(prompts, responses, strict=True)]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
        lengths, answers = [len(r) for r in rows], [len(r) for r in responses]
        length_B, answer_B = torch.tensor(lengths), torch.tensor(answers)
        return cls(
            prefix_P=torch.tensor(list(prompts[0][:shared]), dtype=torch.long, device=device),
            ids_BT=ids.to(device),
            mask_BT=(torch.arange(ids.shape[1]) < length_B[:, None]).to(device),
            starts_B=(length_B - answer_B).to(device),
            mask_BR=(torch.arange(max(answers)) < answer_B[:, None]).to(device),
            lengths=lengths,
            answers=answers,
        )

    def __len__(self) -> int:
        return self.ids_BT.shape[0]

    def batches(self, budget: int, rows: Sequence[int] | None = None) -> list[list[int]]:
        """Micro-batches of these rows, or of all."""
        rows = range(len(self)) if rows is None else rows
        parts = micro_batches([self.lengths[i] for i in rows], budget, packed=self.packed)
        return [[rows[i] for i in part] for part in parts]

    @cached_property
    def packs(self) -> Packs:
        """The rows end to end; the same for all roles that ask."""
        return Packs.of(self.lengths, self.ids_BT.shape[1], self.prefix_P.numel(), self.ids_BT.device)

    @cached_property
    def hidden_BTD(self) -> Tensor | None:
        """Output of the frozen bottom, on the device, for all roles that ask; None where it was not run."""
        if self.again is not None:
            return self.again(self)
        return None if self.h_BTD is None else self.h_BTD.to(self.ids_BT.device)

    def select(self, rows: Sequence[int]) -> Sequences:
        """The given rows, trimmed to the longest of them."""
        pick = torch.tensor(rows, device=self.ids_BT.device)
        lengths, answers = [self.lengths[i] for i in rows], [self.answers[i] for i in rows]
        T, R = max(lengths), max(answers)
        return replace(
            self,
            ids_BT=self.ids_BT[pick, :T],
            mask_BT=self.mask_BT[pick, :T],
            starts_B=self.starts_B[pick],
            mask_BR=self.mask_BR[pick, :R],
            lengths=lengths,
            answers=answers,
            h_BTD=None
            if self.h_BTD is None
            else self.h_BTD[torch.tensor(rows, device=self.h_BTD.device), :T],
        )

    def predictors_BR(self) -> Tensor:
        """Columns whose hidden state predicts response token r: the token before it. Clamped at padding."""
        R = self.mask_BR.shape[1]
        columns = self.starts_B[:, None] - 1 + torch.arange(R, device=self.starts_B.device)
        return columns.clamp(max=self.ids_BT.shape[1] - 1)

    def responses_BR(self) -> Tensor:
        """Token ids of the responses; meaningless where mask_BR is False."""
        return self.ids_BT.gather(1, (self.predictors_BR() + 1).clamp(max=self.ids_BT.shape[1] - 1))
