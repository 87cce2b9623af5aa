"""Each key of a resolved recipe with its meaning, its default, and where its value comes from.

The origins are a tree like that of the recipe's file, with a name in the place of each value: `marked(tree,
"film.yaml")`, over which `--set` puts its own. What has no name there is a default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast, get_args

from pydantic import BaseModel

from ppolite.config.section import Section


class Key(NamedTuple):
    """One line of a recipe. `value` is plain data; a section that follows has none, nor a default."""

    path: tuple[str | int, ...]
    meaning: str
    value: Any = None
    default: Any = None
    """REQUIRED where the recipe must say it."""
    origin: str = "default"
    opens: bool = False
    """The keys that follow are its own."""


REQUIRED = object()


def marked(value: Any, name: str) -> Any:
    """The same tree, with `name` in the place of each value."""
    if isinstance(value, dict):
        return {key: marked(inner, name) for key, inner in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [marked(inner, name) for inner in cast("list[Any]", value)]
    return name


def explained(
    recipe: Section, origins: Any, default: Section | None = None, at: tuple[str | int, ...] = ()
) -> Iterator[Key]:
    """The keys in order, sections before what is in them. `default` is what stands where nobody says anything."""
    plain = recipe.model_dump(mode="json")
    for name, info in type(recipe).model_fields.items():
        value, path = getattr(recipe, name), (*at, name)
        origin = _inner(origins, name)
        standard = (
            REQUIRED if info.is_required() else getattr(default, name) if default else info.get_default()
        )
        meaning = info.description or ""
        parts: tuple[Any, ...] = get_args(info.annotation) or (info.annotation,)
        sections = [part for part in parts if _is_section(part)]
        if isinstance(value, Section):
            yield Key(path, _meaning(value, meaning), opens=True)
            yield from explained(value, origin, standard if isinstance(standard, Section) else None, path)
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            yield Key(path, meaning, opens=True)
            for i, part in enumerate(cast("tuple[Section, ...]", value)):
                yield Key((*path, i), type(part).__doc__ or "", opens=True)
                yield from explained(part, _inner(origin, i), None, (*path, i))
        else:
            if sections and value is None:
                meaning = _meaning(sections[0], meaning)
            said = origin if isinstance(origin, str) else _first(origin)
            yield Key(path, meaning, plain[name], _plain(standard), said or "default")


def _meaning(section: Any, meaning: str) -> str:
    return " ".join(dict.fromkeys(part for part in (section.__doc__, meaning) if part))


def _is_section(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _inner(origins: Any, key: str | int) -> Any:
    if isinstance(origins, dict):
        return cast("dict[str | int, Any]", origins).get(key)
    if isinstance(origins, list) and isinstance(key, int):
        return cast("list[Any]", origins)[key]
    return None


def _first(origins: Any) -> str | None:
    """Of a value that is itself a list or a mapping; one place says all of it, since places replace each other."""
    while isinstance(origins, dict | list):
        inner = cast("list[Any]", [*origins.values()] if isinstance(origins, dict) else origins)
        if not inner:
            return None
        origins = inner[0]
    return origins


def _plain(value: Any) -> Any:
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
