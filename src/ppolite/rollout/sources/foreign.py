"""What other people's code and servers are handed, and what they hand back: in time, in number, in shape.

sent        prompts, responses and columns of rollouts as plain lists
columns_of  the columns that prompts' rows have beside the prompt
require     refuses to ask for one that none has
without_nan numbers that JSON has no form for become null
within      an answer, or TimeoutError
checked     an answer that should be a list of finite numbers
fault_of    what is wrong with it
quoted      a foreign text in one of our sentences
"""

from __future__ import annotations

import math
import queue
import reprlib
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar, cast

from ppolite.data.tables import nearest
from ppolite.obs.visible import visible
from ppolite.types import NotFiniteError, Prompt, Rollout, UserError

T = TypeVar("T")

BASICS: dict[str, Callable[[Rollout], Any]] = {
    "prompts": lambda r: r.prompt.last,
    "responses": lambda r: r.text,
    "messages": lambda r: list(r.prompt.messages) or [{"role": "user", "content": r.prompt.text}],
    "finish": lambda r: r.finish,
}
"""Prompts as text (of a conversation the last user turn) and as the whole conversation, responses as text, and
`stop` or `length`."""


def sent(rollouts: Sequence[Rollout], names: Iterable[str]) -> dict[str, list[Any]]:
    """A list for each name: one of BASICS, else a column of the prompts' rows, null where a row lacks it."""
    made: dict[str, list[Any]] = {}
    for name in names:
        read = BASICS.get(name, lambda r, name=name: r.prompt.columns.get(name))
        made[name] = [read(r) for r in rollouts]
    return made


def columns_of(prompts: Iterable[Prompt]) -> list[str]:
    """All that any of their rows has, sorted."""
    return sorted({key for prompt in prompts for key in prompt.columns if key not in BASICS})


def require(names: Iterable[str], columns: Collection[str], who: str) -> None:
    """Raises UserError where a name is neither one of BASICS nor one of `columns`."""
    for name in names:
        if name not in BASICS and name not in columns:
            raise UserError(
                f"{who} asks for the column {name!r}, but ppo.prompts has {', '.join(columns) or 'none'} beside "
                f"the prompt{nearest(name, list(columns)) or '; add it, or ask for another'}"
            )


def without_nan(value: Any) -> Any:
    """Null in the place of numbers that JSON has no form for, such as the empty cells of a table."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    return [without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value


def within(seconds: float, work: Callable[[], T]) -> T:
    """`work()`. Raises TimeoutError when it takes longer; its thread is then left to itself."""
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:  # noqa: BLE001  raised again below, in the caller's thread
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return answer  # pyright: ignore[reportReturnType]  None only beside an error, or where T is None


def checked(values: object, count: int, who: str, then: str) -> list[float]:
    """`count` finite numbers, true and false being 1 and 0.

    Raises NotFiniteError where one is infinite or NaN, UserError where they are anything else: `who` gave what, and
    `then` what to do.
    """
    fault = fault_of(values, count)
    if fault is None:
        return [float(value) for value in cast("list[float]", values)]
    odd = (
        isinstance(values, list) and len(values) == count and all(isinstance(v, int | float) for v in values)
    )
    raise NotFiniteError(f"{who} {fault}") if odd else UserError(f"{who} {fault}; {then}")


def fault_of(values: object, count: int) -> str | None:
    """None for a list of `count` finite numbers (true and false are 1 and 0), else what it is instead."""
    if not isinstance(values, list):
        return f"gave {quoted(reprlib.repr(values))} instead of a list of {count} numbers"
    if len(values) != count:
        return f"gave {len(values)} numbers for {count} responses"
    for i, value in enumerate(values):
        try:
            # "3" would pass float().
            sound = isinstance(value, int | float) and math.isfinite(value)
        except OverflowError:
            sound = False
        if not sound:
            return f"gave {quoted(reprlib.repr(value))} for response {i + 1} of {count}, not a finite number"
    return None


def quoted(text: str, most: int = 200) -> str:
    """On one line, without what a terminal would obey, and not too long."""
    line = visible(" ".join(text.split()), keep="")
    return line if len(line) <= most else line[: most - 1] + "…"
