"""Log-probs of tokens from hidden states, forward and backward: ours in chunks, or the plain way with all logits.

Memory is what the process holds at most during a call over what it held before, gradients included.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.workers.common import report, resident, told, wait
from ppolite.ops.logprobs import token_logprobs


def plain(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """What a training loop without a kernel for it does."""
    logits_NV = (hidden_ND @ weight_VD.T).float()
    return logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]


def chunked(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return token_logprobs(hidden_ND, weight_VD, targets_N, entropy=False)[0]


def extra_mb(call: object) -> float:
    assert callable(call)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def main() -> None:
    spec = told()
    N, V, D = spec["tokens"], spec["vocabulary"], spec["hidden"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, spec["dtype"])
    torch.manual_seed(spec["seed"])
    hidden_ND = torch.randn(N, D, device=device, dtype=dtype).requires_grad_()
    weight_VD = torch.randn(V, D, device=device, dtype=dtype).mul_(D**-0.5).requires_grad_(spec["weights"])
    targets_N = torch.randint(V, (N,), device=device)
    upstream_N = torch.randn(N, device=device)
    way = {"plain": plain, "chunked": chunked}[spec["way"]]
    last: list[Tensor] = []

    def call() -> None:
        hidden_ND.grad = weight_VD.grad = None
        logp_N = way(hidden_ND, weight_VD, targets_N)
        logp_N.backward(upstream_N)
        last[:] = [logp_N.detach().double().sum(), hidden_ND.grad.double().norm()]

    call()
    hidden_ND.grad = weight_VD.grad = None
    extra = extra_mb(call)
    seconds = []
    for _ in range(spec["repeats"]):
        wait()
        began = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - began)
    report(
        "ppolite",
        ms=1000 * statistics.median(seconds),
        extra_mb=extra,
        checks=[float(x) for x in last],
    )


if __name__ == "__main__":
    main()
