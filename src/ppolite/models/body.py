"""What a role owns of a decoder: the layers from `start` on, the final norm, a head.

    Body          runs Sequences from the cached h_k, or from token ids, to log-probs, values or scores
    decoder.py    where a decoder's layers, final norm and front are

The layers are always run by the model's *own* forward function, so that masks, rotary embeddings, sliding
windows and per-layer types are the library's business. A top is a view of the decoder whose first `start`
layers are `_Skip`, the last of which puts h_k in place. Embedding scales (Gemma) and learned positions
(GPT-2) are applied before layer 0 and are thus thrown away in a top, as they must be.

The shared front of the prompts is run once per batch and its keys and values are repeated; gradients flow
through them. On short answers to templated prompts this halves the work.

Axes: B rows, T tokens after the shared prefix, P prefix tokens, R response tokens, N tokens that count, D
hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ppolite.models.decoder import (
    arithmetic,
    decoder_of,
    front_of,
    hold,
    last_hidden,
    layer_path,
    layers_of,
    view,
    wide,
)
from ppolite.models.recompute import Recomputed
from ppolite.models.sequences import Sequences
from ppolite.ops.logprobs import token_logprobs


class _Skip(nn.Module):
    """Stands for a frozen layer in a top: passes its input on, or puts the cached `h` in its place."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.index = index
        self.h: Tensor | None = None
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, DynamicCache) and self.index == len(value.layers):
                # Masks take their size from the first layers' cache, so a skipped layer has the prefix's length too.
                dummy = hidden_states.new_empty(1, 1, hidden_states.shape[1], 1)
                value.update(dummy, dummy, self.index)
        return hidden_states if self.h is None else self.h


