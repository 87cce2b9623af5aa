import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppolite.ops.losses import clip_loss, explained_variance, kl_penalty_loss, value_loss
from ppolite.ops.masked import masked_zero

NAN = math.nan
ONE = torch.ones(1, dtype=torch.bool)


def at(ratio: float):
    """A token whose probability went from e⁻² to ratio · e⁻²."""
    return torch.tensor([math.log(ratio) - 2], dtype=torch.float64, requires_grad=True)


def one(x: float):
    return torch.tensor([x], dtype=torch.float64)


OLD = one(-2.0)


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
    result, diagnostics = clip_loss(logprobs, OLD, one(advantage), ONE, clip=0.2)
    assert result.item() == pytest.approx(loss)
    assert diagnostics["clip_fraction"] == binds
    assert diagnostics["ratio_mean"].item() == diagnostics["ratio_max"].item() == pytest.approx(ratio)
    assert diagnostics["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))
    result.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0 if binds else -ratio * advantage)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "binds"),
    [
        (1.3, 0.1, -0.128, True),  # above 1 + .28
        (1.25, 0.1, -0.125, False),  # a symmetric .2 would bind
        (0.75, -0.1, 0.08, True),  # below 1 − .2
        (0.75, 0.1, -0.075, False),
    ],
)
def test_asymmetric_bounds_by_hand(ratio, advantage, loss, binds):
    logprobs = at(ratio)
    result, diagnostics = clip_loss(logprobs, OLD, one(advantage), ONE, clip=0.2, clip_high=0.28)
    assert result.item() == pytest.approx(loss)
    assert diagnostics["clip_fraction"] == binds
    result.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0 if binds else -ratio * advantage)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "binds"),
    [
        (5.0, -2.0, 6.0, True),  # max(−10, 3 · −2), where PPO's own clip would leave 10
        (2.5, -2.0, 5.0, False),
        (0.5, -2.0, 1.6, True),  # the clip below is as before
        (5.0, 2.0, -2.4, True),  # and so is a good action's: the dual clip is for bad ones only
        (0.5, 2.0, -1.0, False),
    ],
)
def test_dual_clip_by_hand(ratio, advantage, loss, binds):
    """ε = .2, c = 3."""
    logprobs = at(ratio)
    result, diagnostics = clip_loss(logprobs, OLD, one(advantage), ONE, clip=0.2, dual_clip=3.0)
    assert result.item() == pytest.approx(loss)
    assert diagnostics["clip_fraction"] == binds
    result.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0 if binds else -ratio * advantage)


def test_decoupled_by_hand():
    """π_old/μ = 3 in front of both objectives: 3 · −1.2 · .1, and 3 (−1.3 · .1 + 2 (.3 − log 1.3))."""
    w, advantage = one(3.0), one(0.1)
    loss, diagnostics = clip_loss(at(1.3), OLD, advantage, ONE, clip=0.2, behaviour_weights_BR=w)
    assert loss.item() == pytest.approx(-0.36)
    k3 = 0.3 - math.log(1.3)
    assert diagnostics["approx_kl"].item() == pytest.approx(3 * k3)
    assert diagnostics["ratio_mean"].item() == pytest.approx(1.3)
    loss, _ = kl_penalty_loss(at(1.3), OLD, advantage, ONE, beta=2.0, behaviour_weights_BR=w)
    assert loss.item() == pytest.approx(3 * (-0.13 + 2 * k3))


def test_decoupled_losses_on_another_policys_data_are_those_on_its_own():
    """Three actions, enumerated: E_μ of the weighted loss is E_π_old of the plain one, gradient and all."""
    mu, old, logits = (
        torch.tensor(x, dtype=torch.float64) for x in ([0.2, 0.2, 0.6], [0.5, 0.3, 0.2], [0.9, -0.1, -0.8])
    )
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    every = torch.ones(3, dtype=torch.bool)
    for loss_of in (
        lambda *a, **kw: clip_loss(*a, clip=0.2, dual_clip=3.0, **kw)[0],
        lambda *a, **kw: kl_penalty_loss(*a, beta=2.0, **kw)[0],
    ):
        gradients, values = [], []
        for drawn_from, weights in ((mu, old / mu), (old, None)):
            parameters = logits.clone().requires_grad_()
            new = parameters.log_softmax(0)
            loss = torch.zeros((), dtype=torch.float64)
            for i in range(3):
                place = slice(i, i + 1)
                kw = {} if weights is None else {"behaviour_weights_BR": weights[place]}
                data = (new[place], old.log()[place], advantages[place], every[place])
                loss = loss + drawn_from[i] * loss_of(*data, **kw)
            loss.backward()
            gradients.append(parameters.grad)
            values.append(loss.detach())
        torch.testing.assert_close(values[0], values[1])
        torch.testing.assert_close(gradients[0], gradients[1])


def test_exact_kl_in_place_of_the_estimate():
    """−1.5 · 2 + 3 · .7, whatever the weight: the exact KL is no sample of anybody's."""
    advantage, kl = one(2.0), one(0.7).requires_grad_()
    loss, diagnostics = kl_penalty_loss(at(1.5), OLD, advantage, ONE, beta=3.0, kl_BR=kl)
    assert loss.item() == pytest.approx(-0.9)
    assert diagnostics["approx_kl"].item() == pytest.approx(0.5 - math.log(1.5))
    loss.backward()
    assert kl.grad is not None
    assert kl.grad.item() == pytest.approx(3)
    weighted, _ = kl_penalty_loss(
        at(1.5), OLD, advantage, ONE, beta=3.0, kl_BR=kl, behaviour_weights_BR=one(0.5)
    )
    assert weighted.item() == pytest.approx(-1.5 + 2.1)


