"""A reward function in its process: what it is given, and every way in which it may fail."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.rollout.sources.kit import said

from ppolite.config import FunctionSource
from ppolite.rollout.sources.function import FunctionScorer
from ppolite.types import Prompt, UserError

Make = Callable[..., FunctionScorer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A scorer of the function `f` with this text in a file of its own."""

    def made(
        text: str, name: str = "f", *, file: str = "mine.py", columns: Sequence[str] = (), **settings: Any
    ) -> FunctionScorer:
        (tmp_path / file).write_text(text, encoding="utf-8")
        source = {"kind": "function", "function": f"{tmp_path / file}:{name}", **settings}
        return FunctionScorer(FunctionSource.model_validate(source), columns)

    return made


def test_numbers_by_hand(make: Make) -> None:
    scorer = make("def f(responses):\n    return [len(r) for r in responses]\n")
    assert scorer.score([said("a"), said("bcd"), said("你好")]) == [1.0, 3.0, 2.0]
    assert scorer.score([said("four")]) == [4.0]


def test_what_it_is_given(make: Make) -> None:
    scorer = make(
        "def f(prompts, responses, messages, finish, answer, weight=None, absent=7):\n"
        "    assert prompts == ['last', 'once'], prompts\n"
        "    assert messages[0] == [{'role': 'user', 'content': 'first'}, {'role': 'assistant', 'content': 'x'},"
        " {'role': 'user', 'content': 'last'}], messages\n"
        "    assert messages[1] == [{'role': 'user', 'content': 'once'}], messages\n"
        "    assert (responses, finish) == (['a', 'b'], ['stop', 'length'])\n"
        "    assert (answer, weight, absent) == ([3, None], [None, [1, {'k': 2}]], 7)\n"
        "    return [1, 2]\n",
        columns=["answer", "weight"],
    )
    turns = (
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "last"},
    )
    first, second = said("a"), said("b", finish="length")
    first.prompt = Prompt(messages=turns, columns={"answer": 3})
    second.prompt = Prompt(text="once", columns={"weight": [1, {"k": 2}]})
    assert scorer.score([first, second]) == [1.0, 2.0]


def test_all_columns(make: Make) -> None:
    text = "def f(responses, **more):\n    return [len(more), sum(v is None for v in more['z'])]\n"
    scorer = make(text, columns=["x", "y", "z"])
    assert scorer.score([said("a", x=1, z=0), said("b", y=2)]) == [4.0, 1.0]
    assert scorer.score([said("a"), said("b")]) == [4.0, 2.0]  # the same, whatever this round's rows have


@pytest.mark.parametrize(
    "returned", ["numpy.array([1, 2.5])", "[numpy.float32(1), numpy.float64(2.5)]", "(True, 2.5)"]
)
def test_numbers_of_other_kinds(make: Make, returned: str) -> None:
    assert make(f"import numpy\ndef f(responses): return {returned}\n").score([said("a"), said("b")]) == [
        1,
        2.5,
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "gave None instead of a list of 2 numbers"),
        ("return 'high'", "gave 'high' instead of a list of 2 numbers"),
        ("return {'a': 1}", "gave {'a': 1} instead of a list of 2 numbers"),
        ("return (x for x in [1, 2])", "gave '<generator>' instead of a list of 2 numbers"),
        ("return [1]", "gave 1 numbers for 2 responses"),
        ("return [1, 2, 3]", "gave 3 numbers for 2 responses"),
        ("return [1, float('nan')]", "gave nan for response 2 of 2, not a finite number"),
        ("return [float('-inf'), 1]", "gave -inf for response 1 of 2, not a finite number"),
        ("return [1, '2']", "gave '2' for response 2 of 2, not a finite number"),
        ("return [None, 2]", "gave None for response 1 of 2, not a finite number"),
        ("return [[1], 2]", r"gave \[1\] for response 1 of 2, not a finite number"),
        ("return [10 ** 400, 2]", "for response 1 of 2, not a finite number"),
        ("raise ValueError('no such\\n answer')", r"raised ValueError: no such answer \(mine.py line 2\)"),
        ("return helper(responses)", r"raised ZeroDivisionError: division by zero \(mine.py line 4\)"),
        ("import json; json.loads('{')", r"raised JSONDecodeError: .* \(mine.py line 2\)"),
        ("raise SystemExit(3)", r"raised SystemExit: 3 \(mine.py line 2\)"),
        ("raise ValueError('\\x1b[31mred')", r"raised ValueError: ␛\[31mred"),
        ("import os; os._exit(5)", "took its process down with exit status 5"),
        ("import os; os.kill(os.getpid(), 11)", r"took its process down with signal 11 \(SIGSEGV\)"),
    ],
)
def test_what_goes_wrong_is_said(make: Make, body: str, message: str) -> None:
    scorer = make(f"def f(responses):\n    {body}\ndef helper(x):\n    return 1 / 0\n")
    with pytest.raises(UserError, match=message) as caught:
        scorer.score([said("a"), said("b")])
    assert str(caught.value).startswith("reward function ")
    assert "\n" not in str(caught.value)


def test_after_a_failure_it_can_be_asked_again(make: Make) -> None:
    scorer = make(
        "import os\n"
        "def f(responses):\n"
        "    if responses == ['die']: os._exit(1)\n"
        "    if responses == ['raise']: raise OSError('no')\n"
        "    return [2] * len(responses)\n"
    )
    for text in ("die", "raise", "die"):
        with pytest.raises(UserError):
            scorer.score([said(text)])
        assert scorer.score([said("fine")]) == [2.0]


