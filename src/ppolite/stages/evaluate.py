"""Before against after, on held-out prompts that neither training nor the choice of the best policy has seen.

Reads a finished run: `RUN/sft` (or the recipe's model), `RUN/policy`, `RUN/reward`. The score is that of the sources
which PPO trained against, the reward model where `ppo.rewards` names no others (`scored_by` says which); the judge is
independent of them.

    ppolite eval runs/film --json
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ppolite.config import Recipe
from ppolite.data.chat import encode_prompt
from ppolite.data.film import judge_text
from ppolite.data.judge import vader_judge
from ppolite.models.load import load_causal, load_reward
from ppolite.models.roles import Norm, Roles, check_vocabulary, same_bottom
from ppolite.models.trunk import Body, checked_trunk
from ppolite.obs.metrics import bootstrap_mean_ci, distinct_n
from ppolite.obs.run_files import write_json
from ppolite.rollout.evaluate import Judge, before_and_after, distance, length, mean
from ppolite.rollout.experience import source_means
from ppolite.rollout.score import TrunkScorer
from ppolite.stages.checkpoint import stage_folder
from ppolite.stages.opening import Opened, open_model, read_agreement, round_folders, sft_folder
from ppolite.stages.rows import load_prompts, tests_of
from ppolite.stages.scoring import open_scorer, scored_by
from ppolite.stages.seeds import derive_seed
from ppolite.types import Prompt, Rollout, Scorer, UserError

log = logging.getLogger("ppolite")


@dataclass
class Finished:
    """A run that can be looked at: its SFT model as trunk and reference, its policy and reward model on top."""

    opened: Opened
    roles: Roles
    train: list[Prompt]
    held: list[Prompt]
    """Prompts that PPO has not learned from, those first on which it chose its best policy."""


def finished(recipe: Recipe, run_dir: Path) -> Finished:
    """Raises UserError where there is no policy, or the recipe has no `ppo`."""
    if recipe.ppo is None:
        raise UserError(f"{run_dir}: its recipe has no `ppo` section, so there is nothing to compare")
    if not (run_dir / "policy").exists():
        if made := [folder for folder in round_folders(run_dir) if (folder / "policy").exists()]:
            raise UserError(f"{run_dir}: its policies are in its rounds; name one, for instance {made[-1]}")
        raise UserError(f"{run_dir}: no trained policy in it; run `ppolite run` with this folder first")
    if stage_folder(run_dir, "ppo").exists():
        log.warning("%s: its PPO is not finished; looking at the policy that an earlier one left", run_dir)
    sft = sft_folder(run_dir)
    opened = open_model(recipe, str(sft) if sft.exists() else None)
    train, held = load_prompts(recipe.ppo.prompts, opened, recipe.ppo.max_new_tokens, recipe.seed)
    trust = recipe.trust_remote_code
    policy = load_causal(str(run_dir / "policy"), opened.device, trust_remote_code=trust)
    reward, score, norm = None, None, Norm()
    if (run_dir / "reward").exists():
        reward, score, norm = load_reward(str(run_dir / "reward"), opened.device, trust_remote_code=trust)
        check_vocabulary(opened.model, reward)
    tops: list[PreTrainedModel] = [m for m in (policy, reward) if m is not None]
    shared = all(same_bottom(opened.model, m, recipe.trunk.split, opened.dtype) for m in tops)
    probe = [encode_prompt(opened.tokenizer, prompt) for prompt in train[:4]]
    trunk = checked_trunk(opened.model, recipe.trunk.split if shared else 0, probe, log.warning, opened.dtype)
    trunk.keep = recipe.trunk.keep
    reward_top = Body.of(reward, trunk.split, score=score, dtype=opened.dtype) if reward is not None else None
    body = Body.of(policy, trunk.split, dtype=opened.dtype)
    roles = Roles(trunk, body, trunk.top, body, reward_top, norm, None).hold()
    return Finished(opened, roles, train, held)


def prompts_for_eval(recipe: Recipe, run: Finished) -> list[Prompt]:
    """Held-out prompts after those on which PPO chose its best policy."""
    assert recipe.ppo is not None
    prompts = tests_of(run.held, recipe.ppo)[: recipe.evaluation.prompts]
    if len(prompts) < recipe.evaluation.prompts:
        log.warning("evaluation.prompts: %d asked for, %d held out", recipe.evaluation.prompts, len(prompts))
    return prompts


def judge_rollouts(rollouts: Sequence[Rollout]) -> list[float]:
    """VADER's compound score, −1..1, of each whole text."""
    return judge_texts([(r.prompt, r.text) for r in rollouts])


