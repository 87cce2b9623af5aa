"""`report.html` of a run: what was gained, what it cost, and what PPO did token by token.

One file that needs nothing else: pictures are inside it, nothing is loaded from anywhere, and all text of
models and data is escaped. Reads `metrics.jsonl`, `eval.json` and `rollouts/*.parquet`; a part whose source
is missing is left out, with a line saying so. Every number says whose it is: training rollouts or held-out
prompts, the reward model (the proxy that PPO climbs) or the judge (which training never saw).

    write_report("runs/demo")
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ppolite.obs.plots import write_plots
from ppolite.obs.run_files import Evaluation, read_json
from ppolite.obs.sinks import read_metrics
from ppolite.obs.token_view import load_rollouts, token_view
from ppolite.obs.visible import visible
from ppolite.types import UserError

Eval = Mapping[str, Any]
AGAIN = "delete it and run `ppolite eval` again"

PROXY = '<span class="tag proxy">proxy: what PPO climbs</span>'
JUDGE = '<span class="tag judge">independent judge</span>'
TEACHER = (
    '<span class="tag proxy">scored the training data as a stand-in for people: no independent witness</span>'
)
HELDOUT = '<span class="tag">held-out prompts</span>'
TRAIN = '<span class="tag">training prompts</span>'

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Forbids the page to load or run anything, even if an escape were missed."""

CAPTIONS = {
    "stages": "Before PPO. Held-out rows share no prompt with training.",
    "ppo": "PPO, a point a step. Grey: that step's training rollouts, sampled. Blue: held-out prompts.",
    "reward_vs_kl": (
        "What the score cost. Up is better, right is further from the SFT model. A score that still rises "
        "while the KL runs away may be the reward model being fooled: then look at the judge."
    ),
    "rm_calibration": (
        "Held-out rows in groups of equal size. On the line, a predicted score is the mean that people gave."
    ),
}


def write_report(run_dir: str | Path) -> Path:
    """Write the PNGs and `report.html` into `run_dir`, and return the path of the latter."""
    run = Path(run_dir)
    if not run.is_dir():
        raise UserError(f"{run} is no run folder; give one that `ppolite run` wrote")
    rows, results = read_metrics(run), read_json(run / "eval.json", Evaluation, AGAIN) or {}
    plots = write_plots(rows, results.get("rm_calibration") or [], run)
    rollouts, complaints = load_rollouts(run / "rollouts")
    curves = _figures(plots, ["ppo", "reward_vs_kl"], "no PPO steps in metrics.jsonl")
    sections = {
        "result": section("result", "Before and after", _headline(results)),
        "curves": section("curves", "PPO", curves),
        "samples": section("samples", "Samples", _samples(results)),
        "tokens": section("tokens", "Token by token", _tokens(rollouts, complaints)),
        "stages": section("stages", "The stages before", _stages(plots, results)),
    }
    path = run / "report.html"
    path.write_text(page(run.resolve().name, _facts(rows), sections), encoding="utf-8")
    return path


