"""SFT against plain Hugging Face: the loss is on the answers' tokens, and batching changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.world import World
from transformers import AutoModelForCausalLM

from ppolite.stages.learner import Learner, step_together
from ppolite.stages.sft import SFT


def test_loss_is_plain_cross_entropy_on_answers(world: World, tmp_path: Path) -> None:
    sft = SFT(world.recipe(), tmp_path)
    rows = sft.train[:7]
    model = AutoModelForCausalLM.from_pretrained(world.recipe().model).double()
    total, tokens = 0.0, 0
    for prompt, answer in rows:
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            loss = model(
                torch.tensor([prompt + answer]), labels=labels
            ).loss  # a mean over the answer's tokens
        total, tokens = total + float(loss) * len(answer), tokens + len(answer)
    assert sft.loss(rows, backward=False) == pytest.approx(total / tokens, rel=1e-5)


def test_an_answer_ends_with_the_token_that_ends_a_turn(world: World, tmp_path: Path) -> None:
    sft = SFT(world.recipe(), tmp_path)
    assert all(answer[-1] in sft.opened.stop_ids and answer.count(answer[-1]) == 1 for _, answer in sft.train)


@pytest.mark.parametrize("changes", [{}, {"trunk__split": 0}, {"train__kind": "lora"}], ids=str)
def test_accumulation_equals_one_batch(changes: dict[str, object], world: World, tmp_path: Path) -> None:
    gradients, losses = [], []
    for budget in (4096, 30, 1):
        sft = SFT(world.recipe(sft__optim__micro_batch_tokens=budget, **changes), tmp_path)
        torch.manual_seed(0)
        for name, p in sft.body.named_parameters():
            if "lora_B" in name or "lora_A" in name:
                torch.nn.init.normal_(p, std=0.1)
        losses.append(sft.loss(sft.train[:9], backward=True))
        gradients.append(torch.cat([p.grad.flatten() for p in sft.body.trained() if p.grad is not None]))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    scale = gradients[0].abs().max()
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() < 1e-5 * scale


def test_training_lowers_the_loss_and_leaves_the_bottom(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(trunk__split=2, sft__epochs=3.0)
    result = SFT(recipe, tmp_path).run()
    assert result["loss_before"] is not None
    assert result["loss_after"] is not None
    assert result["loss_after"] < result["loss_before"] - 0.1
    before = AutoModelForCausalLM.from_pretrained(recipe.model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").state_dict()
    changed = {
        k.split(".")[2] if "layers" in k else k for k in before if not torch.equal(before[k], after[k])
    }
    assert changed == {"2", "model.norm.weight"}


def test_one_update_lowers_the_loss_of_its_batch(world: World, tmp_path: Path) -> None:
    sft = SFT(world.recipe(), tmp_path)
    learner = Learner(sft.body.trained(), sft.config.optim, 1)
    before = sft.loss(sft.train[:8], backward=True)
    assert step_together(learner) is not None
    assert sft.loss(sft.train[:8], backward=False) < before


def test_without_held_out_rows(world: World, tmp_path: Path) -> None:
    result = SFT(
        world.recipe(sft__data__held_out=0, sft__eval_every=None, sft__eval_examples=None), tmp_path
    ).run()
    assert result == {"loss_before": None, "loss_after": None}


def test_no_prompt_is_on_both_sides(world: World, tmp_path: Path) -> None:
    sft = SFT(world.recipe(sft__eval_examples=999, sft__data__limit=None), tmp_path)
    sides = [{tuple(p) for p, _ in rows} for rows in (sft.train, sft.held)]
    assert all(sides)
    assert not sides[0] & sides[1]
