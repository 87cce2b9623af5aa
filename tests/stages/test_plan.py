"""Plans of tiny runs, beside what the stages really own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.world import World

from ppolite.cli import main
from ppolite.models.load import load_causal
from ppolite.models.prepacked import prepacking
from ppolite.models.roles import trainable
from ppolite.models.trunk import Trunk
from ppolite.obs.plan_view import verdict
from ppolite.stages.needs import Rows, Stage
from ppolite.stages.plan import memory, plan
from ppolite.stages.ppo import PPO
from ppolite.stages.reward import RewardModel
from ppolite.stages.sft import SFT
from ppolite.types import UserError

LAYOUTS: dict[str, dict[str, Any]] = {
    "layers": {},
    "lora": {"train__kind": "lora"},
    "lora, everywhere": {"train__kind": "lora", "trunk__split": 0},
    "full": {"train__kind": "full", "trunk__split": 0},
    "separate": {"roles": "separate", "trunk__split": 0},
    "bfloat16": {"dtype": "bfloat16", "train__kind": "lora"},
}


def stages_of(world: World, **changes: Any) -> dict[str, Stage]:
    return {stage.name: stage for stage in plan(world.recipe(**changes)).stages}


def owned(*parts: Any) -> int:
    """Bytes of all weights in models and bodies, each once."""
    return sum({id(p): p.nbytes for part in parts for p in part.parameters()}.values())


def said(stage: Stage) -> int:
    return stage.always["weights"] + stage.always["adapters"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_and_moments_are_what_ppo_owns(world: World, finished_run: Path, name: str) -> None:
    planned = stages_of(world, **LAYOUTS[name])["ppo"]
    ppo = PPO(world.recipe(ppo__min_rm_accuracy=0, **LAYOUTS[name]), finished_run)
    roles = ppo.roles
    bodies = [b for b in (roles.policy, roles.reference, roles.critic, roles.reward) if b is not None]
    applied = [head for b in bodies if (head := b._applied_head[0]) is not None]
    decoders = [] if name != "separate" else [roles.reference.decoder]
    assert said(planned) == owned(roles.trunk.model, *bodies, *applied, *decoders)
    trained = sum(p.nbytes for b in (roles.policy, roles.critic) for p in b.trained())
    assert planned.always["optimizer"] == 2 * trained
    assert planned.always["best policy"] == sum(p.nbytes for p in roles.policy.trained())
    assert planned.phases["step"]["gradients"] >= trained


@pytest.mark.parametrize("name", ["layers", "lora", "full"])
def test_weights_of_the_other_stages(world: World, finished_run: Path, name: str, tmp_path: Path) -> None:
    planned, recipe = stages_of(world, **LAYOUTS[name]), world.recipe(**LAYOUTS[name])
    (tmp_path / "sft").symlink_to(finished_run / "sft")
    for stage, trainer in {"sft": SFT(recipe, tmp_path), "reward": RewardModel(recipe, tmp_path)}.items():
        assert said(planned[stage]) == owned(trainer.opened.model, trainer.body)
        assert planned[stage].always["optimizer"] == 2 * sum(p.nbytes for p in trainer.learner.parameters)


def test_what_comes_and_goes(world: World) -> None:
    usual, again = stages_of(world), stages_of(world, train__recompute=True)
    small = stages_of(world, ppo__optim={"micro_batch_tokens": 16})
    kept = [s["ppo"].phases["policy's backward"]["activations"] for s in (usual, again, small)]
    assert kept[1] < kept[0] / 3
    assert kept[2] < kept[0] / 3
    # The policy comes first: it finds gradients only where micro-batches have gone before.
    before = [s["ppo"].phases["policy's backward"]["gradients"] for s in (usual, small)]
    assert before[0] == 0
    assert before[1] == usual["ppo"].phases["step"]["gradients"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generating_has_its_copy_of_the_weights(
    world: World, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppolite.models.prepacked._gains", lambda asked: asked == torch.float32)
    policy = Trunk(load_causal(str(world.folder / "model"), tiny.CPU), 2, dtype).top
    phase = stages_of(world, dtype=str(dtype).removeprefix("torch."))["ppo"].phases["generate"]
    assert phase["prepacked weights"] == prepacking(policy, tiny.CPU)
    assert (phase["prepacked weights"] > 0) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_float32_until_they_are_held(
    world: World, finished_run: Path, dtype: str, tmp_path: Path
) -> None:
    """Half precision does not help before the last copy is made; of the optimizer nothing is there yet."""
    changes: dict[str, Any] = {"dtype": dtype, "train__kind": "lora", "train__lora_rank": 1}
    planned = stages_of(world, **changes)["sft"]
    body = SFT(world.recipe(**changes), tmp_path).body
    once = {id(p): p.numel() for part in (body.decoder, body) for p in part.parameters()}
    later = said(planned) + planned.always["optimizer"]
    assert planned.phases["opening"] == {"weights as they are loaded": max(4 * sum(once.values()) - later, 0)}
    assert (planned.phases["opening"]["weights as they are loaded"] > 0) == (dtype == "bfloat16")


def test_a_gpu_gets_no_whole_reward_model(world: World) -> None:
    """Beside the policy it has the reward model's layers from the split on, which the CPU copied."""
    changes: dict[str, Any] = {
        "dtype": "bfloat16", "train__kind": "lora", "train__lora_rank": 1, "ppo__critic_body": "policy"
    }  # fmt: skip
    opened = [plan(world.recipe(**changes), gpu).stages[2] for gpu in (None, 2**30)]
    here, there = (sum(stage.always[k] for k in ("weights", "adapters", "optimizer")) for stage in opened)
    assert here == there
    loads = [stage.phases["opening"]["weights as they are loaded"] for stage in opened]
    whole = load_causal(str(world.folder / "model"), tiny.CPU)
    assert loads[0] - loads[1] == sum(p.nbytes for p in whole.parameters())


