"""Every setting of every reward source does something: each is changed, and what it should change is looked at.

The keys come from the pydantic models, so a new kind or setting without a case here fails.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.rollout.sources.kit import classifier, said
from tests.rollout.sources.server import GOOD, Server, serving
from tests.world import World

from ppolite.config import SOURCES, parse_recipe
from ppolite.stages.ppo import PPO
from ppolite.stages.scoring import open_scorer
from ppolite.types import UserError

Changes = dict[str, Any]
TEXTS = ["good film", "the plot was so very dull and the end was silly", "superb", "bad cast"]


@dataclass
class Outcome:
    scores: list[float] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    error: str = ""
    said: str = ""
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0


Sees = Callable[[Outcome, Outcome], bool]


def differs(a: Outcome, b: Outcome) -> bool:
    return len(a.scores) == len(b.scores) == len(TEXTS) and a.scores != b.scores


def renamed(a: Outcome, b: Outcome) -> bool:
    return b.titles[0] == "mine" != a.titles[0] and a.scores == b.scores


def refused(text: str) -> Sees:
    return lambda a, b: not a.error and text in b.error


def accepted(text: str) -> Sees:
    return lambda a, b: text in a.error and not b.error


@dataclass
class Case:
    """The source, with `value` at the key in the second run; `beside` are other sources of both."""

    value: Any
    sees: Sees = differs
    given: Changes = field(default_factory=dict)
    beside: tuple[Changes, ...] = ()
    script: tuple[Any, ...] = (GOOD,)
    """What the server does in each run."""


OTHER = {"kind": "function", "function": "PLACE/rewards.py:words", "name": "other"}
BASE: dict[str, Changes] = {
    "model": {},
    "function": {"function": "PLACE/rewards.py:letters"},
    "http": {"url": "SERVER", "timeout": 5.0, "deadline": 5.0},
    "classifier": {"model": "PLACE/one", "dtype": "float32", "shift": 0.0, "scale": 1.0},
    "length": {"max": 4},
    "format": {"pattern": "good"},
}
SHARED = {
    "name": Case("mine", renamed),
    "weight": Case(3.0, beside=(OTHER,)),
    "shift": Case(0.5),
    "scale": Case(3.0),
}
ERROR = (500, b"", {})
CASES: dict[str, Case] = {
    **{
        f"{kind}.{key}": case
        for kind, source in SOURCES.items()
        for key, case in SHARED.items()
        if key in source.model_fields
    },
    "function.function": Case("PLACE/rewards.py:words"),
    "function.timeout": Case(0.05, refused("no answer within"), {"function": "PLACE/rewards.py:slow"}),
    "http.url": Case(
        "SERVER/other", lambda a, b: (a.asked[0][0], b.asked[0][0]) == ("/score", "/score/other")
    ),
    "http.token_env": Case(
        "A_TOKEN",
        lambda a, b: "Authorization" not in a.asked[0][1] and b.asked[0][1]["Authorization"] == "Bearer abc",
    ),
    "http.columns": Case(
        ["level"], lambda a, b: "level" not in a.asked[0][2] and b.asked[0][2]["level"] == [3] * 4
    ),
    "http.batch_size": Case(3, lambda a, b: (len(a.asked), len(b.asked)) == (1, 2) and a.scores == b.scores),
    "http.timeout": Case(
        0.2, lambda a, b: (len(a.asked), len(b.asked)) == (1, 2), script=(lambda h, body: _late(h), GOOD)
    ),
    "http.deadline": Case(
        0.2, refused("within its deadline of 0.2 s"), {"timeout": 0.2}, script=(ERROR, GOOD)
    ),
    "classifier.model": Case("PLACE/two"),
    "classifier.label": Case("good", given={"model": "PLACE/three", "label": "bad"}),
    "classifier.reads": Case("response"),
    "classifier.max_tokens": Case(8, lambda a, b: differs(a, b) and "of which it takes 8" in b.said),
    "classifier.dtype": Case(
        "bfloat16", lambda a, b: differs(a, b) and b.scores == pytest.approx(a.scores, abs=0.1)
    ),
    "classifier.trust_remote_code": Case(True, accepted("trust_remote_code"), {"model": "PLACE/foreign"}),
    "length.min": Case(4),
    "length.max": Case(1),
    "format.pattern": Case("bad"),
}


def _late(handler: Any) -> None:
    time.sleep(0.6)
    Server.do(Server.__new__(Server), handler, {"scores": [1.0] * 4}, {})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "rewards.py").write_text(
        "import time\n"
        "def letters(responses): return [len(r) for r in responses]\n"
        "def words(responses): return [len(r.split()) for r in responses]\n"
        "def slow(responses):\n    time.sleep(0.4)\n    return letters(responses)\n"
    )
    wide = {"num_labels": 1, "initializer_range": 0.5}
    classifier(folder / "one", **wide)
    classifier(folder / "two", seed=1, **wide)
    classifier(
        folder / "three", id2label={0: "bad", 1: "good", 2: "fair"}, label2id={"bad": 0, "good": 1, "fair": 2}
    )
    foreign = classifier(folder / "foreign", **wide)
    config = json.loads((foreign / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "mine.MineConfig",
        "AutoModelForSequenceClassification": "mine.MineModel",
    }
    (foreign / "config.json").write_text(json.dumps(config | {"model_type": "mine_own"}))
    (foreign / "mine.py").write_text(
        "from transformers import AutoModel, LlamaConfig, LlamaForSequenceClassification, LlamaModel\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine_own'\n"
        "class MineModel(LlamaForSequenceClassification):\n    config_class = MineConfig\n"
        "class MineBase(LlamaModel):\n    config_class = MineConfig\n"
        "AutoModel.register(MineConfig, MineBase)\n"
    )
    return folder


@pytest.fixture(scope="module")
def opened(world: World, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> PPO:
    """A run with a reward model; sources are opened on its roles."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("sft", "reward"):
        (folder / name).symlink_to(finished_run / name)
    return PPO(world.recipe(), folder)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("A_TOKEN", "abc")
    with serving() as made:
        yield made


