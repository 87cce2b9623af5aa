"""A reward server on this machine, with every fault that one may have."""

from __future__ import annotations

import gzip
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from tests.rollout.sources.kit import said
from tests.rollout.sources.server import GOOD, Server, Step, serving

from ppolite.config import HttpSource
from ppolite.rollout.sources.http import HttpScorer
from ppolite.types import UserError

TOKEN = "s3cret-token"


def hang(handler: BaseHTTPRequestHandler, body: Any) -> None:
    time.sleep(1.5)
    handler.close_connection = True


def hang_up(handler: BaseHTTPRequestHandler, body: Any) -> None:
    handler.close_connection = True


def drip(handler: BaseHTTPRequestHandler, body: Any) -> None:
    """A byte at a time, each well within any timeout of a read: first of a header, then of the body."""
    try:
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        handler.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as made:
        yield made


Make = Callable[..., HttpScorer]


@pytest.fixture
def make(server: Server) -> Make:
    def made(**settings: Any) -> HttpScorer:
        source = {"kind": "http", "url": server.url, "timeout": 5.0, "deadline": 5.0, **settings}
        return HttpScorer(
            HttpSource.model_validate(source), ["answer", "level", "notes", "secret"], first_pause=0.02
        )

    return made


def test_what_is_sent_and_what_comes_back(make: Make, server: Server) -> None:
    assert make().score([said("abc", "why"), said("你好", "and")]) == [3.0, 2.0]
    [(path, headers, body)] = server.asked
    assert path == "/score"
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers
    assert body == {
        "prompts": ["why", "and"],
        "messages": [[{"role": "user", "content": "why"}], [{"role": "user", "content": "and"}]],
        "responses": ["abc", "你好"],
    }


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "socks://me:secret@127.0.0.1:1080"])
def test_a_proxy_that_cannot_be_used(make: Make, proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserError, match=r"the proxy of ALL_PROXY.* cannot be used") as refused:
        make()
    assert "secret" not in str(refused.value)


def test_empty_cells_are_null(make: Make, server: Server) -> None:
    """Tables say NaN where they have nothing, which JSON has no form for."""
    made = make(columns=("level", "notes"))
    rows = [
        said("a", level=float("nan"), notes=[1.5, float("inf")]),
        said("b", level=2.0, notes={"x": float("nan")}),
    ]
    made.score(rows)
    _, _, body = server.asked[0]
    assert (body["level"], body["notes"]) == ([None, 2.0], [[1.5, None], {"x": None}])


def test_columns_go_along_when_they_are_asked_for(make: Make, server: Server) -> None:
    make(columns=["answer"]).score([said("a", answer=3, secret=4), said("b")])
    assert server.asked[0][2]["answer"] == [3, None]
    assert "secret" not in server.asked[0][2]
    make(columns=["answer"]).score([said("b")])
    assert server.asked[1][2]["answer"] == [None]
    with pytest.raises(UserError, match=r"asks for the column 'answr', but ppo\.prompts has answer"):
        make(columns=["answr"])


def test_batches_keep_the_order(make: Make, server: Server) -> None:
    assert make(batch_size=2).score([said("x" * n) for n in (5, 1, 4, 2, 3)]) == [5, 1, 4, 2, 3]
    assert [len(body["responses"]) for _, _, body in server.asked] == [2, 2, 1]


