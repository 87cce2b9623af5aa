"""The command line as a person uses it: a whole run on a tiny model, its stages, and bad input."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.world import World, taste, write_model, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppolite.cli import main
from ppolite.obs.sinks import read_metrics

EVAL_KEYS = {
    "score_before", "score_after", "judge_before", "judge_after", "judge_gain_ci95", "kl_ref_seq",
    "length_before", "length_after", "distinct2_before", "distinct2_after", "rm_spearman", "rm_pair_accuracy",
    "prompts",
}  # fmt: skip
STEP_KEYS = {
    "score/mean", "kl/ref_seq", "kl/old_token", "policy/clip_fraction", "policy/entropy", "policy/grad_norm",
    "policy/loss", "policy/ratio_max", "value/loss", "value/explained_variance", "length/mean",
    "length/cut_share", "leash/beta", "sampler/gap_max", "time/step_s", "time/generate_s", "lr/policy",
}  # fmt: skip

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ppolite(capsys: pytest.CaptureFixture[str]) -> Run:
    """`ppolite("run", recipe, …)` → exit code, stdout, stderr."""

    def call(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def rows_of(run: Path, stage: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row["stage"] == stage]


# ---- a whole run -----------------------------------------------------------------------------------------


def test_run_makes_everything(world: World, ppolite: Run, tmp_path: Path) -> None:
    recipe, out = world.recipe_file(tmp_path / "tiny.yaml"), tmp_path / "out"
    code, said, noted = ppolite("run", recipe, "--out", out)
    assert code == 0, noted
    assert "before (SFT)" in said
    assert "after (PPO)" in said
    for name in (
        "recipe.yaml",
        "eval.json",
        "report.html",
        "sft",
        "reward",
        "policy",
        "rollouts",
        "tensorboard",
    ):
        assert (out / name).exists(), name
    assert list(out.glob("*.png"))
    steps = rows_of(out, "ppo")
    assert [row["step"] for row in steps] == [0, 1, 2]
    assert all(set(row) >= STEP_KEYS for row in steps[1:])
    assert all(set(row) >= {"heldout/score", "heldout/kl_ref_seq", "heldout/length"} for row in steps)
    assert rows_of(out, "sft")[-1]["loss/heldout"] < rows_of(out, "sft")[0]["loss/heldout"]

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    code, _, noted = ppolite("run", out)
    assert code == 0
    assert noted.count("finished before, kept") == 3
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}

    (out / "eval.json").write_text("{}")
    code, *_ = ppolite("run", recipe, "--out", out, "--set", "evaluation.prompts=5")
    assert code == 0
    assert json.loads((out / "eval.json").read_text())["prompts"] == 5


def test_stages_one_by_one_equal_the_whole(
    world: World, finished_run: Path, ppolite: Run, tmp_path: Path
) -> None:
    recipe, out = world.recipe_file(tmp_path / "tiny.yaml"), tmp_path / "out"
    said = ""
    for stage in ("sft", "reward", "ppo"):
        code, text, noted = ppolite(stage, recipe, "--out", out)
        assert code == 0, noted
        said += text
    assert "held-out loss" in said
    assert "agreement with people" in said
    assert "kept the policy of step" in said
    for name in ("sft", "reward", "policy"):
        a, b = (folder / name / "model.safetensors" for folder in (out, finished_run))
        assert a.read_bytes() == b.read_bytes(), name


@pytest.mark.parametrize(
    "changes",
    [
        {"reward.kind": "pairs", "reward.data": "pairs", "ppo.objective": "kl", "train.kind": "lora"},
        {"reward.kind": "rankings", "reward.data": "rankings", "trunk.split": 0, "train.kind": "full"},
        {"roles": "separate", "trunk.split": 0, "ppo.critic_init": "zero", "ppo.kl.where": "loss",
         "ppo.kl.estimator": "k2", "ppo.kl.target": 0.5},
        {"roles": "separate", "trunk.split": 0, "train.kind": "lora", "ppo.kl.estimator": "k3"},
        {"trunk.split": 2, "train.kind": "lora", "ppo.kl.where": "loss", "ppo.kl.estimator": "k3"},
    ],
    ids=lambda changes: "-".join(str(v) for v in changes.values()),
)  # fmt: skip
def test_every_kind_of_run(changes: dict[str, Any], world: World, ppolite: Run, tmp_path: Path) -> None:
    sets: list[str] = []
    for key, value in changes.items():
        pair = f"{key}.path={world.path(value)}" if key == "reward.data" else f"{key}={value}"
        sets += ["--set", pair]
    out = tmp_path / "out"
    code, _, noted = ppolite("run", world.recipe_file(tmp_path / "r.yaml"), "--out", out, *sets)
    assert code == 0, noted
    result = json.loads((out / "eval.json").read_text())
    assert result["rm_pair_accuracy"] > 0.6
    steps = rows_of(out, "ppo")[1:]
    assert steps[0]["kl/ref_seq"] == pytest.approx(0, abs=1e-4)
    assert steps[1]["kl/ref_seq"] != 0
    assert ("leash/loss" in steps[0]) == (changes.get("ppo.kl.where") == "loss")
    assert ("penalty/beta" in steps[0]) == (changes.get("ppo.objective") == "kl")
    assert (steps[0]["leash/beta"] != steps[1]["leash/beta"]) == ("ppo.kl.target" in changes)


def test_results_load_in_plain_transformers(finished_run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "policy")
    policy = AutoModelForCausalLM.from_pretrained(finished_run / "policy")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "film story plot"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    assert policy.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
    judge = AutoModelForSequenceClassification.from_pretrained(finished_run / "reward")
    scores = []
    for text in ("good great", "bad dull"):
        turns = [{"role": "user", "content": "film story plot"}, {"role": "assistant", "content": text}]
        batch = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            scores.append(judge(**batch).logits.item())
    assert scores[0] > scores[1]


# ---- looking at a run ------------------------------------------------------------------------------------


def test_eval_prints_one_object(copied: Path, ppolite: Run) -> None:
    code, said, _ = ppolite("eval", copied, "--json")
    assert code == 0
    result = json.loads(said)
    assert set(result) >= EVAL_KEYS
    assert result["prompts"] == 16
    assert "samples" not in result
    code, said, noted = ppolite("eval", copied, "--set", "evaluation.prompts=4")
    assert code == 0
    assert "4 prompts" in said
    assert "eval.json is replaced by an evaluation of other settings" in noted


def test_eval_refuses_other_training_settings(copied: Path, ppolite: Run) -> None:
    code, _, noted = ppolite("eval", copied, "--set", "ppo.eval_prompts=2")
    assert code == 2
    assert "ppo.eval_prompts" in noted


def test_report(copied: Path, ppolite: Run) -> None:
    (copied / "report.html").unlink()
    code, said, _ = ppolite("report", copied)
    assert (code, said.strip()) == (0, str(copied / "report.html"))
    assert "Before and after" in (copied / "report.html").read_text()


def test_chat_reads_lines(copied: Path, ppolite: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "film story plot\n\n/new\n[bold] music\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, said, _ = ppolite("chat", copied)
    assert code == 0
    assert said.count("before (SFT)") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert ppolite("chat", copied)[1] == said


def test_chat_within_the_models_context(copied: Path, ppolite: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens, of which the answer takes up to 6."""
    lines = ["film story plot"] * 6 + ["film " * 60, "music", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, said, noted = ppolite("chat", copied)
    assert code == 0, noted
    assert "(1 older turns forgotten)" in said
    assert said.count("(too long: the model takes") == 2
    assert said.count("before (SFT)") == 8


def test_foreign_code_is_trusted_by_every_stage(world: World, ppolite: Run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.folder / "model", model)
    config = json.loads((model / "config.json").read_text())
    kinds = {
        "AutoConfig": "Config",
        "AutoModelForCausalLM": "Model",
        "AutoModelForSequenceClassification": "Judge",
    }
    config |= {"model_type": "own", "auto_map": {auto: f"own.Own{kind}" for auto, kind in kinds.items()}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(
        "from torch import nn\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnJudge(LlamaPreTrainedModel):\n    config_class = OwnConfig\n"
        "    def __init__(self, config):\n        super().__init__(config)\n        self.model = LlamaModel(config)\n"
        "        self.score = nn.Linear(config.hidden_size, 1, bias=False)\n        self.post_init()\n"
    )
    recipe = world.recipe_file(tmp_path / "r.yaml", model=str(model), trust_remote_code=True)
    for command in (["plan", recipe], ["run", recipe, "--out", tmp_path / "out"], ["eval", tmp_path / "out"]):
        code, _, noted = ppolite(*command)
        assert code == 0, noted


# ---- the doctor ------------------------------------------------------------------------------------------


def test_doctor_finds_nothing_wrong_and_writes_nothing(
    world: World, finished_run: Path, ppolite: Run, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    code, said, noted = ppolite("doctor", finished_run, "--set", "sft.data.held_out=0.2")
    assert code == 0
    assert "warning" not in noted
    assert "0 warn, 0 fail" in said
    parts = ["data", "model", "sft", "reward", "ppo"]
    assert [line for line in noted.splitlines() if line.startswith("looking")] == [
        f"looking at {p}" for p in parts
    ]
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}


def test_doctor_tells_machines(world: World, ppolite: Run, tmp_path: Path) -> None:
    recipe = world.recipe_file(tmp_path / "r.yaml", sft=None, reward=None, ppo__max_new_tokens=62)
    code, said, _ = ppolite("doctor", recipe, "--json", "--out", tmp_path / "out")
    assert code == 1
    result = json.loads(said)
    found = {check["name"]: check for check in result["checks"]}
    assert result["failed"] == sum(check["verdict"] == "fail" for check in result["checks"]) == 2
    assert all(set(check) == {"name", "verdict", "figure", "remedy"} for check in result["checks"])
    assert "have no room for 62 new tokens in a context of 64" in found["ppo/lengths"]["figure"]
    assert "lower ppo.max_new_tokens" in found["ppo/lengths"]["remedy"]
    assert not (tmp_path / "out").exists()


def test_doctor_of_a_recipe_that_is_none(ppolite: Run, tmp_path: Path) -> None:
    assert "no such recipe" in refuse(ppolite, "doctor", tmp_path / "none.yaml")


# ---- human feedback --------------------------------------------------------------------------------------


def test_sample_score_reward(
    world: World, ppolite: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, rated = world.recipe_file(tmp_path / "r.yaml"), tmp_path / "candidates.jsonl"
    code, said, noted = ppolite("sample", recipe, "--to", rated, "--prompts", "24", "--n", "2")
    assert code == 0, noted
    assert "48 candidates" in said
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    assert len(rows) == 48
    assert all(row["score"] is None for row in rows)
    assert rows[0]["prompt"] == rows[1]["prompt"] != rows[2]["prompt"]

    keys = [str(max(0, min(9, int(5 + taste(row["response"]) + i % 2)))) for i, row in enumerate(rows)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*keys[:10], "u", keys[9], "q"]) + "\n"))
    assert ppolite("score", rated)[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(keys[10:]) + "\n"))
    assert ppolite("score", rated)[0] == 0
    assert [json.loads(line)["score"] for line in rated.read_text().splitlines()] == [int(k) for k in keys]

    sets = [
        "--set",
        f"reward.data.path={rated}",
        "--set",
        "reward.data.held_out=0.4",
        "--set",
        "reward.pair_gap=0.5",
    ]
    code, said, noted = ppolite("reward", recipe, "--out", tmp_path / "out", *sets)
    assert code == 0, noted
    assert "agreement with people" in said


