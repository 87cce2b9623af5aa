"""Gymnasium's environments, side by side.

    envs = make_envs(config, count)

They reset in the step that ends an episode (SAME_STEP): that step's `final_obs` is the state it led to, and no
step is only a reset. Left out: pictures as observations (they would be flattened), and actions other than
Discrete and Box.
"""

from __future__ import annotations

import difflib
import os
import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from gymnasium.spaces.utils import flatdim
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import FlattenObservation

from ppolite.control.config import Control
from ppolite.control.policy import Actions
from ppolite.types import UserError


def actions_of(space: Space[Any], env: str) -> Actions:
    """The space of actions as the policy needs it. Raises UserError for one that no algorithm here knows."""
    if isinstance(space, Discrete):
        return Actions("discrete", int(space.n), start=int(space.start))
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        # A transposed box is not contiguous, and could not be saved.
        low, high = np.ascontiguousarray(space.low), np.ascontiguousarray(space.high)
        return Actions("box", int(np.prod(space.shape)), low=low, high=high)
    raise UserError(
        f"{env}: its actions are {space}; the algorithms here know Discrete and Box (of floats) only"
    )


def without_window() -> None:
    """Let MuJoCo and SDL draw where there is no display; their own choice is a window. Read when first imported."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def make_env(config: Control, **more: Any) -> gym.Env[Any, Any]:
    """One environment, observations flat. Raises UserError: unknown, not installed, wrong options."""
    name, options = config.env, config.envs.options
    without_window()
    try:
        env = gym.make(name, **options, **more)
    except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv) as error:
        path = isinstance(error, gym.error.NamespaceNotFound)  # there is a `/` in it
        what = "no such run folder or recipe, nor an environment" if path else "no environment of that name"
        raise UserError(f"{name}: {what}; {_nearest(name) or _sentence(error)}") from None
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        own = "ppolite's extra `control` brings what Gymnasium's own need (pip install '.[control]' in its folder)"
        hint = "; mend the module, or start where it lies" if ":" in name else f"; {own}"
        raise UserError(f"{name}: cannot be imported ({_sentence(error)}){hint}") from None
    except Exception as error:  # what an environment does with options is its own
        raise UserError(
            f"{name}: cannot be made with envs.options {options} ({_sentence(error)}); mend the name or the options"
        ) from error
    return env if _is_flat(env.observation_space) else FlattenObservation(env)


def known_env(config: Control) -> gym.Env[Any, Any]:
    """One that was made and closed again, for its spaces.

    Raises UserError as `make_env`, and for spaces that are of no use or that the settings do not fit.
    """
    one = make_env(config)
    one.close()
    if actions_of(one.action_space, config.env).kind == "discrete" and config.net.log_std is not None:
        raise UserError(
            f"net.log_std: the actions of {config.env} are discrete and have no deviation; take the setting out"
        )
    if not isinstance(one.observation_space, Box):
        raise UserError(
            f"{config.env}: its observations are {one.observation_space}, which cannot be made a row of numbers"
        )
    return one


def make_envs(config: Control, count: int) -> VectorEnv[Any, Any, Any]:
    """`count` environments as one, which go on with a new episode in the very step that ends one."""
    flat = isinstance(known_env(config), FlattenObservation)
    return gym.make_vec(
        config.env,
        num_envs=count,
        vectorization_mode=config.envs.vectorization,
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        wrappers=[FlattenObservation] if flat else [],
        **config.envs.options,
    )


def obs_size(envs: VectorEnv[Any, Any, Any]) -> int:
    return flatdim(envs.single_observation_space)


def _nearest(name: str) -> str:
    known = {known.lower(): known for known in gym.registry}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {known[near[0]]}?" if near else ""


def _is_flat(space: Space[Any]) -> bool:
    return isinstance(space, Box) and len(space.shape) == 1


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]
