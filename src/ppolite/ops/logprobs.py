"""Log-probabilities and entropies of tokens, straight from hidden states, without ever holding all logits.

    x_V = hidden_D · weight_VDᵀ + bias_V          the head, in the dtype of `hidden`
    s_V = cap · tanh(x_V / cap) / temperature     in float32 from here on (the cap is optional)
    logprob = s_target − log Σ_v exp s_v          entropy = −Σ_v p_v log p_v,  p = softmax(s)

The logits of a batch are by far its largest tensor: 4,096 tokens × 49,152 words × 4 bytes is 0.8 GB, and a
plain log-softmax keeps three of them. Here N tokens are worked off `chunk` at a time, in the forward and in
the backward pass, in two buffers of [chunk, V]; a third for half-precision matmuls, and one for the gradient
of the entropy.

Gradients, with upstream g for the log-prob and e for the entropy H:

    ∂/∂s_v = g (1[v = target] − p_v) − e p_v (log p_v + H)

When only `hidden` needs a gradient (a frozen or LoRA-trained model) and the entropy is not differentiated, g
is a factor of the whole row: ∂logprob/∂hidden, an [N, D] tensor, is computed while the chunk's probabilities
are at hand, and the backward pass is one multiplication. This saves the second computation of the logits, a
third of the work. Otherwise the backward pass computes each chunk's logits again.

Axes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor


CHUNK = 256
"""Tokens whose logits are there at once."""


@overload
def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
    entropy: Literal[True] = True,
) -> tuple[Tensor, Tensor]: ...


@overload
def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
    entropy: Literal[False],
) -> tuple[Tensor, None]: ...


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(s)[target] and the entropy of softmax(s), nats; s = softcap(hidden·Wᵀ + b) / temperature.

    Args:
        hidden_ND: last hidden states, after the final norm; any float dtype, in which the matmuls are done.
        weight_VD: the head; cast to the dtype of `hidden_ND` where it differs.
        targets_N: token ids, int64.
        bias_V: the head's bias.
        temperature: > 0; that of the sampling, so that the log-probs are those of what was sampled from.
        softcap: cap of cap·tanh(x/cap) (Gemma 2, arXiv 2408.00118, §2).
        chunk: rows worked off at a time; memory is about 8·chunk·V bytes.
        entropy: False to save a pass over the chunk where nobody looks at the entropy.

    Returns:
        logprobs_N and entropy_N (None without `entropy`): float32, or float64 for float64 hidden states.
        Both are differentiable once, in `hidden_ND`, `weight_VD` and `bias_V`. An entropy that is not part of
        the loss costs nothing in the backward pass. Autocast is off inside.

    Raises:
        ValueError: shapes that do not fit, or a temperature, softcap or chunk that is not positive.
    """
    N, V = hidden_ND.shape[0], weight_VD.shape[0]
    if hidden_ND.ndim != 2 or weight_VD.shape != (V, hidden_ND.shape[-1]) or targets_N.shape != (N,):
        raise ValueError(
            f"expected hidden [N, D], weight [V, D], targets [N]; got {tuple(hidden_ND.shape)}, "
            f"{tuple(weight_VD.shape)}, {tuple(targets_N.shape)}"
        )
    if bias_V is not None and bias_V.shape != (V,):
        raise ValueError(f"bias has shape {tuple(bias_V.shape)}; expected ({V},), as the weight has rows")
    if temperature <= 0 or (softcap is not None and softcap <= 0) or chunk < 1:
        raise ValueError(
            f"temperature={temperature}, softcap={softcap}, chunk={chunk}: expected positive numbers"
        )
    setting = _Setting(temperature, softcap, min(chunk, max(N, 1)), entropy, torch.is_grad_enabled())
    return cast("Any", _TokenLogprobs).apply(hidden_ND, weight_VD, bias_V, targets_N, setting)


class _Setting(NamedTuple):
    """The arguments that are not tensors."""

    temperature: float
    softcap: float | None
    chunk: int
    entropy: bool
    grad: bool
    """Whether a backward pass may follow. Asked outside, since grad mode is always off in `forward`."""


