import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppolite.ops.importance import WeightKind, effective_sample_size
from ppolite.ops.losses import clip_loss
from ppolite.ops.policy_gradient import importance_weighted_loss, policy_gradient_loss

NAN = math.nan
ONE = torch.ones(1, dtype=torch.bool)
KINDS: tuple[WeightKind, ...] = ("step", "per_decision", "trajectory")


def one(x):
    return torch.tensor([x], dtype=torch.float64)


def test_policy_gradient_by_hand():
    """−(2 · −1 + −3 · −.5) / 2; the third place does not count."""
    logprobs = torch.tensor([-1.0, -0.5, NAN], requires_grad=True)
    mask = torch.tensor([True, True, False])
    loss, diagnostics = policy_gradient_loss(logprobs, torch.tensor([2.0, -3.0, NAN]), mask)
    assert loss.item() == 0.25
    assert diagnostics["logprob_mean"].item() == -0.75
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1, 1.5, 0]


@pytest.mark.parametrize(
    ("ratio", "cap", "weight"), [(3.0, None, 3.0), (3.0, 2.0, 2.0), (0.5, 2.0, 0.5), (3.0, 1.0, 1.0)]
)
def test_importance_weighted_by_hand(ratio, cap, weight):
    """−w · 2 · log π; a truncated weight still learns, and the diagnostics are of the plain one."""
    logprobs = one(math.log(ratio) - 2).requires_grad_()
    loss, diagnostics = importance_weighted_loss(logprobs, one(-2.0), one(2.0), ONE, truncate=cap)
    assert loss.item() == pytest.approx(-2 * weight * (math.log(ratio) - 2))
    assert diagnostics["weight_mean"].item() == diagnostics["weight_max"].item() == pytest.approx(ratio)
    assert diagnostics["clip_fraction"] == (weight < ratio)
    assert diagnostics["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))
    assert diagnostics["ess"].item() == pytest.approx(1)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-2 * weight)


# A task of two steps and two actions, enumerated: the second action's logits depend on the first.

LOGITS = torch.tensor([[0.4, -0.3], [1.0, 0.2], [-0.5, 0.1]], dtype=torch.float64)
BEHAVIOUR = torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.1, 0.9]], dtype=torch.float64).log()
REWARDS = {(0, 0): (1.0, 2.0), (0, 1): (1.0, -1.0), (1, 0): (3.0, 0.5), (1, 1): (3.0, 4.0)}
ROWS = list(itertools.product(range(2), range(2)))


def logprobs_of(table, a, b):
    return torch.stack([table[0, a], table[1 + a, b]])


def exact_gradient():
    """∇ of the expected sum of the rewards, the four rows with their probabilities."""
    logits = LOGITS.clone().requires_grad_()
    table = logits.log_softmax(1)
    returns = [logprobs_of(table, *row).sum().exp() * sum(REWARDS[row]) for row in ROWS]
    (gradient,) = torch.autograd.grad(torch.stack(returns).sum(), logits)
    return gradient


def sampled_gradient(loss_of, drawn_from, advantages):
    """The expected gradient of a loss when rows are drawn from the given policy."""
    logits = LOGITS.clone().requires_grad_()
    table = logits.log_softmax(1)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for row in ROWS:
        probability = logprobs_of(drawn_from, *row).sum().exp().item()
        new, old = logprobs_of(table, *row)[None], logprobs_of(drawn_from, *row)[None]
        loss = loss_of(new, old, torch.tensor([advantages(*row)]).double(), mask, denom=1 / probability)[0]
        loss.backward(retain_graph=True)
    assert logits.grad is not None
    return -logits.grad


def total(a, b):
    """The episode's return, for either step: REINFORCE."""
    return [sum(REWARDS[a, b])] * 2


def to_go(a, b):
    """Q(s_t, a_t) under π_θ: what an action brings from here on."""
    after = LOGITS[1 + a].softmax(0)
    return [REWARDS[a, 0][0] + sum(after[i].item() * REWARDS[a, i][1] for i in range(2)), REWARDS[a, b][1]]


