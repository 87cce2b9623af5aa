"""What is kept of a run: the nets with the statistics they were trained on. Acts, is saved and loaded.

    policy = Policy.load("runs/cartpole/policy")
    action = policy.act(observation[None])[0]         the likeliest one, as Gymnasium wants it

On disk: `model.safetensors` (weights, and the statistics of observations) and `policy.json` (what to build).
Gymnasium is not needed to use one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ppolite.control.config import Net
from ppolite.control.nets import Agent, Categorical, Gaussian
from ppolite.control.units import ObsNorm
from ppolite.types import UserError

Array = NDArray[Any]
WEIGHTS, SHEET = "model.safetensors", "policy.json"
OBS_MEAN, OBS_VAR, LOW, HIGH = "obs_norm.mean", "obs_norm.var", "actions.low", "actions.high"


@dataclass(frozen=True)
class Actions:
    """What there is to do: `size` actions from `start` on, or a box of `size` numbers."""

    kind: Literal["discrete", "box"]
    size: int
    start: int = 0
    low: Array | None = None
    """Of the box, in its own shape."""
    high: Array | None = None

    def to_env(self, actions_N: Array) -> Array:
        """As Gymnasium wants them. Boxes are cut here, and nowhere else."""
        if self.low is None or self.high is None:
            return actions_N + self.start if self.start else actions_N
        return np.clip(actions_N.reshape(-1, *self.low.shape), self.low, self.high)


class Policy:
    """Nets, statistics of observations (None: taken as they are), and the space of actions."""

    def __init__(
        self, obs_size: int, actions: Actions, net: Net, *, normalise_obs: bool, seed: int = 0
    ) -> None:
        self.obs_size, self.actions, self.net = obs_size, actions, net
        discrete = actions.kind == "discrete"
        dist = Categorical(actions.size) if discrete else Gaussian(actions.size)
        self.agent = Agent(obs_size, dist, net, seed)
        self.norm = ObsNorm(obs_size) if normalise_obs else None

    def see(self, obs_ND: Array, *, update: bool = False) -> Array:
        """Observations as the nets take them, float32; `update` counts them into the statistics."""
        seen = obs_ND if self.norm is None else self.norm(obs_ND, update=update)
        return seen.astype(np.float32, copy=False)

    @torch.inference_mode()
    def act(self, obs_ND: Array) -> Array:
        """The likeliest action for each observation, cut to the box, as `envs.step` takes them."""
        obs = torch.from_numpy(self.see(np.asarray(obs_ND)))
        return self.actions.to_env(self.agent.act(obs).numpy())

    def save(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        """Write `folder`, whole or not at all; what stood there before goes. `about` is kept for people."""
        draft = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        tensors = {name: view.clone() for name, view in self.agent.named.items()}
        if self.norm is not None:
            tensors |= {
                OBS_MEAN: torch.from_numpy(self.norm.seen.mean.copy()),
                OBS_VAR: torch.from_numpy(self.norm.seen.var.copy()),
            }
        if self.actions.low is not None and self.actions.high is not None:
            tensors |= {LOW: torch.from_numpy(self.actions.low), HIGH: torch.from_numpy(self.actions.high)}
        save_file(tensors, draft / WEIGHTS)
        sheet = {
            "obs_size": self.obs_size,
            "actions": {"kind": self.actions.kind, "size": self.actions.size, "start": self.actions.start},
            "net": self.net.model_dump(mode="json"),
            "normalise_obs": self.norm is not None,
            "about": about or {},
        }
        (draft / SHEET).write_text(json.dumps(sheet, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Policy:
        """Read what `save` wrote. Raises UserError: no such folder, or not one that `save` wrote."""
        folder = Path(folder)
        try:
            sheet = json.loads((folder / SHEET).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS)
            about = sheet["actions"]
            box = {
                k: tensors.pop(name).numpy() for k, name in (("low", LOW), ("high", HIGH)) if name in tensors
            }
            actions = Actions(about["kind"], about["size"], about["start"], **box)
            policy = cls(
                sheet["obs_size"],
                actions,
                Net.model_validate(sheet["net"]),
                normalise_obs=sheet["normalise_obs"],
            )
            if policy.norm is not None:
                policy.norm.seen.mean = tensors.pop(OBS_MEAN).numpy()
                policy.norm.seen.var = tensors.pop(OBS_VAR).numpy()
            for name, view in policy.agent.named.items():
                if tensors[name].shape != view.shape:
                    raise ValueError(
                        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(view.shape)}"
                    )
                view.copy_(tensors[name])
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: no policy of `ppolite control` ({error.filename} is missing)"
            ) from None
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
            SafetensorError,
            ValidationError,
        ) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder}: no policy that `ppolite control` saved ({why}); delete the run, and make it again"
            ) from None
        return policy
