"""How good a policy is: whole episodes with the likeliest action, on frozen statistics. And a picture of one.

    evaluate(policy, config)                 100 episodes → mean, deviation, worst, best
    film(policy, config, "agent.gif")        one episode

An episode that has taken MOST_STEPS is counted as it stands: some environments never end by themselves.
"""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image

from ppolite.control.config import Control
from ppolite.control.envs import make_env, make_envs
from ppolite.control.policy import Policy
from ppolite.control.process import one_thread, seeds

log = logging.getLogger("ppolite")

AT_ONCE = 10
"""Environments of an evaluation."""
MOST_STEPS = 100_000
GIF_FPS, GIF_WIDTH, GIF_COLOURS = 25, 300, 64


def evaluate(policy: Policy, config: Control) -> dict[str, float]:
    """Undiscounted returns of `evaluation.episodes` episodes, in true units; the seed decides how they start."""
    wanted = config.evaluation.episodes
    N = min(AT_ONCE, wanted)
    # Each environment plays its share to the end. To take the first that finish would favour short episodes.
    left_N = np.full(N, wanted // N) + (np.arange(N) < wanted % N)
    returns_N, lengths_N = np.zeros(N), np.zeros(N, np.int64)
    done: list[tuple[float, int]] = []
    with one_thread(), closing(make_envs(config, N)) as envs:
        obs_ND, _ = envs.reset(seed=seeds(config.seed, "evaluation")[0])
        while left_N.any():
            obs_ND, rewards_N, terminated_N, truncated_N, _ = envs.step(policy.act(obs_ND))
            returns_N += rewards_N
            lengths_N += 1
            ended_N = terminated_N | truncated_N
            cut_N = (lengths_N >= MOST_STEPS) & ~ended_N
            for n in np.flatnonzero(ended_N | cut_N):
                if left_N[n]:
                    done.append((float(returns_N[n]), int(lengths_N[n])))
                    left_N[n] -= 1
                returns_N[n], lengths_N[n] = 0.0, 0
            if cut_N.any():
                obs_ND, _ = envs.reset(options={"reset_mask": cut_N})
    returns, lengths = np.array(done).T
    return {
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "length_mean": float(lengths.mean()),
        "episodes": len(done),
    }


def film(policy: Policy, config: Control, path: Path) -> bool:
    """A GIF of the first seconds of one episode. False, with a warning, where there is nothing to draw with."""
    seconds, seed = config.evaluation.gif_seconds, seeds(config.seed, "evaluation")[1]
    try:
        with closing(make_env(config, render_mode="rgb_array")) as env:
            fps = float(env.metadata.get("render_fps") or 30)
            every = max(1, round(fps / GIF_FPS))
            frames = _frames(policy, env, seed, steps=int(seconds * fps), every=every)
        pictures = [_picture(frame) for frame in frames]
    except Exception as error:  # noqa: BLE001  drawing is the work of others, and the run is done
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        log.warning("%s: no GIF, for it cannot be drawn here (%s)", config.env, why)
        return False
    pause = round(1000 * every / fps)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=pause, loop=0, optimize=True)
    return True


def _frames(policy: Policy, env: gym.Env[Any, Any], seed: int, *, steps: int, every: int) -> list[Any]:
    obs_D, _ = env.reset(seed=seed)
    frames = [env.render()]
    for t in range(1, steps):
        obs_D, _, terminated, truncated, _ = env.step(policy.act(np.asarray(obs_D)[None])[0])
        if t % every == 0:
            frames.append(env.render())
        if terminated or truncated:
            break
    return frames


def _picture(frame: Any) -> Image.Image:
    picture = Image.fromarray(np.asarray(frame, np.uint8))
    height = round(picture.height * GIF_WIDTH / picture.width)
    small = picture.resize((GIF_WIDTH, height), Image.Resampling.BILINEAR)
    return small.quantize(GIF_COLOURS)