@pytest.fixture
def outcome(world: World, opened: PPO, place: Path, server: Server) -> Callable[..., Outcome]:
    def of(rewards: list[Changes], script: tuple[Any, ...] = (GOOD,), **more: Any) -> Outcome:
        text = json.dumps(rewards).replace("PLACE", str(place)).replace("SERVER", server.url)
        seen, lines, started = Outcome(), list[str](), time.monotonic()
        server.script, server.asked = list(script), seen.asked
        listener = logging.Handler()
        listener.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        log = logging.getLogger("ppolite")
        log.addHandler(listener)
        rollouts = [said(text, level=3) for text in TEXTS]
        for rollout, text_of in zip(rollouts, TEXTS, strict=True):
            rollout.response_ids = opened.opened.tokenizer.encode(text_of, add_special_tokens=False)
            rollout.prompt_ids = [5, 6]
        norm = opened.roles.norm
        try:
            recipe = parse_recipe(world.tree(ppo__rewards=json.loads(text), **more))
            assert recipe.ppo is not None
            seen.titles = [source.title for source in recipe.ppo.rewards]
            prompts = [*opened.rounds.prompts(64), *(r.prompt for r in rollouts)]
            scorer = open_scorer(recipe, opened.run_dir, opened.opened, opened.roles, prompts)
            seen.scores = list(scorer.score(rollouts))
        except UserError as error:
            seen.error = str(error)
        finally:
            opened.roles.norm, opened.roles.last = norm, None
            log.removeHandler(listener)
        seen.said, seen.seconds = "\n".join(lines), time.monotonic() - started
        return seen

    return of


def test_all_settings_have_a_case() -> None:
    keys = {
        f"{kind}.{key}" for kind, source in SOURCES.items() for key in source.model_fields if key != "kind"
    }
    assert keys == set(CASES)
    assert set(SOURCES) == set(BASE)


@pytest.mark.parametrize("key", sorted(CASES))
def test_setting_does_something(key: str, outcome: Callable[..., Outcome]) -> None:
    kind, name = key.split(".")
    case = CASES[key]
    base: Changes = {"kind": kind, **BASE[kind], **case.given}
    beside = list(case.beside)
    a, b = (outcome([source, *beside], case.script) for source in (base, {**base, name: case.value}))
    assert case.sees(a, b), f"{a} → {b}"


def test_an_empty_shift_or_scale_is_measured(outcome: Callable[..., Outcome], opened: PPO) -> None:
    base = {"kind": "function", "function": "PLACE/rewards.py:letters"}
    for changes in ({"shift": None}, {"scale": None}):
        assert differs(outcome([base]), outcome([{**base, **changes}]))
        assert (opened.run_dir / "reward_units.json").exists()


def test_settings_of_all_sources_together(outcome: Callable[..., Outcome]) -> None:
    two = [{"kind": "function", "function": "PLACE/rewards.py:letters"}, OTHER]
    assert all(
        y < x for x, y in zip(outcome(two).scores, outcome(two, ppo__disagreement=1.0).scores, strict=True)
    )
    one = [{**two[0], "shift": None, "scale": None}]
    assert differs(outcome(one, ppo__unit_samples=8), outcome(one, ppo__unit_samples=64))
