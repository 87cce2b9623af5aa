import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppolite.ops.advantages import Steps, gae, monte_carlo, td, td_lambda, vtrace
from ppolite.ops.importance import log_weights

NAN, INF = math.nan, math.inf


def steps_of(rewards, values, next_values, ends, mask=None):
    """One row. `ends`: a character a step; T terminated, C truncated (cut), . goes on."""
    terminated = torch.tensor([[e == "T" for e in ends]])
    ended = torch.tensor([[e in "TC" for e in ends]])
    mask = torch.ones_like(ended) if mask is None else torch.tensor([mask])
    r, v, v_next = (torch.tensor([x], dtype=torch.float64) for x in (rewards, values, next_values))
    return Steps(r, v, v_next, terminated, ended, mask)


def two_episodes(first_end):
    """Three steps, then one more of the next episode, at whose end the row is over.

    What step 2 led to is worth 30 if it was no terminal state; the next episode's first state is worth 100,
    and what it led to 50.
    """
    return steps_of(
        [1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 25.0, 100.0], [20.0, 25.0, 30.0, 50.0], f"..{first_end}."
    )


# By hand, γ = .5 and λ = .5.


def test_td_by_hand():
    assert td(two_episodes("T"), gamma=0.5).tolist() == [[1 + 10, 2 + 12.5, 3, 4 + 25]]
    assert td(two_episodes("C"), gamma=0.5).tolist() == [[1 + 10, 2 + 12.5, 3 + 15, 4 + 25]]
    # Two steps; the last ones of an episode have only one to go.
    assert td(two_episodes("T"), gamma=0.5, n=2).tolist() == [[1 + 1 + 6.25, 2 + 1.5, 3, 29]]
    assert td(two_episodes("C"), gamma=0.5, n=2).tolist() == [[1 + 1 + 6.25, 2 + 1.5 + 7.5, 18, 29]]


def test_monte_carlo_by_hand():
    assert monte_carlo(two_episodes("T"), gamma=0.5).tolist() == [[1 + 1 + 0.75, 2 + 1.5, 3, 29]]
    assert monte_carlo(two_episodes("C"), gamma=0.5).tolist() == [
        [1 + 1 + 0.75 + 3.75, 2 + 1.5 + 7.5, 18, 29]
    ]


def test_td_lambda_by_hand():
    """G_1 = 2 + .5 (.5 · 25 + .5 G_2), G_0 = 1 + .5 (.5 · 20 + .5 G_1)."""
    assert td_lambda(two_episodes("T"), gamma=0.5, lam=0.5).tolist() == [[8.25, 9.0, 3.0, 29.0]]
    assert td_lambda(two_episodes("C"), gamma=0.5, lam=0.5).tolist() == [[9.1875, 12.75, 18.0, 29.0]]


def test_gae_by_hand():
    """δ = (1 + 10 − 10, 2 + 12.5 − 20, 3 [+ 15] − 25, 4 + 25 − 100); Â_t = δ_t + .25 Â_{t+1}."""
    advantages, returns = gae(two_episodes("T"), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1 + 0.25 * (-5.5 + 0.25 * -22), -5.5 + 0.25 * -22, -22, -71]]
    assert returns.tolist() == [[8.25, 9, 3, 29]]
    advantages, _ = gae(two_episodes("C"), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1 + 0.25 * (-5.5 + 0.25 * -7), -5.5 + 0.25 * -7, -7, -71]]


def test_vtrace_by_hand():
    """Weights (2, ½) of a terminating episode, γ = 1, λ = 1: ρ = c = (1, ½).

    δ = (0 + 3 − 2, ½ (8 − 3)); v_1 = 3 + 2.5, v_0 = 2 + 1 + 2.5; Â = (v_1 − 2, ½ (8 − 3)).
    """
    steps = steps_of([0.0, 8.0], [2.0, 3.0], [3.0, NAN], ".T")
    log_w = torch.tensor([[2.0, 0.5]], dtype=torch.float64).log()
    targets, advantages = vtrace(steps, log_w, gamma=1.0)
    assert targets.tolist() == [pytest.approx([5.5, 5.5])]
    assert advantages.tolist() == [pytest.approx([3.5, 2.5])]
    targets, advantages = vtrace(steps, log_w, gamma=1.0, rho_max=INF, c_max=0.5)
    assert targets.tolist() == [pytest.approx([2 + 2 * 1 + 0.5 * 2.5, 5.5])]
    assert advantages.tolist() == [pytest.approx([2 * 3.5, 2.5])]


