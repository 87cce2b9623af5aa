"""The plan of `ppolite plan` in the terminal: parts by stage, the verdict, and what would help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

MiB = 2**20


def plan_view(plan: Mapping[str, Any]) -> Group:
    """Of `Plan.as_json()`. Parts that take less than half a MiB are left out."""
    table = Table("stage", "when", "part", title="memory, MiB")
    table.add_column("", justify="right")
    for stage in plan["stages"]:
        name = stage["name"]
        for when, parts in (("always", stage["always"]), *stage["phases"].items()):
            label = when
            for part, size in parts.items():
                if size >= MiB / 2:
                    table.add_row(name, label, part, _number(size))
                    name = label = ""
        table.add_row("", "", f"peak: {stage['largest']}", _number(stage["peak"]), style="bold")
        table.add_section()
    return Group(table, Text(verdict(plan)))


def verdict(plan: Mapping[str, Any]) -> str:
    """Whether it fits, and which settings take less."""
    has, peak = (f"{plan[key] / 2**30:.1f} GiB" for key in ("has", "peak"))
    if plan["fits"]:
        return f"{peak} at most; {plan['where']} has {has}: it fits"
    said = f"{peak} at most; {plan['where']} has {has}: it does not fit"
    helps = [
        f"    --set {change}: {size / 2**30:.1f} GiB{', fits' if size <= plan['has'] else ''}"
        for change, size in plan["changes"]
    ]
    if not helps:
        return f"{said}. Choose a smaller model"
    enough = any(size <= plan["has"] for _, size in plan["changes"])
    none = "" if enough else " None is enough alone: combine them, or choose a smaller model."
    return "\n".join([f"{said}.{none} With one of these changes:", *helps])


def _number(size: int) -> str:
    return f"{size / MiB:,.0f}"
