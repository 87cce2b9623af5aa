"""The file is read after every key, as if the machine had stopped right there."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from ppolite.obs.rate import Counts, rate_file
from ppolite.types import UserError

ROWS = [
    {"prompt": "The film", "response": "is dull.", "score": None, "model": "a", "meta": {"k": [1, 2]}},
    {"prompt": "rated", "response": "before", "score": 3.5},
    {"prompt": [{"role": "user", "content": "影评"}], "response": "很好", "score": None},
    {"prompt": "no score key", "response": "x"},
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "candidates.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return file


def scores(path):
    return [json.loads(line).get("score") for line in path.read_text(encoding="utf-8").splitlines()]


def rate(path, keys):
    out = io.StringIO()
    return rate_file(path, keys=iter(keys), out=out), out.getvalue()


def test_every_answer_is_on_disk_before_the_next_question(path):
    seen = []

    def keys():
        for key in "9u4s7":
            yield key
            seen.append(scores(path))

    counts = rate_file(path, keys=keys(), out=io.StringIO())
    none = None
    assert seen == [
        [9, 3.5, none, none],
        [none, 3.5, none, none],
        [4, 3.5, none, none],
        [4, 3.5, none, none],
        [4, 3.5, none, 7],
    ]
    assert counts == Counts(rated=2, left=1, total=4)


def test_going_on_asks_the_rest_and_the_skipped(path):
    rate(path, "5sq")
    _, text = rate(path, "q")
    assert "影评" in text
    assert "is dull" not in text
    assert "1/2 · 2 of 4 have a score" in text


def test_other_fields_and_unrated_lines_stay(path):
    before = path.read_text(encoding="utf-8").split("\n")
    rate(path, "5s8q")
    after = path.read_text(encoding="utf-8").split("\n")
    assert after[1:3] == before[1:3]
    assert json.loads(after[0]) == ROWS[0] | {"score": 5}
    assert list(json.loads(after[0])) == list(ROWS[0])
    assert after[-1] == ""


def test_the_last_answer_can_be_taken_back(path):
    counts, _ = rate(path, "123u9q")
    assert scores(path) == [1, 3.5, 2, 9]
    assert counts.left == 0
    assert rate(path, "5")[0] == Counts(0, 0, 4)


def test_unknown_keys_explain_and_change_nothing(path):
    before = path.read_bytes()
    _, text = rate(path, ["x", "10", "", "u", "q"])
    assert path.read_bytes() == before
    assert "Nothing to undo" in text


def test_escape_codes_of_a_response_do_not_reach_the_terminal(path):
    path.write_text(json.dumps({"prompt": "p", "response": "\x1b[2J[bold]gone", "score": None}))
    _, text = rate(path, "3")
    assert "\x1b" not in text
    assert "␛[2J[bold]gone" in text
    assert scores(path) == [3]


def test_a_lone_surrogate_survives(path):
    path.write_text('{"prompt": "中", "response": "\\ud83d", "score": null}\n', encoding="utf-8")
    rate(path, "3")
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "中", "response": "\ud83d", "score": 3}


def test_somebody_elses_change_is_not_overwritten(path):
    def keys():
        path.write_text(path.read_text(encoding="utf-8") + json.dumps(ROWS[0]), encoding="utf-8")
        yield "5"

    with pytest.raises(UserError, match="changed by another program"):
        rate_file(path, keys=keys(), out=io.StringIO())
    assert scores(path)[0] is None


def test_a_link_stays_a_link_and_the_mode_stays(path, tmp_path):
    path.chmod(0o640)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    rate(link, "5")
    assert link.is_symlink()
    assert scores(path)[0] == 5
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["candidates.jsonl", "link.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ('{"prompt": "p", "response": "r"}\n\nnot json\n', "row 3 is not JSON"),
        ("[1]", "row 1 is a list"),
        ('{"response": "r"}', "row 1: 'prompt' is None"),
        ('{"prompt": [{"role": "user"}], "response": "r"}', "'prompt' is"),
        ('{"prompt": "p", "response": 3}', "'response' is 3"),
        ('{"prompt": "p", "response": "r", "score": "high"}', "'score' is 'high'"),
    ],
)
def test_what_cannot_be_rated_is_named(path, text, message):
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        rate(path, "1")


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        rate(tmp_path / "none.jsonl", "1")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        rate(tmp_path / "latin.jsonl", "1")


COMMAND = [sys.executable, "-c", "import sys; from ppolite.obs.rate import rate_file; rate_file(sys.argv[1])"]


def test_piped_lines_are_answers(path):
    subprocess.run([*COMMAND, path], input="5\n10\n7\n", text=True, check=True, capture_output=True)
    assert scores(path) == [5, 3.5, 7, None]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_single_keys_of_a_terminal_and_a_kill(path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, path], stdin=theirs, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    try:
        while scores(path)[0] is None and time.monotonic() < deadline:
            os.write(ours, b"\x1b[5~")  # Page Up: no answer, though it holds a 5
            time.sleep(0.2)
            os.write(ours, b"8")
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(ours)
        os.close(theirs)
    assert scores(path)[0] == 8
    assert set(scores(path)) <= {8, 3.5, None}