def test_response_by_hand():
    """γ = .9, λ = .5: δ = (.9·2 − 1, 10 − 2); Â_0 = .8 + .45·8. Not 4.8, as λ^k would have it."""
    rewards, values = torch.tensor([[0.0, 10.0, NAN]]), torch.tensor([[1.0, 2.0, NAN]])
    steps = Steps.of_responses(rewards, values, right_padded([2], 3))
    advantages, returns = gae(steps, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[4.4, 8.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[5.4, 10.0, 0.0]]))


# Against the definitions, by loops over episodes.


def right_padded(lengths, R):
    return torch.arange(R) < torch.tensor(lengths)[:, None]


def random_steps(rows, columns, seed):
    """Ends of both kinds and gaps in the mask, with NaN wherever nobody should look."""
    g = torch.Generator().manual_seed(seed)
    rewards, values, beyond = torch.randn(3, rows, columns, generator=g, dtype=torch.float64)
    terminated, truncated, mask = (torch.rand(rows, columns, generator=g) < p for p in (0.15, 0.15, 0.9))
    ended = terminated | truncated
    going_on = mask & ~ended & torch.cat([mask[:, 1:], torch.zeros(rows, 1, dtype=torch.bool)], 1)
    next_values = torch.where(going_on, values.roll(-1, 1), beyond)
    next_values[terminated] = NAN
    rewards, values, next_values = (torch.where(mask, x, NAN) for x in (rewards, values, next_values))
    steps = Steps(rewards, values, next_values, terminated, ended, mask)
    log_w = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return steps, torch.where(mask, log_w, NAN)


def episodes(steps: Steps):
    """Row, places, rewards, values with the bootstrap value at their end: 0 where terminal."""
    for b in range(len(steps.mask_BT)):
        places: list[int] = []
        for t in range(steps.mask_BT.shape[1]):
            if steps.mask_BT[b, t]:
                places.append(t)
            over = (
                t + 1 == steps.mask_BT.shape[1] or not steps.mask_BT[b, t + 1] or bool(steps.ended_BT[b, t])
            )
            if places and over:
                last = places[-1]
                rest = 0.0 if steps.terminated_BT[b, last] else steps.next_values_BT[b, last].item()
                yield (
                    b,
                    places,
                    steps.rewards_BT[b, places].tolist(),
                    [*steps.values_BT[b, places].tolist(), rest],
                )
                places = []


def n_step(r, v, t, n, gamma):
    n = min(n, len(r) - t)
    return math.fsum(gamma**k * r[t + k] for k in range(n)) + gamma**n * v[t + n]


def lambda_return(r, v, t, gamma, lam):
    """Sutton & Barto, eq. 12.3: the mixture of all n-step returns."""
    left = len(r) - t
    mixed = math.fsum((1 - lam) * lam ** (n - 1) * n_step(r, v, t, n, gamma) for n in range(1, left))
    return mixed + lam ** (left - 1) * n_step(r, v, t, left, gamma)


def generalised(r, v, t, gamma, lam):
    """Σ_k (γλ)^k δ_{t+k}."""
    delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
    return math.fsum((gamma * lam) ** k * d for k, d in enumerate(delta[t:]))


def vtrace_target(r, v, w, t, gamma, lam, rho_max, c_max):
    """Espeholt et al., eq. 1: every product on its own."""
    total = v[t]
    for i in range(t, len(r)):
        trace = math.prod(lam * min(c_max, w[j]) for j in range(t, i))
        total += gamma ** (i - t) * trace * min(rho_max, w[i]) * (r[i] + gamma * v[i + 1] - v[i])
    return total


shapes = {"rows": st.integers(1, 3), "columns": st.integers(1, 12), "seed": st.integers(0, 9999)}
unit = st.floats(0, 1)
thorough = settings(deadline=None, derandomize=True, max_examples=80)


