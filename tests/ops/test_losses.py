import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppolite.ops.losses import clip_loss, explained_variance, kl_penalty_loss, value_loss

NAN = math.nan
ONE = torch.ones(1, dtype=torch.bool)


def at(ratio: float):
    """A token whose probability went from e⁻² to ratio · e⁻²."""
    return torch.tensor([math.log(ratio) - 2], dtype=torch.float64, requires_grad=True)


OLD = torch.tensor([-2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "binds"),
    [
        (1.3, 0.1, -0.12, True),
        (0.7, 0.1, -0.07, False),  # not −0.08: the minimum, not the clipped term
        (0.7, -0.1, 0.08, True),
        (1.3, -0.1, 0.13, False),
        (1.1, 0.1, -0.11, False),
    ],
)
def test_the_worked_example_of_the_tutorials(ratio, advantage, loss, binds):
    logprobs = at(ratio)
    result, diagnostics = clip_loss(
        logprobs, OLD, torch.tensor([advantage], dtype=torch.float64), ONE, clip=0.2
    )
    assert result.item() == pytest.approx(loss)
    assert diagnostics["clip_fraction"] == binds
    assert diagnostics["ratio_mean"].item() == diagnostics["ratio_max"].item() == pytest.approx(ratio)
    assert diagnostics["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))
    result.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0 if binds else -ratio * advantage)


def test_kl_penalty_by_hand():
    """−1.5 · 2 + 3 (.5 − log 1.5)."""
    advantage = torch.tensor([2.0], dtype=torch.float64)
    loss, diagnostics = kl_penalty_loss(at(1.5), OLD, advantage, ONE, beta=3.0)
    assert loss.item() == pytest.approx(-3 + 3 * (0.5 - math.log(1.5)))
    assert set(diagnostics) == {"approx_kl", "ratio_mean", "ratio_max"}


def test_kl_penalty_gradient_is_that_of_the_kl():
    """Over samples of π_old, enumerated: β ∇ KL(π_old‖π) = β (π − π_old) in the logits."""
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    new = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    logits = new.log().requires_grad_()
    counts = torch.tensor([5, 3, 2])
    tokens = torch.repeat_interleave(torch.arange(3), counts)
    logprobs = logits.log_softmax(0)[tokens]
    mask = torch.ones(10, dtype=torch.bool)
    kl_penalty_loss(logprobs, old.log()[tokens], torch.zeros_like(logprobs), mask, beta=2.0)[0].backward()
    torch.testing.assert_close(logits.grad, 2 * (new - old))


def test_first_step_is_the_policy_gradient():
    """At ρ = 1 both losses have the gradient −A/n."""
    advantages = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    mask = torch.tensor([[True, True], [True, False]])
    for loss in (
        lambda *a: clip_loss(*a, clip=0.2),
        lambda *a: kl_penalty_loss(*a, beta=1.0),
    ):
        logprobs = torch.full((2, 2), -1.0, requires_grad=True)
        loss(logprobs, torch.full((2, 2), -1.0), advantages, mask)[0].backward()
        torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages / 3, 0))


@pytest.mark.parametrize(
    ("value", "loss", "binds"),
    [
        (1.5, 0.5 * 0.8**2, True),  # towards the return 2, but further than .2
        (0.5, 0.5 * 1.5**2, False),  # away from it: the plain error is the larger
        (1.1, 0.5 * 0.9**2, False),
    ],
)
def test_value_loss_by_hand(value, loss, binds):
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([1.0]).double(), torch.tensor([2.0]).double()
    result, diagnostics = value_loss(values, old, returns, ONE, clip=0.2)
    assert result.item() == pytest.approx(loss)
    assert diagnostics["clip_fraction"] == binds
    result.backward()
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(0 if binds else value - 2)
    plain, diagnostics = value_loss(values, torch.full_like(old, NAN), returns, ONE, clip=None)
    assert plain.item() == pytest.approx(0.5 * (value - 2) ** 2)
    assert diagnostics["clip_fraction"] == 0


def test_explained_variance():
    """Returns 0, 2, 4 (variance 8/3) and errors 0, 0, 1 (variance 2/9): 1 − 1/12."""
    returns, mask = torch.tensor([0.0, 2.0, 4.0, NAN]), torch.tensor([True, True, True, False])

    def of(*values):
        v = torch.tensor([*values, NAN])
        return explained_variance(v, returns, mask).item()

    assert of(0.0, 2.0, 5.0) == pytest.approx(1 - 1 / 12)
    assert of(1.0, 3.0, 5.0) == pytest.approx(1)  # an offset is no variance
    assert of(7.0, 7.0, 7.0) == pytest.approx(0, abs=1e-5)
    constant = torch.ones(4)
    assert explained_variance(constant, constant, mask).isnan()


LOSSES = {
    "clip": lambda a, b, c, m, **kw: clip_loss(a, b, c, m, clip=0.2, **kw),
    "kl": lambda a, b, c, m, **kw: kl_penalty_loss(a, b, c, m, beta=1.5, **kw),
    "value": lambda a, b, c, m, **kw: value_loss(a, b, c, m, clip=0.2, **kw),
}


def random_batch(rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, columns, generator=g, dtype=torch.float64) / 2 for _ in range(3)]
    mask = torch.rand(rows, columns, generator=g) < 0.7
    mask[0, 0] = True
    return tensors, mask


@pytest.mark.parametrize("name", LOSSES)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 6),
    seed=st.integers(0, 999),
    junk=st.sampled_from([NAN, math.inf]),
)
def test_parts_add_up_and_padding_is_never_read(name: str, rows: int, columns: int, seed: int, junk: float):
    (x, old, data), mask = random_batch(rows, columns, seed)
    clean = x.clone().requires_grad_()
    whole, diagnostics = LOSSES[name](clean, old, data, mask)
    whole.backward()

    dirty = torch.where(mask, x, junk).requires_grad_()
    total: dict[str, torch.Tensor] = {}
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(rows):
        part, seen = LOSSES[name](
            dirty[b : b + 1],
            torch.where(mask, old, junk)[b : b + 1],
            torch.where(mask, data, junk)[b : b + 1],
            mask[b : b + 1],
            denom=mask.sum(),
        )
        part.backward()
        loss += part.detach()
        for key, v in seen.items():
            assert not v.requires_grad
            total[key] = torch.maximum(total.get(key, v), v) if key == "ratio_max" else total.get(key, 0) + v
    torch.testing.assert_close(loss, whole.detach())
    torch.testing.assert_close(total, diagnostics)
    torch.testing.assert_close(dirty.grad, clean.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(name):
    (x, old, data), mask = random_batch(3, 4, seed=7)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, old, data, mask)[0], x.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_refusals(name):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="mask is empty"):
        LOSSES[name](x, x, x, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be equal"):
        LOSSES[name](x, x, x, torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"clip is 0"):
        clip_loss(x, x, x, x == 0, clip=0.0)
    with pytest.raises(ValueError, match=r"clip is 0"):
        value_loss(x, x, x, x == 0, clip=0.0)
    with pytest.raises(ValueError, match=r"beta is -1"):
        kl_penalty_loss(x, x, x, x == 0, beta=-1)
