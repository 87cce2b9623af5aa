"""The nets against torch's own modules and autograd, the distributions against torch.distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppolite.control.config import Net
from ppolite.control.nets import Agent, Categorical, Gaussian

NONE = torch.zeros(0)
X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
SHARED = pytest.mark.parametrize("shared", [False, True])
HIDDEN = pytest.mark.parametrize("hidden", [(), (16,), (16, 8)])


def agent(*, shared: bool = False, hidden: tuple[int, ...] = (16, 8), activation: Any = "tanh") -> Agent:
    return Agent(5, Categorical(3), Net(hidden=hidden, shared=shared, activation=activation), seed=1)


def modules(net: Agent) -> nn.ModuleDict:
    """The same nets of torch's modules: `policy` and `critic`, whose body is one where it is shared."""
    act = {"tanh": nn.Tanh, "relu": nn.ReLU}[net.activation]
    bodies = []
    for k in range(net.bodies):
        layers: list[nn.Module] = []
        for i in range(net.layers):
            layers += [linear(net.named[f"body.{i}.weight"][k], net.named[f"body.{i}.bias"][k, 0]), act()]
        bodies.append(nn.Sequential(*layers))
    heads = {h: linear(net.named[f"{h}.weight"], net.named[f"{h}.bias"]) for h in ("policy", "critic")}
    return nn.ModuleDict(
        {
            "policy": nn.Sequential(bodies[0], heads["policy"]),
            "critic": nn.Sequential(bodies[-1], heads["critic"]),
        }
    )


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


@SHARED
@HIDDEN
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_values_and_gradients_are_torchs(shared: bool, hidden: tuple[int, ...], activation: str) -> None:
    net = agent(shared=shared, hidden=hidden, activation=activation)
    net.weights.add_(0.1 * torch.randn(len(net.weights), generator=torch.Generator().manual_seed(2)))
    torchs = modules(net)
    c = torch.randn(7, 4, generator=torch.Generator().manual_seed(3))

    done = net.forward(X)
    params = net.params(done)
    ((params * c[:, :3]).sum() + (done.values_N * c[:, 3]).sum()).backward()
    gradient = net.backward(done)

    wanted, values = torch.log_softmax(torchs["policy"](X), -1), torchs["critic"](X)[:, 0]
    ((wanted * c[:, :3]).sum() + (values * c[:, 3]).sum()).backward()
    torch.testing.assert_close(params, wanted)
    torch.testing.assert_close(done.values_N, values)
    # The vector holds, layer by layer, both bodies' weights, both bodies' biases; then the heads.
    parts = [torchs["policy"][0], torchs["critic"][0]][: net.bodies]
    flat = []
    for i in range(0, 2 * net.layers, 2):
        flat += [part[i].weight.grad for part in parts] + [part[i].bias.grad for part in parts]
    flat += [p.grad for head in ("policy", "critic") for p in torchs[head][1].parameters()]
    expected = torch.cat([g.flatten() for g in flat])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert len(gradient) == sum(p.numel() for p in set(torchs.parameters()))


def test_a_gradient_is_of_the_last_pass_alone() -> None:
    net = agent()
    for scale in (5.0, 1.0):
        done = net.forward(X)
        (done.values_N.sum() * scale).backward()
        gradient = net.backward(done)
    assert net._gradients["critic.bias"].item() == 7
    assert not net._gradients["policy.weight"].any()  # no gradient came from there
    assert gradient.norm() > 0


@SHARED
@HIDDEN
def test_acting_and_learning_see_the_same_net(shared: bool, hidden: tuple[int, ...]) -> None:
    net = agent(shared=shared, hidden=hidden)
    done = net.forward(X)
    params, values = net(X)
    assert torch.equal(params, net.params(done))
    assert torch.equal(values, done.values_N)
    assert not params.requires_grad
    assert net.act(X).tolist() == done.outputs_NA.argmax(-1).tolist()


def test_shared_nets_have_one_body() -> None:
    count = {s: len(agent(shared=s).weights) for s in (False, True)}
    body = 5 * 16 + 16 + 16 * 8 + 8
    assert count[False] - count[True] == body