def test_sample_takes_the_newest_policy_of_a_run(copied: Path, ppolite: Run, tmp_path: Path) -> None:
    target = tmp_path / "c.jsonl"
    assert (
        ppolite("sample", copied, "--to", target, "--prompts", "1", "--n", "3", "--max-new-tokens", "2")[0]
        == 0
    )
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(rows) == 3
    assert rows[0]["model"].endswith("policy")
    assert all(len(row["response"].split()) <= 2 for row in rows)
    code, _, noted = ppolite("sample", copied, "--to", target)
    assert code == 2
    assert "is there already" in noted


# peft 0.19 asks transformers 5.17 for a property that it renamed.
def test_sample_takes_the_last_round_that_has_a_policy(
    copied: Path, ppolite: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("round-2", "round-10", "round-11"):
        (copied / name).mkdir()
    for name in ("round-10", "round-2"):  # the newest file is not of the last round
        shutil.copytree(copied / "policy", copied / name / "policy")
    asked: list[str | None] = []
    monkeypatch.setattr("ppolite.stages.sample.sample", lambda *_, model, **__: asked.append(model) or 0)
    assert ppolite("sample", copied, "--to", tmp_path / "x.jsonl")[0] == 0
    assert asked == [str(copied / "round-10" / "policy")]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_ppo_adapter(world: World, finished_run: Path, ppolite: Run, tmp_path: Path) -> None:
    from peft import PeftModel

    out = tmp_path / "out"
    out.mkdir()
    for name in ("sft", "reward"):
        (out / name).symlink_to(finished_run / name)
    recipe = world.recipe_file(tmp_path / "r.yaml", train__kind="lora")
    code, _, noted = ppolite("ppo", recipe, "--out", out)
    assert code == 0, noted
    base = AutoModelForCausalLM.from_pretrained(out / "sft")
    ids = torch.arange(8, 20)[None]
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, out / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "policy")(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert not torch.allclose(plain, merged, atol=1e-3)


def test_iterate_waits_for_scores_and_goes_on(
    world: World, finished_run: Path, ppolite: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "sft").symlink_to(finished_run / "sft")
    recipe = world.recipe_file(
        tmp_path / "r.yaml", reward={"kind": "pairs", "optim": {"lr": 1e-2}}, ppo__min_rm_accuracy=0,
        iterate={"rounds": 1, "by": "file", "prompts": 24, "candidates": 3},
    )  # fmt: skip
    waiting = out / "round-1" / "candidates.jsonl"
    said = refuse(ppolite, "iterate", recipe, "--out", out)
    assert f"{waiting}: " in said
    assert " of 72 candidates wait for a score; give each a number there" in said
    rows = [json.loads(line) for line in waiting.read_text().splitlines()]
    write_rows(waiting, [row | {"score": taste(row["response"])} for row in rows])
    code, said, noted = ppolite("iterate", out)
    assert code == 0, noted
    assert "round 1" in said
    assert f"report: {out / 'report.html'}" in said
    assert ppolite("report", out)[1].strip() == str(out / "report.html")
    assert "Side by side" in (out / "report.html").read_text()
    assert ppolite("report", out / "round-1")[1].strip() == str(out / "round-1" / "report.html")
    assert ppolite("eval", out / "round-1", "--set", "evaluation.prompts=4")[0] == 0
    assert f"for instance {out / 'round-1'}" in refuse(ppolite, "eval", out)
    assert "`ppolite iterate`" in refuse(ppolite, "run", out)
    assert "iterate.candidates" in refuse(ppolite, "iterate", out, "--set", "iterate.candidates=5")
    code, _, noted = ppolite("iterate", out, "--set", "iterate.rounds=2")
    assert code == 2
    assert f"{out / 'round-2' / 'candidates.jsonl'}: " in noted


# ---- what is refused -------------------------------------------------------------------------------------


def refuse(ppolite: Run, *argv: str | Path) -> str:
    """The one sentence on stderr of a command that exits with 2."""
    code, _, noted = ppolite(*argv)
    assert code == 2, noted
    assert "Traceback" not in noted
    said = [line for line in noted.splitlines() if line.startswith("ppolite: ")]
    assert len(said) == 1
    return said[0]


def test_changed_recipe_in_a_finished_folder(
    world: World, copied: Path, ppolite: Run, tmp_path: Path
) -> None:
    recipe = world.recipe_file(tmp_path / "r.yaml", sft__optim__lr=0.5, ppo__kl__beta=0.5)
    said = refuse(ppolite, "run", recipe, "--out", copied)
    assert "ppo.kl.beta" in said
    assert "sft.optim.lr" in said
    assert "--out" in said
    # The last stage may be done again with other settings, an earlier one not: others were built on it.
    assert "sft.epochs" in refuse(ppolite, "sft", copied, "--set", "sft.epochs=2")
    said = refuse(ppolite, "ppo", copied, "--set", "ppo.steps=1")
    assert "its ppo is finished; --again does it anew in its place" in said
    assert "--out NEW` beside it" in said
    before = len(rows_of(copied, "ppo"))
    assert before > 1
    assert ppolite("ppo", copied, "--again", "--set", "ppo.steps=1")[0] == 0
    assert len(rows_of(copied, "ppo")) < before


def test_a_folder_of_other_things_is_left_alone(world: World, ppolite: Run, tmp_path: Path) -> None:
    recipe, data = world.recipe_file(tmp_path / "r.yaml"), tmp_path / "data"
    data.mkdir()
    (data / "mine.csv").touch()
    for command in ("run", "sft"):
        said = refuse(ppolite, command, recipe, "--out", data)
        assert f"{data}: is no run folder, and holds mine.csv; choose another with --out" in said
    assert [path.name for path in data.iterdir()] == ["mine.csv"]


def test_what_only_ppo_reads_may_change_before_it(copied: Path, ppolite: Run) -> None:
    assert "watch.kl" in refuse(ppolite, "run", copied, "--set", "watch.kl=5")
    shutil.rmtree(copied / "policy")
    less_memory = ["train.recompute=true", "trunk.keep=none", "decode_rows=4"]
    sets = [part for change in ("watch.kl=5", *less_memory) for part in ("--set", change)]
    code, _, noted = ppolite("run", copied, *sets)
    assert code == 0, noted


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ppo__prompts__held_out": 0.03}, "prompts are held out, of which 8 serve to choose"),
        ({"ppo__prompts__path": "/nowhere/prompts.jsonl"}, "/nowhere/prompts.jsonl"),
        ({"reward__data__path": "/nowhere/scores.jsonl"}, "/nowhere/scores.jsonl"),
    ],
)
def test_data_of_later_stages_are_looked_at_before_the_first_one(
    changes: dict[str, Any], said: str, world: World, ppolite: Run, tmp_path: Path
) -> None:
    recipe, out = world.recipe_file(tmp_path / "r.yaml", **changes), tmp_path / "out"
    assert said in refuse(ppolite, "run", recipe, "--out", out)
    assert not rows_of(out, "sft")


