"""The rounds of `ppolite iterate` side by side: a table for the terminal, and `report.html` beside the rounds.

Every round has a reward model of its own, whose score means nothing to another's. So there is one row for what
the last reward model says of all policies, which favours the last of them, since that one was trained against it;
a row for the judge; and a row for what the scores were that people (or their stand-in) gave. Reward models of
comparisons have no zero: their scores are shown as what they are above the SFT model's, in log-odds of being
preferred.

    ppolite report runs/film_iterate
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from ppolite.obs.report import escaped, page, section, shown
from ppolite.obs.run_files import Rounds, read_json
from ppolite.obs.table import safe
from ppolite.types import UserError

Result = Mapping[str, Any]


def is_iterated(run_dir: Path) -> bool:
    return (run_dir / "rounds.json").exists()


def read_rounds(run_dir: Path) -> Result:
    """What `ppolite iterate` wrote. Raises UserError for a file that holds something else."""
    path, remedy = run_dir / "rounds.json", "delete it and run `ppolite iterate` again"
    result = read_json(path, Rounds, remedy)
    if result is None:
        raise UserError(f"{path}: there is no such file; run `ppolite iterate` again")
    return result


def figures(result: Result) -> list[tuple[str, list[str]]]:
    """Rows of the table: what is measured, and its value for the SFT model and each round's policy."""
    policies, by = result["policies"], result["scored_by"]
    taught = "taught the reward models: no independent witness"
    judge = taught if result["taught_by"] == "judge" else "independent"
    right = [p.get("rm_right") for p in policies]
    own = [p.get("own_score") for p in policies]
    above = [p["score"] - policies[0]["score"] for p in policies]

    def row(key: str, form: str) -> list[str]:
        return [shown(p.get(key), form) for p in policies]

    def gains(key: str) -> list[str]:
        return [_interval(p.get(f"{key}_gain_ci95")) for p in policies]

    rows = [
        (
            "score above the SFT model's, last reward model (the last round was trained against it)",
            ["0", *(shown(value, "+.2f") for value in above[1:])],
        ),
        ("  gain over the policy before, 95 %", gains("score")),
        (
            "  the same by its own round's reward model (not comparable between rounds)",
            [shown(o[1] - o[0], "+.2f") if o else "–" for o in own],
        ),
        (f"judge ({judge})", row("judge", "+.3f")),
        ("  gain over the policy before, 95 %", gains("judge")),
        ("KL to the SFT model, nats a sequence", ["0", *row("kl_ref_seq", ".2f")[1:]]),
        ("length, tokens", row("length", ".1f")),
        ("distinct-2 (diversity)", row("distinct2", ".3f")),
        (f"mean score given to its candidates by {by}", row("candidates_score", "+.2f")),
        (
            "its round's reward model: right on held-out comparisons of the round's candidates",
            [f"{r[0]:.1%} of {r[1]}" if r else "–" for r in right],
        ),
    ]
    return [(label, cells) for label, cells in rows if set(cells) != {"–"}]


def _interval(ci: Sequence[float] | None) -> str:
    return f"{shown(ci[0], '+.2f')} … {shown(ci[1], '+.2f')}" if ci else "–"


def rounds_table(result: Result, samples: int = 3) -> Group:
    """The figures and a few answers, for the terminal."""
    names = [p["name"] for p in result["policies"]]
    names = [safe(name) for name in names]
    table = Table("on held-out prompts", *names)
    for label, cells in figures(result):
        table.add_row(safe(label), *cells)
    table.caption = (
        f"{result['evaluation']['prompts']} prompts; candidates scored by {safe(result['scored_by'])}"
    )
    texts = Table("prompt", *names, title="samples", show_lines=True)
    for sample in result["samples"][:samples]:
        texts.add_row(*map(safe, (sample["prompt"], *sample["answers"])))
    return Group(table, texts)


def write_rounds_report(run_dir: str | Path) -> Path:
    """Write `report.html` beside the rounds, and return its path."""
    run = Path(run_dir)
    result = read_rounds(run)
    names = [p["name"] for p in result["policies"]]
    head = "".join(f"<th>{escaped(name)}</th>" for name in names)
    body = "".join(
        f"<tr><td>{escaped(label)}</td>{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>"
        for label, cells in figures(result)
    )
    links = " · ".join(
        f'<a href="round-{i}/report.html">report of round {i}</a>' for i in range(1, len(names))
    )
    samples = "".join(_sample(sample, names) for sample in result["samples"])
    prompts, by = result["evaluation"]["prompts"], escaped(result["scored_by"])
    sections = {
        "rounds": section(
            "rounds",
            "Side by side",
            f"<p>Means over {prompts} held-out prompts, the same for all. Candidates were scored by {by}.</p>"
            f'<table class="headline"><thead><tr><th></th>{head}</tr></thead>{body}</table><p>{links}</p>',
        ),
        "samples": section("samples", "Samples", samples),
    }
    path = run / "report.html"
    facts = f"{len(names) - 1} rounds of sample → score → reward → ppo"
    path.write_text(page(run.resolve().name, facts, sections), encoding="utf-8")
    return path


def _sample(sample: Mapping[str, Any], names: Sequence[str]) -> str:
    sides = "".join(
        f'<div><div class="label">{escaped(name)}</div><div class="text">{escaped(answer)}</div></div>'
        for name, answer in zip(names, sample["answers"], strict=True)
    )
    return (
        f'<div class="sample"><div class="prompt">{escaped(sample["prompt"])}</div>'
        f'<div class="sides many">{sides}</div></div>\n'
    )
