"""Text of models, data and files in reports and terminals: it is shown, and neither browser nor terminal obeys it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console, RenderableType
from tests.faults.folders import SOUND_ROUNDS
from tests.faults.kit import COMMANDED

from ppolite.obs.control_report import write_control_report
from ppolite.obs.rate import rate_file
from ppolite.obs.report import write_report
from ppolite.obs.rounds import rounds_table, write_rounds_report
from ppolite.obs.table import before_after_table

HOSTILE = (
    "</pre></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&lt;i&gt;\x1b[31m\x1b]0;x\x07\x9b2J\r"
    "\u202egnp.exe\u2066[bold red]r[/bold red][/nope]{x}%s"
)
HARMLESS = "a film"


class Structure(HTMLParser):
    """Tags with the names of their attributes, in order; and all of the text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def structure(page: Path) -> Structure:
    made = Structure()
    text = page.read_text(encoding="utf-8")
    assert not COMMANDED.search(text.replace("\t", "").replace("\n", ""))
    made.feed(text)
    return made


def language(folder: Path, text: str) -> Path:
    run = folder / text.replace("/", "⁄")
    (run / "rollouts").mkdir(parents=True)
    sample = {"prompt": text, "before": text, "after": text, "score_before": 1.0, "score_after": 2.0}
    result = {
        "prompts": 3, "score_before": 1.0, "score_after": 2.0, "scored_by": [text, "b"], "taught_by": text,
        f"reward/{text}_before": 1.0, f"reward/{text}_after": 2.0, "kl_ref_seq": 1.0, "rm_pair_accuracy": 0.5,
        "samples": [sample],
    }  # fmt: skip
    (run / "eval.json").write_text(json.dumps(result))
    rollout = {"step": 1, "prompt": text, "score": 1.0, "tokens": [text, "b"], "advantages": [0.5, -0.5]}
    pq.write_table(pa.Table.from_pylist([rollout]), run / "rollouts" / "step-00001.parquet")
    (run / "rollouts" / f"{'x' if text == HARMLESS else '<b>'}.parquet").write_text("")
    return write_report(run)


def rounds(folder: Path, text: str) -> Path:
    run = folder / "run"
    run.mkdir(parents=True)
    (run / "rounds.json").write_text(json.dumps(rounds_of(text)))
    return write_rounds_report(run)


def rounds_of(text: str) -> dict[str, Any]:
    told = {"scored_by": text, "taught_by": text, "samples": [{"prompt": text, "answers": [text, text]}]}
    return SOUND_ROUNDS | told | {"policies": [{"name": text, "score": 0.0}, {"name": text, "score": 1.0}]}


def control(folder: Path, text: str) -> Path:
    run = folder / "run"
    run.mkdir(parents=True)
    figures = dict.fromkeys(["return_mean", "return_std", "return_min", "return_max", "length_mean"], 1.0)
    about = {"env": text, "algorithm": text, "seed": 0, "steps": 1, "episodes": 1}
    (run / "eval.json").write_text(json.dumps(about | figures))
    (run / "recipe.yaml").write_text(f"env: x  # {text}\n", encoding="utf-8", newline="")
    return write_control_report(run)


@pytest.mark.parametrize("report", [language, rounds, control])
def test_reports_have_the_same_structure_whatever_the_text(
    report: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    hostile, harmless = (structure(report(tmp_path / name, text)) for name, text in
                         (("a", HOSTILE), ("b", HARMLESS)))  # fmt: skip
    assert hostile.tags == harmless.tags
    text = "".join(hostile.texts)
    assert "<script>alert(1)</script>" in text
    assert "␛[31m" in text
    assert "⟨U+202E⟩gnp.exe" in text


def terminal(*shown: RenderableType) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system=None, width=2000, legacy_windows=False
    )
    console.print(*shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_show_it(tmp_path: Path) -> None:
    sample = {"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}
    result = {
        "prompts": 3, "score_before": 1.0, "score_after": 2.0, "scored_by": [HOSTILE, "b"], "kl_ref_seq": 1.0,
        f"reward/{HOSTILE}_before": 1.0, f"reward/{HOSTILE}_after": 2.0, "samples": [sample],
    }  # fmt: skip
    for said in (terminal(before_after_table(result)), terminal(rounds_table(rounds_of(HOSTILE)))):
        assert not COMMANDED.search(said), said
        assert "␛[31m" in said
        assert "[bold red]r[/bold red][/nope]{x}%s" in said


def test_rating_shows_it(tmp_path: Path) -> None:
    turns = [{"role": HOSTILE, "content": HOSTILE}]
    path, out = tmp_path / "c.jsonl", io.StringIO()
    path.write_text(json.dumps({"prompt": turns, "response": HOSTILE, "score": None}) + "\n")
    rate_file(path, keys=iter("5"), out=out)
    assert not COMMANDED.search(out.getvalue())
    assert out.getvalue().count("␛") == 2 * 3
    assert json.loads(path.read_text())["response"] == HOSTILE
