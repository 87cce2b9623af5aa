"""Rounds of feedback: the policy answers, somebody scores, the reward model and the policy learn, and again.

    sft once, then for each round:
        candidates   n answers to each of a round's prompts, by the last policy (at first the SFT model)
        scores       of whoever is asked: the file, a person at the terminal, or the judge as a stand-in
        comparisons  of the candidates of all rounds so far, and of `reward.data` where there is any
        reward       trained on all of them, from the SFT model
        ppo          from the last policy; the leash stays tied to the SFT model

A round's folder is a run like any other, with a recipe of its own: `ppolite eval`, `chat` and `report` take it.
What it has is kept: a run that was interrupted, or left to wait for scores, goes on with the first part that is
missing. Beside the rounds stand `rounds.json` and a report that has all policies scored by the last reward model,
for what two reward models say cannot be compared.

Left out: scores as numbers (`reward.kind` must be pairs; see `data/candidates.py`), and several raters of a file.

    ppolite iterate recipes/film_iterate.yaml
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppolite.config import Data, Recipe, save_recipe
from ppolite.data.candidates import STAND_IN, comparisons, lines, read_candidates
from ppolite.data.split import split_by_prompt
from ppolite.obs.rate import rate_file, replace_file
from ppolite.obs.report import AGAIN, write_report
from ppolite.obs.rounds import read_rounds, write_rounds_report
from ppolite.obs.run_files import Evaluation, read_json, write_json
from ppolite.rollout.evaluate import mean
from ppolite.stages.evaluate import evaluate_run, judge_texts, side_by_side
from ppolite.stages.opening import read_agreement, round_folders
from ppolite.stages.ppo import PPO
from ppolite.stages.reward import RewardModel
from ppolite.stages.rows import load_split, shuffled, tests_of
from ppolite.stages.run import check_unchanged, evaluated, is_finished, run_stage
from ppolite.stages.sample import sample
from ppolite.stages.seeds import derive_seed
from ppolite.types import Preference, Scored, UserError

log = logging.getLogger("ppolite")


class Iteration:
    """All rounds of a recipe: `Iteration(recipe, run_dir).run()`.

    Raises UserError at once for what would otherwise stop the run after people have scored candidates.
    """

    def __init__(self, recipe: Recipe, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        if recipe.reward is None or recipe.ppo is None or recipe.iterate is None:
            missing = [name for name in ("iterate", "reward", "ppo") if getattr(recipe, name) is None]
            raise UserError(f"the recipe has no section `{missing[0]}`; rounds need reward, ppo and iterate")
        self.recipe, self.config = recipe, recipe.iterate
        self.reward, self.ppo = recipe.reward, recipe.ppo
        if self.reward.kind != "pairs":
            raise UserError(
                f"reward.kind is {self.reward.kind}, but rounds learn from comparing the answers to a prompt, so "
                "that scales do not matter; set it to pairs, and leave out a reward.data without pairs"
            )
        if not self.ppo.asks_model:
            raise UserError(
                "ppo.rewards has no entry of kind model, so nobody would ask the reward model of a round; add one"
            )
        if self.ppo.start is not None:
            raise UserError(
                "ppo.start is for a run of its own; here each round starts from the last one, so remove it"
            )
        there = len(round_folders(self.run_dir))
        if there > self.config.rounds:
            raise UserError(
                f"{self.run_dir}: {there} rounds are there, more than iterate.rounds ({self.config.rounds}); raise it"
            )
        self.taught_by = "judge" if self.config.by == "judge" else self.reward.taught_by
        self.held_out = self._held_out()
        tests_of(load_split(self.ppo.prompts, "prompts", recipe.seed)[1], self.ppo)

    def _held_out(self) -> float:
        """Share of all prompts whose comparisons are held out.

        The other sources hold out the prompts with the smallest hashes (`data/split.py`). Candidates answer the
        rest, so `iterate.held_out` counts from there.
        """
        sources = {"ppo.prompts": self.ppo.prompts, "reward.data": self.reward.data}
        shares = {name: data.held_out for name, data in sources.items() if data is not None}
        for name, share in shares.items():
            if share >= 1:
                raise UserError(
                    f"{name}.held_out is {share:g}; rounds hold out the same prompts everywhere, so give a share "
                    "below 1"
                )
        base = max(shares.values())
        return base + (1 - base) * self.config.held_out

    def run(self, *, skip_unscored: bool = False, allow_changes: bool = False) -> dict[str, Any]:
        """All rounds, as far as there are scores. Returns what `rounds.json` says.

        `allow_changes`: go on with an interrupted stage although the recipe has changed. Raises UserError where
        candidates wait for their scores; the same call then goes on.
        """
        if skip_unscored and self.config.by == "judge":
            raise UserError("--skip-unscored: the judge scores every candidate; leave the option out")
        check_unchanged(self.recipe, self.run_dir)
        if self.recipe.sft is not None and not is_finished(self.run_dir, "sft"):
            run_stage("sft", self.recipe, self.run_dir, allow_changes=allow_changes)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_recipe(self.recipe, self.run_dir / "recipe.yaml")
        known = self.own_comparisons()
        for number in range(1, self.config.rounds + 1):
            self.draw(number)
            rows = self.scored(number, skip=skip_unscored)
            known = [*known, *comparisons(rows, f"round {number}")]
            self.learn(number, known, allow_changes=allow_changes)
            if not (self.folder(number + 1) / "eval.json").exists():
                self.compare(number)
        return dict(read_rounds(self.run_dir))

    def folder(self, number: int) -> Path:
        return self.run_dir / f"round-{number}"

    # ---- the parts of a round ----------------------------------------------------------------------------

    def draw(self, number: int) -> None:
        """`candidates.jsonl`, by the last policy."""
        target = self.folder(number) / "candidates.jsonl"
        if target.exists():
            return
        last = self.folder(number - 1) / "policy" if number > 1 else self.run_dir / "sft"
        log.info("round %d of %d: candidates into %s", number, self.config.rounds, target)
        sample(
            self.recipe,
            self.ppo.prompts,
            self.ppo.sampling,
            model=str(last) if last.exists() else None,
            count=self.config.prompts,
            n=self.config.candidates,
            target=target,
            round=number,
        )

    def scored(self, number: int, *, skip: bool) -> list[Scored]:
        """The candidates with their scores, asked for where no reward model has learned from them yet.

        `skip` leaves out those without; a round of which nobody has scored any waits all the same.
        """
        path = self.folder(number) / "candidates.jsonl"
        rows = self.candidates(number)
        if (self.folder(number) / "reward").exists() or not _missing(rows):
            return rows
        if self.config.by == "judge":
            log.info("%s: scored by %s", path, STAND_IN)
            _judge(path, rows)
        elif self.config.by == "person" and not (skip and _any_scored(rows)):
            rate_file(path)
        rows = self.candidates(number)
        if (missing := _missing(rows)) and not (skip and _any_scored(rows)):
            raise UserError(
                f"{path}: {missing} of {len(rows)} candidates wait for a score; give each a number there (`ppolite "
                "score` asks for them one by one) and repeat this command, with --skip-unscored to leave them out"
            )
        return rows

    def candidates(self, number: int) -> list[Scored]:
        return read_candidates(self.folder(number) / "candidates.jsonl", plain=self.ppo.prompts.plain)

    def own_comparisons(self) -> list[Preference]:
        """What the recipe brings along."""
        if self.reward.data is None:
            return []
        train, held = load_split(self.reward.data, "preferences", self.recipe.seed)
        train = shuffled(train, derive_seed(self.recipe.seed, "reward"))[: self.reward.data.limit]
        return [replace(row, origin="reward.data") for row in [*train, *held]]

    def learn(self, number: int, known: Sequence[Preference], *, allow_changes: bool) -> None:
        """Reward model and policy of a round, its evaluation and its report, as far as they are missing."""
        folder, recipe = self.folder(number), self.recipe_of(number, known)
        self.keep(folder, known)
        if not is_finished(folder, "reward"):
            RewardModel(recipe, folder).run(allow_changes=allow_changes)
        if not is_finished(folder, "ppo"):
            PPO(recipe, folder).run(allow_changes=allow_changes)
            gc.collect()  # its parts refer to each other, and the next round's would not fit beside them
        if evaluated(recipe, folder) is None:
            evaluate_run(recipe, folder)
            write_report(folder)

    def keep(self, folder: Path, known: Sequence[Preference]) -> None:
        """`comparisons.jsonl`. Raises UserError where the reward model has learned from others, or for too few."""
        path, text = folder / "comparisons.jsonl", lines(known)
        if (folder / "reward").exists():
            if not path.exists() or path.read_bytes() != text.encode():
                raise UserError(
                    f"{folder}: its reward model has learned from {path.name}, but the candidates' scores (or "
                    "reward.data) say something else now; put them back, or delete the rounds from this one on"
                )
            return
        held = split_by_prompt(known, self.held_out, self.recipe.seed)[1] if known else []
        if len(held) < 8:
            raise UserError(
                f"{folder / 'candidates.jsonl'}: the scores tell {len(known)} pairs of answers to one prompt apart; "
                f"{len(held)} of them are held out to measure the reward model, and 8 are needed; score more, or "
                "raise iterate.held_out"
            )
        path.write_text(text, encoding="utf-8")

    def recipe_of(self, number: int, known: Sequence[Preference]) -> Recipe:
        """The recipe of one round as an ordinary run: what its reward model reads, where its PPO starts."""
        folder = self.folder(number).resolve()
        plain = any(not row.prompt.messages for row in known)
        data = Data(path=str(folder / "comparisons.jsonl"), held_out=self.held_out, plain=plain)
        reward = self.reward.model_copy(update={"data": data, "taught_by": self.taught_by})
        ppo = self.ppo
        if number > 1:
            kind = "adapter" if self.recipe.train.kind == "lora" else "policy"
            start = folder.with_name(f"round-{number - 1}") / kind
            master = self.recipe.seed if ppo.seed is None else ppo.seed
            ppo = ppo.model_copy(update={"start": str(start), "seed": derive_seed(master, "round", number)})
        return self.recipe.model_copy(update={"sft": None, "iterate": None, "reward": reward, "ppo": ppo})

    # ---- the rounds side by side -------------------------------------------------------------------------

    def compare(self, rounds: int) -> None:
        """`rounds.json` and `report.html` of the rounds so far, unless they are there."""
        path, folders = self.run_dir / "rounds.json", [self.folder(n) for n in range(1, rounds + 1)]
        of = {"rounds": rounds, "evaluation": self.recipe.evaluation.model_dump()}
        if path.exists() and path.stat().st_mtime >= (folders[-1] / "eval.json").stat().st_mtime:
            old = read_rounds(self.run_dir)
            if all(old.get(key) == value for key, value in of.items()):
                return
        policies, samples = side_by_side(self.recipe, folders)
        for number, folder in enumerate(folders, 1):
            look = read_json(folder / "eval.json", Evaluation, AGAIN)
            agreement = read_agreement(folder / "reward")
            assert look is not None
            assert agreement is not None
            given = [row.score for row in self.candidates(number) if row.score is not None]
            policies[number - 1]["candidates_score"] = mean(given) if given else None
            policies[number] |= {
                "kl_ref_seq": look["kl_ref_seq"],
                "own_score": [look["score_before"], look["score_after"]],
                "rm_right": agreement.get("by_origin", {}).get(f"round {number}"),
            }
        by = STAND_IN if self.config.by == "judge" else "people"
        told = {"scored_by": by, "taught_by": self.taught_by, "policies": policies, "samples": samples}
        write_json(path, of | told)
        log.info("report: %s", write_rounds_report(self.run_dir))


def _missing(rows: Sequence[Scored]) -> int:
    """Candidates that could be compared, had they a score."""
    return sum(row.score is None and bool(row.response.strip()) for row in rows)


def _any_scored(rows: Sequence[Scored]) -> bool:
    return any(row.score is not None for row in rows)


def _judge(path: Path, rows: Sequence[Scored]) -> None:
    """Fill in the missing scores, and who gave them."""
    judged = judge_texts([(row.prompt, row.response) for row in rows])
    text = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    out: list[str] = []
    for line, row, score in zip(text, rows, judged, strict=True):
        given = {"score": score, "scored_by": STAND_IN} if row.score is None else {}
        out.append(json.dumps(json.loads(line) | given, ensure_ascii=False) + "\n")
    replace_file(path, "".join(out).encode("utf-8", "backslashreplace"))
