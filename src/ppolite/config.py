"""The recipe: everything a run is told, typed, checked and explained, importable without torch.

A recipe is a YAML file of the keys below; every key has a default but the data. Unknown keys are refused with
the nearest known one, and contradictions are found before anything is loaded:

    recipe = load_recipe("recipes/film.yaml", overrides=["ppo.steps=3"])
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ppolite.types import Sampling, UserError

RECIPES = Path(__file__).parent / "recipes"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Data(Section):
    """Where rows come from and how their columns are called."""

    path: str
    """A jsonl, json, csv, tsv or parquet file, a folder of `datasets`, `hub:NAME`, or `embedded:film`."""
    columns: dict[str, str] = {}
    """Our column name → the file's (dots and indices reach inside: `conversations.0.value`)."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first n training rows after shuffling."""
    held_out: float = Field(default=0.1, ge=0)
    """Rows kept for evaluation, split by prompt: a share below 1, or a number of rows."""
    plain: bool = False
    """Treat string prompts as plain text to be continued instead of as a user's turn."""


class Trunk(Section):
    """The frozen part that all roles share."""

    split: int = Field(default=0, ge=0)
    """First trained layer: the layers below it are frozen, shared by all roles and run once per rollout."""


class Train(Section):
    """Which weights move."""

    kind: Literal["lora", "layers", "full"] = "lora"
    """`lora`: adapters on the layers from `trunk.split` on; `layers`: those layers; `full`: everything."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank of the adapters' two factors."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""


class Adam(Section):
    """AdamW and its schedule."""

    lr: float = Field(default=1e-4, ge=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of all updates over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    adam_eps: float = Field(default=1e-5, gt=0)
    """Adam's ε; 1e-5 and 1e-8 change PPO's approximate KL by half."""
    beta2: float = Field(default=0.99, gt=0, lt=1)
    """Decay of Adam's second moment; the first moment's is 0.9."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class Optim(Adam):
    """AdamW, and how many tokens are worked on at once."""

    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Most tokens (padding included) that go through the model at once; the result does not depend on it."""


class SFT(Section):
    """Supervised fine-tuning on people's answers."""

    data: Data
    """`messages`, or `prompt` and `completion`."""
    optim: Optim = Optim()
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""
    batch_size: int = Field(default=16, ge=1)
    """Examples in one update."""
    max_tokens: int = Field(default=1024, ge=8)
    """Longer examples are reported and left out."""
    eval_every: int = Field(default=10, ge=1)
    """Updates between two looks at the held-out loss."""
    eval_examples: int = Field(default=64, ge=1)
    """Held-out examples in such a look."""


class Reward(Section):
    """The reward model."""

    data: Data | None = None
    """`prompt` and `response`, `score`; or `chosen`, `rejected`; or `responses`, `scores`. Left out where `iterate`
    gathers the scores."""
    kind: Literal["scores", "pairs", "rankings"] = "scores"
    """Regression, Bradley–Terry or Plackett–Luce; all on the same scalar head."""
    optim: Optim = Optim()
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""
    batch_size: int = Field(default=32, ge=1)
    """Rows (pairs, rankings) in one update."""
    max_tokens: int = Field(default=1024, ge=8)
    """Longer rows are reported and left out."""
    eval_examples: int = Field(default=400, ge=8)
    """Held-out rows on which agreement with people is measured."""
    pair_gap: float = Field(default=1.0, ge=0)
    """For `scores`: pairs whose scores differ by at least this count in the pairwise accuracy."""
    norm_samples: int = Field(default=256, ge=8)
    """Samples of the SFT model on which the reward is shifted to mean 0 and scaled to deviation 1."""
    taught_by: Literal["people", "judge"] = "people"
    """Whose opinion the data is; `judge`: the judge's of the evaluation, a stand-in for people, which is then named as
    no independent witness."""

    @property
    def source(self) -> Data:
        """`data`. Raises UserError where it is left out."""
        if self.data is None:
            raise UserError("`reward.data` is missing; add it, or let `ppolite iterate` gather scores")
        return self.data