# ---- several runs from one start -------------------------------------------------------------------------


def test_ppo_anew_from_a_run(copied: Path, ppolite: Run, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    out = tmp_path / "more" / "firm"
    code, said, noted = ppolite("ppo", copied, "--out", out, "--set", "ppo.kl.beta=0.5")
    assert code == 0, noted
    assert "kept the policy of step" in said
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    for stage in ("sft", "reward"):
        assert rows_of(out, stage) == rows_of(copied, stage)
        for path in (copied / stage).iterdir():
            assert path.samefile(out / stage / path.name)
    assert rows_of(out, "ppo")[-1]["leash/beta"] == 0.5
    assert ppolite("report", out)[0] == 0
    assert ppolite("run", out)[0] == 0  # it is a run like any other: evaluation and report are what it lacks
    again = refuse(ppolite, "ppo", copied, "--out", out)
    assert f"is there already; `ppolite ppo {out}` goes on with it" in again


def test_ppo_anew_where_no_file_can_have_two_names(
    copied: Path, ppolite: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError

    monkeypatch.setattr("os.link", refused)
    assert ppolite("ppo", copied, "--out", tmp_path / "out", "--set", "ppo.steps=1")[0] == 0
    assert not (copied / "sft" / "model.safetensors").samefile(tmp_path / "out" / "sft" / "model.safetensors")


def test_reward_anew_from_a_run(copied: Path, ppolite: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, noted = ppolite("reward", copied, "--out", out, "--set", "reward.epochs=1")
    assert code == 0, noted
    assert rows_of(out, "sft") == rows_of(copied, "sft")
    assert len(rows_of(out, "reward")) < len(rows_of(copied, "reward"))
    assert not (out / "policy").exists()


def test_what_cannot_begin_from_a_run(copied: Path, ppolite: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = refuse(ppolite, "ppo", copied, "--out", out, "--set", "trunk.split=0")
    assert "its sft and reward were made with other values of trunk.split" in said
    shutil.rmtree(copied / "reward")
    said = refuse(ppolite, "ppo", copied, "--out", out)
    assert f"its reward is not finished; `ppolite reward {copied}` comes first" in said
    assert not out.exists()


BAD_RECIPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"ppo.stepz": 3}, ["ppo.stepz", "did you mean `ppo.steps`"]),
    "unknown section": ({"pppo.steps": 3}, ["pppo", "did you mean `ppo`"]),
    "wrong type": ({"ppo.steps": "many"}, ["ppo.steps", "'many'", "integer"]),
    "out of range": ({"ppo.top_p": 1.5}, ["ppo.top_p", "1.5"]),
    "not a choice": ({"train.kind": "qlora"}, ["train.kind", "lora"]),
    "full with a split": ({"train.kind": "full"}, ["trunk.split", "set it to 0"]),
    "clip with kl": ({"ppo.objective": "kl", "ppo.clip": 0.2}, ["ppo", "no `clip`", "set objective: clip"]),
    "target from beta 0": ({"ppo.kl.target": 1, "ppo.kl.beta": 0}, ["kl.beta"]),
    "k1 in the loss": ({"ppo.kl.where": "loss"}, ["use k2"]),
    "rollouts do not divide": ({"ppo.samples_per_prompt": 5}, ["multiple of samples_per_prompt"]),
    "no data file": ({"sft.data.path": "/nowhere/x.jsonl"}, ["/nowhere/x.jsonl"]),
    "unknown format": ({"sft.data.path": "FOLDER/x.doc"}, [".doc"]),
    "empty data": ({"sft.data.path": "FOLDER/empty.jsonl"}, ["empty.jsonl is empty"]),
    "missing column": (
        {"sft.data.path": "FOLDER/prompts.jsonl", "sft.data.held_out": 0.2},
        ["completion", "columns:"],
    ),
    "all rows bad": ({"sft.data.path": "FOLDER/bad.jsonl"}, ["bad.jsonl", "none of 2 rows", "row 1"]),
    "one score": ({"reward.data.path": "FOLDER/same.jsonl"}, ["every score is 1", "same.jsonl"]),
    "no pair apart": ({"reward.pair_gap": 100}, ["reward.pair_gap"]),
    "nothing held out": ({"ppo.prompts.held_out": 0}, ["ppo: prompts.held_out"]),
    "no model folder": ({"model": "/nowhere/model"}, ["/nowhere/model", "no such folder"]),
    "unknown embedded model": ({"model": "embedded:gpt9"}, ["embedded:smollm2-135m"]),
    "no EOS token": ({"model": "FOLDER/no_eos"}, ["no EOS token", "eos_token"]),
    "pickled weights": ({"model": "FOLDER/pickled"}, ["safetensors"]),
    "prompts beyond the context": ({"ppo.max_new_tokens": 60}, ["prompts", "64"]),
    "examples beyond the limit": ({"sft.max_tokens": 8}, ["sft.max_tokens"]),
    "split beyond the layers": ({"trunk.split": 3}, ["trunk.split is 3", "0..2"]),
    "nothing to run": ({"sft": None, "reward": None, "ppo": None}, ["none of the sections"]),
}


@pytest.fixture(scope="module")
def bad_world(world: World) -> World:
    folder = world.folder
    (folder / "empty.jsonl").write_text("")
    (folder / "x.doc").write_text("x")
    world.write("bad", [{"prompt": "", "completion": "a"}, {"prompt": "a", "completion": None}])
    world.write(
        "same",
        [{"prompt": f"film {w}", "response": "good", "score": 1} for w in "abcdefghijklmnopqrstuvwxyz" * 2],
    )
    write_model(folder / "no_eos", eos_token=None)
    (folder / "pickled").mkdir()
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n.")
    return world


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipe(name: str, bad_world: World, ppolite: Run, finished_run: Path, tmp_path: Path) -> None:
    changes, expected = BAD_RECIPES[name]
    out = tmp_path / "out"
    stage = "run"
    if name in ("prompts beyond the context", "nothing held out", "no pair apart", "one score"):
        # From a finished SFT, as these are found by a later stage.
        stage = "reward" if name in ("no pair apart", "one score") else "ppo"
        out.mkdir()
        for part in ("sft", "reward") if stage == "ppo" else ("sft",):
            (out / part).symlink_to(finished_run / part)
    here = {
        k.replace(".", "__"): v.replace("FOLDER", str(bad_world.folder)) if isinstance(v, str) else v
        for k, v in changes.items()
    }
    recipe = bad_world.recipe_file(tmp_path / "r.yaml", **here)
    said = refuse(ppolite, stage, recipe, "--out", out)
    for part in expected:
        assert part in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sft: [unclosed", "no valid YAML"),
        ("- a list", "expected `key: value` lines"),
        ("", "expected `key: value` lines"),
        (b"\xff\xfe\x00", "cannot be read as a text file"),
        (None, "no such recipe"),
    ],
)
def test_bad_recipe_file(text: str | bytes | None, expected: str, ppolite: Run, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refuse(ppolite, "run", path)
    assert expected in said
    assert str(path) in said


@pytest.mark.parametrize("value", ["ppo.steps", "=3", "model.x=3", "ppo.steps=[1"])
def test_bad_set(value: str, world: World, ppolite: Run, tmp_path: Path) -> None:
    said = refuse(ppolite, "run", world.recipe_file(tmp_path / "r.yaml"), "--set", value)
    assert f"--set {value.partition('=')[0]}" in said


def test_no_gpu(world: World, ppolite: Run, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    said = refuse(
        ppolite, "sft", world.recipe_file(tmp_path / "r.yaml", device="cuda"), "--out", tmp_path / "o"
    )
    assert "no GPU" in said


def test_pad_equal_to_eos_is_repaired_and_announced(world: World, ppolite: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", pad_token="<|end|>", unk_token="<|unk|>")
    recipe = world.recipe_file(tmp_path / "r.yaml", model=str(model))
    code, _, noted = ppolite("sft", recipe, "--out", tmp_path / "out")
    assert code == 0
    assert "padding with" in noted
    saved = AutoTokenizer.from_pretrained(tmp_path / "out" / "sft")
    assert saved.pad_token_id != saved.eos_token_id


def test_long_rows_are_reported(world: World, ppolite: Run, tmp_path: Path) -> None:
    rows = [{"prompt": f"film {i}"} for i in range(40)] + [{"prompt": "film " * 80}]
    path = write_rows(tmp_path / "p.jsonl", rows)
    recipe = world.recipe_file(tmp_path / "r.yaml")
    code, _, noted = ppolite("sample", recipe, "--data", path, "--to", tmp_path / "c.jsonl", "--prompts", "2")
    assert code == 0
    assert "p.jsonl row 41" in noted


def test_reward_model_of_another_vocabulary(world: World, copied: Path, ppolite: Run, tmp_path: Path) -> None:
    other = write_model(tmp_path / "m", extra=3)
    recipe = world.recipe_file(tmp_path / "r.yaml", model=str(other), sft=None)
    out = tmp_path / "out"
    assert ppolite("reward", recipe, "--out", out)[0] == 0
    shutil.rmtree(copied / "reward")
    shutil.move(out / "reward", copied / "reward")
    shutil.rmtree(copied / "policy")
    said = refuse(ppolite, "ppo", copied, "--set", "ppo.min_rm_accuracy=0")
    assert "vocabulary" in said


def test_a_bad_reward_model_is_refused_unless_told(world: World, copied: Path, ppolite: Run) -> None:
    shutil.rmtree(copied / "policy")
    report = copied / "reward" / "agreement.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"pair_accuracy": 0.52}))
    said = refuse(ppolite, "ppo", copied)
    assert "52.0%" in said
    assert "--set ppo.min_rm_accuracy=0" in said
    report.unlink()
    assert "agreement.json" in refuse(ppolite, "ppo", copied)
    assert ppolite("ppo", copied, "--set", "ppo.min_rm_accuracy=0")[0] == 0


def test_ppo_without_reward_model(world: World, ppolite: Run, tmp_path: Path) -> None:
    code, _, noted = ppolite("ppo", world.recipe_file(tmp_path / "r.yaml"), "--out", tmp_path / "out")
    assert code == 2
    assert "ppolite reward" in noted
    assert "no sft result" in noted


@pytest.mark.parametrize("command", ["eval", "chat", "report", "run"])
def test_folder_that_is_no_run(command: str, ppolite: Run, tmp_path: Path) -> None:
    assert "no run folder" in refuse(ppolite, command, tmp_path)


@pytest.mark.parametrize("command", ["eval", "chat"])
def test_run_without_policy(command: str, copied: Path, ppolite: Run) -> None:
    shutil.rmtree(copied / "policy")
    assert "no trained policy" in refuse(ppolite, command, copied)


def test_out_beside_a_run_folder(copied: Path, ppolite: Run, tmp_path: Path) -> None:
    assert "--out" in refuse(ppolite, "run", copied, "--out", tmp_path / "x")


def test_score_of_a_missing_file(ppolite: Run, tmp_path: Path) -> None:
    assert "ppolite sample" in refuse(ppolite, "score", tmp_path / "none.jsonl")


def test_sample_counts(world: World, ppolite: Run, tmp_path: Path) -> None:
    recipe = world.recipe_file(tmp_path / "r.yaml")
    assert "above 0" in refuse(ppolite, "sample", recipe, "--to", tmp_path / "c.jsonl", "--n", "0")


def test_sample_looks_at_its_file_first(
    world: World, ppolite: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = world.recipe_file(tmp_path / "r.yaml")
    monkeypatch.setattr("ppolite.stages.sample.open_model", lambda *_: pytest.fail("the model was loaded"))
    assert "give it the ending .jsonl" in refuse(ppolite, "sample", recipe, "--to", tmp_path / "c.csv")
    nowhere = "/proc/c.jsonl"
    assert f"{nowhere}: cannot be written there" in refuse(ppolite, "sample", recipe, "--to", nowhere)


def test_version(ppolite: Run) -> None:
    code, said, _ = ppolite("--version")
    assert (code, said) == (0, f"ppolite {version('ppolite')}\n")


def test_interrupt(world: World, ppolite: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ppolite.cli.place.load_recipe", press)
    code, _, noted = ppolite("run", "film")
    assert code == 130
    assert "interrupted" in noted


COMMANDS = [
    "demo",
    "recipe",
    "run",
    "sft",
    "reward",
    "ppo",
    "iterate",
    "sample",
    "score",
    "eval",
    "chat",
    "report",
    "doctor",
    "fetch",
]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command: str | None, ppolite: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"] if command else ["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "usage: ppolite" in said
    if command is None:
        assert all(name in said for name in COMMANDS)
