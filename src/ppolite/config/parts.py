"""Sections that several others are made of: data, the trunk, what is trained, the optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ppolite.config.section import Section


class Data(Section):
    """Where rows come from and how their columns are called."""

    path: str
    """A jsonl, json, csv, tsv or parquet file, a folder of `datasets`, `hub:NAME`, or `embedded:film`."""
    columns: dict[str, str] = Field(default={})
    """Our column name → the file's (dots and indices reach inside: `conversations.0.value`)."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first n training rows after shuffling."""
    held_out: float = Field(default=0.1, ge=0)
    """Rows kept for evaluation, split by prompt: a share below 1, or a number of rows."""
    plain: bool = False
    """Treat string prompts as plain text to be continued instead of as a user's turn."""

    @model_validator(mode="after")
    def _agree(self) -> Data:
        if self.held_out > 1 and not self.held_out.is_integer():
            raise ValueError(
                f"held_out is {self.held_out:g}; give a share below 1, or a whole number of rows"
            )
        return self

    @property
    def fewest_held_out(self) -> float:
        """Rows that are held out for certain; infinite for a share, which may be of any number."""
        return self.held_out if self.held_out >= 1 or self.held_out == 0 else float("inf")


class Trunk(Section):
    """The frozen part that all roles share."""

    split: int = Field(default=0, ge=0)
    """First trained layer: the layers below it are frozen, shared by all roles and run once per rollout."""
    keep: Literal["auto", "device", "cpu", "none"] = "auto"
    """Where their output for a round of PPO stays: on the `device`, with the `cpu`, or nowhere (`none`: they are run
    again for each micro-batch); `auto`: the first of these of which it fills at most a quarter."""

    @model_validator(mode="after")
    def _agree(self) -> Trunk:
        if self.keep != "auto" and not self.split:
            raise ValueError(
                f"trunk.keep is {self.keep}, but with trunk.split 0 no layer is frozen whose output could be kept; "
                "take it out"
            )
        return self


class Train(Section):
    """Which weights move."""

    kind: Literal["lora", "layers", "full"] = "lora"
    """`lora`: adapters on the layers from `trunk.split` on; `layers`: those layers; `full`: everything."""
    lora_rank: int | None = Field(default=None, ge=1)
    """For `lora`, the rank of the adapters' two factors; 16 when empty."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """For `lora`: the adapter's output is scaled by alpha / rank; 32 when empty."""
    recompute: bool = False
    """Keep one hidden state a layer for the backward pass and compute the rest again in it: less memory, more time."""

    @property
    def rank(self) -> int:
        return self.lora_rank or 16

    @property
    def alpha(self) -> float:
        return self.lora_alpha or 32.0

    @model_validator(mode="after")
    def _agree(self) -> Train:
        for key in ("lora_rank", "lora_alpha"):
            if getattr(self, key) is not None and self.kind != "lora":
                raise ValueError(f"kind is {self.kind}, which has no `{key}`; remove it or set kind: lora")
        return self


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