class KL(Section):
    """The leash to the SFT model."""

    beta: float = Field(default=0.05, ge=0)
    """Coefficient, in units of normalised reward per nat; the start value when `target` is given."""
    target: float | None = Field(default=None, gt=0)
    """Nats per sequence that the adaptive controller steers to; empty: β is fixed. On its way there the controller only
    loosens, so start with a firm `beta`, about 0.3 in these units."""
    horizon: float = Field(default=1000.0, gt=0)
    """Sequences over which the adaptive controller reacts."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimate from samples: k1 = −log r, k2 = ½ log² r, k3 = r − 1 − log r, with r = π_ref/π_θ."""
    where: Literal["reward", "loss"] = "reward"
    """In the per-token reward (as in InstructGPT), or as a term of the loss (k2 has KL's gradient there)."""


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
    """A server: `{"prompts": […], "responses": […]}` is posted to it, `{"scores": […]}` comes back."""

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
        told = [key for key, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(key)]
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
            raise ValueError("a length penalty needs `min`, `max` or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) exceeds max ({self.max})")
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
            raise ValueError(f"`{pattern}` is no regular expression ({error})") from None
        return pattern


AnySource = Annotated[
    ModelSource | FunctionSource | HttpSource | ClassifierSource | LengthSource | FormatSource,
    Field(discriminator="kind"),
]
SOURCES: dict[str, type[Source]] = {
    get_args(source.model_fields["kind"].annotation)[0]: source for source in get_args(get_args(AnySource)[0])
}
_SECRET = re.compile(r"key|token|secret|passw|pwd|auth|^sig$|signature|credential", re.IGNORECASE)