def assert_equals(result: Tensor, steps: Steps, expected):
    """`expected(row, places, rewards, values, t)` at each step, 0 at masked places."""
    seen = torch.zeros_like(steps.mask_BT)
    for b, places, r, v in episodes(steps):
        wanted = [expected(b, places, r, v, t) for t in range(len(r))]
        assert result[b, places].tolist() == pytest.approx(wanted, rel=1e-10, abs=1e-10)
        seen[b, places] = True
    assert torch.equal(seen, steps.mask_BT)
    assert not result[~steps.mask_BT].any()


@thorough
@given(**shapes, gamma=unit, n=st.integers(1, 15))
def test_td_against_loops(rows: int, columns: int, seed: int, gamma: float, n: int):
    steps, _ = random_steps(rows, columns, seed)
    assert_equals(td(steps, gamma=gamma, n=n), steps, lambda b, p, r, v, t: n_step(r, v, t, n, gamma))
    assert_equals(monte_carlo(steps, gamma=gamma), steps, lambda b, p, r, v, t: n_step(r, v, t, 99, gamma))


@thorough
@given(**shapes, gamma=unit, lam=unit)
def test_td_lambda_and_gae_against_loops(rows: int, columns: int, seed: int, gamma: float, lam: float):
    steps, _ = random_steps(rows, columns, seed)
    returns = td_lambda(steps, gamma=gamma, lam=lam)
    assert_equals(returns, steps, lambda b, p, r, v, t: lambda_return(r, v, t, gamma, lam))
    advantages, same = gae(steps, gamma=gamma, lam=lam)
    assert_equals(advantages, steps, lambda b, p, r, v, t: generalised(r, v, t, gamma, lam))
    assert_same(same, returns)


@thorough
@given(**shapes, gamma=unit, lam=unit, rho_max=st.floats(0.3, 3), share=st.floats(0.1, 1))
def test_vtrace_against_loops(
    rows: int, columns: int, seed: int, gamma: float, lam: float, rho_max: float, share: float
):
    steps, log_w = random_steps(rows, columns, seed)
    c_max = rho_max * share
    targets, advantages = vtrace(steps, log_w, gamma=gamma, lam=lam, rho_max=rho_max, c_max=c_max)

    def target(b, places, r, v, t):
        if t == len(r):
            return v[t]
        return vtrace_target(r, v, log_w[b, places].exp().tolist(), t, gamma, lam, rho_max, c_max)

    def advantage(b, places, r, v, t):
        ahead = lam * target(b, places, r, v, t + 1) + (1 - lam) * v[t + 1]
        return min(rho_max, log_w[b, places[t]].exp().item()) * (r[t] + gamma * ahead - v[t])

    assert_equals(targets, steps, target)
    assert_equals(advantages, steps, advantage)


@settings(deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    gamma=unit,
    lam=unit,
    seed=st.integers(0, 999),
)
def test_responses_against_loops(lengths: list[int], gamma: float, lam: float, seed: int):
    steps = responses(lengths, 9, seed)
    advantages, returns = gae(steps, gamma=gamma, lam=lam)
    for b, length in enumerate(lengths):
        r, v = steps.rewards_BT[b, :length].tolist(), [*steps.values_BT[b, :length].tolist(), 0.0]
        expected = [generalised(r, v, t, gamma, lam) for t in range(length)]
        assert advantages[b, :length].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)
        torch.testing.assert_close(returns[b, :length], advantages[b, :length] + steps.values_BT[b, :length])
    assert not advantages[~steps.mask_BT].any()
    assert not returns[~steps.mask_BT].any()


def responses(lengths, R, seed):
    g = torch.Generator().manual_seed(seed)
    mask = right_padded(lengths, R)
    rewards, values = torch.randn(2, len(lengths), R, generator=g, dtype=torch.float64)
    return Steps.of_responses(torch.where(mask, rewards, NAN), torch.where(mask, values, NAN), mask)


# Identities and limits.


