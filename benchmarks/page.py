"""docs/benchmarks.md, written from benchmarks/results: the latest measurement of each comparison.

make bench-page
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS, Figure, between, number
from benchmarks.record import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
HEAD = """\
# Benchmarks

Written by `make bench-page` from `benchmarks/results`; do not edit. `make bench-peers ARGS=rlhf_step` measures anew.

Two systems run in turn (A B A B …), each measurement in a process of its own, each system in an environment of its own
where versions clash. A cell is the median of the runs with the least and the most in brackets. A ratio is taken within
each pair: how many times as fast ppolite is, or its share of the peer's memory; then the median of these ratios. Memory
is resident, summed over a process and its children, from start to end. What is timed, and what both sides are given and
told, stands at the top of `benchmarks/NAME.py`.
"""
ORDER = ("rlhf_step", "time_to_score", "generate", "logprobs", "sft", "reward", "control")


def latest(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The last line of each comparison, in the order in which they first came."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        row = json.loads(line)
        found[row["comparison"]] = row
    return list(found.values())


def story(bench: str) -> str:
    """What the benchmark says of itself: the first paragraph of its docstring."""
    source = (ROOT / "benchmarks" / f"{bench}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].replace("\n", " ")


def section(bench: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from (f"## {bench}", "", story(bench), "")
    keys = {f[0]: Figure(*f) for row in rows for f in row["figures"]}
    yield table_line("", "system and setting", *(f.unit for f in keys.values()))
    yield "|---|---|" + "---:|" * len(keys)
    for row in rows:
        yield from comparison(row, list(keys.values()))
    yield ""
    for row in rows:
        said = [*tried(row.get("tried", [])), *likely(row.get("likelihood", {})), *row.get("notes", [])]
        if said:
            yield from (f"{row['comparison']}: {'; '.join(said)}.", "")
    for about, names in where(rows).items():
        of = "" if len(names) == len(rows) else f"{', '.join(names)}: "
        yield from (f"{of}{about}", "")


def comparison(row: dict[str, Any], figures: Sequence[Figure]) -> Iterator[str]:
    """One line a side, and one of ratios for each peer."""
    first = row["comparison"]
    for side in row["sides"]:
        yield table_line(
            first, f"{side['name']}: {side['setting']}", *(cell(side.get(f.key)) for f in figures)
        )
        first = ""
    for side in row["sides"][1:]:
        ratios = (over(side["ratios"].get(f.key)) for f in figures)
        yield table_line("", f"**ppolite to {side['name']}**", *ratios)


def cell(figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    once = figure["min"] == figure["max"]
    return number(figure["median"]) if once else f"{number(figure['median'])} ({between(figure)})"


def over(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return ""
    meaning = "of it" if ratio["kind"] == "size" else "as fast"
    return f"**{ratio['median']:.2f}×** {meaning} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def table_line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def tried(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Every setting that was tried, with what it took."""
    by_name: dict[str, list[str]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(f"{row['setting']}: {outcome(row)}")
    for name, settings in by_name.items():
        yield f"tried once each, {name} — {'; '.join(settings)}"


def outcome(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed ({row['failed']})"
    if "ended_after_s" in row:
        return f"ended after {row['ended_after_s']:,} s"
    units = {
        "step_s": "s",
        "seconds": "s",
        "tokens_per_s": "tokens/s",
        "peak_rss_mb": "MiB",
        "gpu_mb": "MiB of GPU memory",
    }
    figures = ", ".join(f"{number(row[key])} {unit}" for key, unit in units.items() if key in row)
    return figures + ("" if row.get("reached", True) else ", not reached")


def likely(found: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """That all systems draw from the same distribution, or not."""
    if found:
        each = (
            "{} {:.2f} ± {:.2f} nats a token, {:.0f} ± {:.0f} tokens".format(
                name, *row["nats"], *row["length"]
            )
            for name, row in found.items()
        )
        yield f"answers of one set, by the model in float32 (mean ± standard error) — {'; '.join(each)}"


def where(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What produced the figures → the comparisons it produced."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(provenance(row), []).append(row["comparison"])
    return found


def provenance(row: dict[str, Any]) -> str:
    """Command, commit, date, machine and versions of a comparison."""
    told = [f"`{row['command']}`", f"commit {row['commit'][:9]}", row["date"], row["cpu"]]
    if "cores" in row:
        told += [f"{row['cores']} cores", f"{row['memory_gb']} GB", f"load {row['load']} before"]
    told += [f"GPU {row['gpu'] or 'none'}", f"threads {row['threads']}", f"Python {row['python']}"]
    runs = [run for side in row["sides"] for run in side["runs"]]
    versions = {f"{name} {version}" for run in runs for name, version in run.get("versions", {}).items()}
    return ", ".join([*told, *sorted(versions)]) + "."


def page(folder: Path) -> str:
    parts = [HEAD]
    for bench in ORDER:
        path = folder / f"{bench}.jsonl"
        if path.exists():
            parts.append("\n".join(section(bench, latest(path.read_text(encoding="utf-8").splitlines()))))
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    PAGE.write_text(page(RESULTS), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} says what benchmarks/results says")


if __name__ == "__main__":
    main()