class PPO(Section):
    """The policy's training."""

    prompts: Data
    """`prompt` or `messages`."""
    start: str | None = None
    """An earlier run's policy to go on from: its folder `policy`, with `train.kind: lora` its `adapter`. Empty: the SFT
    model, which stays the reference either way."""
    seed: int | None = None
    """Of the order of prompts, of sampling and of shuffling in PPO; empty: the recipe's. What is held out does not
    depend on it."""
    optim: Optim = Optim(schedule="constant", lr=3e-5)
    """For the policy."""
    critic: Adam = Adam(schedule="constant", lr=5e-5)
    """For the critic; it goes through the model together with the policy."""
    steps: int = Field(default=50, ge=1)
    """Rounds of sampling and learning."""
    rollouts: int = Field(default=64, ge=2)
    """Responses in one round."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses drawn for each prompt; divides `rollouts`."""
    max_new_tokens: int = Field(default=128, ge=1)
    """A response is cut here."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling, and of every log-prob."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sampling keeps the smallest set of tokens that holds this much probability."""
    epochs: int = Field(default=4, ge=1)
    """Passes over one round's rollouts."""
    minibatches: int = Field(default=2, ge=1)
    """Updates in one pass."""
    objective: Literal["clip", "kl", "a2c", "is"] = "clip"
    """PPO-clip; PPO with an adaptive penalty on KL(π_old‖π); the plain policy gradient, one update on fresh rollouts
    (A2C); or the policy gradient with importance weights π/μ."""
    clip: float | None = Field(default=None, gt=0, lt=1)
    """PPO-clip's ε; 0.2 when empty."""
    penalty_target: float | None = Field(default=None, gt=0)
    """PPO-KL's target for KL(π_old‖π), nats per token; 0.01 when empty."""
    behaviour: Literal["fresh", "stale", "sft"] = "fresh"
    """Who draws the rollouts, μ: the policy as it is, as it was some steps ago, or the SFT model, whose samples are
    drawn once, kept in RUN/rollouts and learned from again and again."""
    stale_steps: int | None = Field(default=None, ge=0)
    """For `behaviour: stale`, how many steps old μ is; 1 when empty."""
    sft_samples: int | None = Field(default=None, ge=2)
    """For `behaviour: sft`, responses to draw; a multiple of `rollouts`, 8 × as many when empty."""
    weight_kind: Literal["step", "per_decision", "trajectory"] | None = None
    """What a weight against μ is made of: a token's own ratio, those up to it multiplied, or those of the whole
    response multiplied; `step` when empty. The ratios are π/μ for objective `is`, π_old/μ for `clip` and `kl`."""
    weight_cap: float | None = Field(default=None, ge=1)
    """Larger weights are cut to this, for less variance and some bias; empty: none is."""
    ess_floor: float | None = Field(default=None, ge=0, lt=1)
    """For `behaviour: sft`, the least effective sample size (`ess/share`, a share of the round) worth learning from;
    0.5 when empty."""
    on_low_ess: Literal["stop", "draw"] | None = None
    """Below the floor the run stops, or draws as many samples from the policy as it is now, which is μ from then on
    (the SFT model's would be worth no more); `stop` when empty."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """How far a value may move from the old one before its loss is clipped; empty: no clipping."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's λ."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and standard deviation 1 over the whole round."""
    rewards: tuple[AnySource, ...] = ()
    """Who scores: judges (`model`, `function`, `http`, `classifier`), of which the weighted mean counts, and penalties
    (`length`, `format`), which are subtracted. Left out: the run's reward model."""
    disagreement: float = Field(default=0.0, ge=0)
    """k of mean − k · std over the judges' values: of judges that differ, the lower ones are believed."""
    unit_samples: int | None = Field(default=None, ge=8)
    """Answers of the SFT model on which a judge's empty `shift` or `scale` is measured; 256 when empty."""
    reward_scale: float = Field(default=1.0, gt=0)
    """Multiplies the normalised score."""
    reward_clip: float | None = Field(default=None, gt=0)
    """The scaled score is cut to ± this."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Subtracted from the score of a response that the length limit cut."""
    critic_init: Literal["reward", "zero"] = "reward"
    """The critic starts as the reward model, or as the SFT model with a zero head."""
    kl: KL = KL()
    """The leash to the SFT model."""
    eval_every: int = Field(default=5, ge=1)
    """Rounds between two looks at held-out prompts."""
    eval_prompts: int = Field(default=64, ge=2)
    """Held-out prompts in such a look; `ppolite eval` uses others."""
    max_kl: float = Field(default=8.0, gt=0)
    """The policy kept is the one with the best held-out score within this KL to the SFT model (nats a sequence)."""
    min_rm_accuracy: float = Field(default=0.6, ge=0, le=1)
    """PPO refuses to start on a reward model whose held-out pairwise accuracy is lower; 0: never."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    @property
    def asks_model(self) -> bool:
        """Whether the run's reward model scores, alone or with others."""
        return not self.rewards or any(isinstance(source, ModelSource) for source in self.rewards)

    @property
    def lag(self) -> int:
        """Steps between drawing a round and learning from it."""
        return (1 if self.stale_steps is None else self.stale_steps) if self.behaviour == "stale" else 0

    @property
    def stored(self) -> int:
        """Samples drawn at once and used again and again."""
        return (self.sft_samples or 8 * self.rollouts) if self.behaviour == "sft" else 0

    @property
    def least_ess(self) -> float:
        """Rounds whose effective share is below this are not learned from."""
        return (0.5 if self.ess_floor is None else self.ess_floor) if self.behaviour == "sft" else 0.0

    @model_validator(mode="after")
    def _agree(self) -> PPO:
        if self.rollouts % self.samples_per_prompt:
            raise ValueError(
                f"rollouts ({self.rollouts}) must be a multiple of samples_per_prompt "
                f"({self.samples_per_prompt})"
            )
        if self.minibatches > self.rollouts:
            raise ValueError(f"minibatches ({self.minibatches}) exceed rollouts ({self.rollouts})")
        if self.kl.target is not None and self.kl.beta == 0:
            raise ValueError("kl.target steers beta by factors, so kl.beta must start above 0")
        if self.kl.target is not None and self.rollouts >= 5 * self.kl.horizon:
            raise ValueError(
                f"kl.horizon ({self.kl.horizon:g}) must exceed a fifth of rollouts ({self.rollouts})"
            )
        if self.kl.where == "loss" and self.kl.estimator == "k1":
            raise ValueError(
                "kl.where: loss with estimator k1 has an expected gradient of 0 and holds nothing; use k2"
            )
        return self

    @model_validator(mode="after")
    def _has_sound_rewards(self) -> PPO:
        judges = [s for s in self.rewards if isinstance(s, Judge | ModelSource)]
        labels = [s.title for s in self.rewards]
        for label in labels:
            if labels.count(label) > 1 or label == "shaped_mean":
                raise ValueError(f"rewards: `{label}` is taken; give that source another `name`")
        if sum(isinstance(s, ModelSource) for s in judges) > 1:
            raise ValueError("rewards: a run has one reward model; add others as kind classifier")
        if len(judges) == 1 and judges[0].weight != 1:
            raise ValueError(
                f"rewards: `{judges[0].title}` is the only judge, so its weight has nothing to be weighed "
                "against; use ppo.reward_scale"
            )
        if self.disagreement and len(judges) < 2:
            raise ValueError(f"disagreement is one of two judges or more, but rewards has {len(judges)}")
        measured = any(isinstance(s, Judge) and None in (s.shift, s.scale) for s in judges)
        if self.unit_samples is not None and not measured:
            raise ValueError("unit_samples: no source of rewards has an empty shift or scale to be measured")
        for s in self.rewards:
            if isinstance(s, LengthSource) and s.max is not None and s.max >= self.max_new_tokens:
                raise ValueError(
                    f"rewards: `{s.title}` allows {s.max} tokens, which no response of max_new_tokens "
                    f"({self.max_new_tokens}) exceeds; lower its max"
                )
        return self

    @model_validator(mode="after")
    def _is_sound(self) -> PPO:
        if self.objective == "a2c" and self.behaviour != "fresh":
            raise ValueError(
                f"objective a2c holds for fresh rollouts only, but behaviour is `{self.behaviour}`; set "
                "objective: is, which weights what another policy drew"
            )
        if self.objective == "a2c" and (self.epochs > 1 or self.minibatches > 1):
            raise ValueError(
                f"objective a2c learns once from fresh rollouts, but epochs is {self.epochs} and minibatches "
                f"{self.minibatches}; set both to 1, or objective: is to learn several times"
            )
        if self.stored % self.rollouts or self.stored % self.samples_per_prompt:
            raise ValueError(
                f"sft_samples ({self.stored}) must be a multiple of rollouts ({self.rollouts}), so that every "
                "sample is used equally often"
            )
        return self

    @model_validator(mode="after")
    def _reads_every_key(self) -> PPO:
        weighted = self.objective == "is" or self.behaviour != "fresh"
        needs = {
            "clip": (self.objective == "clip", "objective: clip"),
            "penalty_target": (self.objective == "kl", "objective: kl"),
            "stale_steps": (self.behaviour == "stale", "behaviour: stale"),
            "sft_samples": (self.behaviour == "sft", "behaviour: sft"),
            "ess_floor": (self.behaviour == "sft", "behaviour: sft"),
            "on_low_ess": (self.behaviour == "sft", "behaviour: sft"),
            "weight_kind": (weighted, "objective: is, or behaviour to stale or sft"),
            "weight_cap": (weighted, "objective: is, or behaviour to stale or sft"),
        }
        for key, (read, wanted) in needs.items():
            if getattr(self, key) is not None and not read:
                raise ValueError(
                    f"objective is `{self.objective}` and behaviour `{self.behaviour}`, which have no `{key}`; "
                    f"remove it or set {wanted}"
                )
        return self


