"""Where numbers go while a run is running: `metrics.jsonl`, TensorBoard, the terminal.

`metrics.jsonl` is the source of truth, one JSON object a line; TensorBoard mirrors its numbers; the report
reads it back with `read_metrics`. The terminal gets a progress bar and one line a step. All of that goes to
stderr, so that what a command prints as its result (`ppolite eval RUN --json`) can be piped.

    with MetricsLog(run_dir, "sft") as metrics, progress("sft", total=steps) as tick:
        metrics.log(step, {"loss/train": loss})
        tick(1, f"loss {loss:.2f}")

Where stderr is no terminal the bar becomes about ten plain lines, so that a log file stays short.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from ppolite.config.drafts import drafted
from ppolite.config.strict_json import loads
from ppolite.types import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""The one console: lines printed through it land above a running progress bar and leave it whole."""

Tick = Callable[..., None]
"""`tick(n=1, text="")`: n more units are done, and what to say about the last one."""

PLAIN_LINES = 10
"""Lines that a whole progress takes where there is no terminal to redraw."""


class MetricsLog:
    """Appends one stage's rows to `metrics.jsonl`, each whole or not at all, and mirrors the numbers to TensorBoard.

    `after`: rows of this stage behind that step are taken out first, since they are going to be written again; -1
    takes out all of them, None none. A line that a killed run left unfinished is cut off.
    """

    def __init__(
        self, run_dir: str | Path, stage: str, *, after: int | None = None, tensorboard: bool = True
    ) -> None:
        self.run_dir, self.stage = Path(run_dir), stage
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / METRICS
        _clean(path, stage, after)
        self._file = path.open("ab", buffering=0)
        self._tensorboard: SummaryWriter | None = None
        if tensorboard:
            # Late: brings in torch, protobuf and a second of imports, and read_metrics needs none of it.
            from torch.utils.tensorboard import SummaryWriter

            purge = None if after is None else after + 1
            self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard" / stage), purge_step=purge)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One line: stage, step, the time (seconds since 1970), then `values`.

        Values are numbers, strings, booleans, None, one-element tensors or lists of those. Numbers that are
        not finite become null, for JSON has none. Raises OSError where there is no room; then no part of it is there.
        """
        if clash := {"stage", "step", "time"} & values.keys():
            raise ValueError(f"metric named {sorted(clash)[0]!r}; these names head every line")
        row = {"stage": self.stage, "step": int(step), "time": round(time.time(), 3)}
        row |= {key: _plain(value) for key, value in values.items()}
        self._append((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())
        if self._tensorboard:
            for key in values:
                if isinstance(row[key], int | float):
                    self._tensorboard.add_scalar(f"{self.stage}/{key}", row[key], int(step))

    def _append(self, line: bytes) -> None:
        before = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):  # a disk that fills up takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.run_dir / METRICS))
        except OSError:
            self._file.truncate(before)
            raise

    def sync(self) -> None:
        """Until it is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _clean(path: Path, stage: str, after: int | None) -> None:
    """Take out a torn last line, and the stage's rows behind a step."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and not _is_behind(line, stage, after)]
    if len(kept) < len(lines):
        with drafted(path) as draft, draft.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())


def _is_behind(line: bytes, stage: str, after: int | None) -> bool:
    if after is None:
        return False
    try:
        row = loads(line)
        return row["stage"] == stage and row["step"] > after
    except (ValueError, TypeError, KeyError):
        return False  # `read_metrics` names it to the user


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a tensor or a numpy scalar
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`, one for each stage and step, in order of first appearance; [] if no file.

    Lines of one stage and step are merged, the later standing: a control run that is looked at again has several of
    its last step. An unfinished last line is ignored.
    """
    path = Path(run_dir) / METRICS
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = _sound(loads(line))
        except ValueError as error:
            raise UserError(f"{path} line {number} {error}; mend or delete that line") from error
        rows.setdefault((row["stage"], row["step"]), {}).update(row)
    return list(rows.values())


def _sound(row: Any) -> dict[str, Any]:
    """A line as `MetricsLog` writes it, where names with a slash are metrics. Raises ValueError."""
    if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or type(row.get("step")) is not int:
        raise ValueError("is not an object with 'stage' and 'step'")
    for name, value in row.items():
        number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
        if "/" in name and value is not None and not number:
            raise ValueError(f"has {value!s:.40} for {name:.40}, which is not a number")
    return row


@contextmanager
def progress(name: str, *, total: int, start: int = 0) -> Iterator[Tick]:
    """A progress with rate and remaining time; `start` units were done before (a resumed stage)."""
    shown = _bar(name, total, start) if console.is_terminal else _lines(name, total, start)
    with shown as tick:
        yield tick


def step_line(step: int, total: int, row: Mapping[str, Any]) -> None:
    """One line a PPO step, from the metrics of that step. What the row lacks is left out."""
    cells = [f"[bold]ppo[/] {step:>{len(str(total))}}/{total}"]
    for label, key, form in _STEP_CELLS:
        value = row.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            cells.append(f"[dim]{label}[/] {value:{form}}")
    console.print("  ".join(cells))


_STEP_CELLS = [
    ("score", "score/mean", "+6.2f"),
    ("held-out", "heldout/score", "+5.2f"),
    ("KL", "kl/ref_seq", "6.2f"),
    ("clip", "policy/clip_fraction", "5.1%"),
    ("length", "length/mean", "5.1f"),
    ("seconds", "time/step_s", "5.1f"),
]


@contextmanager
def _bar(name: str, total: int, start: int) -> Iterator[Tick]:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Pace(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total, completed=start, text="", pace=_pace_of(total, start))

        def tick(n: int = 1, text: str = "") -> None:
            bar.update(task, advance=n, text=text)

        yield tick


@contextmanager
def _lines(name: str, total: int, start: int) -> Iterator[Tick]:
    pace, done, said = _pace_of(total, start), start, start

    def tick(n: int = 1, text: str = "") -> None:
        nonlocal done, said
        done += n
        if done < total and (done - said) * PLAIN_LINES < total:
            return
        said = done
        console.print(f"{name} {done}/{total}  {pace(done)}  {text}".rstrip(), markup=False)

    yield tick


class _Pace(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return Text(task.fields["pace"](int(task.completed)), style="cyan")


def _pace_of(total: int, start: int) -> Callable[[int], str]:
    """Rate and remaining time, from the mean since the start: steps of PPO take long and vary little."""
    began = time.monotonic()

    def pace(done: int) -> str:
        seconds, units = time.monotonic() - began, done - start
        if units <= 0 or seconds <= 0:
            return "…"
        rate = f"{units / seconds:.1f}/s" if units > seconds else f"{seconds / units:.1f} s each"
        if done >= total:
            return f"{rate}, took {_clock(seconds)}"
        return f"{rate}, {_clock((total - done) * seconds / units)} left"

    return pace


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
