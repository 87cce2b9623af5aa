"""What workers count: tokens, rounds, likelihoods. Those of the peers need their environments and are not here."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.figures import Side
from benchmarks.generate import unlike
from benchmarks.time_to_score import notes
from benchmarks.training import whole
from benchmarks.workers.answers import Sets
from benchmarks.workers.held_out import answers, logprob
from benchmarks.workers.rounds import Clock
from benchmarks.workers.updates import Updates
from tests import tiny

from benchmarks import inputs
from ppolite.config import load_recipe
from ppolite.types import Prompt, Scored


def last_words(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_tokens_of_the_counted_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches of (prompt, answer) and of pairs of such: 3 + 2 ids, then 1 + 1 + 1 + 2."""
    file = tmp_path / "batches.json"
    file.write_text(json.dumps([[[[9] * 50, [9]]], [[[1, 2, 3], [4, 5]]], [[[[1], [2]], [[3], [4, 5]]]]]))
    updates = Updates({"warmup": 1, "batches": file})
    updates.begin()
    for loss in (3.0, 2.0, 1.0):
        updates.done(loss)
    updates.report()
    said = last_words(capsys)
    assert (said["tokens"], said["updates"], said["losses"]) == (10, 2, [3.0, 2.0, 1.0])
    assert said["tokens_per_s"] == pytest.approx(10 / sum(updates.seconds[1:]))


def test_the_first_set_is_a_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, keep = tmp_path / "prompts.json", tmp_path / "answers.json"
    prompts.write_text(json.dumps([["a", "b"], ["c", "d"]]))
    sets = Sets({"prompts": prompts, "keep": keep})
    given = []
    for one, drawn in zip(sets, ([[1] * 9, [1]], [[5, 6, 7], [8]]), strict=True):
        given.append(one)
        sets.done(drawn)
    sets.report()
    said = last_words(capsys)
    assert given == [["a", "b"], ["c", "d"]]
    assert said["length"] == 2.0
    assert said["tokens_per_s"] == pytest.approx(4 / sets.seconds[1])
    assert json.loads(keep.read_text()) == [[[5, 6, 7], [8]]]


def test_the_clock_asks_every_second_round_and_stops_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def save(folder: str) -> None:
        saved.append(folder)
        now[0] += 1000.0  # as long as it may take

    saved: list[str] = []
    answers = [{"more": True, "gain": 0.5}, {"more": False, "gain": 1.6}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(a) + "\n" for a in answers)))
    monkeypatch.setattr("benchmarks.workers.rounds.time.perf_counter", lambda: now[0])
    clock = Clock({"warmup": 0, "every": 2, "folder": "policy"}, save)
    clock.begin()
    more = []
    for seconds in (5.0, 1.0, 2.0, 3.0):
        now[0] += seconds
        more.append(clock.lap(tokens=seconds))
    assert more == [True, True, True, False]
    assert saved == ["policy", "policy"]
    figures = clock.figures()
    assert [row["step_s"] for row in figures["rounds"]] == [5.0, 1.0, 2.0, 3.0]
    assert (figures["step_s"], figures["gain"], figures["looks"]) == (2.5, 1.6, answers)
    warm = Clock({"warmup": 1, "every": None, "folder": None}, save)
    warm.rows = clock.rows
    assert warm.figures()["step_s"] == 2.0


def test_logprob_of_an_answer_is_minus_the_librarys_loss() -> None:
    model = tiny.model("llama")
    prompt, answer = [6, 7, 8], [9, 10, 11, 12]
    labels = torch.tensor([[-100] * 3 + answer])
    loss = model(torch.tensor([prompt + answer]), labels=labels).loss  # mean over the answer
    torch.testing.assert_close(logprob(model, prompt, answer), -4 * loss.detach())


def test_answers_end_at_eos_and_depend_on_no_padding() -> None:
    """A near-greedy model says the same alone as beside a longer prompt."""
    model: Any = tiny.model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(200.0)
    prompts = [[6, 7], [8, 9, 10, 11, 12], [13]]
    together = answers(model, prompts, 12, tiny.PAD, tiny.END, seed=0)
    alone = [answers(model, [p], 12, tiny.PAD, tiny.END, seed=0)[0] for p in prompts]
    assert together == alone
    assert all(tiny.END not in row[:-1] and len(row) <= 12 for row in together)


def test_other_answers_than_the_models_are_noticed() -> None:
    found = {
        "ppolite": {"nats": [3.00, 0.03], "length": [20, 1]},
        "near": {"nats": [3.15, 0.03], "length": [20, 1]},
        "colder": {"nats": [2.80, 0.03], "length": [20, 1]},
    }
    assert unlike(found) == [
        "colder's answers have 2.80 nats a token where ppolite's have 3.00: not the same distribution"
    ]


def test_a_score_that_was_not_reached_is_said() -> None:
    sides = [Side("ppolite", "film", ()), Side("TRL", "full", ())]
    there, not_there = {"reached": True}, {"reached": False}
    missed = "TRL did not reach +1.5 in 1 of 2 runs, whose seconds are those of all rounds"
    assert notes(sides, [[there, there], [there, not_there]], 1.5) == [
        f"{missed}, so that a ratio is at least what stands here"
    ]
    assert notes(sides, [[not_there], [there]], 1.5) == [
        "ppolite did not reach +1.5 in 1 of 1 runs, whose seconds are those of all rounds"
    ]


def test_pairs_begin_alike_and_use_a_review_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(text: str, score: float) -> Scored:
        words = text.split()
        prompt = Prompt(({"role": "user", "content": f"Finish this review: {' '.join(words[:3])}"},))
        return Scored(prompt, " ".join(words[3:]), score)

    rows = [
        scored("One of the worst", -3.0), scored("One of many", 0.0), scored("One of us all", 0.5),
        scored("One of the best", 3.0), scored("The film is good", 1.0), scored("The film is fine", 0.5),
        scored("Alone it stands", 2.0),
    ]  # fmt: skip
    monkeypatch.setattr(inputs, "film_scored", lambda seed: (rows, None))
    pairs = inputs.preferences()
    assert [(p.prompt.last, p.chosen, p.rejected) for p in pairs] == [
        ("Finish this review: One of", "the best", "the worst")
    ]


def test_equal_settings_are_equal() -> None:
    """What `like for like` trains, and with which optimizer, on both sides: all of it, at one constant rate."""
    recipe = load_recipe("film", whole("sft"))
    assert (recipe.train.kind, recipe.trunk.split, recipe.dtype) == ("full", 0, "float32")
    assert recipe.sft
    assert (recipe.sft.optim.schedule, recipe.sft.optim.warmup) == ("constant", 0)
