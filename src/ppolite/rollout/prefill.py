"""Prompts that wait for a place in the batch, run before they are needed.

The front that all prompts share is run once. Then prompts are run by the group, in the order of their length, so that
there is little padding; equal ones are run once. A place that becomes free gets the keys and values of the next
prompt from its group, and the next group is run when a prompt of it is due. So the groups may be large where places
become free one by one.

All but the last token of a prompt is run here. The last is the first that its place in the batch will run.

Axes: G prompts of a group, P shared front, S ragged rest, padded right: no token attends to what comes after it.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from itertools import groupby

import torch
from transformers import DynamicCache, PreTrainedModel

from ppolite.models.slots import SlotCache
from ppolite.ops.packing import common_prefix

GROUP_TOKENS = 1024
"""Run at once, padding included, or one prompt. On a CPU larger and smaller groups are slower (docs/log.md)."""


class Waiting:
    """The prompts of one call that have no place yet."""

    def __init__(self, decoder: PreTrainedModel, ids: Sequence[Sequence[int]], device: torch.device) -> None:
        self.decoder, self.device = decoder, device
        self.heads = [tuple(row[:-1]) for row in ids]
        self._queue = deque(sorted(range(len(ids)), key=lambda i: (len(ids[i]), self.heads[i])))
        self._shared = common_prefix(self.heads, keep=0)
        self._front = DynamicCache()
        self._run([self.heads[0][: self._shared]], self._front, 0)
        self._group, self._members = self._front, dict[tuple[int, ...], int]()

    def admit(self, cache: SlotCache, places: Sequence[int]) -> list[int]:
        """Put the next prompts into `places`, as many as there are. Returns which they are, in the order of places."""
        admitted: list[int] = []
        while self._queue and len(admitted) < len(places):
            if self.heads[self._queue[0]] not in self._members:
                self._next_group()
            first = len(admitted)
            while self._queue and len(admitted) < len(places) and self.heads[self._queue[0]] in self._members:
                admitted.append(self._queue.popleft())
            heads = [self.heads[i] for i in admitted[first:]]
            which, lengths = [self._members[head] for head in heads], [len(head) for head in heads]
            cache.put(places[first : len(admitted)], self._group, which, lengths)
        return admitted

    def _next_group(self) -> None:
        group: list[tuple[int, ...]] = []
        for head, _ in groupby(self.heads[i] for i in self._queue):
            if group and (len(group) + 1) * (len(head) - self._shared) > GROUP_TOKENS:
                break
            group.append(head)
        self._members = {head: g for g, head in enumerate(group)}
        self._group = copy.deepcopy(self._front)
        self._group.batch_repeat_interleave(len(group))
        self._run([head[self._shared :] for head in group], self._group, self._shared)

    def _run(self, rows: Sequence[Sequence[int]], cache: DynamicCache, start: int) -> None:
        """Run the rows, whose tokens come after `start` others that are in the cache."""
        S = max(map(len, rows))
        if S:
            padded = [[*row, *[0] * (S - len(row))] for row in rows]
            self.decoder(
                input_ids=torch.tensor(padded, device=self.device),
                position_ids=torch.arange(start, start + S, device=self.device)[None],
                past_key_values=cache,
                use_cache=True,
            )
