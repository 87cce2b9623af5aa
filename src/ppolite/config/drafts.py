"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


def draft_of(path: Path) -> Path:
    """Where `path` is written until it is whole."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def drafted(path: Path) -> Generator[Path]:
    """The draft to write, which takes the name `path` at the end; where writing fails, it goes.

    What the operating system refuses of the draft it says of `path`, which is the name that people know.
    """
    draft = draft_of(path)
    try:
        yield draft
        draft.rename(path)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink()
        if isinstance(error, OSError) and error.filename == str(draft):
            error.filename, error.filename2 = str(path), None
        raise