@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_autocast_keeps_casts_while_a_gpu_generates(world: World, kind: str) -> None:
    half, single = (
        plan(world.recipe(train__kind=kind, dtype=dtype), 2**30).stages[2].phases["generate"]
        for dtype in ("bfloat16", "float32")
    )
    recipe = world.recipe(train__kind=kind)
    top = Trunk(load_causal(str(world.folder / "model"), tiny.CPU), recipe.trunk.split).top
    policy, _ = trainable(top, recipe.train)
    matrices = [p for p in policy.layers.parameters() if p.dim() > 1 and p.requires_grad]
    assert half["casts of trained weights"] == 2 * sum(p.numel() for p in matrices)
    assert single["casts of trained weights"] == 0


def test_hidden_states_are_counted_where_they_stay(world: World) -> None:
    """16 rows of 12 own tokens, 32 wide: 24,576 bytes. Micro-batches of 24 tokens are an eighth of that."""

    def kept(gpu: int | None, keep: str) -> int:
        changes = {"trunk__keep": keep, "ppo__optim": {"micro_batch_tokens": 24}}
        return plan(world.recipe(**changes), gpu).stages[2].always["hidden states"]

    assert [kept(None, keep) for keep in ("device", "cpu", "none")] == [24_576, 24_576, 3_072]
    assert [kept(2**30, keep) for keep in ("device", "cpu", "none")] == [24_576, 3_072, 3_072]
    assert [kept(gpu, "auto") for gpu in (2**30, 40_000)] == [24_576, 10_000]


def test_fewer_answers_at_once_take_less(world: World) -> None:
    caches = [stages_of(world, decode_rows=n)["ppo"].phases["generate"]["KV cache"] for n in (1000, 16, 4)]
    assert caches[0] == caches[1] == 4 * caches[2]


def test_rows_are_those_of_the_data(world: World) -> None:
    """A user's turn of three words is <start> user a b c <end>, then comes <start> assistant."""
    found = plan(world.recipe()).stages[2]
    longest = Rows(2, ((6, 6),))
    assert longest.batch(3) == [12, 12, 12]
    # One layer's keys and values of one head of 16, for 16 rows and a group of them.
    tokens = 16 * (2 + 6 + 6 - 1) + 16 * (2 + 6)
    assert found.phases["generate"]["KV cache"] == 3 * 2 * 16 * 4 * tokens


def test_nothing_is_loaded(world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.folder / "model", tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert plan(world.recipe(model=str(folder))).fits


def test_what_would_help_is_planned_too(world: World, tmp_path: Path, capsys: Any) -> None:
    layout = {"train__kind": "full", "trunk__split": 0, "sft": None, "reward": None}
    recipe = str(world.recipe_file(tmp_path / "tiny.yaml", **layout))
    assert main(["plan", recipe, "--gpu", "1MiB", "--json"]) == 1
    refused = json.loads(capsys.readouterr().out)
    assert not refused["fits"]
    change, peak = refused["changes"][0]
    assert peak < refused["peak"]
    assert f"--set {change}" in verdict(refused)
    assert main(["plan", recipe, "--gpu", "80 GiB", "--json", "--set", change]) == 0
    assert json.loads(capsys.readouterr().out)["peak"] == peak


def test_the_table(world: World, tmp_path: Path, capsys: Any) -> None:
    assert main(["plan", str(world.recipe_file(tmp_path / "tiny.yaml"))]) == 0
    said = capsys.readouterr().out
    assert "process" in said
    assert "it fits" in said


def test_a_recipe_that_gathers_its_scores(world: World) -> None:
    names = stages_of(world, reward={"kind": "pairs"}, iterate={"by": "judge", "prompts": 20})
    assert list(names) == ["sft", "reward", "ppo"]


def test_sizes() -> None:
    assert memory("24GiB") == 24 * 1024**3
    assert memory("1.5 GB") == 1_500_000_000
    for wrong in ("24", "24gib", "much", "0GiB"):
        with pytest.raises(UserError, match="24GiB"):
            memory(wrong)
