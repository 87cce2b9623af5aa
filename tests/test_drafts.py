"""Files that are there whole or not at all."""

from pathlib import Path

import pytest

from ppolite.config.drafts import drafted
from ppolite.obs.refusal import refusal


def test_what_was_there_stays_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text("old")
    with drafted(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def half(path: Path, error: type[BaseException]) -> None:
    with drafted(path) as draft:
        draft.write_text("ne")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_what_was_there_and_no_draft(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "eval.json"
    path.write_text("old")
    with pytest.raises(error):
        half(path, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refusal_names_the_file_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    inside, folder = tmp_path / "file" / "eval.json", tmp_path / "folder"
    with pytest.raises(NotADirectoryError) as caught, drafted(inside) as draft:
        draft.write_text("new")
    assert refusal(caught.value) == (
        f"{inside}: Not a directory; a file is where a folder should be; move it away, or name another"
    )
    folder.mkdir()
    with pytest.raises(IsADirectoryError) as caught, drafted(folder) as draft:
        draft.write_text("new")
    assert (refusal(caught.value) or "").startswith(f"{folder}: Is a directory; ")
    assert folder.is_dir()
