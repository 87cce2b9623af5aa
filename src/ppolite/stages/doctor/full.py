"""A recipe or a run, examined before it costs hours: `ppolite doctor RECIPE|RUN`.

    place     rights, the judge's package
    data      every section's rows and columns; prompts that leak from training into the tests
    model     RUN/sft, or the recipe's model before SFT: weights, dropout, tokens, template, split
    stages    each is opened as training would open it, and examined as before its first step (`quick.py`)
    reward    RUN/reward asked again about held-out rows of people's
    ppo       a larger round, all of whose updates are made at a learning rate of 0
    sources   each entry of `ppo.rewards` is opened and asked about that round
    disk      room for all that is still to be written, and the memory that `ppolite plan` counts

What needs a part that is not there is skipped. Nothing is written, and no number of a later run depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ppolite import config as recipes
from ppolite.config import HttpSource, Judge, ModelSource, Recipe
from ppolite.data.chat import encode_prompt
from ppolite.rollout.score import TrunkScorer
from ppolite.rollout.sources.combine import values_of
from ppolite.rollout.sources.foreign import columns_of
from ppolite.stages.doctor import chat, model, place, probe, quick, reward, rows
from ppolite.stages.doctor.finding import Finding, graded, skipped, worst
from ppolite.stages.doctor.place import Need, told
from ppolite.stages.doctor.rows import Source
from ppolite.stages.opening import Opened, after_sft, open_model
from ppolite.stages.plan import plan
from ppolite.stages.ppo import PPO
from ppolite.stages.reward import RewardModel
from ppolite.stages.run import is_finished
from ppolite.stages.scoring import open_source
from ppolite.stages.sft import SFT
from ppolite.types import Rollout, UserError

ROWS, TOKENS = 32, 128
"""Of the round that is played."""
PROBED = 256
"""Tokens of a prompt on which split and whole are compared."""
HELD = 128
"""Held-out rows about which a finished reward model is asked."""

Looked = tuple[list[Finding], Need | None]


def examine(
    recipe: Recipe, run_dir: Path, count: int = ROWS, say: Callable[[str], None] = lambda _: None
) -> list[Finding]:
    """All findings, of each name the worst; `count` answers are in the round that is played.

    `say` is told what is looked at next.
    """
    say("data")
    sources, found = rows.read(recipe)
    found = [place.rights(run_dir), place.judge(recipe), *found]
    found += rows.examine(sources) if sources else []
    say("model")
    found += of_model(recipe, run_dir, sources)
    stages: dict[str, Callable[[Recipe, Path], Looked]] = {
        "sft": _sft,
        "reward": _reward,
        "ppo": partial(_ppo, count=count),
    }
    broken = [f.name for f in found if f.verdict == "fail" and f.name.startswith(("model/", "chat/tokens"))]
    needs: list[Need] = []
    for stage, look in stages.items():
        if not any(source.section == stage for source in sources):
            continue
        if broken:
            found.append(skipped(f"{stage}/opens", f"see {broken[0]}"))
            continue
        say(stage)
        looked, need = look(recipe, run_dir)
        found += looked
        if need and not is_finished(run_dir, stage):
            needs.append(need)
    if needs:
        found += [place.disk(run_dir, recipe.checkpoint, needs), _memory(recipe)]
    return worst(found)


def _memory(recipe: Recipe) -> Finding:
    """Room for all that `ppolite plan` counts. Only a warning, since the token budget can give way."""
    try:
        made = plan(recipe)
    except UserError as error:  # data that another check complains about
        return skipped("place/plan", str(error))
    change = f"; --set {made.changes[0][0]} takes {told(made.changes[0][1])}" if made.changes else ""
    return graded(
        "place/plan",
        f"{told(made.largest.peak)} planned for {made.largest.name}, {told(made.has)} on {made.where}",
        f"see `ppolite plan`{change}",
        warn=not made.fits,
    )


def of_model(recipe: Recipe, run_dir: Path, sources: list[Source]) -> list[Finding]:
    """The model that the next stage starts from."""
    try:
        opened = open_model(recipe, after_sft(recipe, run_dir))
    except UserError as error:
        return [Finding("model/opens", "fail", recipe.model, str(error))]
    found = [
        Finding("model/opens", "ok", f"{opened.source}, {str(opened.dtype)[6:]} on {opened.device}"),
        model.weights({"model": opened.model}),
        model.dropout({"model": opened.model}),
    ]
    if not sources:
        return found
    try:
        return found + _of_texts(recipe, opened, sources)
    except UserError as error:  # what the template does not take
        return [*found, Finding("chat/template", "fail", "it refuses a conversation of the data", str(error))]


def _of_texts(recipe: Recipe, opened: Opened, sources: list[Source]) -> list[Finding]:
    """What the model and its tokenizer make of the data."""
    pairs = rows.pairs_of(sources, 8)
    found = chat.examine(opened, pairs) if pairs else chat.asking(opened, sources[0].train[0])
    if recipe.ppo is not None and (ppo := [s for s in sources if s.section == "ppo"]):
        found.append(rows.room(ppo[0], opened, recipe.ppo.max_new_tokens))
    ids = [encode_prompt(opened.tokenizer, prompt) for prompt in rows.prompts_of(sources[-1], 4)]
    return [*found, model.open_split(recipe, opened, [row[:PROBED] for row in ids])]


def _sft(recipe: Recipe, run_dir: Path) -> Looked:
    try:
        trainer = SFT(recipe, run_dir)
    except UserError as error:
        return [Finding("sft/opens", "fail", "cannot begin", str(error))], None
    updates = Finding("sft/opens", "ok", f"{len(trainer.train):,} rows, {trainer.learner.total:,} updates")
    return [updates, *quick.of_fit("sft", trainer)], quick.need_of_fit(trainer)


def _reward(recipe: Recipe, run_dir: Path) -> Looked:
    try:
        trainer = RewardModel(recipe, run_dir)
    except UserError as error:
        return [Finding("reward/opens", "fail", "cannot begin", str(error))], None
    updates = Finding("reward/opens", "ok", f"{len(trainer.train):,} rows, {trainer.learner.total:,} updates")
    found, need = [updates, *quick.of_fit("reward", trainer)], quick.need_of_fit(trainer)
    folder = run_dir / "reward"
    if not folder.exists():
        return [*found, skipped("reward model/agreement", "there is no reward model yet")], need
    try:
        trainer.take(folder)
    except UserError as error:
        return [*found, Finding("reward model/agreement", "fail", f"{folder}", str(error))], need
    return [*found, *agreement(trainer, folder, recipe.ppo)], need


def agreement(trainer: RewardModel, folder: Path, config: recipes.PPO | None) -> list[Finding]:
    """What the reward model that the trainer took says of held-out rows, beside what people said."""
    report = folder / "agreement.json"
    promised = json.loads(report.read_text(encoding="utf-8"))["pair_accuracy"] if report.exists() else None
    near = 0.05 if len(trainer.held) <= HELD else 0.15  # of a part of the rows it is another figure
    trainer.held = trainer.held[:HELD]
    scores = [score for row in trainer.predict(trainer.held) for score in row]
    tokens = [len(response) for row in trainer.held for _, response in row.encoded]
    given = [row.target for row in trainer.held] if trainer.config.kind == "scores" else []
    found = [reward.spread(scores)]
    if found[0].verdict == "fail":
        return found
    right, floor = trainer.agreement()["pair_accuracy"], config.least_accuracy if config else 0.0
    return [
        *found,
        reward.length(scores, tokens, given),
        graded(
            "reward model/agreement",
            f"right on {right:.1%} of the pairs of {len(trainer.held)} held-out rows"
            + ("" if promised is None else f"; agreement.json says {promised:.1%} of all"),
            "its weights are not those that were measured, or it has learned too little: train it anew",
            fail=right < floor - near or (promised is not None and right < promised - near),
        ),
    ]


class _Silent:
    """In the place of scorers that are asked apart."""

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [0.0] * len(rollouts)


def _ppo(recipe: Recipe, run_dir: Path, *, count: int) -> Looked:
    assert recipe.ppo is not None
    still = {
        "rewards": (),
        "disagreement": 0.0,
        "epochs": 1,
        "optim": recipe.ppo.optim.model_copy(update={"lr": 0.0}),
        "critic": recipe.ppo.critic.model_copy(update={"lr": 0.0}),
    }
    own = recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update=still)})
    try:
        trainer = PPO(own, run_dir, scorer=None if recipe.ppo.asks_model else _Silent())
    except UserError as error:
        return [Finding("ppo/opens", "fail", "cannot begin", str(error))], None
    played = probe.play(trainer, count, TOKENS)
    start = recipe.ppo.start or trainer.opened.source
    tests = len(trainer.held) - recipe.ppo.eval_prompts
    found = [
        Finding("ppo/opens", "ok", f"starts from {start}; {len(trainer.rounds.given):,} prompts"),
        *quick.of_ppo(trainer, played),
        tests_left(recipe, tests),
        *ask(recipe.ppo, trainer, played.rollouts),
        probe.repeat_gradient(trainer, played),
        probe.standstill(trainer, played),
    ]
    return found, quick.need_of_ppo(trainer)


def tests_left(recipe: Recipe, count: int) -> Finding:
    """Held-out prompts behind those that choose the best policy."""
    asked = recipe.evaluation.prompts
    return graded(
        "ppo/tests",
        f"{max(count, 0):,} held-out prompts to judge the result by, {asked:,} asked for",
        "raise ppo.prompts.held_out, or lower ppo.eval_prompts or evaluation.prompts",
        warn=count < asked,
        fail=count < 2,
    )


def ask(config: recipes.PPO, trainer: PPO, rollouts: list[Rollout]) -> list[Finding]:
    """Every source of `ppo.rewards` but the run's reward model: it opens, answers in time, and tells answers apart."""
    found: list[Finding] = []
    budget, columns = config.optim.micro_batch_tokens, columns_of(trainer.rounds.given)
    for source in config.rewards:
        if isinstance(source, ModelSource):
            continue
        name = f"source/{source.title}"
        if isinstance(source, HttpSource):
            source = source.model_copy(update={"deadline": source.timeout})  # no retries for minutes
        try:
            scorer = open_source(source, TrunkScorer(trainer.roles, budget), trainer.opened, budget, columns)
            values = values_of(source.title, scorer, rollouts)
        except UserError as error:
            found.append(Finding(name, "fail", "gives no scores", str(error)))
            continue
        low, high = min(values), max(values)
        found.append(
            graded(
                name,
                f"{low:.3g} … {high:.3g} for {len(values)} answers",
                "it tells none of these answers apart, so there is nothing to learn from it yet",
                warn=isinstance(source, Judge) and low == high,
            )
        )
    return found
