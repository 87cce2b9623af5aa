"""The corridor: values by hand, the bias of GAE by its identities, and what episodes say about both."""

from __future__ import annotations

import numpy as np
import pytest
from experiments.how_far import Corridor, errors, exact_bias, learned, true_values, walk

TWO = Corridor(size=2, right=0.5, slip=0.0, prize=1.0, noise=0.0, gamma=0.5)


def test_values_of_two_states_by_hand() -> None:
    """V0 = ¼V0 + ¼V1 and V1 = ¼V0 + ½, so V1 = 6/11 and V0 = 2/11."""
    v_S, q_SA = true_values(TWO)
    assert v_S == pytest.approx([2 / 11, 6 / 11])
    assert q_SA == pytest.approx(np.array([[1 / 11, 3 / 11], [1 / 11, 1.0]]))


def test_a_step_that_slips_goes_the_other_way() -> None:
    """One state: right is out with 0.9, left with 0.1; γ = 0: Q is the chance of the prize."""
    _, q_SA = true_values(Corridor(size=1, slip=0.1, gamma=0.0))
    assert q_SA == pytest.approx(np.array([[0.1, 0.9]]))


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_a_true_critic_is_unbiased_at_every_lambda(lam: float) -> None:
    chain = Corridor()
    assert exact_bias(chain, true_values(chain)[0], lam) == pytest.approx(0, abs=1e-12)


def test_at_lambda_1_the_bias_is_an_offset_of_the_state() -> None:
    """Â = G − V: wrong by −error(s), whatever the action."""
    chain = Corridor()
    error_S = np.linspace(-1, 1, chain.size) ** 2
    bias_SA = exact_bias(chain, true_values(chain)[0] + error_S, 1.0)
    assert bias_SA == pytest.approx(-np.stack([error_S, error_S], axis=1))


def test_at_lambda_0_a_critic_of_zeros_sees_the_reward_alone() -> None:
    v_S, q_SA = true_values(TWO)
    rewards_SA = np.array([[0.0, 0.0], [0.0, 1.0]])
    assert exact_bias(TWO, np.zeros(2), 0.0) == pytest.approx(rewards_SA - (q_SA - v_S[:, None]))


def test_episodes_find_the_bias_that_algebra_gives() -> None:
    chain, lam = Corridor(size=4, noise=0.0), 0.5
    seen = walk(chain, 30_000, 60, np.random.default_rng(0))
    values_S = true_values(chain)[0] + np.array([0.3, -0.2, 0.1, 0.4])
    found = errors(chain, seen, values_S, lam)
    bias_SA = exact_bias(chain, values_S, lam)
    shares_S = np.bincount(seen.states_BT[seen.mask_BT], minlength=4) / seen.mask_BT.sum()
    offset_S = bias_SA @ [0.25, 0.75]
    apart_S = np.square(bias_SA - offset_S[:, None]) @ [0.25, 0.75]
    assert found["bias2"] == pytest.approx(shares_S @ apart_S, rel=0.03)
    assert found["offset2"] == pytest.approx(shares_S @ offset_S**2, rel=0.03)


def test_walks_end_once_and_pay_once() -> None:
    chain = Corridor(size=3, noise=0.0)
    seen = walk(chain, 50, 60, np.random.default_rng(1))
    assert (seen.terminated_BT.sum(axis=1) == 1).all()
    assert (seen.rewards_BT * seen.mask_BT).sum(axis=1).tolist() == [1.0] * 50
    assert (seen.mask_BT.sum(axis=1) == seen.terminated_BT.argmax(axis=1) + 1).all()


def test_td_finds_the_values_after_many_passes() -> None:
    chain = Corridor(size=4, noise=0.0)
    seen = walk(chain, 4_000, 80, np.random.default_rng(2))
    assert learned(chain, seen, passes=100) == pytest.approx(true_values(chain)[0], abs=0.02)
    assert learned(chain, seen, passes=0) == pytest.approx(0)
