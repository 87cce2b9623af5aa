"""Rounds on hand-made environments: what is stored, what is bootstrapped from, what an update is given."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from ppolite.control.config import Control, parse_control
from ppolite.control.envs import actions_of, make_envs, obs_size
from ppolite.control.policy import Policy
from ppolite.control.rounds import Batch, Player, Round, learnable


def config_of(env: str, **more: Any) -> Control:
    base = {"env": env, "algorithm": "is-pg", "rollout": 4, "envs": {"count": 2}, "net": {"hidden": [8]}}
    return parse_control({**base, **more})


def play(config: Control, rounds: int = 1, seed: int = 0) -> tuple[Round, Policy, Any]:
    with closing(make_envs(config, config.envs.count)) as envs:
        policy = Policy(
            obs_size(envs),
            actions_of(envs.single_action_space, config.env),
            config.net,
            normalise_obs=config.envs.normalise_obs,
        )
        player = Player(envs, policy, config, seed)
        draw = torch.Generator().manual_seed(seed)
        for _ in range(rounds):
            seen = player.play(draw)
        return seen, policy, envs


def value_is_the_clock(policy: Policy, slope: float = 10.0) -> None:
    """V(s) = slope · time, exactly: one linear layer."""
    policy.agent.named["critic.weight"].fill_(slope)


CLOCK: dict[str, Any] = {"net": {"hidden": []}, "gamma": 0.5, "lam": 0.5, "normalise_advantages": False}


def test_truncation_bootstraps_from_the_state_before_the_reset() -> None:
    """Time 0 1 2 | 0 (reset); reward 1; V = 10 · time; γ = λ = ½. The third step is cut at time 3."""
    config = config_of("tiny/Clock-v0", **CLOCK)
    seen, policy, _ = play(config)
    value_is_the_clock(policy)
    batch = learnable(seen, policy.agent, config)
    assert seen.obs_TND[:, 0, 0].tolist() == [0, 1, 2, 0, 1]
    assert seen.ended_TN[:, 0].tolist() == [False, False, True, False]
    assert not seen.terminated_TN.any()
    assert [(t, n, float(obs[0])) for t, n, obs in seen.final_obs] == [(2, 0, 3.0), (2, 1, 3.0)]
    delta = [1 + 5 - 0, 1 + 10 - 10, 1 + 0.5 * 30 - 20, 1 + 5 - 0]  # the last one: the end of the round
    advantages = [
        delta[0] + 0.25 * (delta[1] + 0.25 * delta[2]),
        delta[1] + 0.25 * delta[2],
        delta[2],
        delta[3],
    ]
    got = batch.advantages_M.view(4, 2)
    torch.testing.assert_close(got, torch.tensor(advantages)[:, None].expand(4, 2))
    torch.testing.assert_close(batch.returns_M, batch.advantages_M + batch.values_M)


def test_termination_does_not_bootstrap() -> None:
    config = config_of("tiny/Clock-v0", **{**CLOCK, "envs": {"count": 1, "options": {"terminal": True}}})
    seen, policy, _ = play(config)
    value_is_the_clock(policy)
    assert seen.terminated_TN[:, 0].tolist() == [False, False, True, False]
    assert seen.final_obs == []
    assert learnable(seen, policy.agent, config).advantages_M[2] == 1 - 20


def test_rounds_go_on_where_the_last_one_stopped() -> None:
    seen, _, _ = play(config_of("tiny/Clock-v0"), rounds=2)
    assert seen.obs_TND[:, 0, 0].tolist() == [1, 2, 0, 1, 2]  # the first round ended at time 1
    assert seen.episodes == [(3.0, 3), (3.0, 3)]


def test_what_was_drawn_is_stored_and_what_is_played_is_cut() -> None:
    wide = config_of("tiny/Aim-v0", net={"hidden": [8], "log_std": 1.0})
    seen, policy, envs = play(wide)
    drawn = seen.actions_TN.numpy()
    assert np.abs(drawn).max() > 1.5
    played = np.array([env.unwrapped.given for env in envs.envs]).transpose(1, 0, 2)
    np.testing.assert_array_equal(played, np.clip(drawn, -1, 1))
    batch = learnable(seen, policy.agent, wide)
    mean = policy.agent.act(batch.obs_MD)
    normal = torch.distributions.Normal(mean, torch.tensor(1.0).exp())
    torch.testing.assert_close(batch.logprobs_M, normal.log_prob(batch.actions_M).sum(-1))


def test_discrete_actions_may_start_anywhere() -> None:
    seen, _, _ = play(config_of("tiny/Match-v0", envs={"count": 2, "options": {"first": 5}}))
    assert set(seen.actions_TN.flatten().tolist()) <= {0, 1, 2}  # the environment asserts 5, 6 or 7


def test_the_first_ratio_is_one() -> None:
    config = config_of("tiny/Match-v0")
    seen, policy, _ = play(config)
    batch = learnable(seen, policy.agent, config)
    params, values = policy.agent(batch.obs_MD)
    torch.testing.assert_close(
        policy.agent.dist.logprob(params, batch.actions_M), batch.logprobs_M, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(values, batch.values_M, rtol=0, atol=1e-6)


def test_rewards_are_scaled_for_learning_and_true_for_people() -> None:
    options = {"options": {"reward": 100.0}}
    plain, _, _ = play(config_of("tiny/Clock-v0", envs={"count": 2, **options}))
    scaled, _, _ = play(config_of("tiny/Clock-v0", envs={"count": 2, "normalise_reward": True, **options}))
    assert plain.rewards_TN.unique().tolist() == [100.0]
    assert scaled.rewards_TN.abs().max() <= 10
    assert scaled.rewards_TN[-1, 0] != 100
    assert plain.episodes == scaled.episodes == [(300.0, 3), (300.0, 3)]


def test_statistics_count_every_state_that_was_acted_in() -> None:
    config = config_of("tiny/Aim-v0", envs={"count": 2, "normalise_obs": True})
    _, policy, _ = play(config, rounds=3)
    assert policy.norm is not None
    assert policy.norm.seen.count == 2 * (1 + 3 * 4)


def batch_of(size: int) -> Batch:
    x = torch.arange(float(size))
    return Batch(x[:, None], x.long(), x, x[:, None], x, 5 + 2 * x, x, torch.ones(size, dtype=torch.bool))


def test_minibatches_cover_each_epoch_once_in_a_new_order() -> None:
    parts = list(batch_of(10).parts(2, 3, torch.Generator().manual_seed(0), normalise=False))
    assert [len(p.mask_M) for p in parts] == [4, 3, 3] * 2
    epochs = [torch.cat([p.values_M for p in parts[i : i + 3]]) for i in (0, 3)]
    assert not torch.equal(epochs[0], epochs[1])
    assert all(torch.equal(e.sort().values, torch.arange(10.0)) for e in epochs)
    for part in parts:  # rows stay together
        assert torch.equal(part.advantages_M, 5 + 2 * part.values_M)
        assert torch.equal(part.obs_MD[:, 0], part.returns_M)


@pytest.mark.parametrize("count", [1, 3])
def test_advantages_are_normalised_in_each_minibatch(count: int) -> None:
    for part in batch_of(12).parts(1, count, torch.Generator().manual_seed(0), normalise=True):
        raw = 5 + 2 * part.values_M.numpy()
        np.testing.assert_allclose(
            part.advantages_M, (raw - raw.mean()) / raw.std(ddof=0), rtol=1e-5, atol=1e-6
        )
