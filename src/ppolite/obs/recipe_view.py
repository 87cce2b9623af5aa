"""A resolved recipe with its explanations, as YAML: `ppolite recipe RECIPE --explain`.

    # Rounds of sampling and learning.
    steps: 14  # film.yaml; default 50

What is printed is a recipe again, with or without colours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.text import Text

from ppolite.config import REQUIRED, Key, yaml_text


def recipe_view(keys: Iterable[Key], width: int) -> Text:
    """Every key below its meaning, with where its value comes from behind it; comments are cut to `width`."""
    view, before, opened = Text(), -1, True
    for key in keys:
        level = len(key.path) - 1
        if not opened and (level < before or key.opens or not level):
            view.append("\n")
        before, opened = level, key.opens
        indent, item = "  " * level, isinstance(key.path[-1], int)
        room = max(width - len(indent) - 2, 30)
        for line in textwrap.wrap(" ".join(key.meaning.split()), room, break_on_hyphens=False):
            view.append(f"{indent}# {line}\n", "dim")
        if item:
            view.append(f"{indent}-\n", "bold")
            continue
        view.append(f"{indent}{key.path[-1]}:", "bold")
        if not key.opens:
            view.append(f" {yaml_text(key.value, flow=True)}")
            view.append(f"  # {_told(key)}", "dim" if key.origin == "default" else "cyan")
        view.append("\n")
    return view


def _told(key: Key) -> str:
    if key.origin == "default" or key.default is REQUIRED:
        return key.origin
    if key.default == key.value:
        return f"{key.origin}, as by default"
    return f"{key.origin}; default {yaml_text(key.default, flow=True)}"
