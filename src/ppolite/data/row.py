"""One row under our column names: typed getters that say what they found instead.

A prompt is text or a list of messages, a response is text or a conversation that ends with it. Whatever
cannot be used raises RowError with the reason and an advice, which ends up in the report; nothing here lets
another exception out for any value that JSON, CSV or Parquet can hold.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from ppolite.data.tables import RowError
from ppolite.types import Message, Prompt

Columns = Mapping[str, str]
"""{our name: the file's name or dotted path}."""

ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names, which come with `from` and `value`."""
MISSING = object()


class Row:
    """The values of one row under our names. Each getter raises RowError where it finds something else."""

    def __init__(self, values: dict[str, Any], columns: Columns, where: str) -> None:
        self.values, self.columns, self.where = values, columns, where

    def get(self, name: str, default: object = MISSING) -> Any:
        """The value, looked up by the file's name for it, first as it stands, then as a dotted path."""
        found: Any = self.values
        path = self.columns.get(name, name)
        if path in self.values:
            return self.values[path]
        for step in path.split("."):
            if isinstance(found, dict) and step in found:
                found = found[step]
            elif isinstance(found, list) and re.fullmatch(r"-?\d+", step) and _within(found, int(step)):
                found = found[int(step)]
            elif default is MISSING:
                raise RowError(f"has no {path!r}", "add it")
            else:
                return default
        return found

    def others(self, *names: str) -> dict[str, Any]:
        """The values of all columns but those that are read as `names`, by the file's own names."""
        read = {self.columns.get(name, name) for name in names}
        return {str(key): value for key, value in self.values.items() if key not in read}

    def has(self, name: str) -> bool:
        return self.get(name, None) is not None

    def number(self, name: str) -> float:
        return to_number(self.get(name), name)

    def list(self, name: str) -> list[Any]:
        value = self.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):  # the cell of a CSV file
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        if not isinstance(value, list) or not value:
            raise RowError(f"{name!r} is {short(value)}", "give a list that is not empty")
        return value

    def messages(self, name: str) -> tuple[Message, ...]:
        return tuple(_message(turn, name) for turn in self.list(name))

    def prompt(self, plain: bool) -> Prompt:
        value = self.get("prompt")
        if isinstance(_conversation(value), list):
            return asking(self.messages("prompt"), self.where, "prompt")
        return _text_prompt(_text(value, "prompt"), self.where, plain)

    def answer(self, name: str, prompt: Prompt) -> str:
        return self.answer_in(self.get(name), name, prompt)

    def answer_in(self, value: object, name: str, prompt: Prompt) -> str:
        """The text of a response, which may be an assistant message, alone or after the prompt's messages."""
        value = _conversation(value)
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            return _text(value, name)
        turns = [_message(turn, name) for turn in value]
        if not turns or turns[-1]["role"] != "assistant":
            raise RowError(f"{name!r} does not end with an assistant turn", "end it with the response")
        asked = prompt.messages or ({"role": "user", "content": prompt.text},)
        if turns[:-1] and turns[:-1] != list(asked):
            raise RowError(f"{name!r} begins otherwise than 'prompt'", "give the response alone")
        return turns[-1]["content"]

    def implicit_pair(self) -> tuple[Prompt, str, str]:
        """Chosen and rejected that share their beginning, the prompt (TRL's "implicit prompt")."""
        if isinstance(self.get("chosen"), str):
            # TRL takes the characters that both texts share as the prompt; two answers to a prompt that is
            # in another column share some too, so a forgotten `columns` entry would train on nonsense.
            raise RowError("has texts without a 'prompt'", "map it in the recipe: columns: {prompt: NAME}")
        turns = self.messages("chosen")[:-1]
        if not turns or turns != self.messages("rejected")[:-1]:
            raise RowError("'chosen' and 'rejected' differ before their last turn", "give a 'prompt' column")
        prompt = asking(turns, self.where, "chosen")
        return prompt, self.answer("chosen", prompt), self.answer("rejected", prompt)


def _conversation(value: object) -> object:
    """The messages that a cell of a CSV file holds as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    turns = found if isinstance(found, list) else [found]
    roles = ({"role", "content"}, {"from", "value"})
    alike = turns and all(
        isinstance(turn, dict) and any(keys <= turn.keys() for keys in roles) for turn in turns
    )
    return found if alike else value


def _within(values: list[Any], position: int) -> bool:
    return -len(values) <= position < len(values)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name!r} is {short(value)}", "give text")
    if not value.strip():
        raise RowError(f"{name!r} is empty", "fill it in or remove the row")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # JSON may spell half of a surrogate pair; no tokenizer takes it
            raise RowError(f"{name!r} holds half a character", "write \\uD800-\\uDFFF in pairs") from None
    return value


def to_number(value: object, name: str) -> float:
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(f"{name!r} is empty", "give a number, or remove the row")
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        raise RowError(f"{name!r} is {short(value)}", "give a number") from None
    if not math.isfinite(number):
        raise RowError(f"{name!r} is {number}", "give a finite number")
    return number


def _message(turn: object, name: str) -> Message:
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(role, str) and role:
            return {"role": ROLES.get(role, role), "content": _text(content, f"{name}.content")}
    raise RowError(f"{name!r} holds {short(turn)}", "write each turn as {role: …, content: …}")


def asking(turns: tuple[Message, ...], where: str, name: str) -> Prompt:
    if not turns or turns[-1]["role"] == "assistant":
        raise RowError(f"{name!r} asks nothing before the answer", "end the prompt with a user turn")
    return Prompt(messages=turns, source=where)


def _text_prompt(text: str, where: str, plain: bool) -> Prompt:
    if plain:
        return Prompt(text=text, source=where)
    return Prompt(messages=({"role": "user", "content": text},), source=where)


def short(value: object) -> str:
    return "nothing" if value is None else reprlib.repr(value)
