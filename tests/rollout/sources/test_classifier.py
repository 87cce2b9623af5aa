"""A classifier against HF's own way with one row at a time, and what is cut, chosen or refused."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rollout.sources.kit import classifier, said
from tests.world import TEMPLATE, write_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from ppolite.config import ClassifierSource
from ppolite.rollout.sources.classifier import ClassifierScorer
from ppolite.types import Prompt, Rollout, UserError

CPU = torch.device("cpu")
TEXTS = ["good film", "bad", "the plot was so very dull and the end was silly", "superb cast", ""]
Make = Callable[..., ClassifierScorer]


def of(folder: Path, budget: int = 4096, **settings: Any) -> ClassifierScorer:
    source = {"kind": "classifier", "model": str(folder), "dtype": "float32", **settings}
    return ClassifierScorer(ClassifierSource.model_validate(source), CPU, budget)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("llama"), num_labels=1)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {0: "bad", 1: "fair", 2: "good"}
    folder = tmp_path_factory.mktemp("three")
    return classifier(folder, id2label=labels, label2id={v: k for k, v in labels.items()})


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that reads pairs, with token types and absolute positions."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *" ".join(TEXTS).split(), "p", "why"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **special
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path, ids: Any) -> list[float]:
    """HF's answer for one row without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = ids if isinstance(ids, dict) else {"input_ids": ids}
    return model(**{k: torch.tensor([v]) for k, v in rows.items()}).logits[0].tolist()


def chat_ids(folder: Path, text: str, prompt: str = "p") -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)


def test_conversations_in_its_own_template(llama: Path) -> None:
    expected = [logits(llama, chat_ids(llama, text, "film was"))[0] for text in TEXTS]
    made = of(llama).score([said(text, "film was") for text in TEXTS])
    assert made == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in made}) == len(TEXTS)


def test_a_reward_model_of_ours_reads_what_it_was_trained_on(tmp_path: Path) -> None:
    """Its answers end where their turn does, though the template goes on after that."""
    folder = classifier(tmp_path / "own", num_labels=1, ppolite_norm={"mean": 0.0, "std": 1.0, "offset": 0.0})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE.replace("'<|end|>'", "'<|end|> the '")
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    whole = [chat_ids(folder, text) for text in TEXTS]
    ids = [row[: len(row) - row[::-1].index(end)] for row in whole]
    assert all(len(cut) == len(row) - 1 for cut, row in zip(ids, whole, strict=True))
    made = of(folder).score([said(text) for text in TEXTS])
    assert made == pytest.approx([logits(folder, row)[0] for row in ids], abs=1e-5)
    cut = of(folder).score([said(text, finish="length") for text in TEXTS])
    assert cut == pytest.approx([logits(folder, row[:-1])[0] for row in ids], abs=1e-5)


