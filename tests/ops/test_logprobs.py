import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppolite.ops.logprobs import token_logprobs

N, D, V = 7, 5, 11
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"softcap": 1.5},
    {"temperature": 1.3, "softcap": 2.0},
]


def inputs(dtype=torch.float64, n=N, d=D, v=V, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(v, generator=g, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, torch.randint(v, (n,), generator=g)


def by_loops(hidden, weight, bias, targets, temperature=1.0, softcap=None):
    """One token at a time, with math.exp and math.log."""
    logprobs, entropies = [], []
    for h, target in zip(hidden.tolist(), targets.tolist(), strict=True):
        s = [
            math.fsum(a * b for a, b in zip(h, w, strict=True)) + c
            for w, c in zip(weight.tolist(), bias.tolist(), strict=True)
        ]
        if softcap is not None:
            s = [softcap * math.tanh(x / softcap) for x in s]
        weights = [math.exp(x / temperature) for x in s]
        p = [w / math.fsum(weights) for w in weights]
        logprobs.append(math.log(p[target]))
        entropies.append(-math.fsum(q * math.log(q) for q in p))
    return torch.tensor(logprobs, dtype=torch.float64), torch.tensor(entropies, dtype=torch.float64)


def test_by_hand():
    """Logits (log 1, log 3) give p = (1/4, 3/4)."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1]))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.25), math.log(0.75)]))
    torch.testing.assert_close(entropy, torch.full((2,), 2 * math.log(2) - 0.75 * math.log(3)))
    cooler, _ = token_logprobs(hidden, weight, torch.tensor([0, 1]), temperature=0.5)  # p = (1/10, 9/10)
    torch.testing.assert_close(cooler, torch.tensor([math.log(0.1), math.log(0.9)]))


@pytest.mark.parametrize("kw", SETTINGS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_against_loops(kw, chunk):
    hidden, weight, bias, targets = inputs()
    expected = by_loops(hidden, weight, bias, targets, **kw)
    torch.testing.assert_close(
        token_logprobs(hidden, weight, targets, bias_V=bias, chunk=chunk, **kw), expected
    )


@pytest.mark.parametrize("kw", SETTINGS)
@pytest.mark.parametrize("needs", ["hidden", "weight", "bias", "all"])
@pytest.mark.parametrize("output", ["logprobs", "entropy", "both"])
def test_gradients_against_finite_differences(kw, needs, output):
    hidden, weight, bias, targets = inputs()
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        x.requires_grad_(needs in (name, "all"))

    def f(hidden, weight, bias):
        logprobs, entropy = token_logprobs(hidden, weight, targets, bias_V=bias, chunk=3, **kw)
        return {"logprobs": logprobs, "entropy": entropy, "both": (logprobs, entropy)}[output]

    assert torch.autograd.gradcheck(f, (hidden, weight, bias))


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 9),
    d=st.integers(1, 6),
    v=st.integers(1, 12),
    chunk=st.integers(1, 10),
    seed=st.integers(0, 999),
)
def test_any_shape_against_pytorch(n: int, d: int, v: int, chunk: int, seed: int):
    hidden, weight, _, targets = inputs(n=n, d=d, v=v, seed=seed)
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    logprobs, entropy = token_logprobs(ours, weight, targets, chunk=chunk)
    distribution = torch.distributions.Categorical(logits=plain @ weight.T, validate_args=False)
    if n == 0:
        assert logprobs.shape == entropy.shape == (0,)
        return
    torch.testing.assert_close(logprobs, distribution.log_prob(targets))
    torch.testing.assert_close(entropy, distribution.entropy())
    g = torch.linspace(-1, 1, n, dtype=torch.float64)
    logprobs.backward(g)
    distribution.log_prob(targets).backward(g)
    torch.testing.assert_close(ours.grad, plain.grad)


def test_without_entropy():
    hidden, weight, _, targets = inputs()
    logprobs, entropy = token_logprobs(hidden, weight, targets, entropy=False)
    assert entropy is None
    torch.testing.assert_close(logprobs, token_logprobs(hidden, weight, targets)[0])


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    assert logprobs.tolist() == [0, -2e4]
    assert entropy.tolist() == [0, 0]
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[0], [2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Matmuls in half precision, everything after them in float32."""
    hidden, weight, bias, targets = inputs(dtype, d=64)
    hidden, weight = (hidden / 8).requires_grad_(), weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, targets, bias_V=bias, chunk=3)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    wide_h, wide_w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = token_logprobs(wide_h, wide_w, targets, bias_V=bias.double())
    expected[0].sum().backward()
    torch.testing.assert_close(logprobs.double(), expected[0], atol=0.03, rtol=0)
    torch.testing.assert_close(entropy.double(), expected[1], atol=0.03, rtol=0)
    torch.testing.assert_close(hidden.grad.double(), wide_h.grad, atol=0.05, rtol=0.02)
    torch.testing.assert_close(weight.grad.double(), wide_w.grad, atol=0.05, rtol=0.02)


def test_autocast_is_off_inside():
    hidden, weight, _, targets = inputs(torch.float32)
    plain, cast = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    weight.requires_grad_()
    expected = token_logprobs(plain, weight, targets)[0]
    expected.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = token_logprobs(cast, weight, targets)[0]
        logprobs.sum().backward()
    assert torch.equal(logprobs, expected)
    assert torch.equal(cast.grad, plain.grad)


MATMULS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class Allocations(TorchDispatchMode):
    """Counts matmuls, and the elements of the largest storage that was not there before."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.largest = self.matmuls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.matmuls += func.overloadpacket in MATMULS
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("use_entropy", [False, True])
@pytest.mark.parametrize("n", [64, 256])
def test_no_tensor_larger_than_a_chunk_of_logits(n, use_entropy):
    chunk, v = 4, 1000
    hidden, weight, _, targets = inputs(torch.float32, n=n, d=3, v=v)
    hidden.requires_grad_()
    with Allocations(weight) as seen:
        logprobs, entropy = token_logprobs(hidden, weight, targets, chunk=chunk, softcap=3.0)
        (logprobs.sum() + (entropy.sum() if use_entropy else 0)).backward()
    assert seen.largest == chunk * v


def test_work_done():
    """Matmuls a chunk: 1 under no_grad, 2 for a frozen head, 4 when the weight is trained."""
    hidden, weight, _, targets = inputs()
    hidden.requires_grad_()

    def matmuls():
        with Allocations() as seen:
            logprobs = token_logprobs(hidden, weight, targets)[0]
            if logprobs.requires_grad:
                logprobs.sum().backward()
        return seen.matmuls

    with torch.no_grad():
        assert matmuls() == 1
    assert matmuls() == 2
    weight.requires_grad_()
    assert matmuls() == 4


def test_refusals():
    hidden, weight, bias, targets = inputs()
    with pytest.raises(ValueError, match=r"expected hidden \[N, D\]"):
        token_logprobs(hidden, weight.T, targets)
    with pytest.raises(ValueError, match=r"expected hidden \[N, D\]"):
        token_logprobs(hidden, weight, targets[:-1])
    with pytest.raises(ValueError, match="bias has shape"):
        token_logprobs(hidden, weight, targets, bias_V=bias[:-1])
    for kw in ({"temperature": 0.0}, {"softcap": 0.0}, {"chunk": 0}):
        with pytest.raises(ValueError, match="expected positive"):
            token_logprobs(hidden, weight, targets, **kw)
