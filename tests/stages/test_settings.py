"""Every setting does something: each leaf of the recipe is changed, and what it should change is looked at.

The keys come from the pydantic model, so a new setting without a case here fails.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from tests.world import World, put, write_model
from torch import nn

from ppolite.config import Recipe, parse_recipe
from ppolite.stages.checkpoint import Checkpoints
from ppolite.stages.evaluate import evaluate_run
from ppolite.stages.iterate import Iteration
from ppolite.stages.run import RESULTS, STAGES
from ppolite.types import UserError

Changes = dict[str, Any]


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        options = [info.annotation, *getattr(info.annotation, "__args__", ())]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if inner:
            yield from leaves(inner[0], f"{prefix}{name}.")
        else:
            yield prefix + name


@dataclass
class Outcome:
    """What a stage left behind."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    norm: dict[str, float] = field(default_factory=dict)
    said: str = ""
    error: str = ""
    widest: int = 0
    """Most tokens that went through a decoder layer at once while gradients were taken."""
    passes: int = 0
    """How often a decoder layer was run so."""
    frozen: int = 0
    """How often without."""
    owned: int = 0
    """Parameters that the four roles hold, each counted once."""
    checkpoints: list[list[int]] = field(default_factory=list)
    """Steps of those that were there after each one that was written."""

    def column(self, key: str) -> list[Any]:
        return [row[key] for row in self.rows if key in row]

    @property
    def moved(self) -> tuple[Any, ...]:
        return tuple(float(w.double().abs().sum()) for w in self.weights.values())


Sees = Callable[[Outcome, Outcome], bool]


@dataclass
class Case:
    """Change `value` at the key in this stage; `given` holds other settings of both runs."""

    stage: str
    value: Any
    sees: Sees = lambda a, b: a.moved != b.moved
    given: Changes = field(default_factory=dict)
    full_disk: bool = False
    """No checkpoint can be written."""