@SHARED
def test_initialisation_is_orthogonal(shared: bool) -> None:
    net = agent(shared=shared, hidden=(16, 8))
    for name, view in net.named.items():
        if not name.endswith("weight"):
            assert not view.any()
            continue
        gain = {"policy.weight": 0.01, "critic.weight": 1.0}.get(name, 2**0.5)
        for p in view if view.ndim == 3 else [view]:
            rows = p if p.shape[0] <= p.shape[1] else p.T
            torch.testing.assert_close(rows @ rows.T, gain**2 * torch.eye(len(rows)), rtol=1e-5, atol=1e-5)
    assert net(X)[0].exp().sub(1 / 3).abs().max() < 0.02  # so that all actions start about equal
    if not shared:
        assert not torch.equal(*net.named["body.0.weight"])


def test_the_seed_decides_and_the_global_stream_stays() -> None:
    before = torch.get_rng_state()
    a, b = agent(), agent()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.weights, b.weights)
    assert not torch.equal(a.weights, Agent(5, Categorical(3), Net(hidden=(16, 8)), seed=2).weights)


def test_categorical_is_torchs() -> None:
    dist, outputs = Categorical(3), torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    params, other = dist.params(outputs, NONE), dist.params(outputs.flip(0), NONE)
    actions = torch.tensor([0, 1, 2, 2, 1, 0])
    ref = torch.distributions.Categorical(logits=outputs)
    torch.testing.assert_close(dist.logprob(params, actions), ref.log_prob(actions))
    torch.testing.assert_close(dist.entropy(params), ref.entropy())
    kl = torch.distributions.kl_divergence(ref, torch.distributions.Categorical(logits=outputs.flip(0)))
    torch.testing.assert_close(dist.kl(params, other), kl)
    assert dist.act(outputs, NONE, None).tolist() == outputs.argmax(-1).tolist()


def test_gaussian_is_torchs() -> None:
    dist, mean = Gaussian(2), torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    log_std = torch.tensor([-0.5, -0.5])
    params, actions = dist.params(mean, log_std), mean.flip(0)
    ref = torch.distributions.Independent(torch.distributions.Normal(mean, torch.tensor(-0.5).exp()), 1)
    torch.testing.assert_close(dist.logprob(params, actions), ref.log_prob(actions))
    torch.testing.assert_close(dist.entropy(params), ref.entropy())
    wider = dist.params(mean.flip(0), torch.tensor([0.3, 0.3]))
    far = torch.distributions.Independent(
        torch.distributions.Normal(mean.flip(0), torch.tensor(0.3).exp()), 1
    )
    torch.testing.assert_close(dist.kl(params, wider), torch.distributions.kl_divergence(ref, far))
    assert torch.equal(dist.act(mean, log_std, None), mean)


def test_samples_have_the_distributions_frequencies() -> None:
    draw = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    dist = Categorical(4)
    noise = dist.noise(count=50_000, steps=2, generator=draw)
    assert noise.shape == (2, 50_000, 4)
    share = torch.bincount(dist.act(p.log().expand(50_000, 4), NONE, noise[0]), minlength=4) / 50_000
    assert (share - p).abs().max() < 0.01  # 4 standard errors
    box, log_std = Gaussian(2), torch.tensor([-1.0, -1.0])
    x = box.act(torch.tensor([[1.0, -2.0]]), log_std, box.noise(50_000, 1, draw)[0])
    torch.testing.assert_close(x.mean(0), torch.tensor([1.0, -2.0]), atol=0.01, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((2,), -1.0).exp(), atol=0.01, rtol=0)


def test_the_deviation_learns_and_does_not_depend_on_the_state() -> None:
    net = Agent(5, Gaussian(2), Net(hidden=(8,), log_std=0.5), seed=0)
    assert net.weights[-2:].tolist() == [0.5, 0.5]
    done = net.forward(X)
    params = net.params(done)
    assert torch.equal(params[:, 2:], torch.full((7, 2), 0.5))
    net.dist.logprob(params, torch.zeros(7, 2)).sum().backward()
    # Σ over 7 states of ∂ log N(0; μ, σ²) / ∂ log σ = μ²/σ² − 1
    wanted = (params[:, :2].detach().square() / torch.tensor(1.0).exp() - 1).sum(0)
    torch.testing.assert_close(net.backward(done)[-2:], wanted)