def assert_same(a: Tensor, b: Tensor):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_the_family_meets_at_its_ends(gamma):
    """λ = 0 is TD(0), λ = 1 is Monte Carlo, and so is n beyond the row."""
    steps, _ = random_steps(4, 30, seed=5)
    assert_same(td_lambda(steps, gamma=gamma, lam=0.0), td(steps, gamma=gamma))
    _, returns = gae(steps, gamma=gamma, lam=0.0)
    assert_same(returns, td(steps, gamma=gamma))
    _, returns = gae(steps, gamma=gamma, lam=1.0)
    assert_same(returns, monte_carlo(steps, gamma=gamma))
    assert_same(td(steps, gamma=gamma, n=30), monte_carlo(steps, gamma=gamma))
    assert torch.equal(td(steps, gamma=gamma, n=10**9), td(steps, gamma=gamma, n=30))


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_on_policy_vtrace_is_the_lambda_return_and_gae(lam):
    steps, _ = random_steps(4, 30, seed=6)
    on_policy = torch.where(steps.mask_BT, 0.0, NAN).double()
    targets, advantages = vtrace(steps, on_policy, gamma=0.9, lam=lam)
    torch.testing.assert_close(targets, td_lambda(steps, gamma=0.9, lam=lam))
    torch.testing.assert_close(advantages, gae(steps, gamma=0.9, lam=lam)[0])


def test_vtrace_without_truncation_learns_the_value_of_the_other_policy():
    """Two coin tosses, enumerated: E_μ[v_0] is the expected return of π, whatever the critic believed."""
    pi, mu = torch.tensor([0.9, 0.1]).double(), torch.tensor([0.4, 0.6]).double()
    rewards = torch.tensor([[1.0, 5.0], [2.0, -3.0]]).double()  # of step t and action a
    mean = 0.0
    for a in range(2):
        for b in range(2):
            steps = steps_of([rewards[0, a].item(), rewards[1, b].item()], [7.0, -2.0], [-2.0, NAN], ".T")
            log_w = (pi / mu).log()[[a, b]][None]
            targets, _ = vtrace(steps, log_w, gamma=0.5, rho_max=INF, c_max=INF)
            mean += (mu[a] * mu[b] * targets[0, 0]).item()
    assert mean == pytest.approx(0.9 * 1 + 0.1 * 5 + 0.5 * (0.9 * 2 + 0.1 * -3))


def test_truncated_vtrace_learns_the_value_of_a_policy_in_between():
    """Its fixed point is the value of π_ρ̄ ∝ min(ρ̄ μ, π) (Espeholt et al., eq. 3), here (.8, .1) / .9."""
    pi, mu = [0.9, 0.1], [0.4, 0.6]
    rewards, value = [1.0, 5.0], (0.8 * 1 + 0.1 * 5) / 0.9
    surprise = 0.0
    for a in range(2):
        log_w = torch.tensor([[math.log(pi[a] / mu[a])]], dtype=torch.float64)
        targets, _ = vtrace(steps_of([rewards[a]], [value], [NAN], "T"), log_w, gamma=1.0, rho_max=2.0)
        surprise += mu[a] * (targets.item() - value)
    assert surprise == pytest.approx(0, abs=1e-12)


def test_extreme_weights_are_cut():
    steps, _ = random_steps(2, 20, seed=7)
    for extreme in (1e4, -1e4):
        for result in vtrace(steps, torch.full((2, 20), extreme), gamma=0.9):
            assert result.isfinite().all()


def test_a_perfect_critic_leaves_no_advantage():
    """A reward of 1 at the end and V_t = γ^(steps to the end)."""
    rewards, values = [0.0, 0.0, 0.0, 1.0], [0.9**3, 0.9**2, 0.9, 1.0]
    advantages, _ = gae(steps_of(rewards, values, [*values[1:], NAN], "...T"), gamma=0.9, lam=0.7)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))


def test_a_truncation_is_no_termination():
    """A pole that stands for ever at a reward of 1 is worth 1 / (1 − γ), and the time limit does not matter."""
    forever = 1 / (1 - 0.9)
    row = [1.0] * 4, [forever] * 4, [forever] * 4
    advantages, _ = gae(steps_of(*row, "..C."), gamma=0.9, lam=0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))
    assert (gae(steps_of(*row, "..T."), gamma=0.9, lam=0.95)[0][0, :3] < -1).all()


def test_masked_steps_split_a_row_as_ends_do():
    """A step that is only a reset (`done` one step late) is masked, and nothing flows over it."""
    cut = steps_of(
        [1.0, 2.0, NAN, 4.0], [3.0, 4.0, NAN, 6.0], [4.0, 5.0, NAN, 7.0], "....", [True, True, False, True]
    )
    apart = steps_of([1.0, 2.0], [3.0, 4.0], [4.0, 5.0], ".."), steps_of([4.0], [6.0], [7.0], ".")
    for f in (td_lambda, lambda s, **kw: gae(s, **kw)[0], lambda s, gamma, lam: td(s, gamma=gamma, n=3)):
        first, second = (f(s, gamma=0.9, lam=0.8)[0].tolist() for s in apart)
        assert f(cut, gamma=0.9, lam=0.8)[0].tolist() == pytest.approx([*first, 0, *second])


