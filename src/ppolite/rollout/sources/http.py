"""A server as a reward source.

    POST url    {"prompts": […], "messages": [[…], …], "responses": […], and `columns` by their names}
    → 200       {"scores": […]}

What may pass by itself is tried again, after pauses that double and have a random half, until the deadline: refused
and broken connections, requests over their time, 408, 425, 429 (with its Retry-After) and 5xx, and answers that hold no
scores. Any other status stops the run at once, a redirect too: where texts and a token go is the recipe's to say.

The bearer token comes from an environment variable, is sent to this address alone and is blotted out of messages, which
name the host and no path. Answers are read up to 1 MiB. Proxies and certificates are taken from the environment
(HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE).
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import time
import weakref
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2

from ppolite.config import HttpSource
from ppolite.rollout.sources.foreign import fault_of, quoted, require, sent, within, without_nan
from ppolite.types import Rollout, UserError

log = logging.getLogger("ppolite")

MOST_BYTES = 1 << 20
LONGEST_PAUSE = 30.0
PASSING = {408, 425, 429}
"""Statuses below 500 that another try may not meet."""


class _TryAgainError(Exception):
    """What may pass by itself: what happened, and how many seconds the server asks to be left alone."""

    def __init__(self, what: str, pause: float = 0.0) -> None:
        super().__init__(what)
        self.what, self.pause = what, pause


class HttpScorer:
    """Posts batches of responses. `columns` are those that a prompt's row may have; `first_pause` is in seconds."""

    def __init__(
        self, config: HttpSource, columns: Collection[str] = (), *, first_pause: float = 0.5
    ) -> None:
        self.config, self.first_pause = config, first_pause
        parts = urlsplit(config.url)
        self.who = f"reward server {parts.scheme}://{parts.netloc}"
        require(config.columns, columns, self.who)
        self.token = _token(config.token_env) if config.token_env else ""
        # gzip would let a small answer grow.
        headers = {"User-Agent": "ppolite", "Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            self._client = httpx2.Client(headers=headers, timeout=config.timeout, follow_redirects=False)
        except (ImportError, ValueError) as error:  # it opens all proxies that the environment names
            raise UserError(
                f"{self.who}: the proxy of ALL_PROXY, HTTPS_PROXY or HTTP_PROXY cannot be used "
                f"({type(error).__name__}); for a socks5:// one `pip install 'httpx2[socks]'`, or unset it"
            ) from None
        weakref.finalize(self, self._client.close)

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Raises UserError past the deadline of a batch, or at once where trying again is no use."""
        n = self.config.batch_size
        return [s for first in range(0, len(rollouts), n) for s in self._batch(rollouts[first : first + n])]

    def _batch(self, rollouts: Sequence[Rollout]) -> list[float]:
        body = sent(rollouts, ("prompts", "messages", "responses", *self.config.columns))
        end, attempt = time.monotonic() + self.config.deadline, 0
        while True:
            try:
                return self._ask(
                    body, len(rollouts), max(min(self.config.timeout, end - time.monotonic()), 1e-3)
                )
            except _TryAgainError as trouble:
                attempt += 1
                pause = min(self.first_pause * 2 ** (attempt - 1), LONGEST_PAUSE)
                pause = max(pause / 2 * (1 + random.random()), trouble.pause)
                left = end - time.monotonic()
                if pause >= left:
                    raise UserError(
                        f"{self.who} {trouble.what}; given up after {attempt} tries within its deadline of "
                        f"{self.config.deadline:g} s: mend the server and start again"
                    ) from None
                log.warning(
                    "%s %s; trying again in %.1f s, for %.0f s at most", self.who, trouble.what, pause, left
                )
                time.sleep(pause)

    def _ask(self, body: dict[str, Any], count: int, timeout: float) -> list[float]:
        """One request. Raises _TryAgainError, or UserError where that would be no use."""
        text = json.dumps(without_nan(body), default=str)
        try:
            # The client's own timeout is of each read; a server that drips would never meet it.
            status, headers, answer = within(timeout, lambda: self._post(text))
        except (TimeoutError, httpx2.TimeoutException):
            raise _TryAgainError(f"gave no answer within {timeout:.3g} s") from None
        except UnicodeError:
            raise UserError(f"{self.who}: no host can have this name; look at `url`") from None
        except httpx2.RequestError as error:
            raise _TryAgainError(
                f"cannot be reached ({self._shown(str(error) or type(error).__name__)})"
            ) from None
        if status // 100 != 2:
            self._refuse(status, headers, answer)
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _TryAgainError(
                f'answered {self._shown(answer)!r}, which is no JSON of the form {{"scores": […]}}'
            ) from None
        if fault := fault_of(scores, count):
            raise _TryAgainError(self._shown(fault))
        return [float(score) for score in scores]

    def _post(self, text: str) -> tuple[int, httpx2.Headers, str]:
        with self._client.stream("POST", self.config.url, content=text) as response:
            data = bytearray()
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > MOST_BYTES:
                    raise UserError(
                        f"{self.who} answered more than {MOST_BYTES:,} bytes; send the scores alone"
                    )
            return response.status_code, response.headers, data.decode("utf-8", "replace")

    def _refuse(self, status: int, headers: httpx2.Headers, answer: str) -> None:
        what = f"answered {status} ({self._shown(answer) or 'without a word'})"
        if status >= 500 or status in PASSING:
            after = headers.get("Retry-After", "")
            raise _TryAgainError(what, float(after) if re.fullmatch(r"\d{1,6}", after) else 0.0)
        if status // 100 == 3:
            target = self._shown(headers.get("Location", "nowhere"))
            raise UserError(
                f"{self.who} redirects to {target}, and redirects are not followed; give that as url"
            )
        raise UserError(f"{self.who} {what}; mend the recipe's url or token_env, or the server")

    def _shown(self, text: str) -> str:
        return quoted(text.replace(self.token, "***") if self.token else text)


def _token(name: str) -> str:
    token = os.environ.get(name, "")
    if not token:
        raise UserError(f"token_env: the environment has no {name}; export it before the run")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(
            f"token_env: {name} holds a character that no token has, perhaps a line break; mend it"
        )
    return token
