"""The nouns that every layer shares, and the three seams between layers.

Read top to bottom: what goes in (`Prompt`, `Example`, `Scored`, `Preference`, `Ranking`), what the policy
makes of it (`Rollout`), what PPO learns from (`Experience`), and the protocols behind which the makers and
the judges of rollouts stand (`Generator`, `Scorer`, `Leash`).

Axes: B sequences, T tokens, R response tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Message = dict[str, str]
"""One turn of a conversation: `{"role": "system" | "user" | "assistant", "content": text}`."""

Finish = Literal["stop", "length"]
"""Why a response ended: by one of the stop tokens, or cut by the length limit."""


class UserError(Exception):
    """Something the user can mend: one sentence saying what, where and what to do. The CLI exits with 2."""


class NotFiniteError(UserError):
    """A score that is no finite number: the round is skipped and counted."""


class Interrupted(KeyboardInterrupt):
    """A signal has stopped the run; the sentence says where it stands. The CLI exits with 128 + `signal`."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True)
class Prompt:
    """What the policy answers. `messages` empty means plain text: `text` is continued as it stands."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    source: str = ""
    """Where it came from, for error messages: `FILE row N`."""
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The other columns of its row, by the file's names: what a verifiable reward compares with."""

    @property
    def last(self) -> str:
        """The last user turn, or the plain text: what a person would show as "the prompt"."""
        return self.messages[-1]["content"] if self.messages else self.text


@dataclass(frozen=True)
class Example:
    """A prompt with the answer a person gave: SFT imitates it."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Scored:
    """A response with a person's score; `score` is None until somebody gives one."""

    prompt: Prompt
    response: str
    score: float | None


@dataclass(frozen=True)
class Preference:
    """Two responses of which people preferred one; `margin` says by how much, in score units."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    origin: str = ""
    """Which part of a file of several it is from; agreement is also measured by part."""


@dataclass(frozen=True)
class Ranking:
    """Responses to one prompt, best first."""

    prompt: Prompt
    responses: tuple[str, ...]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Log-probs are those of the distribution that this describes."""

    max_new_tokens: int = 48
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class Rollout:
    """One sampled response. `response_ids` holds the stop token when `finish == "stop"`."""

    prompt: Prompt
    prompt_ids: list[int]
    response_ids: list[int]
    text: str
    """The response decoded, without the stop token."""
    logprobs_R: Tensor
    """log μ(token) for each response token, nats, float32."""
    finish: Finish
    version: int = 0
    """Number of policy updates that μ had seen."""
    trainer_logprobs_R: Tensor | None = None
    """log μ by the trainer's own forward pass, for rollouts that wait until the policy has moved on; None for fresh
    ones, whose μ is π_old."""
    rewards: dict[str, float] = field(default_factory=dict)
    """What each source of the recipe's `ppo.rewards` gave, by its name and in its own units."""
    scored: bool = False
    """Whether the run's own scorer has scored it, so that its score is in that one's units."""


@dataclass
class Experience:
    """What an update learns from: rollouts with everything that is computed once for all epochs.

    Right-padded [B, R] tensors; `mask_BR` is True on response tokens (the stop token included).
    """

    rollouts: list[Rollout]
    mask_BR: Tensor
    logprobs_BR: Tensor
    """log π_old, from the trainer's own forward pass."""
    behaviour_logprobs_BR: Tensor
    """log μ, from the trainer's own forward pass; on fresh rollouts that of π_old."""
    ref_logprobs_BR: Tensor
    """log π_ref."""
    values_BR: Tensor
    """V before the update."""
    scores_B: Tensor
    """As the reward source gave them, before scaling, clipping and penalties."""
    rewards_BR: Tensor
    """Per-token reward: leash and, on the last response token, the scaled score."""
    advantages_BR: Tensor
    returns_BR: Tensor
    weights_BR: Tensor | None = None
    """π_old/μ, of the recipe's kind and cut to its cap; None on fresh rollouts, where it is 1."""
    diagnostics: dict[str, float] = field(default_factory=dict)

    def select(self, rows: Sequence[int]) -> Experience:
        """The given rows, trimmed to the longest of them; the diagnostics stay those of the round."""
        pick, R = list(rows), max(len(self.rollouts[i].response_ids) for i in rows)
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name[-2:] in ("_B", "BR")}
        cut = {
            k: x if x is None else x[pick, :R] if k.endswith("_BR") else x[pick] for k, x in tensors.items()
        }
        return replace(self, rollouts=[self.rollouts[i] for i in pick], **cut)


class Generator(Protocol):
    """Draws responses. Token ids in, token ids out, so that an engine in another process fits."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]: ...


class Scorer(Protocol):
    """Judges whole responses; larger is better. One finite float for each rollout, in order."""

    def score(self, rollouts: Sequence[Rollout]) -> list[float]: ...


class Leash(Protocol):
    """Controls the KL coefficient β that ties the policy to the reference."""

    @property
    def beta(self) -> float: ...

    def update(self, kl_seq: float, sequences: int) -> None:
        """Take the measured KL (nats a sequence) of `sequences` finished responses into account."""
        ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...
