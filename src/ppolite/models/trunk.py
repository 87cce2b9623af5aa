"""One frozen bottom, several tops: a decoder cut at layer k.

    Sequences        prompts with responses as padded tensors                                (sequences.py)
    Body             layers k..L-1 with the final norm and a head: what a role owns          (body.py)
    Trunk.bottom()   runs layers 0..k-1 once and keeps h_k in the Sequences, where there is room (memory.py)
    verify()         compares the split path with the model's plain forward pass on real tokens

The bottom is a view of the model with its first k layers and no final norm, run by the model's own forward
function. Its output serves all roles and all epochs.

Axes: B rows, T tokens after the shared prefix, P prefix tokens, R response tokens, D hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ppolite.models.body import Body
from ppolite.models.decoder import arithmetic, decoder_of, hold, last_hidden, layer_path, layers_of, view
from ppolite.models.memory import Keep, is_out_of_memory, kept_at
from ppolite.models.packs import kinds_of
from ppolite.models.sequences import Sequences
from ppolite.types import UserError


class Trunk:
    """A loaded causal LM cut at `split`: its frozen bottom and `top`, the body as loaded."""

    def __init__(
        self,
        model: PreTrainedModel,
        split: int,
        dtype: torch.dtype = torch.float32,
        *,
        packed: bool | None = None,
    ) -> None:
        """`packed`: whether rows are laid end to end; by default wherever a mask can say who looks at what."""
        decoder = decoder_of(model)
        layers_name, norm_name = layer_path(decoder)
        layers = layers_of(decoder)
        if not 0 <= split < len(layers):
            raise UserError(
                f"trunk.split is {split}, but the model has layers 0..{len(layers) - 1}; choose one of those"
            )
        model.requires_grad_(False).eval()
        self.model, self.split, self.dtype = model, split, dtype
        self.packed = kinds_of(decoder.config) is not None if packed is None else packed
        self.keep: Keep = "auto"
        """Where the bottom's output for a round of PPO stays (`trunk.keep`)."""
        self.gap: float | None = None
        """What `verify` found, where it was asked."""
        self.top = Body.of(model, split, dtype=dtype)
        self._last_front: tuple[tuple[int, ...], Tensor | None, DynamicCache] | None = None
        self._bottom = (
            view(decoder, {layers_name: layers[:split], norm_name: nn.Identity()}) if split else None
        )

    def hold(self) -> None:
        """`hold` the bottom. Not at once: a reward model's bottom is compared with this one first."""
        hold(layers_of(decoder_of(self.model))[: self.split], self.dtype)

    def _front(self, prefix_P: Tensor) -> tuple[Tensor | None, DynamicCache]:
        """Output and cache of the shared prefix; frozen, so the last one is kept while it stays the same."""
        key = tuple(prefix_P.tolist())
        if self._last_front is None or self._last_front[0] != key:
            assert self._bottom is not None
            cache = DynamicCache()
            positions = torch.arange(len(key), device=prefix_P.device)[None]
            h = None
            if key:
                h = last_hidden(
                    self._bottom,
                    input_ids=prefix_P[None],
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
            self._last_front = key, h, cache
        return self._last_front[1:]

    @torch.no_grad()
    def bottom(self, seqs: Sequences, budget: int | None = None, keep: Keep = "device") -> Sequences:
        """Run the frozen layers once; the result carries h_k for every role and every epoch.

        Where `keep` comes to nowhere, whatever is selected from the result runs them when it is asked. `budget`
        bounds the tokens that go through at once.
        """
        seqs = replace(seqs, packed=self.packed)
        if self._bottom is None:
            return seqs
        (B, T), device = seqs.ids_BT.shape, seqs.ids_BT.device
        D = decoder_of(self.model).config.hidden_size
        place = kept_at(keep, 4 * B * T * D, device)
        with arithmetic(device, self.dtype):
            h_prefix, front = self._front(seqs.prefix_P)
        run = partial(self._run_bottom, front=front if seqs.prefix_P.numel() else None)
        if place == "none":
            return replace(seqs, h_prefix_1PD=h_prefix, again=run)
        h_BTD, where = None, device if place == "device" else torch.device("cpu")
        for rows in seqs.batches(budget or B * T):
            h = run(seqs.select(rows)).to(where)
            if h_BTD is None:
                h_BTD = h.new_zeros(B, T, D)
            h_BTD[torch.tensor(rows, device=where), : h.shape[1]] = h
        return replace(seqs, h_prefix_1PD=h_prefix, h_BTD=h_BTD)

    @torch.no_grad()
    def _run_bottom(self, seqs: Sequences, front: DynamicCache | None) -> Tensor:
        """h_k of the rows, [B, T, D]; at padding anything."""
        assert self._bottom is not None
        P, (B, T) = seqs.prefix_P.numel(), seqs.ids_BT.shape
        if seqs.packed:
            packs = seqs.packs
            ids, positions = packs.lay(seqs.ids_BT), packs.position_KL
            mask = packs.masks(self._bottom.config, torch.promote_types(self.model.dtype, torch.float32))
        else:
            ids, positions = seqs.ids_BT, torch.arange(P, P + T, device=seqs.ids_BT.device)[None]
            mask = torch.cat([seqs.mask_BT.new_ones(B, P), seqs.mask_BT], 1)
        cache: dict[str, Any] = {"use_cache": False}
        if front is not None:
            cache = {"use_cache": True, "past_key_values": copy.deepcopy(front)}
            cache["past_key_values"].batch_repeat_interleave(len(ids))
        with arithmetic(seqs.ids_BT.device, self.dtype):
            h = last_hidden(self._bottom, input_ids=ids, attention_mask=mask, position_ids=positions, **cache)
        return h.flatten(0, 1)[seqs.packs.place_BT] if seqs.packed else h


def verify(
    model: PreTrainedModel,
    split: int,
    rows: Sequence[Sequence[int]],
    *,
    packed: bool | None = None,
    recompute: bool = False,
) -> float:
    """Largest difference between the split path and the plain forward pass on real tokens.

    Compares, in the weights' dtype, the log-probs (nats, absolute) of each row's second half and the gradient
    of their sum with respect to the last layer (the distance of the two relative to their length; a single weight
    would not do, since that of a query is 0 after a prompt of one token). A row of one token is doubled.
    """
    pairs = [list(r) if len(r) > 1 else [*r, *r] for r in rows]
    halves = [(r[: len(r) // 2], r[len(r) // 2 :]) for r in pairs]
    trunk = Trunk(model, split, model.dtype, packed=packed)
    if recompute:
        trunk.top.recompute()
    device = trunk.top.device
    watched = list(trunk.top.layers[-1].parameters())
    trunk.top.layers[-1].requires_grad_(True)
    try:
        seqs = Sequences.of([p for p, _ in halves], [r for _, r in halves], device)
        ours, _ = trunk.top.logprobs(trunk.bottom(seqs), 1.0)
        our_grad = flat_grad(ours.sum(), watched)
        plain: list[Tensor] = []
        for prompt, response in halves:
            ids = torch.tensor([prompt + response], device=device)
            logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            plain.append(logp.gather(1, ids[0, len(prompt) :, None])[:, 0])
        plain_grad = flat_grad(torch.cat(plain).sum(), watched)
        gap = (ours[seqs.mask_BR] - torch.cat(plain)).abs().max()
        # Not entry by entry: where a norm's input has a huge channel, rounding alone moves one entry by 1e-3 of the
        # largest (seen on SmolLM2 with an answer of −22 nats a token; the whole vector had moved by 1e-4).
        grad_gap = (our_grad - plain_grad).norm() / plain_grad.norm().clamp(min=1e-12)
        return float(torch.maximum(gap, grad_gap).detach())
    finally:
        trunk.top.layers[-1].requires_grad_(False)


def flat_grad(loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """∂loss/∂weights, one after another in one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def checked_trunk(
    model: PreTrainedModel,
    split: int,
    rows: Sequence[Sequence[int]],
    say: Callable[[str], None],
    dtype: torch.dtype = torch.float32,
    *,
    recompute: bool = False,
) -> Trunk:
    """A trunk that was compared with the plain model; falls back to split 0, announced, where they differ.

    Raises UserError when even the unsplit path differs, or where `recompute` makes the difference: then log-probs or
    gradients would be wrong.
    """
    tolerance = 1e-3  # both sides run in float32, the dtype of loaded weights
    errors: list[Exception] = []

    def gap_of(split: int, **ways: Any) -> float:
        """Infinite where the model's own code cannot be run so: layers can ask for other shapes than these."""
        try:
            return verify(model, split, rows, **ways)
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):  # other ways need as much
                raise
            errors.append(error)
            return math.inf

    gap = gap_of(split, recompute=recompute)
    if gap <= tolerance:
        trunk = Trunk(model, split, dtype)
        trunk.gap = gap
        return trunk
    name = type(model).__name__
    by = f"by {gap:.2g}" if errors == [] else f"to an error ({errors[0]})"
    if recompute and gap_of(split) <= tolerance:
        raise UserError(f"train.recompute changes {name}'s results {by}; set it to false")
    if gap_of(split, packed=False) <= tolerance:
        say(f"rows that are laid end to end change {name}'s results {by}; going on with padded ones")
        return Trunk(model, split, dtype, packed=False)
    if split and gap_of(0, packed=False) <= tolerance:
        say(f"trunk.split: {split} changes {name}'s results {by} on real tokens; going on with 0")
        return Trunk(model, 0, dtype, packed=False)
    raise UserError(
        f"{name}: the model's own forward pass is changed {by} by ppolite's way through it, even without a split; it"
        " cannot be trained correctly, so choose another model"
    ) from (errors[0] if errors else None)