def judge_texts(answers: Sequence[tuple[Prompt, str]]) -> list[float]:
    """The same of prompts and their answers."""
    return vader_judge([judge_text(prompt, text) for prompt, text in answers])


def judge_of(recipe: Recipe) -> Judge | None:
    """The independent judge that the recipe names, if it names one."""
    return judge_rollouts if recipe.evaluation.judge == "vader" else None


def scorer_of(recipe: Recipe, run_dir: Path, run: Finished) -> Scorer | None:
    """The sources that PPO climbed; None where the recipe names none and there is no reward model."""
    assert recipe.ppo is not None
    if not recipe.ppo.rewards and run.roles.reward is None:
        return None
    return open_scorer(recipe, run_dir, run.opened, run.roles, run.train)


def evaluate_run(recipe: Recipe, run_dir: str | Path) -> dict[str, Any]:
    """Sample both models on the same prompts, score, judge; write `RUN/eval.json` and return its content."""
    run_dir = Path(run_dir)
    run = finished(recipe, run_dir)
    assert recipe.ppo is not None
    prompts = prompts_for_eval(recipe, run)
    seed = derive_seed(recipe.seed, "eval")
    sampling = recipe.ppo.sampling
    before, after = (
        run.opened.generator(body).generate(prompts, sampling, seed=seed)
        for body in (run.roles.reference, run.roles.policy)
    )
    scorer = scorer_of(recipe, run_dir, run)
    result = before_and_after(
        before,
        after,
        scorer.score if scorer else None,
        judge_of(recipe),
        seed=seed,
        samples=recipe.evaluation.samples,
    )
    result["scored_by"] = scored_by(recipe) if scorer else None
    for when, rollouts in {"before": before, "after": after}.items():
        result |= {f"{key}_{when}": value for key, value in source_means(rollouts).items()}
    result["kl_ref_seq"] = mean(distance(run.roles, after, recipe.ppo))
    report = read_agreement(run_dir / "reward") or {}
    result["rm_spearman"] = report.get("spearman")
    result["rm_pearson"] = report.get("pearson")
    result["rm_pair_accuracy"] = report.get("pair_accuracy")
    result["rm_calibration"] = report.get("calibration")
    result["rm_held_out"] = report.get("held_out")
    result["taught_by"] = recipe.reward.taught_by if recipe.reward else None
    result["evaluation"] = recipe.evaluation.model_dump()
    write_json(run_dir / "eval.json", result)
    return result


def side_by_side(recipe: Recipe, rounds: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The SFT model and the policies of all rounds on the same prompts, scored by the last round's reward model.

    Returns figures of each, with the gain over the one before it, and a few answers. Prompts, sampling and thus
    answers are those of `evaluate_run`.
    """
    assert recipe.ppo is not None
    run = finished(recipe, rounds[-1])
    opened, roles = run.opened, run.roles
    prompts = prompts_for_eval(recipe, run)
    seed = derive_seed(recipe.seed, "eval")
    judges = {
        "score": TrunkScorer(roles, recipe.ppo.optim.micro_batch_tokens).score,
        "judge": judge_of(recipe),
    }
    made: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = [
        {"prompt": p.last, "answers": []} for p in prompts[: recipe.evaluation.samples]
    ]
    columns: dict[str, list[float]] = {}
    for name, folder in {"SFT": None, **{f"round {i}": folder for i, folder in enumerate(rounds, 1)}}.items():
        body = roles.reference if folder is None else _policy_of(recipe, folder, opened)
        rollouts = opened.generator(body).generate(prompts, recipe.ppo.sampling, seed=seed)
        row: dict[str, Any] = {"name": name}
        for key, judge in judges.items():
            values = judge(rollouts) if judge else []
            row[key] = mean(values) if values else None
            gain = [a - b for a, b in zip(values, columns.get(key, []), strict=False)]
            row[f"{key}_gain_ci95"] = list(bootstrap_mean_ci(gain, seed=seed)) if gain else None
            columns[key] = values
        row |= {"length": length(rollouts), "distinct2": distinct_n([r.text for r in rollouts], 2)}
        made.append(row)
        for sample, rollout in zip(samples, rollouts, strict=False):
            sample["answers"].append(rollout.text)
    return made, samples


def _policy_of(recipe: Recipe, folder: Path, opened: Opened) -> Body:
    model = load_causal(str(folder / "policy"), opened.device, trust_remote_code=recipe.trust_remote_code)
    body = Body.of(model, 0, dtype=opened.dtype)
    body.hold({})
    return body
