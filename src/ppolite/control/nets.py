"""Policy and critic: two small nets, or one with two heads. And the distributions over actions.

Nets of this size cost what their kernels cost to start, so they are few. The two bodies are one stack of
matrices, all weights are one vector (one tensor to clip and to step), and forward and backward are written
out; a loss is differentiated as far as the nets' outputs, and `backward` does the rest. 256 states through two
nets 4-64-64-2 and back take half the time that `nn.Sequential` wants. Acting runs the policy alone.

A distribution is one tensor of parameters, so that a round can keep it: log-probs for discrete actions, mean
and log-deviation side by side for boxes.

Axes: N samples, D observation, A actions (or numbers in a box), P parameters of a distribution; K bodies (two,
or one that is shared), I and O the layer's inputs and outputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ppolite.control.config import Net
from ppolite.ops.kl import (
    categorical_entropy,
    categorical_kl,
    gaussian_entropy,
    gaussian_kl,
    gaussian_logprob,
)

HIDDEN_GAIN, POLICY_GAIN, VALUE_GAIN = math.sqrt(2), 0.01, 1.0
"""Of the orthogonal initialisation (OpenAI Baselines; Engstrom et al. 2020, arXiv 2005.12729, §3)."""


class Categorical:
    """Discrete actions; parameters are normalised log-probs, actions int64 [N] from 0."""

    def __init__(self, size: int) -> None:
        self.size = size

    def params(self, outputs_NA: Tensor, log_std_A: Tensor) -> Tensor:
        return torch.log_softmax(outputs_NA, dim=-1)

    def noise(self, count: int, steps: int, generator: torch.Generator) -> Tensor:
        """Gumbel noise [steps, count, A]: the argmax of logits with it added is a sample (Gumbel 1954)."""
        drawn = torch.empty(steps, count, self.size).exponential_(generator=generator)
        return -drawn.log()

    def act(self, outputs_NA: Tensor, log_std_A: Tensor, noise_NA: Tensor | None) -> Tensor:
        """A sample, or the likeliest action without noise."""
        return (outputs_NA if noise_NA is None else outputs_NA + noise_NA).argmax(-1)

    def logprob(self, params_NP: Tensor, actions_N: Tensor) -> Tensor:
        return params_NP.gather(-1, actions_N[:, None]).squeeze(-1)

    def entropy(self, params_NP: Tensor) -> Tensor:
        return categorical_entropy(params_NP)

    def kl(self, p_NP: Tensor, q_NP: Tensor) -> Tensor:
        return categorical_kl(p_NP, q_NP)


class Gaussian:
    """Box actions, a normal distribution each, whose deviation does not depend on the state.

    Parameters are mean and log-deviation, actions floats [N, A] that are not cut to the box: the log-prob of
    a cut action would not be that of what was drawn.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def params(self, outputs_NA: Tensor, log_std_A: Tensor) -> Tensor:
        return torch.cat([outputs_NA, log_std_A.expand_as(outputs_NA)], dim=-1)

    def noise(self, count: int, steps: int, generator: torch.Generator) -> Tensor:
        return torch.randn(steps, count, self.size, generator=generator)

    def act(self, outputs_NA: Tensor, log_std_A: Tensor, noise_NA: Tensor | None) -> Tensor:
        return outputs_NA if noise_NA is None else outputs_NA + log_std_A.exp() * noise_NA

    def logprob(self, params_NP: Tensor, actions_NA: Tensor) -> Tensor:
        mean_NA, log_std_NA = params_NP.chunk(2, dim=-1)
        return gaussian_logprob(actions_NA, mean_NA, log_std_NA)

    def entropy(self, params_NP: Tensor) -> Tensor:
        return gaussian_entropy(params_NP.chunk(2, dim=-1)[1])

    def kl(self, p_NP: Tensor, q_NP: Tensor) -> Tensor:
        return gaussian_kl(*p_NP.chunk(2, dim=-1), *q_NP.chunk(2, dim=-1))


class Pass(NamedTuple):
    """A forward pass: the layers of the bodies, for the way back, and the leaves that a loss is made of."""

    seen: list[Tensor]
    """The input and what each layer made of it, [K, N, O]."""
    outputs_NA: Tensor
    log_std_A: Tensor
    values_N: Tensor