def test_a_function_that_hangs_is_ended_with_its_children(make: Make, tmp_path: Path) -> None:
    scorer = make(
        "import os, subprocess\n"
        "def f(responses):\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        f"    open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "    while True: pass\n",
        timeout=1.0,
    )
    started = time.monotonic()
    with pytest.raises(
        UserError, match="gave no answer within 1 s and was ended; mend it or raise its timeout"
    ):
        scorer.score([said("a")])
    assert time.monotonic() - started < 5
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_timeout_is_the_recipe_s(make: Make) -> None:
    text = "import time\ndef f(responses):\n    time.sleep(0.6)\n    return [1] * len(responses)\n"
    assert make(text, timeout=20.0).score([said("a")]) == [1.0]
    with pytest.raises(UserError, match=r"within 0\.3 s"):
        make(text, timeout=0.3).score([said("a")])


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("f = 3\n", "f", "raised TypeError: f is int, no function"),
        ("def g(): pass\n", "f", "raised AttributeError: module 'mine' has no attribute 'f'"),
        ("import no_such_thing\n", "f", r"raised ModuleNotFoundError: .*no_such_thing.* \(mine.py line 1\)"),
        ("def f(:\n", "f", "raised SyntaxError: invalid syntax .*line 1"),
        ("def f(a, /): pass\n", "f", "its arguments are passed by name"),
        ("import time\ntime.sleep(9)\n", "f", "gave no answer within 2 s"),
    ],
)
def test_what_is_no_function_is_said_at_once(make: Make, text: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(text, name, timeout=2.0)
    with pytest.raises(UserError, match="FileNotFoundError"):
        FunctionScorer(FunctionSource(kind="function", function="nowhere.py:f"))


def test_a_column_that_is_not_there(make: Make) -> None:
    text = "def f(responses, answr): return [1 for a in answr if a is None]\n"
    with pytest.raises(
        UserError, match=r"the column 'answr', but ppo.prompts has answer, level.*mean 'answer'\?"
    ):
        make(text, columns=["answer", "level"])
    with pytest.raises(
        UserError, match=r"ppo\.prompts has none beside the prompt; add it, or ask for another"
    ):
        make(text)
    # Some row has it, though none of this round.
    assert make(text, columns=["answr"]).score([said("a")]) == [1]


def test_a_module_is_found_from_the_working_folder(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `http` and `worker` would be taken from the folder of worker.py if that were searched.
    (tmp_path / "helper_of_mine.py").write_text("import http.client\nBONUS = 4\n")
    (tmp_path / "rewards_of_mine.py").write_text(
        "from helper_of_mine import BONUS\ndef f(responses): return [BONUS for _ in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert FunctionScorer(FunctionSource(kind="function", function="rewards_of_mine:f")).score(
        [said("a")]
    ) == [4]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    # A file's own folder is searched too.
    assert make("from helper_of_mine import BONUS\ndef f(responses): return [BONUS]\n").score(
        [said("a")]
    ) == [4]


def test_it_may_print_read_and_remember(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    scorer = make(
        "import sys\ncalls = 0\n"
        "def f(responses):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    print('{\"scores\": [9]}', flush=True)\n"
        "    assert sys.stdin.read() == ''\n"
        "    return [calls]\n"
    )
    assert [scorer.score([said("a")]) for _ in range(2)] == [[1.0], [2.0]]
    assert capfd.readouterr().err.count('{"scores": [9]}') == 2


def test_a_round_of_many_long_texts(make: Make) -> None:
    scorer = make("def f(responses): return [len(r) for r in responses]\n")
    assert scorer.score([said("x" * 20_000)] * 200) == [20_000.0] * 200


def test_no_process_stays_behind(make: Make) -> None:
    def children() -> set[int]:
        return {p.pid for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE}

    before = children()
    scorer = make("def f(responses): return [1]\n")
    assert len(children() - before) == 1
    del scorer
    gc.collect()
    assert not children() - before


def test_it_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, subprocess, time\ndef f(responses):\n    child = subprocess.Popen(['sleep', '60'])\n"
        "    print('pid', os.getpid(), child.pid, flush=True)\n    time.sleep(60)\n"
    )
    code = (
        "from tests.rollout.sources.kit import said\n"
        "from ppolite.config import FunctionSource\n"
        "from ppolite.rollout.sources.function import FunctionScorer\n"
        "FunctionScorer(FunctionSource(kind='function', function='mine.py:f')).score([said('a')])\n"
    )
    root = Path(__file__).parents[3]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}"}
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )
    assert run.stderr is not None
    with run.stderr as lines:
        pids = [int(pid) for pid in next(line for line in lines if line.startswith("pid")).split()[1:]]
        run.kill()
        run.wait()
    assert len(pids) == 2  # of the function, and of what it has started
    for _ in range(100):
        if all(is_gone(pid) for pid in pids):
            return
        time.sleep(0.05)
    pytest.fail(f"of the processes {pids} one is still there")


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_columns_json_has_no_form_for(make: Make) -> None:
    import datetime

    scorer = make("def f(responses, day): return [len(day[0])]\n", columns=["day"])
    day = datetime.date(2026, 2, 3)
    assert scorer.score([said("a", day=day)]) == [10.0]


def test_half_a_character_passes(make: Make) -> None:
    scorer = make("def f(responses): return [ord(responses[0])]\n")
    assert scorer.score([said("\ud800")]) == [float(0xD800)]
