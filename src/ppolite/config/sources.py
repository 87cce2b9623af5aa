"""Who scores a run: the entries of `ppo.rewards`, each of a kind of its own.

Judges (`model`, `function`, `http`, `classifier`) enter a weighted mean; penalties (`length`, `format`) are subtracted.
What their units are and why secrets are refused: docs/decisions/0008-reward-sources.md.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, field_validator, model_validator

from ppolite.config.secrets import NAMES_SECRET
from ppolite.config.section import Section


class Source(Section):
    """What every entry of `ppo.rewards` may say."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]{1,40}$")
    """Its figures are called `reward/NAME`; empty: the function's name, else the kind."""
    weight: float = Field(default=1.0, gt=0)
    """Of a judge: its share in the weighted mean. Of a penalty: multiplies it."""

    @property
    def title(self) -> str:
        """`name`, or what stands for it."""
        return self.name or str(getattr(self, "kind"))  # noqa: B009  each kind of source is a Literal


class Judge(Source):
    """A source whose units are its own: it counts as (value − shift) / scale."""

    shift: float | None = 0.0
    """Subtracted from its values; empty: their mean over answers of the SFT model."""
    scale: float | None = Field(default=1.0, gt=0)
    """Its values are divided by this; empty: their standard deviation over those answers."""


class ModelSource(Source):
    """The run's reward model, RUN/reward, with mean 0 and deviation 1 on the SFT model's answers."""

    kind: Literal["model"]
    """`model`"""


class FunctionSource(Judge):
    """A Python function: prompts and responses of a round in, a number for each out."""

    kind: Literal["function"]
    """`function`"""
    function: str
    """`MODULE:NAME`, found from the working folder, or `FILE.py:NAME`."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds after which its process is ended and the run stops."""

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, function: str) -> str:
        module, _, name = function.rpartition(":")
        if not module or not name.isidentifier():
            raise ValueError(f"`{function}` names no function; write MODULE:NAME or FILE.py:NAME")
        return function

    @property
    def title(self) -> str:
        return self.name or self.function.rpartition(":")[2]


class HttpSource(Judge):
    """A server: `{"prompts": […], "messages": […], "responses": […]}` and `columns` are posted to it.

    `{"scores": […]}` comes back.
    """

    kind: Literal["http"]
    """`http`"""
    url: str
    """http or https, without a password, key or token in it."""
    token_env: str | None = None
    """The environment variable, in capitals, that holds a bearer token; the token itself has no place in a recipe."""
    columns: tuple[str, ...] = ()
    """Columns of the prompts' rows that are sent along, under their own names."""
    batch_size: int = Field(default=64, ge=1)
    """Most responses in one request."""
    timeout: float = Field(default=30.0, gt=0)
    """Seconds that one request may take."""
    deadline: float = Field(default=300.0, gt=0)
    """Seconds after which a batch that is still without scores, all its retries counted, stops the run."""

    @field_validator("url")
    @classmethod
    def _tells_no_secret(cls, url: str) -> str:
        # What is wrong with it is said without showing it: messages end up in logs.
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            raise ValueError("it is no address; write https://HOST/PATH") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address that begins with http:// or https://")
        if not re.fullmatch(r"[!-~]+", url) or parts.fragment:
            raise ValueError("it holds characters that an address has not; percent-encode them")
        told = [key for key, _ in parse_qsl(parts.query, keep_blank_values=True) if NAMES_SECRET.search(key)]
        if parts.username is not None or told:
            what = f"`{told[0]}`" if told else "a user or password"
            raise ValueError(
                f"it holds {what}, and recipes are saved and shown; take it out and put the token into the "
                "environment variable that token_env names"
            )
        return url

    @field_validator("token_env")
    @classmethod
    def _is_no_token(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError("expected the name of an environment variable in capitals, not the token itself")
        return name

    @model_validator(mode="after")
    def _agree(self) -> HttpSource:
        parts = urlsplit(self.url)
        here = re.fullmatch(r"localhost|::1|127(\.\d{1,3}){3}", parts.hostname or "")
        if self.token_env and parts.scheme == "http" and not here:
            raise ValueError(
                f"{parts.hostname} would get the token of {self.token_env} unencrypted; use https"
            )
        if self.deadline < self.timeout:
            raise ValueError(f"deadline ({self.deadline:g} s) must not be below timeout ({self.timeout:g} s)")
        return self


class ClassifierSource(Judge):
    """A sequence classifier of Hugging Face, with its own tokenizer and chat template."""

    kind: Literal["classifier"]
    """`classifier`"""
    model: str
    """A folder or a hub id, with safetensors weights; a RUN/reward of another run is one."""
    shift: float | None = None
    """Subtracted from its values; empty: their mean over answers of the SFT model."""
    scale: float | None = Field(default=None, gt=0)
    """Its values are divided by this; empty: their standard deviation over those answers."""
    label: str | int | None = None
    """For a classifier with several labels, the name or number of the one whose log-odds count."""
    reads: Literal["chat", "pair", "response"] = "chat"
    """The conversation in its own chat template, prompt and response as a pair of texts, or the response alone."""
    max_tokens: int | None = Field(default=None, ge=8)
    """Longer inputs are cut: of a conversation the beginning, of a pair the prompt, of a response the end; empty: what
    the classifier takes."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of its weights and arithmetic."""
    trust_remote_code: bool = False
    """Run Python that the classifier's folder brings along."""


class LengthSource(Source):
    """A penalty of 1 for each response token (the stop token counts) below `min` or above `max`."""

    kind: Literal["length"]
    """`length`"""
    min: int | None = Field(default=None, ge=1)
    """Fewer tokens cost; empty: no number is too small."""
    max: int | None = Field(default=None, ge=1)
    """More tokens cost; empty: no number is too large."""

    @model_validator(mode="after")
    def _agree(self) -> LengthSource:
        if self.min is None and self.max is None:
            raise ValueError("a length penalty needs `min`, `max` or both; add one")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) exceeds max ({self.max}); exchange them")
        return self


class FormatSource(Source):
    """A penalty of 1 for a response in which a pattern is not found."""

    kind: Literal["format"]
    """`format`"""
    pattern: str
    r"""A regular expression of Python, searched for anywhere in the response; `\A…\Z` ties it to both ends."""

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`{pattern}` is no regular expression ({error}); mend it") from None
        return pattern


AnySource = Annotated[
    ModelSource | FunctionSource | HttpSource | ClassifierSource | LengthSource | FormatSource,
    Field(discriminator="kind"),
]
SOURCES: dict[str, type[Source]] = {
    get_args(source.model_fields["kind"].annotation)[0]: source for source in get_args(get_args(AnySource)[0])
}
