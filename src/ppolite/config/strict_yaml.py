"""YAML as a recipe needs it: a mapping of text to plain values, in which nothing is lost and nothing is hidden.

What YAML allows beyond that is refused, with its line: a key given twice (the first would be lost), tags such as
`!!python/object`, keys that are no text, aliases that write a few lines out to millions of values, and nesting without
end. Dates stay text. Anchors, aliases and merge keys (`<<: *base`) are welcome.

    parse("ppo: {steps: 3}", "film.yaml")        → {"ppo": {"steps": 3}}
"""

from __future__ import annotations

import re
from typing import Any, cast

import yaml

from ppolite.types import UserError

MOST_VALUES = 10_000
"""Of a whole file, aliases written out; a recipe has about a hundred."""
MOST_LEVELS = 50


_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""Escapes may spell them: no file name holds a NUL, and no file half a surrogate pair."""


class _Loader(yaml.SafeLoader):
    """SafeLoader makes text, numbers, true and false, null, lists and mappings; this one makes no dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _RefusedError(Exception):
    """What is wrong, and on which line (from 0)."""

    def __init__(self, what: str, mark: yaml.Mark | None) -> None:
        super().__init__(what)
        self.what, self.mark = what, mark


def parse(text: str, where: str) -> Any:
    """The one document in `text`. Raises UserError, which begins with `where` and names the line."""
    try:
        _check_events(text)
        loader: Any = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except _RefusedError as error:
        what, mark = error.what, error.mark
    except yaml.MarkedYAMLError as error:
        told = ", ".join(part for part in (error.context, error.problem) if part)
        what, mark = f"{told}; mend it there", error.problem_mark
    except yaml.reader.ReaderError as error:
        what, mark = f"{_code(error.character)} has no place in YAML; remove it", None
    except ValueError as error:  # of more digits than Python reads, or of none, like 0x_
        what, mark = f"a number cannot be read ({error}); mend it", None
    line = f" line {mark.line + 1}" if mark else ""
    raise UserError(f"{where}{line}: no valid YAML: {' '.join(what.split())}")


def _code(character: int | str | bytes) -> str:
    return f"the character U+{character if isinstance(character, int) else ord(character):04X}"


def _check_events(text: str) -> None:
    level = 0
    events: Any = cast("Any", yaml).parse(text, _Loader)
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            level += 1
            if level > MOST_LEVELS:
                raise _RefusedError(
                    f"more than {MOST_LEVELS} levels deep; write it flatter", event.start_mark
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            level -= 1
        if tag := getattr(event, "tag", None):
            raise _RefusedError(f"the tag {tag} has no place in a recipe; remove it", event.start_mark)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Values in and below a node, those behind aliases each time they are named, and levels; (0, 0): being counted."""
    if id(node) in known:
        if known[id(node)] == (0, 0):
            raise _RefusedError("an alias stands in what it names; write it out", node.start_mark)
        return known[id(node)]
    known[id(node)] = (0, 0)
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.ScalarNode) and (found := _NO_TEXT.search(node.value)):
        raise _RefusedError(f"{_code(found[0])} has no place in a recipe; remove it", node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [value for _, value in node.value]
    inner = [_measure(part, known) for part in parts]
    values, levels = 1 + sum(v for v, _ in inner), 1 + max((n for _, n in inner), default=0)
    if values > MOST_VALUES or levels > MOST_LEVELS:
        found = f"{MOST_VALUES:,} values" if values > MOST_VALUES else f"{MOST_LEVELS} levels"
        raise _RefusedError(f"its aliases stand for more than {found}; write less", node.start_mark)
    known[id(node)] = values, levels
    return values, levels


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set[str]()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith((":str", ":merge")):
            found = f"`{key.value}`" if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            raise _RefusedError(f"{found} is no text, as keys are; put it in quotes", key.start_mark)
        if key.value in seen:
            raise _RefusedError(f"the key `{key.value}` stands there twice; remove one", key.start_mark)
        seen.add(key.value)