class Iterate(Section):
    """Rounds of sample → score → reward → ppo, each from the last policy."""

    rounds: int = Field(default=2, ge=1)
    """How many; may be raised in a run that is finished."""
    by: Literal["file", "person", "judge"] = "person"
    """Who scores the candidates: whoever fills in the file, a person at this terminal, or the VADER lexicon as a
    stand-in for people."""
    prompts: int = Field(default=200, ge=2)
    """Prompts in a round, of those that PPO trains on; the next round takes the next ones."""
    candidates: int = Field(default=4, ge=2)
    """Answers to each, all compared with each other."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the prompts whose comparisons measure the reward model instead of training it; prompts that
    `ppo.prompts` or `reward.data` hold out stay held out."""


class Evaluation(Section):
    """The look at the result."""

    prompts: int = Field(default=200, ge=2)
    """Held-out prompts, never seen in training nor in choosing the best policy."""
    judge: Literal["vader", "none"] = "none"
    """An independent judge beside the reward model; `vader` is a lexicon of English sentiment."""
    samples: int = Field(default=12, ge=1)
    """Before/after pairs kept for the report."""


class Recipe(Section):
    """A whole run."""

    model: str = "embedded:smollm2-135m"
    """`embedded:smollm2-135m`, a folder in HF format, a .gguf file, or a hub id."""
    trust_remote_code: bool = False
    """Run Python that a model's folder brings along."""
    seed: int = 0
    """Every random stream derives from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the arithmetic; weights that are trained stay float32. `auto`: bfloat16 where the chip has it."""
    roles: Literal["shared", "separate"] = "shared"
    """One trunk for policy, reference, critic and reward model, or four whole models."""
    trunk: Trunk = Trunk()
    train: Train = Train()
    sft: SFT | None = None
    """Left out: the model is taken as it is."""
    reward: Reward | None = None
    """Left out: `ppo.rewards` says who scores, or the Python API trains with scores of its own."""
    ppo: PPO | None = None
    iterate: Iterate | None = None
    """Read by `ppolite iterate` alone."""
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        if self.train.kind == "full" and self.trunk.split:
            raise ValueError(
                f"train.kind: full trains every layer, but trunk.split is {self.trunk.split}; set it to 0 or "
                "train.kind to layers"
            )
        if self.roles == "separate" and self.trunk.split:
            raise ValueError(
                f"roles: separate shares nothing, but trunk.split is {self.trunk.split}; set it to 0 or "
                "roles to shared"
            )
        return self


