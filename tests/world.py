"""A world small enough to train in a second: 24 words, a random Llama, and people with simple tastes.

People like `good` words and dislike `bad` ones; their scores, pairs and rankings all say so, so that a reward
model can learn it and PPO can please them. `World(folder)` writes the model and the data; `world.recipe(...)`
gives a recipe that trains all three stages on them.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppolite.config import Recipe, parse_recipe

GOOD = ["good", "great", "superb", "sweet"]
BAD = ["bad", "dull", "stale", "silly"]
PLAIN = [
    "film",
    "story",
    "scene",
    "actor",
    "music",
    "plot",
    "it",
    "was",
    "the",
    "a",
    "and",
    "so",
    "very",
    "end",
    "start",
    "cast",
]
WORDS = [*GOOD, *BAD, *PLAIN]
SPECIAL = ["<|pad|>", "<|start|>", "<|end|>", "<|unk|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + ' ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant ' }}{% endif %}"
)


def taste(text: str) -> float:
    """What people give: good words less bad ones."""
    words = text.split()
    return float(sum(w in GOOD for w in words) - sum(w in BAD for w in words))


def write_model(
    folder: Path, *, layers: int = 3, context: int = 64, seed: int = 0, extra: int = 0, **special: str | None
) -> Path:
    """A random Llama with a word-level tokenizer; `special` replaces tokens (`pad_token`, `eos_token`, …)."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, "user", "assistant", "system", *WORDS])}
    vocab |= {f"extra{i}": len(vocab) + i for i in range(extra)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "unk_token": "<|unk|>"} | special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        additional_special_tokens=["<|start|>"],
        **{k: v for k, v in named.items() if v},
    )
    tokenizer.chat_template = TEMPLATE
    eos = named["eos_token"]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None if eos is None else vocab[eos],
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class World:
    """Model and data in one folder; paths are absolute, so that tests may change the working folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_model(folder / "model")
        draw = random.Random(0)
        prompts = sorted({" ".join(draw.choices(PLAIN, k=3)) for _ in range(160)})
        draw.shuffle(prompts)
        answers = [
            [" ".join(draw.choices([*GOOD, *BAD, *WORDS], k=draw.randint(2, 6))) for _ in range(3)]
            for _ in prompts
        ]
        self.write("prompts", [{"prompt": p} for p in prompts])
        self.write(
            "examples", [{"prompt": p, "completion": a[0]} for p, a in zip(prompts, answers, strict=True)]
        )
        self.write(
            "scored",
            [
                {"prompt": p, "response": r, "score": taste(r)}
                for p, a in zip(prompts, answers, strict=True)
                for r in a[:2]
            ],
        )
        ranked = [(p, sorted(a, key=taste, reverse=True)) for p, a in zip(prompts, answers, strict=True)]
        clear = [(p, a) for p, a in ranked if len({taste(r) for r in a}) == 3]
        self.write("pairs", [{"prompt": p, "chosen": a[0], "rejected": a[2]} for p, a in clear])
        self.write(
            "rankings",
            [{"prompt": p, "responses": a, "scores": [taste(r) for r in a]} for p, a in clear],
        )

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        return write_rows(self.folder / f"{name}.jsonl", rows)

    def path(self, name: str) -> str:
        return str(self.folder / f"{name}.jsonl")

    def tree(self, **changes: Any) -> dict[str, Any]:
        """The recipe as plain data; `changes` are dotted keys with `__` for the dot."""
        tree: dict[str, Any] = {
            "model": str(self.folder / "model"),
            "dtype": "float32",
            "device": "cpu",
            "trunk": {"split": 1},
            "train": {"kind": "layers"},
            "sft": {
                "data": {"path": self.path("examples"), "limit": 64},
                "batch_size": 16,
                "optim": {"lr": 3e-3},
                "eval_every": 2,
                "eval_examples": 8,
            },
            "reward": {
                "data": {"path": self.path("scored"), "held_out": 0.2, "limit": 128},
                "epochs": 3,
                "batch_size": 16,
                "optim": {"lr": 1e-2},
                "norm_samples": 32,
            },
            "ppo": {
                "prompts": {"path": self.path("prompts"), "held_out": 0.2},
                "optim": {"lr": 3e-3, "schedule": "constant"},
                "critic": {"lr": 3e-3, "schedule": "constant"},
                "steps": 2,
                "rollouts": 16,
                "max_new_tokens": 6,
                "epochs": 2,
                "eval_every": 1,
                "eval_prompts": 8,
            },
            "evaluation": {"prompts": 16, "samples": 3},
        }
        for key, value in changes.items():
            put(tree, key.replace("__", "."), value)
        return tree

    def recipe(self, **changes: Any) -> Recipe:
        return parse_recipe(self.tree(**changes))

    def recipe_file(self, path: Path, **changes: Any) -> Path:
        path.write_text(yaml.safe_dump(self.tree(**changes)), encoding="utf-8")
        return path


def put(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set a dotted key in place."""
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = copy.deepcopy(value)
    return tree
