"""Tiny environments whose numbers can be worked out by hand, registered with Gymnasium as `tiny/…`.

tiny/Match-v0   say which of three states is shown: 1 point each, cut after `length` steps
tiny/Aim-v0     say the number that is shown: −(a − x)², box actions, cut after `length` steps
tiny/Clock-v0   shows the time; 1 point a step; after 3 steps it is cut, or (`terminal`) over
tiny/Wild-v0    spaces and rewards that break things, as its options say
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space

Step = tuple[Any, float, bool, bool, dict[str, Any]]


class Match(gym.Env[Any, Any]):
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self, render_mode: str | None = None, length: int = 8, first: int = 0, also_length: int | None = None
    ):
        self.render_mode, self.length, self.also_length = render_mode, length, also_length
        self.observation_space = Box(-100.0, 100.0, (3,), np.float32)
        self.action_space = Discrete(3, start=first)
        self.first = first

    def _show(self) -> Any:
        self.state = int(self.np_random.integers(3))
        return np.eye(3, dtype=np.float32)[self.state]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        self.end = self.length
        if self.also_length is not None and self.np_random.random() < 0.5:
            self.end = self.also_length
        return self._show(), {}

    def step(self, action: Any) -> Step:
        assert self.action_space.contains(action), action
        reward = float(action - self.first == self.state)
        self.time += 1
        return self._show(), reward, False, self.time == self.end, {}

    def render(self) -> Any:
        return np.full((40, 60, 3), 80 * self.state, np.uint8)


class Aim(gym.Env[Any, Any]):
    def __init__(self, length: int = 8, shape: tuple[int, ...] = (2,)):
        self.length = length
        self.observation_space = Box(-1.0, 1.0, shape, np.float64)
        self.action_space = Box(-1.0, 1.0, shape, np.float32)
        self.given: list[Any] = []

    def _show(self) -> Any:
        self.state = self.np_random.uniform(-1, 1, self.observation_space.shape)
        return self.state

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self._show(), {}

    def step(self, action: Any) -> Step:
        assert self.action_space.contains(action), action
        self.given.append(np.array(action))
        reward = -float(np.square(action - self.state).sum())
        self.time += 1
        return self._show(), reward, False, self.time == self.length, {}


class Clock(gym.Env[Any, Any]):
    def __init__(self, terminal: bool = False, reward: float = 1.0):
        self.observation_space, self.action_space = Box(0.0, 3.0, (1,), np.float32), Discrete(2)
        self.terminal, self.reward = terminal, reward

    def _show(self) -> Any:
        return np.array([self.time], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self._show(), {}

    def step(self, action: Any) -> Step:
        self.time += 1
        over = self.time == 3
        return self._show(), self.reward, over and self.terminal, over and not self.terminal, {}


class Endless(gym.Env[Any, Any]):
    """Step t gives t, for ever. `picture`: what `render` returns."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, picture: str = "none", render_mode: str | None = None):
        self.observation_space, self.action_space = Box(0.0, 1e6, (1,), np.float32), Discrete(2)
        self.picture, self.render_mode = picture, render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Step:
        self.time += 1
        return np.array([self.time], np.float32), float(self.time), False, False, {}

    def render(self) -> Any:
        if self.picture == "fatal":
            raise Exception("an OpenGL platform library has not been loaded")  # as mujoco.FatalError
        return {"none": None, "text": "a picture", "list": [np.zeros((4, 4, 3), np.uint8)]}[self.picture]


class Wild(gym.Env[Any, Any]):
    def __init__(self, actions: str = "discrete", reward: float = 0.0):
        self.observation_space = gym.spaces.Dict({"a": Discrete(2), "b": Box(-1.0, 1.0, (2, 2), np.float32)})
        kinds: dict[str, Space[Any]] = {"discrete": Discrete(2), "multi": MultiDiscrete([2, 3])}
        self.action_space, self.reward = kinds[actions], reward

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Step:
        self.time += 1
        return self.observation_space.sample(), self.reward, self.time == 4, False, {}


def register() -> None:
    for world in (Match, Aim, Clock, Endless, Wild):
        gym.register(f"tiny/{world.__name__}-v0", entry_point=world)
