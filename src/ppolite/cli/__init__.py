"""The command line: each command is a function in one of these files; its docstring is its help.

Heavy modules (torch, transformers) are imported inside the commands, so that `ppolite --help` answers at
once; this is the only package that imports ppolite inside functions, and a test holds it to that.

    ppolite demo
    ppolite run recipes/film.yaml --set ppo.steps=5
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import tyro

from ppolite.cli.answers import chat, sample, score
from ppolite.cli.control import control
from ppolite.cli.look import doctor, eval_, plan, recipe_, report
from ppolite.cli.train import demo, fetch, iterate, ppo, reward, run, sft
from ppolite.obs.refusal import refusal
from ppolite.obs.visible import visible
from ppolite.types import Interrupted, UserError

log = logging.getLogger("ppolite")

app = tyro.extras.SubcommandApp()
for command in (
    demo,
    run,
    recipe_,
    plan,
    sft,
    reward,
    ppo,
    sample,
    score,
    iterate,
    eval_,
    chat,
    control,
    report,
    doctor,
    fetch,
):  # in the order of --help
    app.command(name=command.__name__.rstrip("_"))(command)


class _Lines(logging.Handler):
    """Log records as plain lines on stderr; warnings say so."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        print(f"{mark}{visible(record.getMessage(), keep='')}", file=sys.stderr)


@contextmanager
def _quiet() -> Iterator[None]:
    """Our own sentences only: progress bars and notices of the libraries would bury them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    lines = _Lines()
    before = log.level, log.propagate
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:  # whoever calls main() from Python gets their logging back
        log.removeHandler(lines)
        log.level, log.propagate = before


def _complain(what: str) -> int:
    print(f"ppolite: {visible(what, keep='')}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when it worked, 1 where `doctor` finds a fault or `plan` too little memory, 2 for something the
    user can mend, 128 + the signal that stopped it."""
    about = (
        "RLHF with PPO: supervised fine-tuning → reward model → PPO. `ppolite --version` says which this is."
    )
    if (sys.argv[1:] if argv is None else argv) == ["--version"]:
        print(f"ppolite {version('ppolite')}")
        return 0
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows no “→” should not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _quiet():
            code = app.cli(prog="ppolite", description=about, args=argv) or 0
            sys.stdout.flush()
            return code
    except UserError as error:
        return _complain(str(error))
    except Interrupted as stop:
        print(f"ppolite: {visible(str(stop), keep='')}", file=sys.stderr)
        return 128 + stop.signal
    except BrokenPipeError:  # `ppolite recipe film | head`
        sys.stdout = io.StringIO()
        return 1
    except OSError as error:
        if not (told := refusal(error)):
            raise
        return _complain(told)
    except KeyboardInterrupt:
        print("ppolite: interrupted; finished stages are kept", file=sys.stderr)
        return 130
