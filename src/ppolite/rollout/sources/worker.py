"""The process in which a reward function runs: it may hang, print, exit or crash without taking the run along.

Started by `function.py` as a file of its own, it imports nothing of ppolite. A line of JSON on standard input is a
request, a line on standard output its answer:

    {"function": "my_rewards:right", "path": […]}      → {"wants": ["prompts", "responses", "answer"], "any": false,
                                                          "source": "…"}, the SHA-256 of its file
    {"prompts": […], "responses": […], "answer": […]}  → {"scores": […]}
    what goes wrong                                    → {"error": "ValueError: … (my_rewards.py line 12)"}

What the function prints goes to standard error. When the run ends, however it ends, input ends, and so does this
process, even amid a call.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import queue
import signal
import sys
import threading
import traceback
from hashlib import sha256
from pathlib import Path
from typing import Any


def load(function: str, path: list[str]) -> Any:
    """The function that `MODULE:NAME` or `FILE.py:NAME` names. Raises whatever importing it raises."""
    module_name, _, name = function.rpartition(":")
    sys.path[:0] = path
    if module_name.endswith(".py"):
        file = Path(module_name).expanduser()
        sys.path.insert(0, str(file.resolve().parent))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    found = getattr(module, name)
    if not callable(found):
        raise TypeError(f"{name} is {type(found).__name__}, no function")
    return found


def wants(function: Any) -> dict[str, Any]:
    """The names of its parameters, those that have a default, whether it takes any other; a fingerprint of its file."""
    parameters, file = inspect.signature(function).parameters.values(), source_of(function)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind == p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        raise TypeError("its arguments are passed by name; take the `/` out of its signature")
    return {
        "wants": [p.name for p in named if p.default is p.empty],
        "may": [p.name for p in named if p.default is not p.empty],
        "any": any(p.kind == p.VAR_KEYWORD for p in parameters),
        "source": sha256(Path(file).read_bytes()).hexdigest() if file else "",
    }


def source_of(function: Any) -> str | None:
    """The file that a function is in; None for other callables."""
    return inspect.getsourcefile(inspect.unwrap(function)) if inspect.isfunction(function) else None


def plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as lists and numbers; JSON refuses the rest."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def told(error: BaseException, file: str | None) -> str:
    """The exception with the last line that ran in `file`, or anywhere."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    own = [f for f in frames if f.filename == file] or frames
    where = f" ({Path(own[-1].filename).name} line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"


def serve(requests: Any, answers: Any) -> None:
    """Load the function that the first request names; answer the others."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in requests:
            lines.put(line)
        # The run is gone. The group is this process's own (`process.py`), with what the function has started.
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    function: Any = None
    while True:
        request = json.loads(lines.get())
        file = source_of(function)
        try:
            if function is None:
                function = load(request["function"], request["path"])
                answer = wants(function)
            else:
                answer = {"scores": plain(function(**request))}
            line = json.dumps(answer, default=lambda value: f"<{type(value).__name__}>")
        except (Exception, SystemExit) as error:  # noqa: BLE001  a stranger's code may raise anything
            line = json.dumps({"error": told(error, file)})
        answers.write(line + "\n")
        answers.flush()


if __name__ == "__main__":
    pipes = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    serve(*pipes)