def baseline(a, b):
    """Q less anything that does not depend on the action."""
    q = to_go(a, b)
    return [q[0] - 1.7, q[1] - (0.3 if a else -2.0)]


@pytest.mark.parametrize("advantages", [total, to_go, baseline])
def test_on_fresh_data_it_is_the_gradient_of_the_return(advantages):
    own = LOGITS.log_softmax(1)
    for loss_of in (
        lambda new, old, *rest, **kw: policy_gradient_loss(new, *rest, **kw),
        *(lambda *a, k=k, **kw: importance_weighted_loss(*a, kind=k, **kw) for k in KINDS),
    ):
        torch.testing.assert_close(sampled_gradient(loss_of, own, advantages), exact_gradient())


@pytest.mark.parametrize(
    ("kind", "advantages", "exact"),
    [
        ("trajectory", total, True),
        ("trajectory", to_go, True),
        ("per_decision", to_go, True),
        ("per_decision", baseline, True),
        ("per_decision", total, False),  # the later reward of the first step's return is not weighted
        ("step", to_go, False),  # states are still visited as often as μ visits them
    ],
)
def test_which_weights_are_exact_on_another_policys_data(kind, advantages, exact):
    gradient = sampled_gradient(
        lambda *a, **kw: importance_weighted_loss(*a, kind=kind, **kw), BEHAVIOUR, advantages
    )
    assert torch.allclose(gradient, exact_gradient()) == exact


def test_unweighted_it_is_wrong_on_another_policys_data():
    gradient = sampled_gradient(
        lambda new, old, *rest, **kw: policy_gradient_loss(new, *rest, **kw), BEHAVIOUR, to_go
    )
    assert not torch.allclose(gradient, exact_gradient(), rtol=0.05)


# Identities and conventions.


def random_batch(rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, columns, generator=g, dtype=torch.float64) / 2 for _ in range(3)]
    mask = torch.rand(rows, columns, generator=g) < 0.7
    mask[0, 0] = True
    return tensors, mask


def gradient_of(loss_of, logprobs):
    logprobs = logprobs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(logprobs), logprobs)
    return gradient


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_policys_own_data_weights_are_one(kind):
    (logprobs, _, advantages), mask = random_batch(3, 5, seed=3)
    weighted, diagnostics = importance_weighted_loss(logprobs, logprobs, advantages, mask, kind=kind)
    torch.testing.assert_close(weighted, policy_gradient_loss(logprobs, advantages, mask)[0])
    assert {k: v.item() for k, v in diagnostics.items()} == pytest.approx(
        {"weight_mean": 1, "weight_square": 1, "weight_max": 1, "ess": 1, "clip_fraction": 0, "approx_kl": 0}
    )


def test_a_step_weight_has_the_gradient_of_ppos_surrogate_without_a_clip():
    """∇ −ρ A = −ρ A ∇log π."""
    (logprobs, behaviour, advantages), mask = random_batch(3, 5, seed=4)
    ours = gradient_of(lambda x: importance_weighted_loss(x, behaviour, advantages, mask)[0], logprobs)
    unclipped = gradient_of(lambda x: clip_loss(x, behaviour, advantages, mask, clip=1e9)[0], logprobs)
    torch.testing.assert_close(ours, unclipped)


