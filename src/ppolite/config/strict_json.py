"""JSON that nothing is lost of, and whose every fault is a ValueError with a sentence.

`json` keeps the last of two values of one name, and meets deep nesting with RecursionError.
"""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """Plain data; bytes are UTF-8, with or without a byte order mark."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 ({error.reason})") from None
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("is not JSON (it is nested without end)") from None
    except _TwiceError as error:
        raise ValueError(f"names {error.name!r} twice") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None


class _TwiceError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return made
