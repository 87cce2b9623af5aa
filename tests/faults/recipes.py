"""Recipes that no run can be made of: broken files, wrong values for every key, and keys that contradict each other.

Every table maps what is wrong to the file's text, or to the data of it.
"""

from __future__ import annotations

import copy
import gzip
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from ppolite.config import SOURCES, Recipe
from ppolite.control.config import Control

DATA = {"path": "x.jsonl"}
WHOLE: dict[str, Any] = {
    "sft": {"data": dict(DATA)}, "reward": {"data": dict(DATA)}, "ppo": {"prompts": dict(DATA)}, "iterate": {}
}  # fmt: skip
"""Every section is there, so that every key has a place."""

NEEDS: dict[str, dict[str, Any]] = {
    "function": {"function": "m:f"}, "http": {"url": "https://a.test/"}, "classifier": {"model": "x"},
    "length": {"max": 9}, "format": {"pattern": "x"},
}  # fmt: skip
"""What a source must say."""

GROWS = "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 10)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "".join(f"k{i}: &k{i} {'[' * 20}*k{i - 1}{']' * 20}\n" for i in range(1, 40))

NO_YAML: dict[str, str | bytes] = {
    "empty": "",
    "comment alone": "# nothing\n",
    "document marks alone": "---\n...\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "list": "- seed: 1\n",
    "text": "film\n",
    "number": "3\n",
    "null": "null\n",
    "true": "true\n",
    "date": "2026-11-24\n",
    "unclosed list": "sft: [1, 2\n",
    "unclosed mapping": "sft: {data: 1\n",
    "unclosed quote": 'model: "x\nseed: 1\n',
    "tab as indentation": "sft:\n\tdata: 1\n",
    "indentation of a key": "seed: 1\n  dtype: auto\n",
    "value beside a section": "train: lora\n  kind: lora\n",
    "reserved character": "model: @x\n",
    "backtick": "model: `x`\n",
    "percent": "%YAML 9.9\n---\nseed: 1\n",
    "colon in a value": "model: a: b\n",
    "missing space": "seed:1\n",
    "NUL": "model: a\0b\n",
    "escape sequence": "model: \x1b[31mred\n",
    "C1 control": "model: \x9b31m\n",
    "escaped NUL": 'model: "a\\0b"\n',
    "half a character": 'model: "\\ud800"\n',
    "half a character as key": '"\\udfff": 1\n',
    "latin 1": "model: café\n".encode("latin-1"),
    "UTF-16, little": "seed: 1\n".encode("utf-16"),
    "UTF-16, big": b"\xfe\xff" + "seed: 1\n".encode("utf-16-be"),
    "UTF-32": "seed: 1\n".encode("utf-32"),
    "GB 18030": "model: 电影\n".encode("gb18030"),
    "broken UTF-8": b"model: \xff\xfe\xfd\n",
    "cut UTF-8": "model: 电".encode()[:-1],
    "gzip": gzip.compress(b"seed: 1\n"),
    "picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "program": b"\x7fELF\x02\x01\x01" + bytes(64),
    "web page": "<!doctype html>\n<title>404</title>\n",
    "JSON with a comma too many": '{"seed": 1,}}\n',
    "Windows ini": "[sft]\nepochs = 1\n",
    "Python object": "model: !!python/object/apply:os.system [id]\n",
    "Python name": "model: !!python/name:os.system\n",
    "Python module": "model: !!python/module:os\n",
    "Python tuple": "model: !!python/tuple [1]\n",
    "tag of our own": "model: !x 1\n",
    "set": "model: !!set {a, b}\n",
    "binary": "model: !!binary aGVsbG8=\n",
    "number that is none": "seed: !!int abc\n",
    "boolean that is none": "trust_remote_code: !!bool maybe\n",
    "time that is none": "model: !!timestamp yesterday\n",
    "hexadecimal that is none": "seed: 0x_\n",
    "5000 digits": f"seed: {'9' * 5000}\n",
    "unknown alias": "model: *nobody\n",
    "unknown merge": "<<: *nobody\n",
    "merge of a number": "<<: 3\n",
    "alias in itself": "sft: &a [*a]\n",
    "mapping in itself": "sft: &a {data: *a}\n",
    "a billion values": f"a: &a [x]\n{GROWS}",
    "a billion keys": f"a: &a {{x: 1}}\n{MERGES}",
    "a thousand levels of aliases": f"k0: &k0 [x]\n{CHAIN}",
    "brackets": "[" * 10_000,
    "braces": "{a: " * 10_000,
    "dashes": "- " * 10_000,
    "block levels": "".join(f"{' ' * i}a:\n" for i in range(500)),
    "key twice": "seed: 1\nseed: 2\n",
    "section twice": "train: {kind: lora}\nsft: null\ntrain: {kind: full}\n",
    "key in a section twice": "train: {kind: lora, kind: full}\n",
    "merge twice": "x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x\n",
    "number as key": "1: x\n",
    "null as key": "null: x\n",
    "yes as key": "yes: x\n",
    "list as key": "? [a, b]\n: c\n",
    "mapping as key": "{a: b}: c\n",
    "key in a section is a number": "ppo: {prompts: {path: x, columns: {1: 2}}}\n",
}  # fmt: skip


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that holds a value, with its annotation."""
    for name, info in section.model_fields.items():
        inner = [o for o in (info.annotation, *get_args(info.annotation)) if _is_section(o)]
        if inner:
            yield from leaves(inner[0], f"{prefix}{name}.")
        else:
            yield prefix + name, info.annotation


def _is_section(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, BaseModel)


def put(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(tree)
    *parents, last = key.split(".")
    inner = made
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return made


def wrong_values() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """For every key of every section: its name, what it is given, and the whole recipe."""
    for key, annotation in leaves(Recipe):
        for name, value in _wrong(annotation):
            yield key, name, put(WHOLE, key, value)
    for section in (
        "trunk",
        "train",
        "sft",
        "reward",
        "ppo",
        "iterate",
        "evaluation",
        "sft.data",
        "ppo.kl",
        "ppo.optim",
    ):
        for value in (3, "text", [1], True):
            yield section, f"{value!r} for a section", put(WHOLE, section, value)
    for kind, source in SOURCES.items():
        for field in source.model_fields:
            if field != "kind":
                entry = {"kind": kind, **NEEDS.get(kind, {}), field: {"a": [1]}}
                yield f"ppo.rewards.0.{field}", f"a mapping for {kind}", put(WHOLE, "ppo.rewards", [entry])


def _wrong(annotation: Any) -> Iterator[tuple[str, Any]]:
    options = {annotation, *get_args(annotation)}
    yield "a mapping", {"a": [1]}
    if options & {int, float}:
        yield "text", "many"
        yield "true", True
        yield "no number", float("nan")
    if float in options:
        yield "infinity", float("inf")
    if int in options:
        yield "a fraction", 2.5
        yield "40 digits", 10**40
    if str in options and int not in options:
        yield "a number", 3


FUNCTION = {"kind": "function", "function": "m:f"}
A2C = {"objective": "a2c", "epochs": 1, "minibatches": 1}

CONTRADICTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank without lora": ("lora_rank", {"train": {"kind": "layers", "lora_rank": 16}}),
    "alpha without lora": ("lora_alpha", {"train": {"kind": "full", "lora_alpha": 32}}),
    "full with a split": ("trunk.split", {"train": {"kind": "full"}, "trunk": {"split": 2}}),
    "separate with a split": ("trunk.split", {"roles": "separate", "trunk": {"split": 2}}),
    "look without held-out rows": ("eval_every", {"sft": {"data": {**DATA, "held_out": 0}, "eval_every": 5}}),
    "examples without held-out rows": ("eval_examples", {"sft": {"data": {**DATA, "held_out": 0}, "eval_examples": 5}}),
    "one and a half rows": ("held_out", {"sft": {"data": {**DATA, "held_out": 1.5}}}),
    "gap of pairs": ("pair_gap", {"reward": {"data": DATA, "kind": "pairs", "pair_gap": 1}}),
    "gap of rankings": ("pair_gap", {"reward": {"data": DATA, "kind": "rankings", "pair_gap": 0}}),
    "scores one by one": ("batch_size", {"reward": {"data": DATA, "batch_size": 1}}),
    "reward model without held-out rows": ("held_out", {"reward": {"data": {**DATA, "held_out": 0}}}),
    "reward model with too few": ("held_out", {"reward": {"data": {**DATA, "held_out": 7}}}),
    "PPO without held-out prompts": ("held_out", {"ppo": {"prompts": {**DATA, "held_out": 0}}}),
    "PPO with as many as it looks at": ("eval_prompts", {"ppo": {"prompts": {**DATA, "held_out": 64}}}),
    "stages that hold out differently": (
        "hold out 0.1 and 0.2", {"sft": {"data": DATA}, "ppo": {"prompts": {**DATA, "held_out": 0.2}}}
    ),
    "reward model that holds out differently": (
        "reward.data and ppo.prompts", {"reward": {"data": {**DATA, "held_out": 50}}, "ppo": {"prompts": DATA}}
    ),
    "horizon without a target": ("horizon", {"ppo": {"prompts": DATA, "kl": {"horizon": 1000}}}),
    "horizon too short": ("horizon", {"ppo": {"prompts": DATA, "kl": {"horizon": 5, "target": 4}}}),
    "target from nothing": ("beta", {"ppo": {"prompts": DATA, "kl": {"beta": 0, "target": 4}}}),
    "target beyond what is kept": ("max_kl", {"ppo": {"prompts": DATA, "kl": {"target": 9}}}),
    "k1 in the loss": ("k2", {"ppo": {"prompts": DATA, "kl": {"where": "loss"}}}),
    "clip of the other objective": ("clip", {"ppo": {"prompts": DATA, "objective": "kl", "clip": 0.2}}),
    "penalty of the other objective": ("penalty_target", {"ppo": {"prompts": DATA, "penalty_target": 0.1}}),
    "A2C twice over": ("epochs", {"ppo": {"prompts": DATA, **A2C, "epochs": 2}}),
    "A2C on old samples": ("behaviour", {"ppo": {"prompts": DATA, **A2C, "behaviour": "sft"}}),
    "weights of fresh rollouts": ("weight_kind", {"ppo": {"prompts": DATA, "weight_kind": "step"}}),
    "cap of fresh rollouts": ("weight_cap", {"ppo": {"prompts": DATA, "weight_cap": 2}}),
    "stale steps of fresh rollouts": ("stale_steps", {"ppo": {"prompts": DATA, "stale_steps": 0}}),
    "SFT samples of fresh rollouts": ("sft_samples", {"ppo": {"prompts": DATA, "sft_samples": 64}}),
    "floor of fresh rollouts": ("ess_floor", {"ppo": {"prompts": DATA, "ess_floor": 0.1}}),
    "what to do below no floor": (
        "on_low_ess", {"ppo": {"prompts": DATA, "behaviour": "sft", "ess_floor": 0, "on_low_ess": "draw"}}
    ),
    "samples that do not divide": ("multiple", {"ppo": {"prompts": DATA, "behaviour": "sft", "sft_samples": 65}}),
    "prompts that do not divide": ("multiple", {"ppo": {"prompts": DATA, "samples_per_prompt": 5}}),
    "more minibatches than rollouts": ("minibatches", {"ppo": {"prompts": DATA, "minibatches": 65}}),
    "a critic on the policy's layers that starts as the reward model": (
        "critic_init", {"ppo": {"prompts": DATA, "critic_body": "policy", "critic_init": "reward"}}
    ),
    "two losses on layers of their own": ("value_coef", {"ppo": {"prompts": DATA, "value_coef": 0.5}}),
    "critic from no reward model": (
        "critic_init", {"ppo": {"prompts": DATA, "rewards": [FUNCTION], "critic_init": "reward"}}
    ),
    "accuracy of no reward model": (
        "min_rm_accuracy", {"ppo": {"prompts": DATA, "rewards": [FUNCTION], "min_rm_accuracy": 0.7}}
    ),
    "longer than any response": (
        "max_new_tokens", {"ppo": {"prompts": DATA, "rewards": [FUNCTION, {"kind": "length", "max": 128}]}}
    ),
    "shortest beyond any response": (
        "max_new_tokens", {"ppo": {"prompts": DATA, "rewards": [FUNCTION, {"kind": "length", "min": 129}]}}
    ),
    "length without bounds": ("min", {"ppo": {"prompts": DATA, "rewards": [FUNCTION, {"kind": "length"}]}}),
    "one name for two": ("name", {"ppo": {"prompts": DATA, "rewards": [FUNCTION, FUNCTION]}}),
    "two reward models": (
        "one reward model", {"ppo": {"prompts": DATA, "rewards": [{"kind": "model"}, {"kind": "model", "name": "b"}]}}
    ),
    "weight of the only judge": ("weight", {"ppo": {"prompts": DATA, "rewards": [{**FUNCTION, "weight": 2}]}}),
    "disagreement of one": ("disagreement", {"ppo": {"prompts": DATA, "disagreement": 1}}),
    "samples for no units": ("unit_samples", {"ppo": {"prompts": DATA, "unit_samples": 64}}),
    "pattern that is none": ("pattern", {"ppo": {"prompts": DATA, "rewards": [{"kind": "format", "pattern": "("}]}}),
    "function that is none": (
        "names no function", {"ppo": {"prompts": DATA, "rewards": [{**FUNCTION, "function": "f"}]}}
    ),
    "control in language": ("ppolite control", {"env": "CartPole-v1"}),
    "unknown section": ("did you mean `reward`", {"reward_model": {}}),
    "unknown key": ("did you mean `ppo.steps`", {"ppo": {"prompts": DATA, "step": 3}}),
    "missing key": ("path", {"ppo": {"prompts": {}}}),
    "key of a neighbour": ("unknown key `sft.rollouts`", {"sft": {"data": DATA, "rollouts": 3}}),
}  # fmt: skip

HTTP = {"kind": "http", "url": "https://a.test/score"}
SECRETS: dict[str, dict[str, Any]] = {
    "model with a login": {"model": "https://me:s3cret-s3cret@a.test/model"},
    "model with a token": {"model": "hf_s3crets3crets3crets3cret"},
    "token as a seed": {"seed": "hf_s3crets3crets3crets3cret"},
    "token in a path": {"sft": {"data": {"path": "hub:sk-S3crets3crets3crets3cret"}}},
    "token as a column": {"sft": {"data": {**DATA, "columns": {"prompt": "ghp_s3crets3crets3crets3cret"}}}},
    "token in a pattern": {
        "ppo": {"prompts": DATA, "rewards": [{"kind": "format", "pattern": "AKIAS3CRETS3CRETS3CR"}]}
    },
    "key in an address": {"ppo": {"prompts": DATA, "rewards": [{**HTTP, "url": "https://a.test/?api_key=s3cret"}]}},
    "login in an address": {"ppo": {"prompts": DATA, "rewards": [{**HTTP, "url": "https://me:s3cret@a.test/"}]}},
    "token in the place of its name": {"ppo": {"prompts": DATA, "rewards": [{**HTTP, "token_env": "s3cret"}]}},
    "token under a key of its own": {"ppo": {"prompts": DATA, "rewards": [{**HTTP, "token": "s3cret"}]}},
    "token on an open line": {
        "ppo": {"prompts": DATA, "rewards": [{**HTTP, "url": "http://a.test/", "token_env": "T"}]}
    },
}  # fmt: skip

CONTROL_TEXTS: dict[str, tuple[str, str]] = {
    "language in control": ("ppolite run", "ppo: {prompts: {path: x}}\n"),
    "no env": ("`env` is missing", "seed: 1\n"),
    "env is a number": ("env", "env: 3\n"),
    "unknown key": ("did you mean `gamma`", "env: X-v0\ngama: 1\n"),
    "algorithms is a list": ("algorithms", "env: X-v0\nalgorithms: [a2c]\n"),
    "algorithms is text": ("algorithms", "env: X-v0\nalgorithms: a2c\n"),
    "an algorithm's keys are a number": ("algorithms.ppo-clip", "env: X-v0\nalgorithms: {ppo-clip: 3}\n"),
    "unknown algorithm": ("did you mean", "env: X-v0\nalgorithm: ppo\n"),
    "algorithm is a list": ("unknown algorithm", "env: X-v0\nalgorithm: [a2c]\n"),
    "algorithm is a mapping": ("unknown algorithm", "env: X-v0\nalgorithm: {a: b}\n"),
    "unknown among algorithms": ("did you mean a2c", "env: X-v0\nalgorithms: {a2: {}}\n"),
    "clip of another": ("clip", "env: X-v0\nalgorithm: a2c\nclip: 0.1\n"),
    "clip taken away": ("clip", "env: X-v0\nclip: null\n"),
    "schedule of another": ("clip_schedule", "env: X-v0\nalgorithm: a2c\nclip_schedule: linear\n"),
    "weights of another": ("max_weight", "env: X-v0\nmax_weight: 3\n"),
    "target from nothing": ("beta", "env: X-v0\nalgorithm: ppo-kl\nbeta: 0\n"),
    "A2C twice over": ("a2c", "env: X-v0\nalgorithm: a2c\nepochs: 2\n"),
    "layers of nothing": ("net.hidden", "env: X-v0\nnet: {hidden: [64, 0]}\n"),
    "layers of less": ("net.hidden", "env: X-v0\nnet: {hidden: [-3]}\n"),
    "layers of text": ("net.hidden", "env: X-v0\nnet: {hidden: wide}\n"),
    "more minibatches than steps": ("minibatches", "env: X-v0\nrollout: 1\nenvs: {count: 1}\n"),
    "negative seed": ("seed", "env: X-v0\nseed: -1\n"),
    "endless film": ("gif_seconds", "env: X-v0\nevaluation: {gif_seconds: .inf}\n"),
    "a deviation beyond numbers": ("net.log_std", "env: X-v0\nnet: {log_std: 1.0e+9}\n"),
    "secret option": ("api_key", "env: X-v0\nenvs: {options: {api_key: s3cret}}\n"),
    "secret value": ("envs.options.x", "env: X-v0\nenvs: {options: {x: hf_s3crets3crets3crets3cret}}\n"),
    "options are a list": ("envs.options", "env: X-v0\nenvs: {options: [1]}\n"),
    "section is a number": ("optim", "env: X-v0\noptim: 3\n"),
}  # fmt: skip


def control_values() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for key, annotation in leaves(Control):
        if key not in ("envs.options", "env", "algorithm"):
            for name, value in _wrong(annotation):
                yield key, name, put({"env": "X-v0"}, key, value)


SETS: dict[str, str] = {
    "no value": "ppo.steps",
    "no key": "=3",
    "nothing": "",
    "empty part": "ppo..steps=3",
    "dot alone": ".=3",
    "dot at the end": "ppo.=3",
    "below a value": "model.x=3",
    "below a number": "seed.x.y=3",
    "into a list": "ppo.rewards.0.weight=3",
    "unclosed": "ppo.steps=[1",
    "tag": "ppo.steps=!!python/object/apply:os.system [id]",
    "alias": "ppo.steps=*a",
    "alias in itself": "ppo.steps=&a [*a]",
    "brackets": f"ppo.steps={'[' * 300}",
    "NUL escaped": 'model="\\0"',
    "surrogate of a foreign byte": "model=\udcff",
    "escape sequence": "model=\x1b[31m",
    "two documents": "ppo.steps=1\n---\n2",
    "key twice": "train={kind: lora, kind: full}",
    "number key": "train={1: 2}",
    "unknown": "ppo.stepz=3",
    "unknown section": "pppo.steps=3",
    "not a number": "ppo.steps=many",
    "no whole number": "ppo.steps=2.5",
    "below the least": "ppo.steps=0",
    "NaN": "ppo.kl.beta=.nan",
    "infinity": "ppo.max_kl=.inf",
    "yes": "ppo.steps=yes",
    "a list for a section": "ppo.kl=[1]",
    "5000 digits": f"seed={'1' * 5000}",
    "spaces": "ppo.steps = 3",
    "equals twice": "ppo.steps==3",
    "secret": "model=hf_s3crets3crets3crets3cret",
    "wide key": f"{'x' * 5000}=1",
    "deep key": f"{'.'.join('x' * 3000)}=1",
}  # fmt: skip


def text_of(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree)
