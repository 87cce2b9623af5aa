import io
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from ppolite.obs import sinks
from ppolite.obs.sinks import MetricsLog, progress, read_metrics, step_line
from ppolite.types import UserError


def strict(text: str) -> dict:
    """JSON as the standard has it: Python's own reader lets NaN pass."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with MetricsLog(tmp_path, "ppo", tensorboard=False) as log:
        log.log(3, {"score/mean": 1.5, "kl/ref_seq": math.nan, "policy/ratio_max": math.inf})
        row = strict((tmp_path / "metrics.jsonl").read_text())
    assert abs(row.pop("time") - time.time()) < 60
    assert row == {
        "stage": "ppo",
        "step": 3,
        "score/mean": 1.5,
        "kl/ref_seq": None,
        "policy/ratio_max": None,
    }


def test_tensors_numpy_and_lists_become_plain_json(tmp_path):
    with MetricsLog(tmp_path, "ppo", tensorboard=False) as log:
        log.log(0, {"a": torch.tensor(2.5), "b": np.float32(0.5), "c": np.int64(3), "d": [1.0, math.nan]})
    row = read_metrics(tmp_path)[0]
    assert (row["a"], row["b"], row["c"], row["d"]) == (2.5, 0.5, 3, [1.0, None])


def test_a_torn_line_is_passed_over_and_then_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "ppo", "step": 0}\n{"stage": "ppo", "st')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]
    with MetricsLog(tmp_path, "ppo", tensorboard=False) as log:
        log.log(1, {})
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [0, 1]


def test_what_is_written_again_is_taken_out_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    stood = [("sft", 1), ("sft", 2), ("ppo", 0), ("ppo", 1), ("ppo", 2)]
    path.write_text("".join(json.dumps({"stage": s, "step": n}) + "\n" for s, n in stood))

    def there(stage: str, after: int | None) -> list[tuple[str, int]]:
        with MetricsLog(tmp_path, stage, after=after, tensorboard=False):
            return [(row["stage"], row["step"]) for row in read_metrics(tmp_path)]

    assert there("ppo", None) == stood
    assert there("ppo", 1) == stood[:4]
    assert there("sft", 5) == stood[:4]
    assert there("ppo", -1) == [("sft", 1), ("sft", 2)]


def test_a_row_that_finds_no_room_leaves_no_part_of_it(tmp_path):
    """A limit on the size of files is a full disk: the write takes what fits, the next one fails."""
    code = """
import resource, signal, sys
from ppolite.obs.sinks import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = MetricsLog(sys.argv[1], "ppo", tensorboard=False)
log.log(1, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    log.log(2, {"note": "x" * 100})
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() in ("No space left on device", "File too large"), done.stderr
    assert [strict(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_lines_of_one_step_merge_and_the_later_stands(tmp_path):
    with MetricsLog(tmp_path, "ppo", tensorboard=False) as log:
        log.log(1, {"score/mean": 0.1})
        log.log(1, {"heldout/score": 0.2})
        with MetricsLog(tmp_path, "sft", tensorboard=False) as sft:
            sft.log(1, {"loss/train": 4.0})
        log.log(1, {"score/mean": 0.3})
    ppo, sft = read_metrics(tmp_path)
    assert (ppo["score/mean"], ppo["heldout/score"], sft["loss/train"]) == (0.3, 0.2, 4.0)


def test_no_file_is_no_rows_and_a_spoilt_one_is_named(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ppo", "step": 0}\nhello\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_a_metric_may_not_take_the_name_of_a_heading(tmp_path):
    with MetricsLog(tmp_path, "ppo", tensorboard=False) as log, pytest.raises(ValueError, match="'step'"):
        log.log(1, {"step": 2})


def test_tensorboard_reads_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, "ppo") as log:
        log.log(1, {"score/mean": 0.25, "bad": math.nan, "note": "text"})
        log.log(2, {"score/mean": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "ppo")).Reload()
    assert events.Tags()["scalars"] == ["ppo/score/mean"]
    assert [(e.step, e.value) for e in events.Scalars("ppo/score/mean")] == [(1, 0.25), (2, 0.75)]


@pytest.fixture
def shown(monkeypatch):
    """Replace the console with one that writes into memory."""

    def show(*, terminal: bool) -> io.StringIO:
        out = io.StringIO()
        monkeypatch.setattr(
            sinks, "console", Console(file=out, force_terminal=terminal, width=120, highlight=False)
        )
        return out

    return show


def test_a_log_file_gets_about_ten_lines(shown):
    out = shown(terminal=False)
    with progress("sft", total=800) as tick:
        for i in range(800):
            tick(1, f"loss [{i}]")
    lines = out.getvalue().splitlines()
    assert 10 <= len(lines) <= 11
    assert lines[-1].startswith("sft 800/800")
    assert lines[-1].endswith("loss [799]")
    assert "took 0:00" in lines[-1]


def test_a_resumed_progress_counts_from_where_it_stood(shown):
    out = shown(terminal=False)
    with progress("ppo", total=4, start=3) as tick:
        tick()
    assert out.getvalue().startswith("ppo 4/4")


def test_a_terminal_gets_a_bar_and_step_lines_above_it(shown):
    out = shown(terminal=True)
    with progress("ppo", total=2) as tick:
        step_line(1, 2, {"score/mean": 1.25, "kl/ref_seq": 4.5, "policy/clip_fraction": 0.125})
        tick(2, "text [with] brackets")
    text = out.getvalue()
    assert "2/2" in text
    assert "text [with] brackets" in text
    assert "+1.25" in text


def test_step_line_leaves_out_what_is_missing_or_not_finite(shown):
    out = shown(terminal=False)
    step_line(7, 25, {"score/mean": 1.234, "kl/ref_seq": None, "length/mean": math.nan, "time/step_s": 29.44})
    assert out.getvalue().split() == ["ppo", "7/25", "score", "+1.23", "seconds", "29.4"]


def test_a_clock():
    assert [sinks._clock(s) for s in (0, 61.4, 3600 * 2 + 5)] == ["0:00", "1:01", "2:00:05"]