class Body(nn.Module):
    """Layers `start`.. with the final norm and a head: `head` of a policy, `score` of critic or reward model.

    `front` is what runs before layer 0. It is frozen and shared unless the role was copied in full; the
    embedding in it is the head in models that tie the two.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        start: int,
        layers: nn.ModuleList,
        norm: nn.Module,
        front: nn.ModuleDict,
        head: nn.Module | None = None,
        score: nn.Linear | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.start, self.dtype = start, dtype
        self.layers, self.norm, self.front, self.head, self.score = layers, norm, front, head, score
        layers_name, norm_name = layer_path(decoder)
        below = layers_of(decoder)[:start]
        skips = [_Skip(layer, i) for i, layer in enumerate(below)]
        own: dict[str, Any] = {norm_name: norm, **front}
        top = view(decoder, {layers_name: nn.ModuleList([*skips, *layers]), **own})
        whole = view(decoder, {layers_name: nn.ModuleList([*below, *layers]), **own})
        self.recomputes = self.borrows = False
        # In tuples: not this module's parameters.
        self._shell = (decoder, whole, top, skips[-1] if skips else None)
        self._applied_head: tuple[Any] = (head,)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        start: int,
        *,
        score: nn.Linear | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Body:
        """The top of a loaded model, sharing its modules. `dtype` is that of the arithmetic."""
        decoder = decoder_of(model)
        norm = getattr(decoder, layer_path(decoder)[1])
        head = None if score is not None else model.get_output_embeddings()
        layers = nn.ModuleList(layers_of(decoder)[start:])
        return cls(decoder, start, layers, norm, front_of(decoder), head, score, dtype)

    @property
    def decoder(self) -> PreTrainedModel:
        """The decoder as loaded, of which this body shares or replaces the top."""
        return self._shell[0]

    @property
    def whole(self) -> PreTrainedModel:
        """Decoder that runs from token ids: the shared bottom with this body on top."""
        return self._shell[1]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def clone(self, *, embed: bool = False, score: nn.Linear | None = None) -> Body:
        """An own copy of layers and norm (of front and head too when `embed`), ties kept.

        With `score` the copy has that head in place of this body's.
        """
        memo: dict[int, Any] = {}
        layers, norm = copy.deepcopy(self.layers, memo), copy.deepcopy(self.norm, memo)
        front, head = self.front, self.head if score is None else None
        if embed:
            front, head = copy.deepcopy(front, memo), copy.deepcopy(head, memo)
        score = copy.deepcopy(self.score) if score is None else score
        return Body(self.decoder, self.start, layers, norm, front, head, score, self.dtype)

    def on(self, other: Body) -> Body:
        """These layers, norm and head on the frozen bottom and front of another body with the same ones."""
        return Body(
            other.decoder, self.start, self.layers, self.norm, other.front, self.head, self.score, self.dtype
        )

    def hold(self, copies: dict[nn.Module, nn.Module]) -> None:
        """`hold` the frozen layers, and a copy of a frozen head, since an embedding may be tied to it.

        `copies` is filled with head → copy, so that bodies with the same head share one.
        """
        hold(self.layers, self.dtype)
        head: Any = self.head
        if head is not None and self.dtype.itemsize < 4 and not head.weight.requires_grad:
            if head not in copies:
                copies[head] = copy.deepcopy(head).to(self.dtype)
            self._applied_head = (copies[head],)

    def forward(self, seqs: Sequences) -> Tensor:
        """Hidden states after the final norm, [B, T, D], for the columns of `seqs.ids_BT`."""
        hidden, place_BT = self._hidden(seqs)
        return hidden[place_BT]

    def _hidden(self, seqs: Sequences) -> tuple[Tensor, Tensor]:
        """Hidden states [places, D] of the rows, end to end or padded, and where each token's is, [B, T]."""
        h_BTD = seqs.hidden_BTD
        if self.start and h_BTD is None:
            raise ValueError("the bottom has not been run: call trunk.bottom(seqs) first")
        P, (B, T) = seqs.prefix_P.numel(), seqs.ids_BT.shape
        device = seqs.ids_BT.device
        if seqs.packed:
            packs = seqs.packs
            ids, positions, place_BT = packs.lay(seqs.ids_BT), packs.position_KL, packs.place_BT
            h = None if h_BTD is None else packs.lay(h_BTD)
            mask = packs.masks(self.decoder.config, self._width(h))
        else:
            ids, h, positions = seqs.ids_BT, h_BTD, torch.arange(P, P + T, device=device)[None]
            place_BT = torch.arange(B * T, device=device).view(B, T)
            mask = torch.cat([seqs.mask_BT.new_ones(B, P), seqs.mask_BT], 1)
        cache = None
        if P:
            cache = DynamicCache()
            prefix = torch.arange(P, device=device)[None]
            self._run(seqs.prefix_P[None], seqs.h_prefix_1PD, None, prefix, cache)
            if not self.recomputes:  # such layers repeat it themselves
                cache.batch_repeat_interleave(len(ids))
        return self._run(ids, h, mask, positions, cache).flatten(0, 1), place_BT

    def _width(self, h: Tensor | None) -> torch.dtype:
        """Of what is added to attention scores: at least float32."""
        x = next(self.parameters()) if h is None else h
        return torch.promote_types(x.dtype, torch.float32)

    def _run(
        self, ids: Tensor, h: Tensor | None, mask: Any, positions: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        _, _, top, inject = self._shell
        kwargs: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        with arithmetic(ids.device, self.dtype):
            if inject is None:
                return last_hidden(top, input_ids=ids, **kwargs)
            inject.h = h
            try:
                return last_hidden(top, inputs_embeds=h, **kwargs)
            finally:
                inject.h = None

    def response_hidden(self, seqs: Sequences) -> Tensor:
        """Hidden states that predict each response token, [N, D] for the N True places of `seqs.mask_BR`."""
        hidden, place_BT = self._hidden(seqs)
        columns = seqs.predictors_BR()[seqs.mask_BR]
        rows = seqs.mask_BR.nonzero()[:, 0]
        return hidden[place_BT[rows, columns]]

    @torch.no_grad()
    def logits(self, hidden_BD: Tensor, *, head: nn.Module | None = None) -> Tensor:
        """Logits [B, V] of the head, at least float32, soft cap applied. For drawing: no gradient.

        `head`: another module that computes what this body's head does.
        """
        (own,) = self._applied_head
        if head is None and hidden_BD.device.type != "cpu":
            head = own
        with arithmetic(hidden_BD.device, self.dtype):
            logits_BV = self._head_product(hidden_BD) if head is None else wide(head(hidden_BD))
        cap = self._softcap
        return logits_BV if cap is None else logits_BV.div_(cap).tanh_().mul_(cap)

    def _head_product(self, hidden_BD: Tensor) -> Tensor:
        (head,) = self._applied_head
        # W hᵀ and not h Wᵀ: for a few rows and a large vocabulary MKL takes 0.5 to 0.8 of the time.
        product_BV = wide((head.weight @ hidden_BD.T).T.contiguous())
        bias_V = getattr(head, "bias", None)
        return product_BV if bias_V is None else product_BV.add_(bias_V)

    @property
    def _softcap(self) -> float | None:
        return getattr(self.decoder.config, "final_logit_softcapping", None)

    def logprobs(
        self,
        seqs: Sequences,
        temperature: float,
        *,
        entropy: bool = False,
        hidden_ND: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """log π of each response token and (asked for) the entropy, nats, [B, R]; 0 where there is none.

        `hidden_ND`: `response_hidden(seqs)`, where it is there already.
        """
        (head,) = self._applied_head
        hidden_ND = self.response_hidden(seqs) if hidden_ND is None else hidden_ND
        logp_N, entropy_N = token_logprobs(
            hidden_ND.to(self.dtype),
            head.weight,
            seqs.responses_BR()[seqs.mask_BR],
            bias_V=getattr(head, "bias", None),
            temperature=temperature,
            softcap=self._softcap,
            entropy=entropy,
        )
        return _spread(logp_N, seqs.mask_BR), None if entropy_N is None else _spread(entropy_N, seqs.mask_BR)

    def values(self, seqs: Sequences, *, hidden_ND: Tensor | None = None) -> Tensor:
        """Value before each response token is drawn, [B, R]; 0 where mask_BR is False. `hidden_ND` as in logprobs."""
        hidden_ND = self.response_hidden(seqs) if hidden_ND is None else hidden_ND
        return _spread(self._scalar(hidden_ND), seqs.mask_BR)

    def scores(self, seqs: Sequences) -> Tensor:
        """Scalar read at the last token of each row, [B]."""
        hidden, place_BT = self._hidden(seqs)
        last_B = seqs.mask_BT.sum(1) - 1
        return self._scalar(hidden[place_BT[torch.arange(len(seqs), device=last_B.device), last_B]])

    def _scalar(self, hidden_ND: Tensor) -> Tensor:
        assert self.score is not None
        return self.score(wide(hidden_ND)).squeeze(-1)

    def add_lora(self, rank: int, alpha: float) -> LoraConfig:
        """Put trainable adapters on every linear layer; within `adapters(False)` the body is as before."""
        config = LoraConfig(
            r=rank,
            lora_alpha=cast("int", alpha),  # PEFT computes with a float as well
            target_modules=lora_targets(self.layers),
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in self.layers.modules()),
        )
        inject_adapter_in_model(config, self.layers)
        return config

    def recompute(self) -> None:
        """Keep one hidden state a layer for the backward pass, and compute the rest again in it (recompute.py)."""
        _, _, top, _ = self._shell
        again = [Recomputed(layer, self.start + i) for i, layer in enumerate(self.layers)]
        name, _ = layer_path(top)
        setattr(top, name, nn.ModuleList([*layers_of(top)[: self.start], *again]))
        self.recomputes = True

    @contextmanager
    def adapters(self, on: bool) -> Iterator[None]:
        """Switch the adapters for a while: off, the weights are those of the reference."""
        tuned = [m for m in self.layers.modules() if isinstance(m, BaseTunerLayer)]
        before = [m._disable_adapters for m in tuned]
        for module in tuned:
            module._disable_adapters = not on  # enable_adapters() would also flip requires_grad
        try:
            yield
        finally:
            for module, off in zip(tuned, before, strict=True):
                module._disable_adapters = off

    def second_head(self, score: nn.Linear) -> Body:
        """These very layers and norm with a head of its own, which is all that it trains."""
        other = Body(
            self.decoder, self.start, self.layers, self.norm, self.front, score=score, dtype=self.dtype
        )
        other.borrows = True
        return other

    def trained(self) -> list[nn.Parameter]:
        return list(self.trained_by_name().values())

    def trained_by_name(self) -> dict[str, nn.Parameter]:
        """Those that are this body's to train: borrowed ones are trained by whom they belong to."""
        return {
            name: weight
            for name, weight in self.named_parameters()
            if weight.requires_grad and (not self.borrows or name.startswith("score."))
        }


def _spread(x_N: Tensor, mask_BR: Tensor) -> Tensor:
    """The values at the True places of a mask, 0 elsewhere, [B, R]."""
    return x_N.new_zeros(mask_BR.shape).masked_scatter(mask_BR, x_N)


def lora_targets(layers: nn.ModuleList) -> list[str]:
    """Names, inside a layer, of its linear modules (GPT-2 calls them Conv1D)."""
    linear = (nn.Linear, Conv1D)
    return sorted({n.partition(".")[2] for n, m in layers.named_modules() if isinstance(m, linear)})
