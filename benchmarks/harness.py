"""Two systems in turn, each measurement in a process of its own: how all comparisons are run.

    A B A B …    a machine that is busy for a minute slows both
    memory       resident, summed over a process and its children, from start to end

A worker is a command that prints one JSON object as its last: its figures. Each side has its own Python, so that
versions may clash. A worker may also ask while it runs (`{"ask": …}` on a line); the answer is a line on its stdin.
What it prints besides is in `runs/bench/logs`.

Left out: pinning to cores, and any look at the clock frequency. `load` in a result is the machine's before the first
run; anything but 0 is a reason to measure again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import Figure, Run, Side, in_words
from benchmarks.record import ROOT

BENCH = ROOT / "runs" / "bench"
"""Models and inputs of the benchmarks; kept."""
OURS = Path(sys.executable)
LOOK_S = 0.5
"""Between two looks at the memory of a process tree: each costs milliseconds, which two busy cores do not have."""


class HadToEnd(Exception):  # noqa: N818  it is no error of the worker's
    """A run that went past its limit and was ended."""


class Failed(SystemExit):
    """A worker that ended with an error, or has nothing to run in.

    Nobody catches it where there is no other setting: the benchmark ends.
    """


def worker(python: Path, module: str, **told: Any) -> tuple[str, ...]:
    """The command of `benchmarks/workers/MODULE.py` with what it is told."""
    return (str(python), "-m", f"benchmarks.workers.{module}", json.dumps(told, default=str))


def environment(folder: str, what: str) -> Path:
    """Python of a peer's environment; one sentence where it has not been made."""
    if not (ROOT / folder / ".installed").exists():
        raise Failed(f"{what} has no environment here ({folder}); make {folder}/.installed brings it")
    return ROOT / folder / "bin" / "python"


def measure(
    side: Side,
    threads: int,
    *,
    seed: int = 0,
    limit_s: float | None = None,
    answer: Callable[[Any], Any] | None = None,
) -> Run:
    """Run one worker. Raises HadToEnd, and Failed with the end of its log."""
    log = BENCH / "logs" / f"{side.name}-{side.setting}.log".replace(" ", "-").replace("/", "-")
    log.parent.mkdir(parents=True, exist_ok=True)
    late = threading.Event()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            side.command,
            cwd=ROOT,
            env=_surroundings(side, threads, seed),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            start_new_session=True,  # so that its children end with it
        )

        def end() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit_s or 1e6, end)
        timer.daemon = True
        with _peak_memory(process.pid) as peak, process:
            timer.start()
            try:
                last = _listen(process, out, answer)
                code = process.wait()
            except BaseException:  # Ctrl-C and SIGTERM reach this process alone
                end()
                raise
            finally:
                timer.cancel()
    if late.is_set():
        raise HadToEnd
    if code or not last.startswith("{"):
        raise Failed(f"{side.name} ({side.setting}) failed with {code}; {log} ends:\n{_tail(log)}")
    run = json.loads(last)
    # A worker knows its own peak exactly; what children need is sampled.
    run["peak_rss_mb"] = round(max(peak[0], run.get("peak_rss_mb", 0.0)))
    return run


def _surroundings(side: Side, threads: int, seed: int) -> dict[str, str]:
    told = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
    told |= {"BENCH_SEED": str(seed), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if side.command[0] == str(OURS):
        return os.environ | told
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | told


def _listen(process: subprocess.Popen[str], out: Any, answer: Callable[[Any], Any] | None) -> str:
    """The last line that a worker prints; its questions are answered as they come."""
    assert process.stdout is not None
    assert process.stdin is not None
    last = ""
    for line in process.stdout:
        out.write(line)
        out.flush()
        if answer and line.startswith('{"ask"'):
            process.stdin.write(json.dumps(answer(json.loads(line)["ask"])) + "\n")
            process.stdin.flush()
        elif line.startswith('{"'):
            last = line
    return last


@contextlib.contextmanager
def _peak_memory(pid: int) -> Iterator[list[float]]:
    """A list whose one number is the most resident memory of the process tree so far, MiB.

    What several processes share counts once: each has its part of it (PSS).
    """
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_S):
            total = 0
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(pid)
                tree = [top, *top.children(recursive=True)]
                for process in tree:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        alone = len(tree) == 1
                        total += process.memory_info().rss if alone else process.memory_full_info().pss
            peak[0] = max(peak[0], total / 2**20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])


def in_turn(
    sides: Sequence[Side],
    figure: Figure,
    args: argparse.Namespace,
    answer: Callable[[Any], Any] | None = None,
) -> list[list[Run]]:
    """`args.pairs` runs of each side, alternating."""
    runs: list[list[Run]] = [[] for _ in sides]
    for pair in range(1, args.pairs + 1):
        for side, mine in zip(sides, runs, strict=True):
            mine.append(measure(side, args.threads, seed=pair, answer=answer))
            print(f"pair {pair}: {in_words(side, mine[-1], figure)}", flush=True)
    return runs


def fastest(
    sides: Sequence[Side],
    figure: Figure,
    args: argparse.Namespace,
    answer: Callable[[Any], Any] | None = None,
) -> tuple[Side, list[dict[str, Any]]]:
    """Run each setting of one system once; the fastest, and what all of them took.

    A setting that needs three times as long as the fastest so far is ended, and one that fails is noted. Raises Failed
    where all of them do.
    """
    if len(sides) == 1:
        return sides[0], []
    tried: list[dict[str, Any]] = []
    limit, best, failure = None, None, None
    for side in sides:
        started = time.perf_counter()
        row: dict[str, Any] = {"name": side.name, "setting": side.setting}
        try:
            run = measure(side, args.threads, limit_s=limit, answer=answer)
        except HadToEnd:
            print(f"tried: {side.name}, {side.setting}: ended after {limit:.0f} s", flush=True)
            tried.append(row | {"ended_after_s": round(limit or 0.0)})
            continue
        except Failed as error:
            failure = error
            print(f"tried: {error}", flush=True)
            tried.append(row | {"failed": str(error).splitlines()[-1]})
            continue
        seconds = time.perf_counter() - started
        print(f"tried: {in_words(side, run, figure)}", flush=True)
        kept = (figure.key, "peak_rss_mb", "gpu_mb", "reached", "kl")
        tried.append(row | {key: run[key] for key in kept if run.get(key) is not None})
        cost = (not run.get("reached", True), run[figure.key] * (-1 if figure.kind == "rate" else 1))
        if best is None or cost < best[0]:
            best, limit = (cost, side), 3 * seconds
    if best is None:
        assert failure, "without a fastest one there is no limit"
        raise failure
    return best[1], tried


def arguments(doc: str | None, *, pairs: int = 5) -> argparse.ArgumentParser:
    """What every comparison can be told. From here on SIGTERM ends the process by an exception, and its workers too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=pairs, help="runs of each side, in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process, on both sides")
    parser.add_argument("--dirty", action="store_true", help="measure uncommitted code; nothing is recorded")
    return parser
