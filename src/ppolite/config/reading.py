"""Reading a recipe's text, and what is said when it is wrong.

    read_tree        a YAML file as plain data
    apply_override   KEY=VALUE of the command line, put into it
    explain          one sentence on the first thing that does not fit, with the nearest known key
    save_recipe      the resolved recipe as YAML

Shared by the recipes of language runs (this package) and of control runs (`control/config.py`).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from ppolite.config.section import Section
from ppolite.config.sources import SOURCES, Source
from ppolite.types import UserError

RECIPES = Path(__file__).parent.parent / "recipes"


def _known_keys(section: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for before, key in zip((None, *path), path, strict=False):
        if isinstance(key, int) or (isinstance(before, int) and key in SOURCES):
            section = SOURCES.get(key, section) if isinstance(key, str) else section
            continue
        if key == "rewards":
            section = Source
            continue
        annotation = section.model_fields[key].annotation if key in section.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not found:
            return []
        section = found[0]
    return list(section.model_fields)


def explain(error: ValidationError, where: str, root: type[BaseModel]) -> UserError:
    """One sentence on the first thing that is wrong; unknown keys with the nearest one that `root` has."""
    # A misspelt key also leaves its right name missing: the misspelling is the better news.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = first["loc"]
    # An entry of a list of sources is followed by its kind, which no recipe spells there.
    spelt = [
        key
        for before, key in zip((None, *loc), loc, strict=False)
        if not (isinstance(before, int) and key in SOURCES)
    ]
    path = ".".join(str(p) for p in spelt)
    if first["type"] in ("union_tag_not_found", "union_tag_invalid"):
        kind = first.get("ctx", {}).get("tag")
        near = difflib.get_close_matches(str(kind), SOURCES, n=1, cutoff=0.4) if kind else []
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(SOURCES)}"
        return UserError(f"{where}: `{path}` has {f'the kind `{kind}`' if kind else 'no `kind`'}; {hint}")
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return UserError(f"{where}: unknown key `{path}`; {hint}")
    if first["type"] == "missing":
        return UserError(f"{where}: `{path}` is missing; add it")
    if first["type"] == "value_error":
        prefix = f"{path}: " if path else ""
        return UserError(f"{where}: {prefix}{first.get('ctx', {})['error']}")
    return UserError(f"{where}: `{path}` is {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}")


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set what `section.key=value` says, the value being YAML. Raises UserError."""
    key, eq, value = override.partition("=")
    if not eq or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE, for instance --set ppo.steps=20")
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: `{parent}` is not a section")
        tree = cast("dict[str, Any]", child)
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is no YAML ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def read_tree(path: Path, names: list[str]) -> dict[str, Any]:
    """A YAML file of `key: value` lines as it stands. Raises UserError; `names` are what else could be given."""
    try:
        loaded: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; give a YAML file or one of {', '.join(names)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({_first_line(error)})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: no valid YAML ({_first_line(error)})") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(loaded).__name__}")
    return cast("dict[str, Any]", loaded)


def save_recipe(recipe: Section, path: Path) -> None:
    """Write the resolved recipe, defaults included, so that a later version can repeat the run. Whole or not at all."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    draft.rename(path)
