"""Text from models and files, made safe to look at.

A terminal obeys escape sequences, and bidirectional overrides reorder what a person reads, in a terminal
and in a browser. `visible` puts a visible sign in the place of each such character and leaves all other text,
Chinese and emoji included, as it is.
"""

from __future__ import annotations

import unicodedata

_BIDI = set(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))


def visible(text: str, *, keep: str = "\n\t") -> str:
    """ESC becomes ␛, other control characters likewise; C1 controls, bidi overrides and lone surrogates
    become their code point in brackets. Characters of `keep` stay."""
    return "".join(c if c in keep else _sign(c) for c in text)


def _sign(c: str) -> str:
    code = ord(c)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if c in _BIDI or unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"}:
        return f"⟨U+{code:04X}⟩"
    return c
