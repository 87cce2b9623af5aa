"""Random models of every family with a few thousand weights, a tokenizer of 40 words, and plain oracles.

    model = tiny.model("gemma2")                     a causal LM in eval mode, weights large enough to matter
    tiny.logprobs(model, prompt_ids, response_ids)   HF's own forward pass, one row, no padding
    with tiny.Wide(): ...                            float64 through and through

HF computes norms, rotary tables and some softmaxes in float32 whatever the weights are. `Wide` turns those
casts into float64, so that two ways to the same number can be compared beyond float32's rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from ppolite.config import Train

PAD, END, STOP, UNK, USER, BOT = range(6)
SPECIAL = ["<pad>", "<end>", "<stop>", "<unk>", "<user>", "<bot>"]
VOCAB = 40
LAYERS = 4
WINDOW = 4
CPU = torch.device("cpu")

_llama = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
_gemma = {**_llama, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
_mixed = ["sliding_attention", "full_attention"] * (LAYERS // 2)

FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **k: LlamaConfig(**_llama, tie_word_embeddings=True, **k),
    "mistral": lambda **k: MistralConfig(**_llama, head_dim=8, sliding_window=WINDOW, **k),
    "qwen2": lambda **k: Qwen2Config(
        **_llama, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2, **k
    ),
    "qwen3": lambda **k: Qwen3Config(**_llama, head_dim=8, **k),
    "gemma2": lambda **k: Gemma2Config(**_gemma, final_logit_softcapping=3.0, layer_types=_mixed, **k),
    "gemma3": lambda **k: Gemma3TextConfig(**_gemma, layer_types=_mixed, **k),
    "gpt2": lambda **k: GPT2Config(n_embd=16, n_head=2, n_positions=64, **k),
    "neox": lambda **k: GPTNeoXConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, max_position_embeddings=64, **k
    ),
}
NAMES = list(FAMILIES)


def config(name: str, **changes: Any) -> PreTrainedConfig:
    usual: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    return FAMILIES[name](**(usual | changes))


def fill(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Random weights, norms and biases among them, so large that every layer, mask and position shows."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=stream)
            p.copy_(0.3 * noise if p.ndim > 1 else p + 0.2 * noise)
    return model.eval().requires_grad_(False)


def model(
    name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    return fill(AutoModelForCausalLM.from_config(config(name, **changes)), seed).to(dtype)


def classifier(like: PreTrainedModel, *, seed: int = 1, changed_from: int = 0) -> PreTrainedModel:
    """A one-output classifier on the decoder of `like`, other weights from layer `changed_from` on."""
    shape = copy.deepcopy(like.config)
    shape.num_labels = 1
    made = AutoModelForSequenceClassification.from_config(shape)
    made.load_state_dict(like.state_dict(), strict=False)
    stream = torch.Generator().manual_seed(seed)
    children = dict(made.base_model.named_children())
    layers = children.get("layers", children.get("h"))
    with torch.no_grad():
        made.score.weight.zero_()
        for p in [*layers[changed_from:].parameters(), made.score.weight]:
            p.add_(0.1 * torch.randn(p.shape, generator=stream))
    return made.eval().requires_grad_(False)


def train(kind: str, **lora: float) -> Train:
    """What is trained; adapters of rank 2, where there are adapters."""
    return Train.model_validate({"kind": kind, **({"lora_rank": 2, **lora} if kind == "lora" else {})})


def tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token: `w6` is 6. `<stop>` ends a response too, for those who count it as one."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCAB))])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        additional_special_tokens=["<stop>", "<user>", "<bot>"],
    )  # fmt: skip
    made.chat_template = (
        "{% for m in messages %}{{ ('<user> ' if m['role'] == 'user' else '<bot> ') + m['content'] }}"
        "{{ ' <end> ' }}{% endfor %}{{ '<bot> ' if add_generation_prompt }}"
    )
    return made


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def rows(*, shared: int, seed: int = 0, n: int = 4) -> tuple[list[list[int]], list[list[int]]]:
    """Ragged prompts with `shared` common tokens at the front, and ragged responses longer than a window."""
    stream = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(len(SPECIAL), VOCAB, (k,), generator=stream).tolist()  # noqa: E731
    front = draw(shared)
    firsts = [len(SPECIAL) + i for i in range(n)]  # so that no prompt shares more
    prompts = [[*front, firsts[i], *draw(2 * i)] for i in range(n)]
    return prompts, [draw(1 + (3 * i) % 7) for i in range(n)]


class Wide(TorchFunctionMode):
    """Every cast to float32 becomes one to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


def logprobs(model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> Tensor:
    """log π of the response's tokens, [R], by the model's plain forward pass on this row alone."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def hidden(model: Any, ids: Sequence[int]) -> Tensor:
    """Last hidden states [T, D] of one row."""
    return model.base_model(input_ids=torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]
