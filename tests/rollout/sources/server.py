"""A reward server on this machine that does what it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = object()
"""As a step of the script: the lengths of the responses."""
Step = Any


class Server:
    """Does what the script says, a step for each request, the last one again and again."""

    def __init__(self) -> None:
        self.script: list[Step] = [GOOD]
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.times: list[float] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, dict(self.headers), body))
                outer.times.append(time.monotonic())
                step = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                outer.do(self, step, body)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/score"

    def do(self, handler: BaseHTTPRequestHandler, step: Step, body: dict[str, Any]) -> None:
        if callable(step):
            step(handler, body)
            return
        status, answer, headers = 200, step, {}
        if step is GOOD:
            answer = {"scores": [len(text) for text in body["responses"]]}
        elif isinstance(step, tuple):
            status, answer, headers = step
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


@contextmanager
def serving() -> Iterator[Server]:
    """A server of its own. Whoever uses it sees to it that no proxy stands between."""
    made = Server()
    try:
        yield made
    finally:
        made.http.shutdown()
        made.http.server_close()
        made.thread.join()
