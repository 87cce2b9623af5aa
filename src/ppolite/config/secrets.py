"""What a recipe must not hold: it is saved with the run, shown in reports and sent to colleagues.

Told by its form alone: tokens of well-known services, private keys, addresses with a user or a password. It is refused
and not redacted, since a run must be able to go on from its saved recipe (docs/decisions/0008-reward-sources.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

from ppolite.types import UserError

_TOKEN = re.compile(
    r"\b(hf_|sk_live_|gh[oprsu]_|github_pat_|glpat-|xox[abprs]-|pypi-AgE)[A-Za-z0-9_-]{20,}"
    r"|\bsk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{24,}"  # and no folder called sk-learn-something
    r"|\bAKIA[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{35}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}"
    r"|\b[Bb]earer [A-Za-z0-9._~+/-]{16,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b[a-z][a-z0-9+.-]*://[^/\s@]*@"
)
NAMES_SECRET = re.compile(r"key|token|secret|passw|pwd|auth|^sig$|signature|credential", re.IGNORECASE)
"""Of a query's or an option's name: its value had better not be written down."""


def refuse_secrets(tree: dict[str, Any], where: str) -> None:
    """Raises UserError, without the secret, for the first key whose value is or holds one."""
    for key, text in _texts(tree, ""):
        if _TOKEN.search(text):
            raise UserError(
                f"{where}: `{key}` holds a token or a password, and recipes are saved and shown; take it out, and "
                "put it where the environment or a login keeps it"
            )


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in cast("dict[Any, Any]", value).items():
            yield from _texts(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(cast("list[Any]", value)):
            yield from _texts(inner, f"{path}.{i}")
