import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppolite.ops.kl import AdaptiveLeash, AdaptivePenalty, FixedLeash, kl_estimate

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
KL = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)


def expectation(kind, logp, logq, p=P):
    return (p * kl_estimate(logp, logq, kind)).sum()


def test_one_sample_by_hand():
    """r = q/p = 2: k1 = −log 2, k2 = ½ log² 2, k3 = 1 − log 2."""
    logp, logq = torch.tensor([0.25]).log(), torch.tensor([0.5]).log()
    log2 = math.log(2)
    for kind, expected in (("k1", -log2), ("k2", log2**2 / 2), ("k3", 1 - log2)):
        assert kl_estimate(logp, logq, kind).item() == pytest.approx(expected)


def test_k1_and_k3_are_unbiased():
    """The expectation over p, enumerated, is KL(p‖q) itself."""
    assert expectation("k1", P.log(), Q.log()).item() == pytest.approx(KL)
    assert expectation("k3", P.log(), Q.log()).item() == pytest.approx(KL)
    assert expectation("k2", P.log(), Q.log()).item() != pytest.approx(KL, rel=0.005)


@pytest.mark.parametrize(
    ("kind", "in_q", "in_p"), [("k1", True, False), ("k2", False, True), ("k3", True, False)]
)
def test_whose_gradient_is_unbiased(kind, in_q, in_p):
    """Samples held fixed; in softmax parameters ∇_q KL = q − p and ∇_p KL = p (log p/q − KL)."""
    parameters = Q.log().requires_grad_()
    (grad,) = torch.autograd.grad(expectation(kind, P.log(), parameters.log_softmax(0)), parameters)
    assert torch.allclose(grad, Q - P) == in_q
    parameters = P.log().requires_grad_()
    (grad,) = torch.autograd.grad(expectation(kind, parameters.log_softmax(0), Q.log()), parameters)
    assert torch.allclose(grad, P * ((P / Q).log() - KL)) == in_p


@given(st.floats(-20, 0, width=32), st.floats(-20, 0, width=32))
def test_k2_and_k3_are_never_negative(logp: float, logq: float):
    a, b = torch.tensor([logp]), torch.tensor([logq])
    assert kl_estimate(a, b, "k2") >= 0
    assert kl_estimate(a, b, "k3") >= 0


def test_k3_keeps_its_digits_for_small_steps():
    """½ (1e-3)² (1 + 1e-3/3); written as exp(x) − 1 − x float32 would miss by several per cent."""
    k3 = kl_estimate(torch.zeros(1), torch.full((1,), 1e-3), "k3").item()
    assert k3 == pytest.approx(0.5e-6 * (1 + 1e-3 / 3), rel=1e-3)


def test_unknown_estimator():
    with pytest.raises(ValueError, match="expected 'k1', 'k2' or 'k3'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_fixed_leash():
    leash = FixedLeash(0.05)
    leash.update(100.0, 64)
    assert leash.beta == 0.05
    with pytest.raises(ValueError, match="beta is -1"):
        FixedLeash(-1)


@pytest.mark.parametrize(
    ("kl", "beta"),
    [(6.0, 0.1), (6.6, 0.101), (60.0, 0.102), (5.4, 0.099), (-1.0, 0.098)],
)
def test_adaptive_leash_by_hand(kl, beta):
    """64 sequences of a horizon of 640: a tenth of the clipped relative error."""
    leash = AdaptiveLeash(beta=0.1, target=6.0, horizon=640)
    leash.update(kl, 64)
    assert leash.beta == pytest.approx(beta)


def test_adaptive_leash_settles_at_its_target():
    """On a policy whose KL falls as β rises, KL = 1/β."""
    leash = AdaptiveLeash(beta=1.0, target=6.0, horizon=1000)
    for _ in range(500):
        leash.update(1 / leash.beta, 100)
    assert 1 / leash.beta == pytest.approx(6.0, rel=1e-3)


@pytest.mark.parametrize(
    ("kl", "beta"), [(0.0066, 0.5), (0.0067, 1.0), (0.01, 1.0), (0.0149, 1.0), (0.0151, 2.0), (9.0, 2.0)]
)
def test_adaptive_penalty_by_hand(kl, beta):
    penalty = AdaptivePenalty(beta=1.0, target=0.01)
    penalty.update(kl)
    assert penalty.beta == beta


def test_beta_survives_a_checkpoint():
    leash = AdaptiveLeash(0.1, 6.0, 640)
    leash.update(60.0, 64)
    penalty = AdaptivePenalty(1.0, 0.01)
    penalty.update(1.0)
    for trained, fresh in (
        (leash, AdaptiveLeash(0.1, 6.0, 640)),
        (penalty, AdaptivePenalty(1.0, 0.01)),
        (FixedLeash(0.3), FixedLeash(0.0)),
    ):
        fresh.load_state_dict(trained.state_dict())
        assert fresh.beta == trained.beta


def test_controllers_refuse_what_would_poison_beta():
    for controller in (AdaptiveLeash(0.1, 6.0, 640), AdaptivePenalty(1.0, 0.01)):
        before = controller.beta
        with pytest.raises(ValueError, match="the measured KL is nan"):
            controller.update(math.nan, 64) if isinstance(controller, AdaptiveLeash) else controller.update(
                math.nan
            )
        assert controller.beta == before
    with pytest.raises(ValueError, match="choose one well above 20"):
        AdaptiveLeash(0.1, 6.0, 20).update(1.0, 100)
    with pytest.raises(ValueError, match="target is 0"):
        AdaptiveLeash(0.1, 0, 640)
    with pytest.raises(ValueError, match="beta is 0"):
        AdaptivePenalty(0, 0.01)