class Agent:
    """π_θ and V.

        done = agent.forward(obs)
        loss_of(agent.params(done), done.values_N).backward()
        gradient = agent.backward(done)

    Called, it gives parameters and values without gradients; `act` runs the policy alone.
    """

    def __init__(self, obs_size: int, dist: Categorical | Gaussian, net: Net, seed: int) -> None:
        self.dist, self.activation = dist, net.activation
        self.layers, self.bodies = len(net.hidden), 1 if net.shared else 2
        sizes = [obs_size, *net.hidden]
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(self.layers):
            shapes[f"body.{i}.weight"] = self.bodies, sizes[i + 1], sizes[i]
            shapes[f"body.{i}.bias"] = self.bodies, 1, sizes[i + 1]
        for head, width in (("policy", dist.size), ("critic", 1)):
            shapes[f"{head}.weight"], shapes[f"{head}.bias"] = (width, sizes[-1]), (width,)
        shapes["log_std"] = (dist.size if isinstance(dist, Gaussian) else 0,)
        self.weights = torch.zeros(sum(map(math.prod, shapes.values())))
        self.named = _views(self.weights, shapes)
        """The matrices and vectors that `weights` holds, by name."""
        self._gradient = torch.zeros_like(self.weights)
        self._gradients = _views(self._gradient, shapes)
        self._initialise(net, torch.Generator().manual_seed(seed))
        bodies = [(self.named[f"body.{i}.bias"], self.named[f"body.{i}.weight"]) for i in range(self.layers)]
        self._policy = [(bias_K1O[0], weight_KOI[0].t()) for bias_K1O, weight_KOI in bodies]
        """The first body, which is the policy's, as `act` wants it."""
        self._head_IA = self.named["policy.weight"].t()

    def _initialise(self, net: Net, draw: torch.Generator) -> None:
        """Orthogonal weights, no bias. Leaves torch's global random stream alone."""
        gains = {"policy.weight": POLICY_GAIN, "critic.weight": VALUE_GAIN}
        for name, view in self.named.items():
            if name.endswith("weight"):
                for matrix in view if view.ndim == 3 else [view]:
                    nn.init.orthogonal_(matrix, gains.get(name, HIDDEN_GAIN), generator=draw)
        self.named["log_std"].fill_(net.log_std or 0.0)

    def act(self, obs_ND: Tensor, noise_NA: Tensor | None = None) -> Tensor:
        """Samples, or the likeliest actions without noise. Call it without gradients."""
        h_NI = obs_ND
        for bias_O, weight_IO in self._policy:
            h_NI = self._activate(torch.addmm(bias_O, h_NI, weight_IO))
        outputs_NA = torch.addmm(self.named["policy.bias"], h_NI, self._head_IA)
        return self.dist.act(outputs_NA, self.named["log_std"], noise_NA)

    @torch.no_grad()
    def forward(self, obs_ND: Tensor) -> Pass:
        """All that an update wants. Outputs, log-deviation and values are leaves: their gradients go to `backward`."""
        w = self.named
        seen = [obs_ND.expand(self.bodies, *obs_ND.shape)]
        for i in range(self.layers):
            x_KNO = torch.baddbmm(w[f"body.{i}.bias"], seen[-1], w[f"body.{i}.weight"].transpose(1, 2))
            seen.append(self._activate(x_KNO))
        outputs_NA = torch.addmm(w["policy.bias"], seen[-1][0], w["policy.weight"].t())
        values_N1 = torch.addmm(w["critic.bias"], seen[-1][-1], w["critic.weight"].t())
        leaves = outputs_NA, w["log_std"].clone(), values_N1.squeeze(-1)
        return Pass(seen, *(leaf.requires_grad_() for leaf in leaves))

    def __call__(self, obs_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of the distribution over actions [N, P], and values [N]; no gradients."""
        with torch.no_grad():
            done = self.forward(obs_ND)
            return self.params(done), done.values_N.detach()

    def params(self, done: Pass) -> Tensor:
        """Parameters of the distribution over actions, [N, P]."""
        return self.dist.params(done.outputs_NA, done.log_std_A)

    @torch.no_grad()
    def backward(self, done: Pass) -> Tensor:
        """From the gradients in what `forward` gave, that in `weights`; the next call overwrites it."""
        w, g, last_KNI = self.named, self._gradients, done.seen[-1]
        d_outputs_NA, d_values_N1 = _grad(done.outputs_NA), _grad(done.values_N)[:, None]
        g["log_std"].copy_(_grad(done.log_std_A))
        for head, d_NO, h_NI in (
            ("policy", d_outputs_NA, last_KNI[0]),
            ("critic", d_values_N1, last_KNI[-1]),
        ):
            torch.mm(d_NO.t(), h_NI, out=g[f"{head}.weight"])
            torch.sum(d_NO, 0, out=g[f"{head}.bias"])
        d_KNO = torch.empty_like(last_KNI)
        torch.mm(d_outputs_NA, w["policy.weight"], out=d_KNO[0])
        if self.bodies == 2:
            torch.mm(d_values_N1, w["critic.weight"], out=d_KNO[1])
        else:
            d_KNO[0].addmm_(d_values_N1, w["critic.weight"])
        for i in reversed(range(self.layers)):
            x_KNI, y_KNO = done.seen[i], done.seen[i + 1]
            d_KNO = _TANH_BACK(d_KNO, y_KNO) if self.activation == "tanh" else _RELU_BACK(d_KNO, y_KNO, 0)
            torch.sum(d_KNO, 1, keepdim=True, out=g[f"body.{i}.bias"])
            for k in range(self.bodies):  # bmm takes twice as long where there are few inputs
                torch.mm(d_KNO[k].t(), x_KNI[k], out=g[f"body.{i}.weight"][k])
            if i:
                d_KNO = torch.bmm(d_KNO, w[f"body.{i}.weight"])
        return self._gradient

    def _activate(self, x: Tensor) -> Tensor:
        """In place. numpy's tanh takes 3 µs for 256 × 64, torch's 38 (AVX-512, numpy 2.4, torch 2.13)."""
        array = x.numpy()
        np.tanh(array, out=array) if self.activation == "tanh" else np.maximum(array, 0, out=array)
        return x


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _views(vector: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    parts = vector.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


_TANH_BACK, _RELU_BACK = torch.ops.aten.tanh_backward, torch.ops.aten.threshold_backward