@pytest.mark.parametrize("kind", KINDS)
def test_effective_sample_size_is_that_of_the_weights_in_use(kind):
    """Of 3 rows of 2 steps; by hand from the ratios 2, ½ | 1, 1 | 1, 4."""
    behaviour = torch.zeros(3, 2).double()
    logprobs = torch.tensor([[2, 0.5], [1, 1], [1, 4]]).double().log()
    w = {"step": [2, 0.5, 1, 1, 1, 4], "per_decision": [2, 1, 1, 1, 1, 4], "trajectory": [1, 1, 1, 1, 4, 4]}[
        kind
    ]
    _, diagnostics = importance_weighted_loss(logprobs, behaviour, logprobs, behaviour == 0, kind=kind)
    assert diagnostics["ess"].item() == pytest.approx(sum(w) ** 2 / sum(x * x for x in w) / 6)
    mean, square = (diagnostics[key].item() for key in ("weight_mean", "weight_square"))
    assert mean**2 / square == pytest.approx(diagnostics["ess"].item())
    assert diagnostics["weight_max"].item() == pytest.approx(4)
    assert diagnostics["weight_mean"].item() == pytest.approx(sum(w) / 6)


def test_rows_with_several_episodes():
    """The first episode's weights do not reach the second's."""
    (logprobs, behaviour, advantages), _ = random_batch(1, 6, seed=5)
    mask = torch.ones(1, 6, dtype=torch.bool)
    ended = torch.tensor([[False, True, False, False, False, False]])
    for kind in KINDS:
        joined, _ = importance_weighted_loss(
            logprobs, behaviour, advantages, mask, kind=kind, ended_BR=ended, denom=6
        )
        apart = [
            importance_weighted_loss(
                *(x[:, s] for x in (logprobs, behaviour, advantages, mask)), kind=kind, denom=6
            )[0]
            for s in (slice(2), slice(2, 6))
        ]
        torch.testing.assert_close(joined, apart[0] + apart[1])


LOSSES = {
    "policy gradient": lambda x, b, a, m, **kw: policy_gradient_loss(x, a, m, **kw),
    **{k: lambda x, b, a, m, k=k, **kw: importance_weighted_loss(x, b, a, m, kind=k, **kw) for k in KINDS},
    "truncated": lambda x, b, a, m, **kw: importance_weighted_loss(x, b, a, m, truncate=1.1, **kw),
}


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 6),
    seed=st.integers(0, 999),
    junk=st.sampled_from([NAN, math.inf]),
)
def test_parts_add_up_and_padding_is_never_read(name: str, rows: int, columns: int, seed: int, junk: float):
    (x, behaviour, advantages), mask = random_batch(rows, columns, seed)
    clean = x.clone().requires_grad_()
    whole, diagnostics = LOSSES[name](clean, behaviour, advantages, mask)
    whole.backward()

    dirty, *rest = (torch.where(mask, t, junk) for t in (x, behaviour, advantages))
    dirty.requires_grad_()
    loss, parts = torch.zeros((), dtype=torch.float64), []
    for b in range(rows):
        row = slice(b, b + 1)
        part, seen = LOSSES[name](dirty[row], *(t[row] for t in rest), mask[row], denom=mask.sum())
        part.backward()
        loss += part.detach()
        parts.append(seen)
        assert not any(v.requires_grad for v in seen.values())
    torch.testing.assert_close(loss, whole.detach())
    torch.testing.assert_close(dirty.grad, clean.grad)
    for key, value in diagnostics.items():
        values = torch.stack([seen[key] for seen in parts])
        if key == "ess":
            assert values.sum() >= value - 1e-12
        else:
            torch.testing.assert_close(values.max() if key == "weight_max" else values.sum(), value)


@pytest.mark.parametrize("name", LOSSES)
def test_refusals(name):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="mask is empty"):
        LOSSES[name](x, x, x, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be equal"):
        LOSSES[name](x, x, x, torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="the cap of the weights is 0"):
        importance_weighted_loss(x, x, x, x == 0, truncate=0.0)
    with pytest.raises(ValueError, match="expected 'step'"):
        importance_weighted_loss(x, x, x, x == 0, kind="full")


def test_a_part_without_a_single_place():
    x, nothing = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    loss, diagnostics = importance_weighted_loss(x, x, x, nothing, denom=7)
    assert loss == 0
    assert all(v == 0 for v in diagnostics.values())
    assert effective_sample_size(x[nothing]) == 0
