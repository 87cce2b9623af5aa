"""Statistics over the places of a tensor that count.

    masked_zero ─► masked_sum ─► masked_mean ─► masked_var, whiten
    places         what a mean divides by, for sums over what is zero already

A mask is a bool tensor of the same shape as its values; True counts. What stands at the other places is never
read: it may be NaN or infinite, and takes part neither in the result nor in the gradient (hence `torch.where`
and not a multiplication: 0 · NaN is NaN).

Left out: reductions along one axis. Losses are means over all tokens of a batch, which is what makes an
accumulated gradient equal to that of one large batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

EMPTY = "the mask is empty: a mean over no values"


def masked_zero(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where `mask` is True and 0 elsewhere. Any shape; the gradient is 0 elsewhere too.

    Apply it before a non-linear function: masking afterwards lets a NaN back in through the gradient.

    Raises:
        ValueError: `mask` is not bool, or not of the shape of `x` (a broadcast mask would miscount).
    """
    require_bool(mask=mask)
    if mask.shape != x.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, values {tuple(x.shape)}; they must be equal")
    return torch.where(mask, x, False)  # False is 0 in every dtype, and promotes none


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Σ x_i over the True places of `mask`; 0 when there is none. Any shape → scalar."""
    return masked_zero(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor, *, denom: float | Tensor | None = None) -> Tensor:
    """Σ x_i / denom over the True places of `mask`. Any shape → scalar.

    `denom` defaults to the number of True places. When a batch is worked off in parts, pass the count of the
    whole batch: the parts then add up to the mean over the whole, in value and in gradient, and a part
    without a single True place contributes 0.

    Raises:
        ValueError: no place counts and no `denom` was given, so that there is no mean; or `denom` is a number
            that is not positive.
    """
    return masked_sum(x, mask) / places(mask, denom)


def places(mask: Tensor, denom: float | Tensor | None = None) -> float | Tensor:
    """`denom`, or the number of True places where it is None: what a mean over the mask divides by.

    For sums over tensors that hold 0 at the masked places already, since they were made of such.

    Raises:
        ValueError: as `masked_mean`.
    """
    if denom is None:
        count = int(mask.sum())
        if count == 0:
            raise ValueError(f"{EMPTY}; pass denom to count a whole batch")
        return count
    if not torch.is_tensor(denom) and denom <= 0:
        raise ValueError(f"denom is {denom}; expected the positive number of places in the whole batch")
    return denom


def _alone(x: Tensor) -> Tensor:
    """The sum over one process."""
    return x


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Variance with ddof 0: mean of (x_i − mean x)² over the True places. Any shape → scalar.

    Raises:
        ValueError: the mask is empty.
    """
    return _moments(x, mask)[2]


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool,
    eps: float = 1e-8,
    total: Callable[[Tensor], Tensor] = _alone,
) -> Tensor:
    """Scale to unit variance: (x_i − mean) / √(var + eps), plus the mean again unless `shift_mean`.

    Any shape → the same shape; masked places become 0. RLHF whitens rewards with `shift_mean=False` and
    advantages with `shift_mean=True` (Ziegler et al. 2019, released code), both with ddof 0.

    Args:
        x: what is whitened.
        mask: True counts.
        shift_mean: whether the mean becomes 0.
        eps: added to the variance.
        total: sums a scalar over all processes, where `x` is one process's part: mean and variance are then
            those of the whole.

    Raises:
        ValueError: the mask is empty.
    """
    mean, centred, var = _moments(x, mask, total)
    scaled = centred * torch.rsqrt(var + eps)
    return scaled if shift_mean else masked_zero(scaled + mean, mask)


def _moments(
    x: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = _alone
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, x − mean (0 at masked places), variance."""
    x, count = masked_zero(x, mask), total(mask.sum())
    if count == 0:
        raise ValueError(EMPTY)
    mean = total(x.sum()) / count
    centred = masked_zero(x - mean, mask)
    return mean, centred, total(centred.square().sum()) / count


def require_bool(**tensors: Tensor) -> None:
    """Raises ValueError for a tensor that is not bool, by its name."""
    for name, x in tensors.items():
        if x.dtype != torch.bool:
            raise ValueError(f"{name} has dtype {x.dtype}; expected bool")