def _known_keys(section: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for before, key in zip((None, *path), path, strict=False):
        if isinstance(key, int) or (isinstance(before, int) and key in SOURCES):
            section = SOURCES.get(key, section) if isinstance(key, str) else section
            continue
        if key == "rewards":
            section = Source
            continue
        annotation = section.model_fields[key].annotation if key in section.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not found:
            return []
        section = found[0]
    return list(section.model_fields)


def explain(error: ValidationError, where: str, root: type[BaseModel]) -> UserError:
    """One sentence on the first thing that is wrong; unknown keys with the nearest one that `root` has."""
    # A misspelt key also leaves its right name missing: the misspelling is the better news.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = first["loc"]
    # An entry of a list of sources is followed by its kind, which no recipe spells there.
    spelt = [
        key
        for before, key in zip((None, *loc), loc, strict=False)
        if not (isinstance(before, int) and key in SOURCES)
    ]
    path = ".".join(str(p) for p in spelt)
    if first["type"] in ("union_tag_not_found", "union_tag_invalid"):
        kind = first.get("ctx", {}).get("tag")
        near = difflib.get_close_matches(str(kind), SOURCES, n=1, cutoff=0.4) if kind else []
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(SOURCES)}"
        return UserError(f"{where}: `{path}` has {f'the kind `{kind}`' if kind else 'no `kind`'}; {hint}")
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return UserError(f"{where}: unknown key `{path}`; {hint}")
    if first["type"] == "missing":
        return UserError(f"{where}: `{path}` is missing; add it")
    if first["type"] == "value_error":
        prefix = f"{path}: " if path else ""
        return UserError(f"{where}: {prefix}{first.get('ctx', {})['error']}")
    return UserError(f"{where}: `{path}` is {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}")


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set what `section.key=value` says, the value being YAML. Raises UserError."""
    key, eq, value = override.partition("=")
    if not eq or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE, for instance --set ppo.steps=20")
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: `{parent}` is not a section")
        tree = cast("dict[str, Any]", child)
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is no YAML ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def parse_recipe(tree: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Check a recipe given as plain data. Raises UserError with the first thing that is wrong."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise explain(error, where, Recipe) from None


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(source: str | Path) -> Path:
    """The file that is meant: a path, or the name of a shipped recipe."""
    path = Path(source)
    if not path.exists() and str(source) in shipped():
        return RECIPES / f"{source}.yaml"
    return path


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a YAML recipe, or the shipped one of that name; `overrides` are `section.key=value`.

    Relative data paths count from the working folder.
    Raises UserError: file missing, no YAML, unknown key (with the nearest), wrong type, contradiction.
    """
    path = recipe_path(path)
    tree = read_tree(path, shipped())
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree, where=str(path))


def read_tree(path: Path, names: list[str]) -> dict[str, Any]:
    """A YAML file of `key: value` lines as it stands. Raises UserError; `names` are what else could be given."""
    try:
        loaded: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; give a YAML file or one of {', '.join(names)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({_first_line(error)})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: no valid YAML ({_first_line(error)})") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(loaded).__name__}")
    return cast("dict[str, Any]", loaded)


def save_recipe(recipe: Section, path: Path) -> None:
    """Write the resolved recipe, defaults included, so that the run can be repeated by a later version."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
