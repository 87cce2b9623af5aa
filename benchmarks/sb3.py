"""One run of stable-baselines3 with the settings of rl-zoo: what `control.py` and `control_returns.py` compare with.

Trains, evaluates with the likeliest action on frozen statistics, and prints one JSON object. Needs `.venv-oracles`
and nothing of ppolite. Settings from rl-baselines3-zoo, hyperparams/ppo.yml and a2c.yml; what is not named there is
the library's default. Its tasks LunarLander-v2, Hopper-v3 and HalfCheetah-v3 are now LunarLander-v3 and -v5.

    .venv-oracles/bin/python benchmarks/sb3.py CartPole-v1 --algorithm ppo --seed 0
    .venv-oracles/bin/python benchmarks/sb3.py CartPole-v1 --steps 51200 --episodes 0     # time alone
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from typing import Any

import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

WIDE = {
    "log_std_init": -2,
    "ortho_init": False,
    "activation_fn": torch.nn.ReLU,
    "net_arch": {"pi": [256, 256], "vf": [256, 256]},
}

SETTINGS: dict[str, dict[str, Any]] = {
    "ppo CartPole-v1": {
        "steps": 100_000, "envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98,
        "n_epochs": 20, "learning_rate": "lin_1e-3", "clip_range": "lin_0.2",
    },
    "ppo Acrobot-v1": {
        "steps": 1_000_000, "envs": 16, "normalise": True, "n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99,
        "n_epochs": 4,
    },
    "ppo LunarLander-v3": {
        "steps": 1_000_000, "envs": 16, "n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999,
        "n_epochs": 4, "ent_coef": 0.01,
    },
    "ppo Pendulum-v1": {
        "steps": 100_000, "envs": 4, "n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10,
        "learning_rate": 1e-3, "use_sde": True, "sde_sample_freq": 4,
    },
    "ppo Hopper-v5": {
        "steps": 1_000_000, "envs": 1, "normalise": True, "n_steps": 512, "batch_size": 32, "gamma": 0.999,
        "learning_rate": 9.80828e-5, "ent_coef": 0.00229519, "n_epochs": 5, "gae_lambda": 0.99,
        "max_grad_norm": 0.7, "vf_coef": 0.835671, "policy_kwargs": WIDE,
    },
    "ppo HalfCheetah-v5": {
        "steps": 1_000_000, "envs": 1, "normalise": True, "n_steps": 512, "batch_size": 64, "gamma": 0.98,
        "learning_rate": 2.0633e-5, "ent_coef": 0.000401762, "clip_range": 0.1, "n_epochs": 20,
        "gae_lambda": 0.92, "max_grad_norm": 0.8, "vf_coef": 0.58096, "policy_kwargs": WIDE,
    },
    "a2c CartPole-v1": {"steps": 500_000, "envs": 8},
}  # fmt: skip


def linear(value: Any) -> Any:
    """rl-zoo writes `lin_0.2` for what falls from 0.2 to 0 over the run."""
    if not isinstance(value, str):
        return value
    start = float(value.removeprefix("lin_"))
    return lambda left: start * left


def train_and_look(env: str, algorithm: str, seed: int, steps: int | None, episodes: int) -> dict[str, Any]:
    """Seconds are those of `learn` alone."""
    given = SETTINGS[f"{algorithm} {env}"]
    settings = {key: linear(value) for key, value in given.items()}
    count, normalise, default = settings.pop("envs"), settings.pop("normalise", False), settings.pop("steps")
    torch.set_num_threads(1)
    envs = make_vec_env(env, n_envs=count, seed=seed)
    if normalise:
        envs = VecNormalize(envs, gamma=settings["gamma"])
    model = {"ppo": PPO, "a2c": A2C}[algorithm](
        "MlpPolicy", envs, seed=seed, device="cpu", verbose=0, **settings
    )
    started = time.perf_counter()
    model.learn(steps or default)
    seconds = time.perf_counter() - started
    steps_done = model.num_timesteps
    result: dict[str, Any] = {"steps": steps_done, "seconds": seconds, "steps_per_s": steps_done / seconds}
    if episodes:
        looking = make_vec_env(env, n_envs=10, seed=seed + 10_000)
        if isinstance(envs, VecNormalize):
            looking = VecNormalize(looking, training=False, norm_reward=False)
            looking.obs_rms = envs.obs_rms
        returns, _ = evaluate_policy(
            model, looking, n_eval_episodes=episodes, deterministic=True, return_episode_rewards=True
        )
        result |= {
            "return_mean": float(np.mean(returns)),
            "return_std": float(np.std(returns)),
            "episodes": episodes,
        }
    result["settings"] = given
    packages = "stable_baselines3", "torch", "gymnasium"
    return result | {"versions": {name: importlib.metadata.version(name) for name in packages}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("env", choices=sorted({key.split()[1] for key in SETTINGS}))
    parser.add_argument("--algorithm", choices=["ppo", "a2c"], default="ppo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="rl-zoo's when left out")
    parser.add_argument("--episodes", type=int, default=100)
    args = parser.parse_args()
    if f"{args.algorithm} {args.env}" not in SETTINGS:
        parser.error(f"no settings for {args.algorithm} on {args.env}; there are {', '.join(SETTINGS)}")
    print(
        json.dumps(
            train_and_look(args.env, args.algorithm, args.seed, args.steps, args.episodes), default=str
        )
    )


if __name__ == "__main__":
    main()