def test_the_token_comes_from_the_environment(
    make: Make, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    assert make(token_env="MY_TOKEN").score([said("a")]) == [1.0]
    assert server.asked[0][1]["Authorization"] == f"Bearer {TOKEN}"
    monkeypatch.setenv("MY_TOKEN", f"{TOKEN}\n")
    with pytest.raises(UserError, match="MY_TOKEN holds a character that no token has") as caught:
        make(token_env="MY_TOKEN")
    assert TOKEN not in str(caught.value)
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(UserError, match="the environment has no MY_TOKEN; export it before the run"):
        make(token_env="MY_TOKEN")


@pytest.mark.parametrize(
    "trouble",
    [
        (500, b"oops", {}),
        (503, b"", {}),
        (429, b"slow down", {}),
        (408, b"", {}),
        b"<html>",
        b"\xff\xfe",
        b"",
        b"[" * 100_000,
        {"score": [1, 1]},
        [1.0, 1.0],
        {"scores": [1]},
        {"scores": [1, 1, 1]},
        {"scores": [1, "1"]},
        {"scores": [1, None]},
        b'{"scores": [1, NaN]}',
        {"scores": "11"},
        hang_up,
        (200, gzip.compress(b'{"scores": [1, 1]}', mtime=0), {"Content-Encoding": "gzip"}),
    ],
    ids=lambda trouble: getattr(trouble, "__name__", None) or str(trouble)[:30],
)
def test_what_may_pass_is_tried_again(
    make: Make, server: Server, trouble: Step, caplog: pytest.LogCaptureFixture
) -> None:
    server.script = [trouble, trouble, GOOD]
    with caplog.at_level(logging.WARNING, "ppolite"):
        assert make().score([said("ab"), said("c")]) == [2.0, 1.0]
    assert len(server.asked) == 3
    assert server.asked[0][2] == server.asked[2][2]
    assert [r.getMessage().count("trying again in") for r in caplog.records] == [1, 1]
    assert not any("/score" in r.getMessage() for r in caplog.records)


def test_slow_answers_are_tried_again(make: Make, server: Server) -> None:
    server.script = [hang, GOOD]
    started = time.monotonic()
    assert make(timeout=0.3).score([said("ab")]) == [2.0]
    assert 0.3 <= time.monotonic() - started < 1.4


def test_a_drip_meets_the_timeout_too(make: Make, server: Server) -> None:
    server.script = [drip, GOOD]
    started = time.monotonic()
    assert make(timeout=0.5).score([said("ab")]) == [2.0]
    assert 0.5 <= time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((500, b"it is on \x1b[31mfire", {}), r"answered 500 \(it is on ␛\[31mfire\)"),
        (b"not now", r"answered 'not now', which is no JSON of the form \{\"scores\": \[…\]\}"),
        ({"scores": [1, 2]}, "gave 2 numbers for 1 responses"),
        (hang, r"gave no answer within 0\.\d+ s"),
        (hang_up, "cannot be reached"),
    ],
)
def test_past_the_deadline_the_run_stops(make: Make, server: Server, step: Step, message: str) -> None:
    server.script = [step]
    started = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        make(timeout=0.2, deadline=0.7).score([said("a")])
    assert time.monotonic() - started < 1.2
    assert "given up after" in str(caught.value)
    assert "within its deadline of 0.7 s" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.asked) > 1


def test_pauses_double_with_jitter(make: Make, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = [(500, b"", {})] * 6 + [GOOD]
    pauses: list[float] = []
    scorer = make()
    own = threading.current_thread()  # servers of tests before may still drip in theirs
    monkeypatch.setattr(
        time, "sleep", lambda s: pauses.append(s) if threading.current_thread() is own else None
    )
    scorer.score([said("a")])
    shares = [pause / (0.02 * 2**i) for i, pause in enumerate(pauses)]
    assert len(shares) == 6
    assert all(0.5 <= share <= 1 for share in shares)
    assert len({round(share, 6) for share in shares}) == 6


def test_retry_after_is_heeded(make: Make, server: Server) -> None:
    server.script = [(429, b"", {"Retry-After": "1"}), GOOD]
    assert make().score([said("a")]) == [1.0]
    assert server.times[1] - server.times[0] >= 1
    server.script = [(503, b"", {"Retry-After": "3600"})]
    started = time.monotonic()
    with pytest.raises(UserError, match="answered 503"):
        make().score([said("a")])
    assert time.monotonic() - started < 1


def test_a_server_that_is_not_there(make: Make) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"reward server http://127.0.0.1:{port} cannot be reached .*refused"):
        make(url=f"http://127.0.0.1:{port}/", timeout=0.2, deadline=0.3).score([said("a")])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((401, f"bad token {TOKEN}".encode(), {}), r"answered 401 \(bad token \*\*\*\); mend"),
        ((404, b"", {}), r"answered 404 \(without a word\)"),
        (
            (302, b"", {"Location": "http://elsewhere.test/"}),
            "redirects to http://elsewhere.test/, and redirects",
        ),
        ((307, b"", {"Location": "file:///etc/passwd"}), "redirects to file:///etc/passwd, and redirects"),
        (b" " * ((1 << 20) + 1), "answered more than 1,048,576 bytes"),
    ],
    ids=["401", "404", "302", "307", "large"],
)
def test_what_will_not_pass_stops_at_once(
    make: Make, server: Server, step: Step, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    server.script = [step, GOOD]
    with pytest.raises(UserError, match=message) as caught:
        make(token_env="MY_TOKEN").score([said("a")])
    assert len(server.asked) == 1
    assert TOKEN not in str(caught.value)


def test_an_answer_without_end_is_not_read(make: Make, server: Server) -> None:
    sent = 0

    def pour(handler: BaseHTTPRequestHandler, body: Any) -> None:
        nonlocal sent
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while sent < 1 << 30:
                sent += handler.wfile.write(b"7" * (1 << 16))
        except OSError:
            pass

    server.script = [pour]
    with pytest.raises(UserError, match="answered more than"):
        make().score([said("a")])
    assert sent < 1 << 27
