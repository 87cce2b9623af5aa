"""Where numbers go while a run is running: `metrics.jsonl`, TensorBoard, the terminal.

`metrics.jsonl` is the source of truth, one JSON object a line; TensorBoard mirrors its numbers; the report
reads it back with `read_metrics`. The terminal gets a progress bar and one line a step. All of that goes to
stderr, so that what a command prints as its result (`ppolite eval RUN --json`) can be piped.

    with MetricsLog(run_dir) as log, progress("sft", total=steps) as tick:
        log.log("sft", step, {"loss/train": loss})
        tick(1, f"loss {loss:.2f}")

Where stderr is no terminal the bar becomes about ten plain lines, so that a log file stays short.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

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
    """Appends to `metrics.jsonl`, each line flushed, and mirrors the numbers to TensorBoard.

    A line that a killed run left unfinished is cut off when the log is opened again.
    """

    def __init__(self, run_dir: str | Path, *, tensorboard: bool = True):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (self.run_dir / METRICS).open("ab+")
        self._cut_torn_line()
        self._tensorboard: SummaryWriter | None = None
        if tensorboard:
            # Late: brings in torch, protobuf and a second of imports, and read_metrics needs none of it.
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"))

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """One line: stage, step, the time (seconds since 1970), then `values`.

        Values are numbers, strings, booleans, None, one-element tensors or lists of those. Numbers that are
        not finite become null, for JSON has none.
        """
        if clash := {"stage", "step", "time"} & values.keys():
            raise ValueError(f"metric named {sorted(clash)[0]!r}; these names head every line")
        row = {"stage": stage, "step": int(step), "time": round(time.time(), 3)}
        row |= {key: _plain(value) for key, value in values.items()}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        if self._tensorboard:
            for key in values:
                if isinstance(row[key], int | float):
                    self._tensorboard.add_scalar(f"{stage}/{key}", row[key], int(step))

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

    def _cut_torn_line(self) -> None:
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if line.endswith(b"\n"):
                whole += len(line)
        self._file.truncate(whole)


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

    Lines of one stage and step are merged, the later standing: training and evaluation write separate lines,
    and a resumed run writes again the steps since its last checkpoint. An unfinished last line is ignored.
    """
    path = Path(run_dir) / METRICS
    if not path.exists():
        return []
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            key = row["stage"], row["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} line {number} is not an object with 'stage' and 'step'; mend or delete that line"
            ) from error
        rows.setdefault(key, {}).update(row)
    return list(rows.values())


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
