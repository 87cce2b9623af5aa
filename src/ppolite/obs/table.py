"""The before/after table that ends a run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from ppolite.obs.visible import visible

TEACHER = "judge (scored the training data as a stand-in for people: no independent witness)"

ROWS = (
    ("length", "length, tokens", "{:.1f}"),
    ("distinct2", "distinct-2 (diversity)", "{:.3f}"),
    ("cut_share", "cut by the length limit", "{:.1%}"),
)


def before_after_table(result: Mapping[str, Any], samples: int = 4) -> Group:
    """Figures of `eval.json` and a few answers, before and after."""
    judge = TEACHER if result.get("taught_by") == "judge" else "independent judge (never seen in training)"
    sources = result.get("scored_by") or ["model"]
    alone = sources == ["model"]
    score = "predicted score (reward model, trained against)" if alone else "score, trained against"
    rows = [
        ("score", score, "{:.2f}"),
        *((f"reward/{name}", f"  {name}", "{:.3f}") for name in sources if not alone),
        ("judge", judge, "{:.3f}"),
        *ROWS,
    ]
    table = Table("on held-out prompts", "before (SFT)", "after (PPO)", "gain, 95 % interval")
    for key, label, form in rows:
        before, after = result.get(f"{key}_before"), result.get(f"{key}_after")
        if before is None or after is None:
            continue
        interval = result.get(f"{key}_gain_ci95")
        gain = f"{after - before:+.2f}  [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else ""
        table.add_row(safe(label), form.format(before), form.format(after), safe(gain))
    table.add_row("KL to the SFT model, nats a sequence", "0", f"{result['kl_ref_seq']:.2f}", "")
    table.caption = f"{result['prompts']} prompts" + _agreement(result)
    texts = Table("prompt", "before", "after", title="samples", show_lines=True)
    for sample in result.get("samples", [])[:samples]:
        texts.add_row(*(safe(sample[k]) for k in ("prompt", "before", "after")))
    return Group(table, texts)


def safe(text: str) -> str:
    """Text of models and data for a cell of rich: neither the terminal nor rich obeys it."""
    return escape(visible(text))


VERDICTS = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


def findings_table(findings: Sequence[Mapping[str, str]]) -> Table:
    """What `ppolite doctor` has found: of each check its name, verdict, figure, and where need be what to change."""
    table = Table("check", "verdict", "figure, and what to change")
    for found in findings:
        colour = VERDICTS[found["verdict"]]
        told = [safe(found["figure"])]
        if found["remedy"]:
            told.append(f"[{colour}]→ {safe(found['remedy'])}[/]")
        table.add_row(found["name"], f"[{colour}]{found['verdict']}[/]", "\n".join(told))
    verdicts = [found["verdict"] for found in findings]
    table.caption = ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICTS)
    return table


def _agreement(result: Mapping[str, Any]) -> str:
    accuracy = result.get("rm_pair_accuracy")
    if accuracy is None:
        return ""
    spearman = result.get("rm_spearman")
    rank = f", Spearman {spearman:.2f}" if spearman is not None else ""
    who = "the judge does, a stand-in for people" if result.get("taught_by") == "judge" else "people do"
    return f"; the reward model ranks {accuracy:.1%} of held-out pairs as {who}{rank}"