class _Head:
    """hidden → softmax and ∂softmax → ∂hidden for one chunk of rows after another, in the same buffers.

    Reused because a fresh block costs a CPU more to fault in than to fill: `exp` of 256 × 49,152 floats took
    30 ms into a new tensor and 8 ms in place (two shared cores, torch 2.13, November 2026).
    """

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, setting: _Setting
    ) -> None:
        N, dtype, chunk = len(hidden_ND), hidden_ND.dtype, setting.chunk
        shape = (chunk, len(weight_VD))
        self.weight_VD = weight_VD.to(dtype)
        self.bias_V = None if bias_V is None else bias_V.to(dtype)
        self.temperature, self.softcap = setting.temperature, setting.softcap
        self.x = hidden_ND.new_empty(shape)
        self.s = self.x if dtype == _wide(dtype) else hidden_ND.new_empty(shape, dtype=_wide(dtype))
        self.p = torch.empty_like(self.s)
        self.slices = [slice(i, i + chunk) for i in range(0, N, chunk)]

    def softmax(self, hidden_cD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p and p, [c, V] in the two buffers, and log Σ exp s, [c, 1]."""
        x, s, p = (buffer[: len(hidden_cD)] for buffer in (self.x, self.s, self.p))
        if self.bias_V is None:
            torch.mm(hidden_cD, self.weight_VD.T, out=x)
        else:
            torch.addmm(self.bias_V, hidden_cD, self.weight_VD.T, out=x)
        if x is not s:
            s.copy_(x)
        if self.softcap is not None:
            s.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            s.div_(self.temperature)
        top = s.amax(-1, keepdim=True)
        total = torch.sub(s, top, out=p).exp_().sum(-1, keepdim=True)
        lse = top + total.log()
        return s.sub_(lse), p.div_(total), lse

    def grad_x(self, grad_s: Tensor, logp: Tensor, lse: Tensor) -> Tensor:
        """∂/∂x in the dtype of the matmuls, from ∂/∂s; uses up `grad_s` and `logp`."""
        if self.softcap is not None:  # ∂s/∂x = (1 − tanh²(x / cap)) / temperature
            tanh = logp.add_(lse).mul_(self.temperature / self.softcap)
            grad_s.mul_(tanh.square_().neg_().add_(1.0))
        if self.temperature != 1.0:
            grad_s.div_(self.temperature)
        return grad_s if self.x is self.s else self.x[: len(grad_s)].copy_(grad_s)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        setting: _Setting,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs_N = hidden_ND.new_empty(len(hidden_ND), dtype=_wide(hidden_ND.dtype))
        entropy_N = torch.empty_like(logprobs_N) if setting.entropy else None
        hidden_only = setting.grad and tuple(ctx.needs_input_grad[:3]) == (True, False, False)
        jacobian_ND = torch.empty_like(hidden_ND) if hidden_only else None

        with torch.autocast(hidden_ND.device.type, enabled=False):
            head = _Head(hidden_ND, weight_VD, bias_V, setting)
            for rows in head.slices:
                target = targets_N[rows, None]
                logp, p, lse = head.softmax(hidden_ND[rows])
                logprobs_N[rows] = logp.gather(1, target)[:, 0]
                if entropy_N is not None:
                    entropy_N[rows] = -torch.einsum("nv,nv->n", p, logp)
                if jacobian_ND is not None:
                    grad_s = p.neg_().scatter_add_(1, target, torch.ones_like(lse))
                    torch.mm(head.grad_x(grad_s, logp, lse), head.weight_VD, out=jacobian_ND[rows])

        if setting.grad:
            ctx.setting = setting
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, entropy_N, jacobian_ND)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the names)
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        grad_N, grad_entropy_N = grad_outputs  # None where an output is not part of the loss
        hidden_ND, weight_VD, bias_V, targets_N, entropy_N, jacobian_ND = ctx.saved_tensors
        dtype, wide = hidden_ND.dtype, _wide(hidden_ND.dtype)
        if grad_N is None:
            grad_N = hidden_ND.new_zeros(len(hidden_ND), dtype=wide)
        if jacobian_ND is not None and grad_entropy_N is None:
            return (grad_N[:, None] * jacobian_ND).to(dtype), None, None, None, None

        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if need_bias else None

        with torch.autocast(hidden_ND.device.type, enabled=False):
            head = _Head(hidden_ND, weight_VD, bias_V, ctx.setting)
            for rows in head.slices:
                target, g = targets_N[rows, None], grad_N[rows, None]
                logp, p, lse = head.softmax(hidden_ND[rows])
                if grad_entropy_N is None:
                    grad_s = p.mul_(-g)
                else:
                    e, H = grad_entropy_N[rows, None], entropy_N[rows, None]
                    grad_s = p.mul_((logp + H).mul_(e).add_(g)).neg_()
                grad_x = head.grad_x(grad_s.scatter_add_(1, target, g), logp, lse)
                if grad_hidden is not None:
                    torch.mm(grad_x, head.weight_VD, out=grad_hidden[rows])
                if grad_weight is not None:
                    _add_mm(grad_weight, grad_x.T, hidden_ND[rows])
                if grad_bias is not None:
                    grad_bias += grad_x.sum(0, dtype=wide)

        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias_V.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where `total` may be wider than `a` and `b`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