@contextmanager
def watched_checkpoints(seen: Outcome, *, full_disk: bool) -> Iterator[None]:
    """Keeps account of the checkpoints that are written; with `full_disk` none can be."""

    def save(self: Checkpoints, step: int, state: dict[str, Any]) -> bool:
        done = original(self, step, state)
        seen.checkpoints.append(self.steps())
        return done

    def no_room(folder: Path, state: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = Checkpoints.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        if full_disk:
            patch.setattr("ppolite.stages.checkpoint.write_state", no_room)
        yield


def run(
    world: World, finished_run: Path, folder: Path, stage: str, changes: Changes, *, full_disk: bool = False
) -> Outcome:
    tree = world.tree()
    for key, value in changes.items():
        put(tree, key, value)
    recipe = parse_recipe(tree)
    folder.mkdir()
    before = {
        "sft": (), "reward": ("sft",), "ppo": ("sft", "reward"), "eval": ("sft", "reward", "policy"),
        "iterate": ("sft",),
    }  # fmt: skip
    for name in before[stage]:
        (folder / name).symlink_to(finished_run / name)
    seen = Outcome()

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        if type(module).__name__ != "LlamaMLP":
            return
        if not torch.is_grad_enabled():
            seen.frozen += 1
        else:
            seen.widest = max(seen.widest, args[0].shape[0] * args[0].shape[1])
            seen.passes += 1

    lines: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("ppolite")
    log.addHandler(listener)
    # Before the module runs: computed again, a layer ends with the last tensor that the backward pass asks for.
    hook = nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        if stage == "eval":
            seen.result = evaluate_run(recipe, folder)
        elif stage == "iterate":
            seen.result = Iteration(recipe, folder).run()
        else:
            with watched_checkpoints(seen, full_disk=full_disk):
                trainer = STAGES[stage](recipe, folder)
                seen.result = trainer.run()
            if stage == "ppo":
                r = trainer.roles
                bodies = (r.policy, r.reference, r.critic, r.reward)
                params = {id(p): p.numel() for b in bodies if b is not None for p in b.parameters()}
                params |= {id(p): p.numel() for p in r.trunk.model.parameters()}
                seen.owned = sum(params.values())
    except UserError as error:
        seen.error = str(error)
    finally:
        hook.remove()
        log.removeHandler(listener)
    seen.said = "\n".join(lines)
    if stage in RESULTS and (folder / RESULTS[stage]).exists():
        seen.weights = load_file(folder / RESULTS[stage] / "model.safetensors")
        seen.norm = json.loads((folder / RESULTS[stage] / "config.json").read_text()).get("ppolite_norm", {})
    if (folder / "metrics.jsonl").exists():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        seen.rows = [{k: v for k, v in row.items() if k[:4] != "time"} for row in rows]
    return seen


# ---- what changes ----------------------------------------------------------------------------------------


def differs(key: str) -> Sees:
    """The column of metrics differs."""
    return lambda a, b: a.column(key) != b.column(key)


def as_numbers_agree(a: Outcome, b: Outcome) -> bool:
    return all(torch.allclose(a.weights[k], b.weights[k], atol=2e-3) for k in a.weights)


def lower(key: str) -> Sees:
    """The first number in the column falls."""
    return lambda a, b: b.column(key)[0] < a.column(key)[0]


def count(key: str) -> Callable[[Outcome], int]:
    return lambda a: len(a.column(key))


def narrower(a: Outcome, b: Outcome) -> bool:
    return b.widest < a.widest and as_numbers_agree(a, b)


def computed_twice(a: Outcome, b: Outcome) -> bool:
    """For `verify`, layers are run without being gone back through in either."""
    return 1.5 * a.passes < b.passes < 2 * a.passes and a.moved == b.moved


def frozen_layers_more_often(a: Outcome, b: Outcome) -> bool:
    return b.frozen > a.frozen and b.passes == a.passes and as_numbers_agree(a, b)


def more_updates(a: Outcome, b: Outcome) -> bool:
    return len(b.rows) > len(a.rows) and a.moved != b.moved


def refused(text: str) -> Sees:
    return lambda a, b: not a.error and text in b.error


def accepted(text: str) -> Sees:
    return lambda a, b: text in a.error and not b.error


def refused_instead(before: str, after: str) -> Sees:
    return lambda a, b: before in a.error and after in b.error


def no_judge(outcome: Outcome) -> bool:
    """Without the [demo] extra there is nobody to score candidates."""
    return "vaderSentiment" in outcome.error


def refused_or_no_judge(text: str) -> Sees:
    return lambda a, b: no_judge(a) or refused(text)(a, b)


def first_kl(outcome: Outcome) -> float:
    return outcome.column("heldout/kl_ref_seq")[0]


def data_cases(stage: str, key: str, name: str, swap: dict[str, str]) -> dict[str, Case]:
    """`swap`: our column → what the file at `renamed` calls it."""
    renamed = {f"{key}.path": f"renamed_{name}"}
    return {
        f"{key}.path": Case(stage, f"other_{name}"),
        f"{key}.columns": Case(stage, swap, accepted("no column"), given=renamed),
        f"{key}.limit": Case(stage, 16, differs("loss/train") if stage != "ppo" else differs("score/mean")),
        f"{key}.held_out": Case(stage, 0.4),
        f"{key}.plain": Case(stage, True),
    }


def optim_cases(stage: str, key: str, *, watched: Sees = lambda a, b: a.moved != b.moved) -> dict[str, Case]:
    changed = {
        "lr": 1e-3, "schedule": "cosine", "warmup": 0.5, "weight_decay": 0.5, "adam_eps": 1e-2, "beta2": 0.5,
        "max_grad_norm": 1e-3,
    }  # fmt: skip
    cases = {f"{key}.{name}": Case(stage, value, watched) for name, value in changed.items()}
    if key != "ppo.critic":
        cases[f"{key}.micro_batch_tokens"] = Case(stage, 40, narrower)
    return cases


def rings(name: str) -> Sees:
    """Alarm `name`, where before there was none."""
    return lambda a, b: f"alarm `{name}`" in b.said and "alarm" not in a.said


LORA = {"train.kind": "lora"}
OBJECTIVE = {"ppo.objective": "kl"}
OLD = {"ppo.behaviour": "sft", "ppo.optim.lr": 1e-2}
ROUND = {
    "iterate.rounds": 1, "iterate.by": "judge", "iterate.prompts": 16, "iterate.candidates": 4, "iterate.held_out": 0.3,
    "reward.kind": "pairs", "reward.data": None, "ppo.steps": 1, "ppo.min_rm_accuracy": 0,
}  # fmt: skip
WAITING = {**ROUND, "iterate.by": "file", "iterate.candidates": 2}
COUNTS = {"kind": "function", "function": f"{Path(__file__).parent / 'rewards.py'}:lengths"}
NANS = {**COUNTS, "function": f"{Path(__file__).parent / 'rewards.py'}:second_is_nan"}
BADS = {**COUNTS, "function": f"{Path(__file__).parent / 'rewards.py'}:bads"}
IMPATIENT = {"watch.patience": 1}
FAR = {**IMPATIENT, "watch.kl": 1e-9}
ADAPTIVE = {"ppo.kl.target": 0.5, "ppo.optim.lr": 1e-2}

CASES: dict[str, Case] = {
    "model": Case("sft", "other_model"),
    "trust_remote_code": Case("sft", True, accepted("trust_remote_code"), given={"model": "foreign_model"}),
    "seed": Case("sft", 1),
    "device": Case("sft", "cuda", refused("torch sees no GPU")),
    "dtype": Case("sft", "bfloat16"),
    "decode_rows": Case("ppo", 3, frozen_layers_more_often),
    "roles": Case(
        "ppo", "separate", lambda a, b: b.owned > a.owned and as_numbers_agree(a, b), {"trunk.split": 0}
    ),
    "doctor": Case(
        "ppo", "off", lambda a, b: "doctor: ppo/critic" in a.said and "doctor:" not in b.said, {"ppo.value_clip": 1e-3}
    ),
    "trunk.split": Case("sft", 2),
    "trunk.keep": Case("ppo", "none", frozen_layers_more_often),
    "train.kind": Case("sft", "full", given={"trunk.split": 0}),
    "train.lora_rank": Case("sft", 2, given=LORA),
    "train.lora_alpha": Case("sft", 4.0, given=LORA),
    "train.recompute": Case("ppo", True, computed_twice),
    **data_cases("sft", "sft.data", "examples", {"prompt": "q", "completion": "a"}),
    **optim_cases("sft", "sft.optim"),
    "sft.epochs": Case("sft", 2.0, more_updates),
    "sft.batch_size": Case("sft", 8, more_updates),
    "sft.max_tokens": Case("sft", 11, lambda a, b: "limit 11" in b.said and a.moved != b.moved),
    "sft.eval_every": Case("sft", 1, lambda a, b: count("loss/heldout")(b) > count("loss/heldout")(a)),
    "sft.eval_examples": Case("sft", 4, differs("loss/heldout")),
    **data_cases("reward", "reward.data", "scored", {"prompt": "q", "response": "a", "score": "s"}),
    "reward.kind": Case("reward", "pairs", accepted("no column"), given={"reward.data.path": "pairs"}),
    **optim_cases("reward", "reward.optim"),
    "reward.epochs": Case("reward", 5.0, more_updates),
    "reward.batch_size": Case("reward", 8, more_updates),
    "reward.max_tokens": Case("reward", 11, lambda a, b: "limit 11" in b.said and a.moved != b.moved),
    "reward.eval_examples": Case(
        "reward", 20, lambda a, b: b.result["held_out"] == 20 < a.result["held_out"] and a.moved == b.moved
    ),
    "reward.pair_gap": Case("reward", 3.0, differs("heldout/pair_accuracy")),
    "reward.norm_samples": Case("reward", 8, lambda a, b: a.norm != b.norm),
    "reward.taught_by": Case(
        "eval", "judge", lambda a, b: [x.result["taught_by"] for x in (a, b)] == ["people", "judge"]
    ),
    **data_cases("ppo", "ppo.prompts", "prompts", {"prompt": "q"}),
    "ppo.start": Case("ppo", "policy", lambda a, b: first_kl(b) > 0.1 > first_kl(a)),
    "ppo.seed": Case(
        "ppo", 1, lambda a, b: a.column("heldout/score")[0] == b.column("heldout/score")[0] and a.moved != b.moved
    ),
    **optim_cases("ppo", "ppo.optim"),
    **optim_cases("ppo", "ppo.critic", watched=differs("value/loss")),
    "ppo.steps": Case("ppo", 3, lambda a, b: count("policy/loss")(b) == 3 > count("policy/loss")(a)),
    "ppo.rollouts": Case("ppo", 24),
    "ppo.samples_per_prompt": Case("ppo", 4),
    "ppo.max_new_tokens": Case("ppo", 8, lambda a, b: max(b.column("length/mean")) > 6),
    "ppo.temperature": Case("ppo", 0.5, lower("policy/entropy")),
    "ppo.top_p": Case("ppo", 0.3, differs("sampler/gap_mean")),
    "ppo.epochs": Case("ppo", 3),
    "ppo.minibatches": Case("ppo", 3),
    "ppo.objective": Case("ppo", "kl", lambda a, b: bool(b.column("penalty/beta")) and a.moved != b.moved),
    "ppo.clip": Case("ppo", 0.01, lambda a, b: lower("policy/clip_fraction")(b, a)),
    "ppo.clip_high": Case("ppo", 0.5, lower("policy/clip_fraction"), given={"ppo.clip": 0.01}),
    "ppo.dual_clip": Case("ppo", 1.001, lambda a, b: lower("policy/clip_fraction")(b, a), given={"ppo.clip": 0.9}),
    "ppo.penalty_beta": Case("ppo", 8.0, lambda a, b: set(b.column("penalty/beta")) == {8.0}, given=OBJECTIVE),
    "ppo.penalty_target": Case(
        "ppo", 1e9, lambda a, b: (a.column("penalty/beta"), b.column("penalty/beta")) == ([8.0, 8.0], [8.0, 4.0]),
        given={**OBJECTIVE, "ppo.penalty_beta": 8.0},
    ),
    "ppo.behaviour": Case("ppo", "sft", lambda a, b: bool(b.column("ess/share")) and a.moved != b.moved),
    "ppo.stale_steps": Case(
        "ppo", 2, lambda a, b: b.column("samples/drawn")[0] == 48 and a.moved != b.moved,
        given={"ppo.behaviour": "stale", "ppo.steps": 3},
    ),
    "ppo.sft_samples": Case("ppo", 32, lambda a, b: b.column("samples/drawn")[-1] == 32, given=OLD),
    "ppo.weight_kind": Case("ppo", "trajectory", given={"ppo.objective": "is"}),
    "ppo.weight_cap": Case("ppo", 1.0, differs("weight/capped_share"), given={"ppo.objective": "is"}),
    "ppo.ess_floor": Case(
        "ppo", 0.999, lambda a, b: "stopped_at" not in a.result and b.result.get("stopped_at") == 2, given=OLD
    ),
    "ppo.on_low_ess": Case(
        "ppo", "draw", lambda a, b: "stopped_at" in a.result and b.column("samples/drawn")[-1] > 128,
        given={**OLD, "ppo.ess_floor": 0.999},
    ),
    "ppo.value_clip": Case("ppo", 1e-3, differs("value/clip_fraction")),
    "ppo.gamma": Case("ppo", 0.5),
    "ppo.lam": Case("ppo", 0.0),
    "ppo.whiten_advantages": Case("ppo", False),
    "ppo.rewards": Case("ppo", [{"kind": "model"}, {"kind": "length", "max": 3}], differs("score/mean")),
    "ppo.disagreement": Case(
        "ppo", 1.0, lower("score/mean"), given={"ppo.rewards": [{"kind": "model"}, COUNTS]}
    ),
    "ppo.unit_samples": Case(
        "ppo", 8, differs("score/mean"), given={"ppo.rewards": [{"kind": "model"}, {**COUNTS, "shift": None}]}
    ),
    "ppo.reward_scale": Case("ppo", 3.0, differs("reward/shaped_mean")),
    "ppo.reward_clip": Case("ppo", 0.1, differs("reward/shaped_mean")),
    "ppo.missing_eos_penalty": Case("ppo", 3.0, lower("reward/shaped_mean")),
    "ppo.critic_body": Case("ppo", "policy", lambda a, b: b.column("value/mean")[0] == 0 != b.column("value/mean")[-1]),
    "ppo.value_coef": Case("ppo", 2.0, given={"ppo.critic_body": "policy"}),
    "ppo.critic_init": Case("ppo", "zero", lambda a, b: b.column("value/mean")[0] == 0),
    "ppo.kl.beta": Case("ppo", 1.0, differs("policy/loss")),
    "ppo.kl.target": Case("ppo", 0.5, differs("leash/beta")),
    "ppo.kl.horizon": Case("ppo", 20.0, differs("leash/beta"), given=ADAPTIVE),
    "ppo.kl.estimator": Case("ppo", "k3"),
    "ppo.kl.where": Case("ppo", "loss", lambda a, b: a.moved != b.moved, given={"ppo.kl.estimator": "k2"}),
    "ppo.eval_every": Case("ppo", 2, lambda a, b: count("heldout/score")(b) < count("heldout/score")(a)),
    "ppo.eval_prompts": Case("ppo", 4, differs("heldout/score")),
    "ppo.max_kl": Case("ppo", 1e-3, lambda a, b: b.result["best_step"] == 0 < a.result["best_step"]),
    "ppo.min_rm_accuracy": Case("ppo", 0.999, refused("min_rm_accuracy")),
    "iterate.rounds": Case(
        "iterate", 2, lambda a, b: no_judge(b) or [len(x.result["policies"]) for x in (a, b)] == [2, 3], ROUND
    ),
    "iterate.by": Case("iterate", "file", refused_or_no_judge("wait for a score"), ROUND),
    "iterate.prompts": Case("iterate", 12, refused_instead(" of 32 candidates", " of 24 candidates"), WAITING),
    "iterate.candidates": Case("iterate", 3, refused_instead(" of 32 candidates", " of 48 candidates"), WAITING),
    "iterate.held_out": Case("iterate", 0.01, refused_or_no_judge("8 are needed"), ROUND),
    "checkpoint.every": Case(
        "sft", 2, lambda a, b: [x[-1] for x in a.checkpoints][:1] == [1] and [x[-1] for x in b.checkpoints] == [2, 4]
    ),
    "checkpoint.cost": Case(
        "sft", 1e-9, lambda a, b: len(b.checkpoints) == 1 < len(a.checkpoints), {"checkpoint.cost": 1}
    ),
    "checkpoint.keep": Case(
        "sft", 3, lambda a, b: [max(map(len, x.checkpoints)) for x in (a, b)] == [2, 3], {"checkpoint.every": 1}
    ),
    "checkpoint.on_error": Case("sft", "stop", refused("no checkpoint could be written"), full_disk=True),
    "faults.skips": Case("ppo", 0, refused("faults.skips is 0"), {"ppo.rewards": [{"kind": "model"}, NANS]}),
    "faults.returns": Case(
        "ppo", 0, refused_instead("no checkpoint to go back to", "faults.returns is 0"),
        {"ppo.optim.lr": 1e30, "ppo.epochs": 4},
    ),
    "watch.on_alarm": Case("ppo", "stop", lambda a, b: [x.result.get("stopped_at") for x in (a, b)] == [None, 2], FAR),
    "watch.patience": Case("ppo", 2, lambda a, b: rings("kl")(b, a), FAR),
    "watch.kl": Case("ppo", 1e-9, rings("kl"), IMPATIENT),
    "watch.entropy": Case("ppo", 0.999, rings("entropy"), {**IMPATIENT, "ppo.optim.lr": 3e-2}),
    "watch.length": Case("ppo", 1.0001, rings("length"), IMPATIENT),
    "watch.repeats": Case(
        "ppo", 1e-9, rings("repeats"),
        {**IMPATIENT, "watch.repeats": None, "ppo.temperature": 0.1, "ppo.max_new_tokens": 24},
    ),
    "watch.judge": Case(
        "ppo", 1e-6, lambda a, b: "vaderSentiment" in b.error or rings("judge")(a, b),
        {
            **IMPATIENT, "watch.judge": None, "evaluation.judge": "vader",
            "ppo.rewards": [BADS], "ppo.steps": 6, "ppo.optim.lr": 1e-2,
        },
    ),
    "watch.ratio": Case("ppo", 1.001, rings("ratio"), IMPATIENT),
    "watch.clip_fraction": Case("ppo", 1e-6, rings("clip_fraction"), IMPATIENT),
    "watch.explained_variance": Case("ppo", 0.999, rings("explained_variance"), IMPATIENT),
    "watch.ess": Case("ppo", 0.99999, rings("ess"), {**IMPATIENT, "ppo.behaviour": "stale", "ppo.steps": 3}),
    "evaluation.prompts": Case("eval", 7, lambda a, b: b.result["prompts"] == 7 != a.result["prompts"]),
    "evaluation.samples": Case("eval", 2, lambda a, b: [len(x.result["samples"]) for x in (a, b)] == [3, 2]),
    "evaluation.judge": Case(
        "eval",
        "vader",
        lambda a, b: (
            a.result["judge_after"] is None
            and ("vaderSentiment" in b.error or b.result["judge_after"] is not None)
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def named(world: World) -> World:
    """The world with the other files and models that the cases name."""
    draw = {
        "examples": ("prompt", "completion"),
        "scored": ("prompt", "response", "score"),
        "prompts": ("prompt",),
    }
    short = {"prompt": "q", "completion": "a", "response": "a", "score": "s"}
    for name, columns in draw.items():
        rows = [json.loads(line) for line in Path(world.path(name)).read_text().splitlines()]
        world.write(f"renamed_{name}", [{short[c]: row[c] for c in columns} for row in rows])
        world.write(f"other_{name}", rows[: len(rows) * 2 // 3])
    write_model(world.folder / "other_model", seed=1)
    foreign = write_model(world.folder / "foreign_model")
    config = json.loads((foreign / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config["model_type"] = "own"
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return world


@pytest.fixture(scope="module")
def outcome(
    named: World, finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case, Changes], Outcome]:
    """Run a stage once for each set of changes."""
    folder = tmp_path_factory.mktemp("settings")
    numbers = iter(range(1000))

    def real(key: str, value: Any) -> Any:
        if key.endswith(".path"):
            return named.path(value)
        if key == "ppo.start":
            return str(finished_run / "policy")
        return str(named.folder / value) if key == "model" else value

    @lru_cache
    def cached(stage: str, text: str, full_disk: bool) -> Outcome:
        changes = {k: real(k, v) for k, v in json.loads(text).items()}
        place = folder / str(next(numbers))
        made = run(named, finished_run, place, stage, changes, full_disk=full_disk)
        shutil.rmtree(place)
        return made

    return lambda case, changes: cached(case.stage, json.dumps(changes), case.full_disk)


def test_all_settings_have_a_case() -> None:
    assert set(leaves(Recipe)) == set(CASES)


@pytest.mark.parametrize("key", [*leaves(Recipe)])
def test_setting_does_something(key: str, outcome: Callable[[Case, Changes], Outcome]) -> None:
    if key == "device" and torch.cuda.is_available():
        pytest.skip("there is a GPU here, so that device: cuda is no error")
    case = CASES[key]
    base, changed = outcome(case, case.given), outcome(case, {**case.given, key: case.value})
    assert case.sees(base, changed), f"{base.error or base.result} → {changed.error or changed.result}"


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_recompute_in_the_other_stages(stage: str, outcome: Callable[[Case, Changes], Outcome]) -> None:
    case = Case(stage, True)
    assert computed_twice(*(outcome(case, {"train.recompute": value}) for value in (False, True)))
