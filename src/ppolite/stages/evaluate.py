"""Before against after, on held-out prompts that neither training nor the choice of the best policy has seen.

Reads a finished run: `RUN/sft` (or the recipe's model), `RUN/policy`, `RUN/reward`. The score is the reward
model's, which PPO trained against; the judge is independent of it.

    ppolite eval runs/film --json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ppolite.config import PPO, Recipe
from ppolite.data.film import judge_text
from ppolite.data.judge import vader_judge
from ppolite.models.load import load_causal, load_reward
from ppolite.models.roles import Norm, Roles, check_vocabulary, same_bottom
from ppolite.models.trunk import Body, Trunk
from ppolite.rollout.evaluate import Judge, before_and_after, distance, mean
from ppolite.rollout.local import LocalGenerator
from ppolite.rollout.score import TrunkScorer
from ppolite.stages.loop import Opened, derive_seed, load_prompts, log, open_model, tests_of, write_json
from ppolite.types import Prompt, Rollout, UserError


def finished(recipe: Recipe, run_dir: Path) -> tuple[Opened, Roles]:
    """The run's SFT model as trunk and reference, its policy and reward model on top."""
    if not (run_dir / "policy").exists():
        raise UserError(f"{run_dir}: no trained policy in it; run `ppolite run` with this folder first")
    sft = run_dir / "sft"
    opened = open_model(recipe, str(sft) if sft.exists() else None)
    policy = load_causal(str(run_dir / "policy"), opened.device)
    reward, score, norm = None, None, Norm()
    if (run_dir / "reward").exists():
        reward, score, norm = load_reward(str(run_dir / "reward"), opened.device)
        check_vocabulary(opened.model, reward)
    tops: list[PreTrainedModel] = [m for m in (policy, reward) if m is not None]
    shared = all(same_bottom(opened.model, m, recipe.trunk.split, opened.dtype) for m in tops)
    split = recipe.trunk.split if shared else 0
    trunk = Trunk(opened.model, split, opened.dtype)
    reward_top = Body.of(reward, split, score=score, dtype=opened.dtype) if reward is not None else None
    body = Body.of(policy, split, dtype=opened.dtype)
    return opened, Roles(trunk, body, trunk.top, body, reward_top, norm, None).hold()


def prompts_for_eval(config: PPO, opened: Opened, recipe: Recipe) -> list[Prompt]:
    """Held-out prompts after those on which PPO chose its best policy."""
    _, held = load_prompts(config.prompts, opened, config.max_new_tokens, recipe.seed)
    prompts = tests_of(held, config)[: recipe.evaluation.prompts]
    if len(prompts) < recipe.evaluation.prompts:
        log.warning("evaluation.prompts: %d asked for, %d held out", recipe.evaluation.prompts, len(prompts))
    return prompts


def judge_rollouts(rollouts: Sequence[Rollout]) -> list[float]:
    """VADER's compound score, −1..1, of each whole text."""
    return vader_judge([judge_text(r.prompt, r.text) for r in rollouts])


def judge_of(recipe: Recipe) -> Judge | None:
    """The independent judge that the recipe names, if it names one."""
    return judge_rollouts if recipe.evaluation.judge == "vader" else None


def evaluate_run(recipe: Recipe, run_dir: str | Path) -> dict[str, Any]:
    """Sample both models on the same prompts, score, judge; write `RUN/eval.json` and return its content."""
    run_dir = Path(run_dir)
    if recipe.ppo is None:
        raise UserError(f"{run_dir}: its recipe has no `ppo` section, so there is nothing to compare")
    opened, roles = finished(recipe, run_dir)
    prompts = prompts_for_eval(recipe.ppo, opened, recipe)
    seed = derive_seed(recipe.seed, "eval")
    sampling = recipe.ppo.sampling
    before, after = (
        LocalGenerator(body, opened.tokenizer, opened.stop_ids).generate(prompts, sampling, seed=seed)
        for body in (roles.reference, roles.policy)
    )
    scorer = TrunkScorer(roles, recipe.ppo.optim.micro_batch_tokens)
    result = before_and_after(
        before,
        after,
        scorer.score if roles.reward else None,
        judge_of(recipe),
        seed=seed,
        samples=recipe.evaluation.samples,
    )
    result["kl_ref_seq"] = mean(distance(roles, after, recipe.ppo))
    agreement = run_dir / "reward" / "agreement.json"
    report = json.loads(agreement.read_text(encoding="utf-8")) if agreement.exists() else {}
    result["rm_spearman"] = report.get("spearman")
    result["rm_pearson"] = report.get("pearson")
    result["rm_pair_accuracy"] = report.get("pair_accuracy")
    result["rm_calibration"] = report.get("calibration")
    result["rm_held_out"] = report.get("held_out")
    result["evaluation"] = recipe.evaluation.model_dump()
    write_json(run_dir / "eval.json", result)
    return result