def test_more_padding_changes_nothing():
    narrow, wide = responses([3, 1], 3, seed=2), responses([3, 1], 3, seed=2)
    rewards, values = (torch.cat([x, torch.full((2, 4), NAN)], 1) for x in (wide.rewards_BT, wide.values_BT))
    wide = Steps.of_responses(rewards, values, right_padded([3, 1], 7))
    for a, b in zip(gae(narrow, gamma=0.99, lam=0.95), gae(wide, gamma=0.99, lam=0.95), strict=True):
        assert torch.equal(a, b[:, :3])


def test_padding_has_no_gradient():
    mask = right_padded([2, 0], 3)
    values = torch.where(mask, 1.0, NAN).requires_grad_()
    steps = Steps.of_responses(torch.where(mask, 2.0, NAN), values, mask)
    gae(steps, gamma=0.9, lam=0.9)[0].sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert not values.grad[~mask].any()


def test_float32_stays_float32_and_close():
    steps, log_w = random_steps(4, 300, seed=8)
    single = Steps._make(x.float() if x.is_floating_point() else x for x in steps)
    for f in (
        lambda s, w: td(s, gamma=0.99, n=5),
        lambda s, w: td_lambda(s, gamma=0.99, lam=0.95),
        lambda s, w: gae(s, gamma=0.99, lam=0.95)[0],
        lambda s, w: vtrace(s, w, gamma=0.99)[0],
    ):
        small, exact = f(single, log_w.float()), f(steps, log_w)
        assert small.dtype == torch.float32
        assert (small - exact).abs().max() < 1e-6 * exact.abs().max()


def test_nothing_to_do():
    empty = torch.zeros(2, 0)
    for x in gae(Steps.of_responses(empty, empty, empty > 0), gamma=0.9, lam=0.9):
        assert x.shape == (2, 0)
    assert td(Steps.of_responses(empty, empty, empty > 0), gamma=0.9, n=4).shape == (2, 0)


def test_refusals():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="row 1 of the mask has a True after a False"):
        Steps.of_responses(x, x, torch.tensor([[True, True, False], [False, True, True]]))
    with pytest.raises(ValueError, match="must be equal"):
        Steps.of_responses(x, x, right_padded([1, 1], 4))
    steps = Steps.of_responses(x, x, right_padded([1, 2], 3))
    with pytest.raises(ValueError, match="must be equal"):
        gae(steps._replace(next_values_BT=torch.zeros(2, 4)), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"gamma=1.1, lam=1.0: expected numbers in \[0, 1\]"):
        gae(steps, gamma=1.1, lam=1.0)
    with pytest.raises(ValueError, match=r"lam=-0.1: expected numbers in \[0, 1\]"):
        td_lambda(steps, gamma=1.0, lam=-0.1)
    with pytest.raises(ValueError, match="n=0: expected 1 step or more"):
        td(steps, gamma=1.0, n=0)
    with pytest.raises(ValueError, match="expected 0 < c_max ≤ rho_max"):
        vtrace(steps, x, gamma=1.0, rho_max=0.5)
    with pytest.raises(ValueError, match=r"ended has dtype torch\.float32; expected bool"):
        gae(steps._replace(ended_BT=x), gamma=1.0, lam=1.0)
    unended = steps.ended_BT & torch.tensor([[True], [False]])
    with pytest.raises(ValueError, match="row 1 terminates at a step that did not end"):
        gae(steps._replace(ended_BT=unended), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="must be equal"):
        vtrace(steps, torch.zeros(2, 1), gamma=1.0)


def test_weights_and_targets_fit_together():
    """What `log_weights` gives is what `vtrace` takes."""
    steps, _ = random_steps(2, 8, seed=9)
    logprobs = torch.where(steps.mask_BT, -1.0, NAN).double()
    log_w = log_weights(logprobs, logprobs, steps.mask_BT)
    torch.testing.assert_close(vtrace(steps, log_w, gamma=0.9)[0], monte_carlo(steps, gamma=0.9))
