"""The embedded 135M model on the embedded film task, end to end, with little of everything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppolite.cli import main
from ppolite.config import load_recipe
from ppolite.models.sequences import Sequences
from ppolite.obs.sinks import read_metrics
from ppolite.stages.evaluate import finished

pytestmark = pytest.mark.real

SETS = [
    "device=cpu",
    "trunk.split=28",
    "sft.data.limit=48",
    "sft.batch_size=8",
    "sft.eval_examples=8",
    "reward.data.limit=64",
    "reward.eval_examples=40",
    "reward.norm_samples=8",
    "ppo.min_rm_accuracy=0",
    "ppo.steps=2",
    "ppo.rollouts=8",
    "ppo.max_new_tokens=12",
    "ppo.epochs=1",
    "ppo.eval_prompts=4",
    "ppo.max_kl=100",
    "evaluation.prompts=4",
    "evaluation.judge=none",
]


@pytest.fixture(scope="module")
def run(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "film"
    sets = [part for value in [f"model={real_model}", *SETS] for part in ("--set", value)]
    assert main(["run", "film", "--out", str(folder), *sets]) == 0
    return folder


def losses(run: Path, stage: str, key: str) -> Sequence[float]:
    return [row[key] for row in read_metrics(run) if row["stage"] == stage and key in row]


def test_three_stages_and_two_steps_of_ppo(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heldout = losses(run, "sft", "loss/heldout")
    assert heldout[-1] < heldout[0] - 0.05
    assert len(losses(run, "ppo", "policy/loss")) == 2
    assert losses(run, "ppo", "kl/ref_seq")[0] == pytest.approx(0, abs=1e-3)
    assert losses(run, "ppo", "kl/ref_seq")[1] != 0
    assert max(losses(run, "ppo", "sampler/gap_max")) < 1  # bfloat16, where the chip has it
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompts"] == 4
    assert -4 < result["score_before"] < 4
    assert result["rm_pair_accuracy"] > 0.5
    assert (run / "report.html").stat().st_size > 10_000


def test_exported_policy_is_the_same_in_plain_transformers(run: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml", ["dtype=float32"])
    assert recipe.ppo is not None
    roles = finished(recipe, run).roles
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    model = AutoModelForCausalLM.from_pretrained(run / "policy", dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Finish this review: The gorgeously elaborate"}],
        add_generation_prompt=True,
    )["input_ids"]
    answer = tokenizer.encode("continuation is a joy.", add_special_tokens=False)
    seqs = roles.trunk.bottom(Sequences.of([prompt], [answer], torch.device("cpu")))
    with torch.no_grad():
        ours = roles.policy.logprobs(seqs, 1.0)[0][0]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    plain = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert torch.allclose(ours, plain, atol=1e-3)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
