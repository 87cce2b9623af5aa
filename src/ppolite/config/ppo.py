"""The section `ppo` of a recipe: the policy's training, and which of its keys go together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ppolite.config.parts import Adam, Data, Optim
from ppolite.config.section import Section
from ppolite.config.sources import AnySource, Judge, LengthSource, ModelSource
from ppolite.types import Sampling


class KL(Section):
    """The leash to the SFT model."""

    beta: float = Field(default=0.05, ge=0)
    """Coefficient, in units of normalised reward per nat; the start value when `target` is given."""
    target: float | None = Field(default=None, gt=0)
    """Nats per sequence that the adaptive controller steers to; empty: β is fixed. On its way there the controller only
    loosens, so start with a firm `beta`, about 0.3 in these units."""
    horizon: float | None = Field(default=None, gt=0)
    """With a `target`, the sequences over which the adaptive controller reacts; 1000 when empty."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimate from samples: k1 = −log r, k2 = ½ log² r, k3 = r − 1 − log r, with r = π_ref/π_θ."""
    where: Literal["reward", "loss"] = "reward"
    """In the per-token reward (as in InstructGPT), or as a term of the loss (k2 has KL's gradient there,
    k3 that of the KL the other way round, k1 none, and is refused)."""

    @property
    def reaction(self) -> float:
        """Sequences over which the adaptive controller reacts."""
        return self.horizon or 1000.0

    @model_validator(mode="after")
    def _agree(self) -> KL:
        if self.target is None and self.horizon is not None:
            raise ValueError("`horizon` is of the leash that adapts; remove it, or give it a `target`")
        if self.target is not None and self.beta == 0:
            raise ValueError("target steers beta by factors, so kl.beta must start above 0")
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError(
                "where: loss with estimator k1 has an expected gradient of 0 and holds nothing; use k2"
            )
        return self


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
    """For the critic's weights; with `critic_body: policy` these are its head's."""
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
    """PPO-clip; PPO with a penalty on KL(π_old‖π), adaptive or fixed; the plain policy gradient, one update on fresh
    rollouts (A2C); or the policy gradient with importance weights π/μ."""
    clip: float | None = Field(default=None, gt=0, lt=1)
    """PPO-clip's ε; 0.2 when empty."""
    clip_high: float | None = Field(default=None, gt=0)
    """PPO-clip's ε above, at least `clip`: a ratio may rise further than it may fall (DAPO); `clip` when empty."""
    dual_clip: float | None = Field(default=None, gt=1)
    """PPO-clip: where A < 0, a ratio counts at most this much, so that no token rules an update; empty: in full."""
    penalty_beta: float | None = Field(default=None, gt=0)
    """PPO-KL's β: fixed, or with a `penalty_target` where it starts; when empty it starts at 1 and is steered."""
    penalty_target: float | None = Field(default=None, gt=0)
    """PPO-KL's target for KL(π_old‖π), nats per token: after each round β is doubled or halved to come nearer. 0.01
    when empty, unless `penalty_beta` fixes β."""
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
    critic_init: Literal["reward", "zero"] | None = None
    """The critic starts as the run's reward model, or as the SFT model with a zero head; when empty, as the reward
    model where that is among those who score."""
    critic_body: Literal["own", "policy"] = "own"
    """The critic's layers: its own, or the policy's, on which it is a second head then. One pass serves both, at about
    half the cost; but two losses pull at the same weights, and what the reward model knows is not in them."""
    value_coef: float | None = Field(default=None, gt=0)
    """With `critic_body: policy`, the weight of the value loss beside the policy's; 0.1 when empty."""
    kl: KL = KL()
    """The leash to the SFT model."""
    eval_every: int = Field(default=5, ge=1)
    """Rounds between two looks at held-out prompts."""
    eval_prompts: int = Field(default=64, ge=2)
    """Held-out prompts in such a look; `ppolite eval` uses others."""
    max_kl: float = Field(default=8.0, gt=0)
    """The policy kept is the one with the best held-out score within this KL to the SFT model (nats a sequence)."""
    min_rm_accuracy: float | None = Field(default=None, ge=0, le=1)
    """PPO refuses to start on a reward model whose held-out pairwise accuracy is lower; 0: never; 0.6 when empty."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    @property
    def asks_model(self) -> bool:
        """Whether the run's reward model scores, alone or with others."""
        return not self.rewards or any(isinstance(source, ModelSource) for source in self.rewards)

    @property
    def critic_start(self) -> Literal["reward", "zero"]:
        return self.critic_init or ("reward" if self.asks_model and self.critic_body == "own" else "zero")

    @property
    def steers_penalty(self) -> bool:
        """Whether there is a PPO-KL's β that follows a target."""
        return self.objective == "kl" and (self.penalty_target is not None or self.penalty_beta is None)

    @property
    def value_weight(self) -> float:
        """Of the value loss in the loss of a body that serves policy and critic."""
        return 0.1 if self.value_coef is None else self.value_coef

    @property
    def least_accuracy(self) -> float:
        """Held-out pairwise accuracy below which a reward model is refused."""
        return 0.6 if self.min_rm_accuracy is None else self.min_rm_accuracy

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
            raise ValueError(
                f"minibatches ({self.minibatches}) exceed rollouts ({self.rollouts}); lower them"
            )
        if self.kl.target is not None and self.rollouts >= 5 * self.kl.reaction:
            raise ValueError(
                f"kl.horizon ({self.kl.reaction:g}) must exceed a fifth of rollouts ({self.rollouts}); raise it"
            )
        if self.kl.target is not None and self.kl.target > self.max_kl:
            raise ValueError(
                f"kl.target ({self.kl.target:g}) lies beyond max_kl ({self.max_kl:g}), so the leash would steer to "
                "where no policy is kept; lower the one or raise the other"
            )
        if self.critic_body == "policy" and self.critic_init == "reward":
            raise ValueError(
                "critic_init: reward starts a critic with layers of its own, but critic_body is `policy`; remove one"
            )
        if self.critic_body == "own" and self.value_coef is not None:
            raise ValueError(
                "value_coef weighs two losses on the same layers; remove it, or set critic_body: policy"
            )
        if self.prompts.fewest_held_out < self.eval_prompts + 2:
            raise ValueError(
                f"prompts.held_out is {self.prompts.held_out:g}, but eval_prompts ({self.eval_prompts}) serve to "
                "choose the best policy and others to judge it; hold out more"
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
            raise ValueError(
                f"disagreement is one of two judges or more, but rewards has {len(judges)}; remove it, or add one"
            )
        measured = any(isinstance(s, Judge) and None in (s.shift, s.scale) for s in judges)
        if self.unit_samples is not None and not measured:
            raise ValueError(
                "unit_samples: no source of rewards has an empty shift or scale to be measured; remove it"
            )
        for s in self.rewards:
            if isinstance(s, LengthSource) and s.min is not None and s.min > self.max_new_tokens:
                raise ValueError(
                    f"rewards: `{s.title}` asks for {s.min} tokens, which no response of max_new_tokens "
                    f"({self.max_new_tokens}) has; lower its min"
                )
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
        if self.clip_high is not None and self.clip_high < (self.clip or 0.2):
            raise ValueError(
                f"clip_high ({self.clip_high:g}) is below clip ({self.clip or 0.2:g}), but it is the wider bound; "
                "raise it, or lower clip"
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
            "clip_high": (self.objective == "clip", "objective: clip"),
            "dual_clip": (self.objective == "clip", "objective: clip"),
            "penalty_beta": (self.objective == "kl", "objective: kl"),
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
        if self.ess_floor == 0 and self.on_low_ess is not None:
            raise ValueError("ess_floor is 0, below which nothing is, so on_low_ess has no use; remove one")
        asked = {"critic_init": self.critic_init == "reward", "min_rm_accuracy": bool(self.min_rm_accuracy)}
        for key, given in asked.items():
            if given and not self.asks_model:
                raise ValueError(
                    f"rewards has no entry of kind model, so there is no reward model for `{key}`; remove it, or add "
                    "one"
                )
        return self