def test_the_limits_of_both_are_the_unclipped_surrogate():
    """ε → ∞, c → ∞ and β = 0 leave −mean ρ A."""
    (logprobs, old, advantages), mask = random_batch(4, 6, seed=1)
    rows = zip(logprobs[mask].tolist(), old[mask].tolist(), advantages[mask].tolist(), strict=True)
    expected = -math.fsum(math.exp(x - y) * a for x, y, a in rows) / int(mask.sum())
    for loss in (
        clip_loss(logprobs, old, advantages, mask, clip=1e9)[0],
        clip_loss(logprobs, old, advantages, mask, clip=1e9, clip_high=1e8, dual_clip=1e9)[0],
        kl_penalty_loss(logprobs, old, advantages, mask, beta=0.0)[0],
    ):
        assert loss.item() == pytest.approx(expected)


def test_kl_penalty_by_hand():
    """−1.5 · 2 + 3 (.5 − log 1.5)."""
    loss, diagnostics = kl_penalty_loss(at(1.5), OLD, one(2.0), ONE, beta=3.0)
    assert loss.item() == pytest.approx(-3 + 3 * (0.5 - math.log(1.5)))
    assert set(diagnostics) == {"approx_kl", "ratio_mean", "ratio_max"}


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 6),
    seed=st.integers(0, 9999),
    beta=st.floats(0, 4),
    stale=st.booleans(),
)
def test_kl_penalty_from_samples_against_a_loop(rows, columns, seed, beta, stale):
    """−w ρ A + β w (ρ − 1 − log ρ), token by token, and its derivative in log π: w (β (ρ − 1) − ρ A)."""
    g = torch.Generator().manual_seed(seed)
    new, old, advantages, log_w = torch.randn(4, rows, columns, generator=g, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=g) < 0.7
    mask[0, 0] = True
    total, slopes, count = 0.0, torch.zeros_like(new), int(mask.sum())
    for b in range(rows):
        for t in range(columns):
            if mask[b, t]:
                log_ratio = float(new[b, t] - old[b, t])
                rho, a = math.exp(log_ratio), float(advantages[b, t])
                w = math.exp(float(log_w[b, t])) if stale else 1.0
                total += -w * rho * a + beta * w * (rho - 1 - log_ratio)
                slopes[b, t] = w * (beta * (rho - 1) - rho * a) / count
    hidden = [torch.where(mask, x, NAN) for x in (new, old, advantages, log_w.exp())]
    logprobs = hidden[0].requires_grad_()
    weights = hidden[3] if stale else None
    loss, _ = kl_penalty_loss(logprobs, *hidden[1:3], mask, beta=beta, behaviour_weights_BR=weights)
    loss.backward()
    assert loss.item() == pytest.approx(total / count, rel=1e-10, abs=1e-10)
    torch.testing.assert_close(logprobs.grad, slopes, rtol=1e-10, atol=1e-10)


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


def junk_where_masked(a, b, mask):
    """Some exact KL, of which only what counts may be looked at."""
    return torch.where(mask, (masked_zero(a, mask) - masked_zero(b, mask)).square(), NAN)


LOSSES = {
    "clip": lambda a, b, c, m, **kw: clip_loss(a, b, c, m, clip=0.2, **kw),
    "clip, all of it": lambda a, b, c, m, **kw: clip_loss(
        a, b, c, m, clip=0.2, clip_high=0.3, dual_clip=1.5, behaviour_weights_BR=b.square(), **kw
    ),
    "kl": lambda a, b, c, m, **kw: kl_penalty_loss(a, b, c, m, beta=1.5, **kw),
    "kl, stale": lambda a, b, c, m, **kw: kl_penalty_loss(
        a, b, c, m, beta=1.5, behaviour_weights_BR=b.square(), **kw
    ),
    "kl, exact": lambda a, b, c, m, **kw: kl_penalty_loss(
        a, b, c, m, beta=1.5, kl_BR=junk_where_masked(a, b, m), behaviour_weights_BR=b.square(), **kw
    ),
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
    with pytest.raises(ValueError, match=r"clip_high is -1.0; expected a number > 0"):
        clip_loss(x, x, x, x == 0, clip=0.2, clip_high=-1.0)
    with pytest.raises(ValueError, match=r"dual_clip is 1.0; expected a number > 1"):
        clip_loss(x, x, x, x == 0, clip=0.2, dual_clip=1.0)
    with pytest.raises(ValueError, match="must be equal"):
        clip_loss(x, x, x, x == 0, clip=0.2, behaviour_weights_BR=torch.ones(2, 1))
    with pytest.raises(ValueError, match="must be equal"):
        kl_penalty_loss(x, x, x, x == 0, beta=1.0, kl_BR=torch.ones(2))
    with pytest.raises(ValueError, match=r"clip is 0"):
        value_loss(x, x, x, x == 0, clip=0.0)
    with pytest.raises(ValueError, match=r"beta is -1"):
        kl_penalty_loss(x, x, x, x == 0, beta=-1)
