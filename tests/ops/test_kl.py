import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from ppolite.ops.kl import (
    AdaptiveLeash,
    AdaptivePenalty,
    FixedLeash,
    categorical_entropy,
    categorical_kl,
    gaussian_entropy,
    gaussian_kl,
    gaussian_logprob,
    kl_estimate,
)

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


def test_categorical_by_hand():
    assert categorical_kl(P.log(), Q.log()).item() == pytest.approx(KL)
    assert categorical_kl(P.log(), P.log()).item() == 0
    fair = torch.full((2, 4), 0.25).log()
    assert categorical_entropy(fair).tolist() == pytest.approx([math.log(4)] * 2)


def test_categorical_with_impossible_choices():
    """(½, ½, 0) and (¼, ¼, ½): KL(p‖q) = log 2 either way round the 0, and ∞ the other way."""
    logits = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    logp, logq = logits.log_softmax(0), torch.tensor([0.25, 0.25, 0.5]).double().log()
    kl, entropy = categorical_kl(logp, logq), categorical_entropy(logp)
    assert kl.item() == entropy.item() == pytest.approx(math.log(2))
    assert categorical_kl(logq, logp.detach()) == math.inf
    (kl + entropy).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0, 0, 0])
    assert categorical_kl(logp, logp).item() == 0


def test_gaussian_by_hand():
    """N(1, 1) and N(3, 2²): log 2 + (1 + 4) / 8 − ½, of two dimensions the second being alike."""
    mean_p, mean_q = torch.tensor([[1.0, 7.0]]), torch.tensor([[3.0, 7.0]])
    log_std_p, log_std_q = torch.tensor([0.0, -1.0]), torch.tensor([math.log(2), -1.0])
    assert gaussian_kl(mean_p, log_std_p, mean_q, log_std_q).tolist() == pytest.approx([math.log(2) + 1 / 8])
    assert gaussian_kl(mean_p, log_std_p, mean_p, log_std_p).tolist() == [0]
    density = math.exp(-0.5 * 4) / math.sqrt(2 * math.pi)  # of 3 under N(1, 1)
    assert gaussian_logprob(mean_q[:, :1], mean_p[:, :1], log_std_p[:1]).tolist() == pytest.approx(
        [math.log(density)]
    )
    assert gaussian_entropy(log_std_p).item() == pytest.approx(math.log(2 * math.pi * math.e) - 1)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(deadline=None, derandomize=True)
@given(n=st.integers(1, 5), size=st.integers(1, 6), seed=st.integers(0, 999))
def test_exact_divergences_against_pytorch(n: int, size: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    a, b, c, d = torch.randn(4, n, size, generator=g, dtype=torch.float64)
    p, q = Categorical(logits=a, validate_args=False), Categorical(logits=b, validate_args=False)
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    assert_same(categorical_kl(logp, logq), kl_divergence(p, q))
    assert_same(categorical_entropy(logp), p.entropy())
    p, q = (Independent(Normal(m, s.exp()), 1) for m, s in ((a, c), (b, d)))
    assert_same(gaussian_kl(a, c, b, d), kl_divergence(p, q))
    assert_same(gaussian_entropy(c), p.entropy())
    assert_same(gaussian_logprob(b, a, c), p.log_prob(b))
    shared = c[0]  # one log σ for all states
    torch.testing.assert_close(gaussian_logprob(b, a, shared), gaussian_logprob(b, a, shared.expand(n, -1)))
    assert_same(gaussian_kl(a, shared, b, d), gaussian_kl(a, shared.expand(n, -1), b, d))


def test_the_estimates_settle_at_the_exact_gaussian_kl():
    g = torch.Generator().manual_seed(0)
    mean_p, log_std_p = torch.tensor([0.3, -0.2]), torch.tensor([0.1, -0.3])
    mean_q, log_std_q = torch.tensor([0.0, 0.1]), torch.tensor([0.0, 0.0])
    x = mean_p + log_std_p.exp() * torch.randn(1_000_000, 2, generator=g)
    logp, logq = gaussian_logprob(x, mean_p, log_std_p), gaussian_logprob(x, mean_q, log_std_q)
    exact = gaussian_kl(mean_p, log_std_p, mean_q, log_std_q).item()
    for kind in ("k1", "k3"):
        assert kl_estimate(logp, logq, kind).mean().item() == pytest.approx(exact, rel=0.01)
    assert -logp.mean().item() == pytest.approx(gaussian_entropy(log_std_p).item(), rel=0.01)


def test_gaussian_kl_keeps_its_digits_for_small_steps():
    """σ_p = σ_q e^{1e-4}: (e^{2e-4} − 1 − 2e-4) / 2 ≈ 1e-8; as exp(x) − 1 − x float32 would see nothing."""
    zero = torch.zeros(1)
    kl = gaussian_kl(zero, torch.full((1,), 1e-4), zero, zero).item()
    assert kl == pytest.approx(1e-8, rel=1e-2)


@pytest.mark.parametrize(
    "f", [gaussian_kl, lambda *a: categorical_kl(a[0].log_softmax(-1), a[1].log_softmax(-1))]
)
def test_gradients_of_the_exact_divergences(f):
    g = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(f, inputs)


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


def test_the_penalty_comes_back_from_both_ends():
    penalty = AdaptivePenalty(beta=1.0, target=0.01)
    for kl, end in ((0.0, 1e-9), (9.0, 1e9), (0.0, 1e-9)):
        for _ in range(2_000):
            penalty.update(kl)
        assert penalty.beta == end


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