@pytest.mark.parametrize("reads", ["pair", "response"])
def test_texts_of_an_encoder(bert: Path, reads: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    rows = [dict(tokenizer("why", t) if reads == "pair" else tokenizer(t)) for t in TEXTS]
    expected = [logits(bert, row)[0] for row in rows]
    made = of(bert, reads=reads).score([said(text, "why") for text in TEXTS])
    assert made == pytest.approx(expected, abs=1e-5)
    assert "token_type_ids" in rows[0]
    assert len({round(score, 4) for score in made}) == len(TEXTS)


def test_a_plain_prompt_and_its_response_are_one_text(llama: Path) -> None:
    rollout = said(" good film")
    rollout.prompt = Prompt(text="the plot was")
    ids = AutoTokenizer.from_pretrained(llama).encode("the plot was good film")
    assert of(llama).score([rollout]) == pytest.approx(logits(llama, ids), abs=1e-5)


@pytest.mark.parametrize("budget", [1, 20, 4096])
def test_batches_do_not_matter(llama: Path, budget: int) -> None:
    rollouts = [said(text) for text in TEXTS]
    alone = [of(llama).score([r])[0] for r in rollouts]
    assert of(llama, budget).score(rollouts) == pytest.approx(alone, abs=1e-5)


def test_without_a_pad_token_rows_go_one_by_one(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "padless"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            told = json.loads((folder / name).read_text())
            told.pop("pad_token", None)
            (folder / name).write_text(json.dumps(told))
    with caplog.at_level(logging.WARNING, "ppolite"):
        scorer = of(folder)
    assert scorer.pad is None
    assert "names no pad token" in caplog.text
    rollouts = [said(text) for text in TEXTS]
    assert scorer.score(rollouts) == pytest.approx(of(llama).score(rollouts), abs=1e-5)


@pytest.mark.parametrize(("label", "index"), [("good", 2), (1, 1), ("bad", 0)])
def test_log_odds_of_a_label(three: Path, label: str | int, index: int) -> None:
    raw = logits(three, chat_ids(three, "good film"))
    share = math.exp(raw[index]) / sum(map(math.exp, raw))
    made = of(three, label=label).score([said("good film")])
    assert made == pytest.approx([math.log(share / (1 - share))], abs=1e-5)


def test_labels_that_are_judged_alone(three: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(three, tmp_path / "multi"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    raw = logits(folder, chat_ids(folder, "good film"))
    assert of(folder, label="good").score([said("good film")]) == pytest.approx(raw[2:], abs=1e-5)


def test_labels_that_cannot_be_meant(llama: Path, three: Path) -> None:
    with pytest.raises(UserError, match=r"it has 3 labels \(bad, fair, good\); set `label` to one of them"):
        of(three)
    with pytest.raises(UserError, match="it has no label 'god'; did you mean 'good'"):
        of(three, label="god")
    for label in (3, -1):
        with pytest.raises(UserError, match=f"it has no label {label}; it has bad, fair, good"):
            of(three, label=label)
    with pytest.raises(UserError, match="it has one output, so there is no label to choose"):
        of(llama, label="good")


LONG = "the plot was so very dull and the end was silly"


def test_a_long_conversation_loses_its_beginning(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = chat_ids(llama, LONG)
    with caplog.at_level(logging.WARNING, "ppolite"):
        made = of(llama, max_tokens=8).score([said(LONG), said(LONG)])
    assert made == pytest.approx([logits(llama, ids[-8:])[0]] * 2, abs=1e-5)
    assert f"an input has {len(ids)} tokens, of which it takes 8" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("reads", "prompt", "answer", "kept"),
    [
        ("pair", LONG, "good film", (" ".join(LONG.split()[:9]), "good film")),
        ("pair", "p", LONG + " " + LONG, None),
        ("response", "p", LONG + " " + LONG, (f"{LONG} the",)),
    ],
)
def test_a_long_text_keeps_what_was_answered(
    bert: Path, reads: str, prompt: str, answer: str, kept: Any
) -> None:
    scorer = of(bert, reads=reads, max_tokens=14)
    [score] = scorer.score([said(answer, prompt)])
    assert math.isfinite(score)
    if kept is not None:
        expected = logits(bert, dict(AutoTokenizer.from_pretrained(bert)(*kept)))
        assert [score] == pytest.approx(expected, abs=1e-5)


def test_it_takes_no_more_than_its_positions(bert: Path, llama: Path) -> None:
    assert math.isfinite(of(bert, reads="response").score([said("film " * 40)])[0])
    with pytest.raises(UserError, match=r"it takes 16 tokens; lower its max_tokens \(17\)"):
        of(bert, reads="response", max_tokens=17)
    assert math.isfinite(of(llama).score([said("film " * 200)])[0])


def test_dtype(llama: Path) -> None:
    made = {dtype: of(llama, dtype=dtype) for dtype in ("float32", "bfloat16")}
    assert next(made["bfloat16"].model.parameters()).dtype == torch.bfloat16
    scores = [made[dtype].score([said("good film")])[0] for dtype in ("float32", "bfloat16")]
    assert scores[0] != scores[1] == pytest.approx(scores[0], abs=0.1)


def test_an_encoder_has_no_template(bert: Path) -> None:
    with pytest.raises(UserError, match="its tokenizer has no chat template; set reads to pair or response"):
        of(bert)


def test_places_that_no_token_gets_are_not_counted(tmp_path: Path) -> None:
    """RoBERTa's table has 24 of them, and its tokens begin at the third."""
    folder = Path(shutil.copytree(write_model(tmp_path / "model"), tmp_path / "roberta"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24, pad_token_id=1, num_labels=1,
    )  # fmt: skip
    RobertaForSequenceClassification(shape).save_pretrained(folder)
    assert all(math.isfinite(score) for score in of(folder).score([said("good film " * 30)]))
    assert of(folder).most == 22
    with pytest.raises(UserError, match="it takes 22 tokens"):
        of(folder, max_tokens=23)


def test_a_template_that_refuses(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "strict"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
    with pytest.raises(UserError, match=r"refuses the conversation of a\.jsonl row 1 \(no system turns\)"):
        of(folder).score([said("a")])


def test_weights_that_could_run_code_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which can run code"):
        of(folder)


def test_foreign_code_runs_only_when_the_recipe_says_so(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "foreign"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "ownclass.OwnConfig",
        "AutoModelForSequenceClassification": "ownclass.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "ownclass"}))
    (folder / "ownclass.py").write_text(
        "from transformers import AutoModel, LlamaConfig, LlamaForSequenceClassification, LlamaModel\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'ownclass'\n"
        "class OwnModel(LlamaForSequenceClassification):\n    config_class = OwnConfig\n"
        "class OwnBase(LlamaModel):\n    config_class = OwnConfig\n"
        "AutoModel.register(OwnConfig, OwnBase)\n"
    )
    with pytest.raises(UserError, match="trust_remote_code"):
        of(folder)
    scores = of(folder, trust_remote_code=True).score([said("good film")])
    assert scores == pytest.approx(of(llama).score([said("good film")]), abs=1e-6)


def test_a_language_model_is_no_classifier(world: Any) -> None:
    with pytest.raises(UserError, match=r"lacks weights of LlamaForSequenceClassification \(score\.weight\)"):
        of(world.folder / "model")


def test_rollouts_stay_as_they_are(llama: Path) -> None:
    rollouts: list[Rollout] = [said(text) for text in TEXTS]
    of(llama).score(rollouts)
    assert [r.text for r in rollouts] == TEXTS
    assert not any(r.rewards for r in rollouts)