def page(name: str, facts: str, sections: Mapping[str, str]) -> str:
    """The whole page; `sections` are shown one after another, with their names to jump to them."""
    links = "\n".join(f'<a href="#{key}">{key}</a>' for key in sections)
    body = "".join(sections.values())
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(name)} · ppolite</title>
<style>{css}</style></head><body>
<h1>{escaped(name)}</h1>
<p class="soft">{facts}</p>
<nav>{links}</nav>
{body}</body></html>
"""


def section(name: str, title: str, body: str) -> str:
    """One part of a page, under its heading."""
    return f'<section id="{name}"><h2>{title}</h2>\n{body}</section>\n'


def _facts(rows: Sequence[Mapping[str, Any]]) -> str:
    ppo = [row for row in rows if row["stage"] == "ppo" and row["step"] > 0]  # 0 is the look before
    if not ppo:
        return "A ppolite run without PPO steps so far."
    worn = next((row for row in ppo if row.get("stopped")), None)  # a line without a step
    ppo = [row for row in ppo if row is not worn]
    facts = [f"{len(ppo)} PPO steps"]
    if worn:
        share = shown(worn.get("ess/share"), ".2f")
        facts.append(
            f"stopped before step {worn['step']}: the samples were worth only {share} of their number"
        )
    if seconds := [row["time/step_s"] for row in ppo if row.get("time/step_s") is not None]:
        facts.append(f"median {median(seconds):.1f} s a step")
    if beta := ppo[-1].get("leash/beta"):
        facts.append(f"last KL coefficient {beta:.3g}")
    if ratios := [row["policy/ratio_max"] for row in ppo if row.get("policy/ratio_max") is not None]:
        facts.append(f"largest ratio {max(ratios):.2f}")
    return " · ".join(facts)


def _headline(results: Eval) -> str:
    if not results:
        return _missing("no eval.json: `ppolite eval RUN` writes it")
    rows = [
        *_score(results),
        _change(
            f"score of the judge {TEACHER if _by_judge(results) else JUDGE}",
            results,
            "judge",
            "+.3f",
            results.get("judge_gain_ci95"),
        ),
        _change("length, tokens", results, "length", ".1f"),
        _change("distinct-2, share of word pairs that are new", results, "distinct2", ".3f"),
    ]
    prompts = results.get("prompts")
    table = (
        '<table class="headline"><thead><tr><th></th><th>before (SFT)</th><th>after (PPO)</th><th>change</th>'
        f"<th>95 % interval of the change</th></tr></thead>{''.join(rows)}</table>"
    )
    lines = [f"<p>Means over {shown(prompts, 'd')} {HELDOUT}, which no stage trained on.</p>", table]
    if results.get("kl_ref_seq") is not None:
        lines.append(
            f"<p>Distance from the SFT model: {shown(results['kl_ref_seq'], '.2f')} nats a sequence.</p>"
        )
    if results.get("judge_after") is None:
        lines.append(_missing("no independent judge was asked, so the gain stands on the proxy alone"))
    return "\n".join(lines)


def _score(results: Eval) -> list[str]:
    """What PPO climbed, and each of the sources that it is made of."""
    sources = results.get("scored_by") or ["model"]
    alone = sources == ["model"]
    whose = "score of the reward model" if alone else "score"
    return [
        _change(f"{whose} {PROXY}", results, "score", "+.2f", results.get("score_gain_ci95")),
        *(_change(f"… of it {escaped(n)}", results, f"reward/{n}", "+.3f") for n in sources if not alone),
    ]


def _by_judge(results: Eval) -> bool:
    return results.get("taught_by") == "judge"


def _change(label: str, results: Eval, key: str, form: str, ci: Sequence[float] | None = None) -> str:
    before, after = results.get(f"{key}_before"), results.get(f"{key}_after")
    if before is None and after is None:
        return ""
    gain = after - before if before is not None and after is not None else None
    interval = f"{shown(ci[0], '+.3f')} … {shown(ci[1], '+.3f')}" if ci else ""
    signed = form if form.startswith("+") else f"+{form}"
    return (
        f"<tr><td>{label}</td><td>{shown(before, form)}</td><td>{shown(after, form)}</td>"
        f"<td>{shown(gain, signed)}</td><td>{interval}</td></tr>"
    )


def _figures(plots: Mapping[str, Path], names: Sequence[str], otherwise: str) -> str:
    shown = [figure(plots[name], CAPTIONS[name]) for name in names if name in plots]
    return "".join(shown) or _missing(otherwise)


def figure(path: Path, caption: str) -> str:
    """A picture (PNG or GIF), inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img class="{path.stem}" alt="{path.stem}" src="data:image/{path.suffix[1:]};base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _stages(plots: Mapping[str, Path], results: Eval) -> str:
    lines = [_figures(plots, ["stages"], "no SFT or reward-model steps in metrics.jsonl")]
    if results.get("rm_pair_accuracy") is not None:
        who = "the judge, a stand-in for people," if _by_judge(results) else "people"
        rank = results.get("rm_spearman")
        spearman = "" if rank is None else f"Spearman {shown(rank, '.3f')}, "
        lines.append(
            f"<p>The reward model on held-out rows: {spearman}right on "
            f"{shown(results['rm_pair_accuracy'], '.1%')} of the pairs that {who} told apart.</p>"
        )
    lines.append(_figures(plots, ["rm_calibration"], "no calibration of the reward model in eval.json"))
    return "\n".join(lines)


def _samples(results: Eval) -> str:
    samples = results.get("samples") or []
    if not samples:
        return _missing("no samples in eval.json")
    return f"<p>{HELDOUT} answered by the SFT model and by the policy.</p>" + "".join(map(_sample, samples))


def _sample(sample: Mapping[str, Any]) -> str:
    sides = "".join(
        f'<div><div class="label">{name}{_scores(sample, side)}</div>'
        f'<div class="text">{escaped(sample.get(side, ""))}</div></div>'
        for side, name in (("before", "before (SFT)"), ("after", "after (PPO)"))
    )
    return (
        f'<div class="sample"><div class="prompt">{escaped(sample.get("prompt", ""))}</div>'
        f'<div class="sides">{sides}</div></div>\n'
    )


def _scores(sample: Mapping[str, Any], side: str) -> str:
    named = (("proxy", sample.get(f"score_{side}")), ("judge", sample.get(f"judge_{side}")))
    return "".join(f" · {name} {shown(value, '+.2f')}" for name, value in named if value is not None)


def _tokens(rollouts: Sequence[Mapping[str, Any]], complaints: Sequence[str]) -> str:
    lines = [_missing(complaint) for complaint in complaints]
    if not rollouts:
        return "".join([*lines, _missing("no rollouts on file (rollouts/*.parquet)")])
    intro = (
        f"<p>{TRAIN} Of the first and of the last step on file: the best, the middle and the worst rollout "
        "by score. Colour is the advantage as the update used it: how much better the answer turned out, "
        "from this token on, than the critic expected. PPO makes blue tokens likelier, orange ones rarer.</p>"
    )
    return "".join([*lines, intro, token_view(rollouts)])


def _missing(text: str) -> str:
    return f'<p class="missing">Left out: {escaped(text)}.</p>\n'


def shown(value: float | None, form: str) -> str:
    """A figure as the page has it; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{form}}".replace("-", "−")


def escaped(value: object) -> str:
    """Text of models and data, harmless in HTML and visible."""
    return html.escape(visible(str(value)))
