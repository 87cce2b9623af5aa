"""Conversations become token ids, through the model's own chat template.

    prompt_ids          response_ids
    ┌─────────┴────────┐┌──────┴───────┐
    … user turn, header  answer end-of-turn        (what the template adds after that is left away)

`prompt_ids + response_ids` are the ids which the template gives for the whole conversation: SFT learns the
border that generation starts from, and the last response id is the token that generation stops at. Plain
text (a prompt without messages) is encoded as it stands and ends with EOS.

`prepare_tokenizer` comes first: it repairs what would corrupt training silently (pad = eos, no chat
template) and returns a sentence for each repair. Nothing here prints.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from ppolite.types import Message, Prompt, UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger("ppolite")

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\n\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:\n' if add_generation_prompt }}"
)
"""For a tokenizer without a chat template. The answer starts after a newline, which BPE never merges with a
letter, so that prompt and answer tokenize alike together and apart."""

PAD_NAMES = (
    *("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|PAD_TOKEN|>", "<|finetune_right_pad_id|>"),
    *("<|vision_pad|>", "<|endoftext|>", "<|end_of_text|>"),
)


# ---- encoding --------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The ids after which the response starts: for messages, up to and including the assistant's header."""
    if prompt.messages:
        return _ids(tokenizer, render(tokenizer, prompt.messages, prompt.source, header=True))
    ids = tokenizer.encode(prompt.text, add_special_tokens=True, verbose=False)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str
) -> tuple[list[int], list[int]]:
    """`(prompt_ids, response_ids)`; the response ends with the token that ends a turn.

    Where the template does not continue its own generation prompt, or a token spans the border, the two
    sides are encoded apart, as generation meets them, and a warning says so once.
    """
    if not prompt.messages:
        response_ids = [*_ids(tokenizer, response), _eos(tokenizer)]
        return encode_prompt(tokenizer, prompt), _end_once(tokenizer, prompt, response_ids)
    tail, stop = turn_ending(tokenizer, tokenizer.get_chat_template())
    before = render(tokenizer, prompt.messages, prompt.source, header=True)
    prompt_ids = _ids(tokenizer, before)
    answer: Message = {"role": "assistant", "content": response}
    whole = render(tokenizer, [*prompt.messages, answer], prompt.source)
    if not whole.startswith(before):
        _warn_once(
            "The chat template does not continue its own generation prompt with an answer; the answer is"
            " encoded by itself after that prompt, as generation meets it"
        )
        whole = before + response + tail
    if stop is None:
        whole = whole.removesuffix(tail)
    ids = _ids(tokenizer, whole)
    response_ids = ids[len(prompt_ids) :]
    if ids[: len(prompt_ids)] != prompt_ids:
        _warn_once("A token spans the border between prompt and answer; they are encoded apart")
        response_ids = _ids(tokenizer, whole[len(before) :])
    if stop is None:
        response_ids = [*response_ids, _eos(tokenizer)]
    else:
        response_ids = response_ids[: len(response_ids) - response_ids[::-1].index(stop)]
    return prompt_ids, _end_once(tokenizer, prompt, response_ids)


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Every token that ends a response: EOS, the generation config's, and the template's end of a turn."""
    found: set[int | None] = {_eos(tokenizer), *_as_list(getattr(generation_config, "eos_token_id", None))}
    if tokenizer.chat_template:
        found.add(turn_ending(tokenizer, tokenizer.get_chat_template())[1])
    return frozenset(token for token in found if token is not None)


def check_lengths(
    ids_list: Sequence[Sequence[int]],
    limit: int,
    sources: Sequence[str],
    *,
    what: str = "the model's context",
) -> tuple[list[int], list[str]]:
    """Indices of the rows with at most `limit` tokens, and one sentence for each row that is longer.

    Raises UserError where no row is left.
    """
    keep = [i for i, ids in enumerate(ids_list) if len(ids) <= limit]
    too_long = [
        f"{source}: {len(ids):,} tokens, but {what} holds {limit:,}; shorten it or raise the limit"
        for ids, source in zip(ids_list, sources, strict=True)
        if len(ids) > limit
    ]
    if too_long and not keep:
        raise UserError(f"none of {len(ids_list):,} rows fits. {too_long[0]}")
    return keep, too_long


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.eos_token_id, int), "prepare_tokenizer comes first"
    return tokenizer.eos_token_id


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    source: str,
    *,
    header: bool = False,
    template: str | None = None,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=header
        )
    except Exception as error:  # a template may stumble over anything
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"{source or 'prompt'}: the model's chat template refuses this conversation of {roles} ({error});"
            " change these turns, or use a model whose template allows them"
        ) from error
    assert isinstance(text, str)
    return text


@lru_cache(maxsize=8)
def turn_ending(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, int | None]:
    """What the template writes after an answer, and the token in it that ends the turn, if there is one.

    The token may differ from EOS: Llama 3 ends turns with `<|eot_id|>`, Gemma with `<end_of_turn>`. The
    template is an argument so that a tokenizer whose template changed is looked at again.
    """
    answer = "ppolite"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    _, said, tail = render(tokenizer, turns, "chat template", template=template).rpartition(answer)
    if not said:
        raise UserError(
            f"{tokenizer.name_or_path or 'the model'}: its chat template leaves out what the assistant says; mend it in"
            " chat_template.jinja or tokenizer_config.json, or choose another model"
        )
    special = _special_ids(tokenizer)
    return tail, next((token for token in _ids(tokenizer, tail) if token in special), None)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _end_once(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response_ids: list[int]) -> list[int]:
    """Refuse a response whose text spells a stop token: a response ends once, where its reward lands."""
    ends = {response_ids[-1], _eos(tokenizer)}
    if early := ends.intersection(response_ids[:-1]):
        raise UserError(
            f"{prompt.source or 'response'}: the answer contains {tokenizer.decode(list(early))!r}, which"
            " ends a response; remove it from the text"
        )
    return response_ids


@lru_cache(maxsize=64)
def _warn_once(sentence: str) -> None:
    log.warning(sentence)


# ---- repairs ---------------------------------------------------------------------------------------------


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, *, chat: bool = True
) -> list[str]:
    """Give tokenizer and config an EOS, a pad that differs from it and a chat template; say what changed.

    `chat=False` is for plain text, which needs no template. Raises UserError where no repair is possible.
    """
    said: list[str] = []
    name = tokenizer.name_or_path or "the model"
    if tokenizer.eos_token_id is None:
        ids = _as_list(getattr(config, "eos_token_id", None))
        if not ids:
            raise UserError(
                f"{name}: no EOS token, so no response could end; set eos_token in its tokenizer_config.json"
                " or choose another model"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])
        said.append(f"{name}: the tokenizer names no EOS token; using the model's, {tokenizer.eos_token!r}")
    if chat and not tokenizer.chat_template:
        # Llama-like tokenizers start a text with BOS; apply_chat_template leaves that to the template.
        starts = tokenizer.encode("x")[0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + PLAIN_TEMPLATE
        said.append(f"{name}: the tokenizer has no chat template; using a plain one ('User:', 'Assistant:')")
    said += _repair_pad(tokenizer, config, name)
    if getattr(config, "eos_token_id", None) is None:
        config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return said


def _repair_pad(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> list[str]:
    ends = stop_ids(tokenizer)
    size = getattr(config.get_text_config(), "vocab_size", len(tokenizer))
    old = cast("int | None", tokenizer.pad_token_id)
    if old is not None and old not in ends and old < size:
        return []
    taken = {
        *ends,
        *_as_list(getattr(config, "eos_token_id", None)),
        cast("int | None", tokenizer.bos_token_id),
    }
    vocab = tokenizer.get_vocab()
    candidates = [*PAD_NAMES[:-2], tokenizer.unk_token, *PAD_NAMES[-2:], _unwritten_token(tokenizer)]
    for token in candidates:
        if token is not None and token in vocab and vocab[token] not in taken and vocab[token] < size:
            why = (
                "it has none"
                if old is None
                else f"{tokenizer.pad_token!r} also ends a response or is no token"
            )
            tokenizer.pad_token = token
            return [f"{name}: padding with {token!r} (id {vocab[token]}), because {why}"]
    raise UserError(
        f"{name}: no token can serve as padding that differs from EOS {tokenizer.eos_token!r}; set pad_token"
        " in its tokenizer_config.json to a token of the vocabulary that no text uses"
    )


def _unwritten_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token of one control character, for vocabularies with a single special token, such as GPT-2's.

    Byte 0x14 occurs in no text. A byte-level BPE spells it "Ĕ", and a pad token's spelling is also looked
    for in texts: of the 33 letters that stand for control bytes, no language's alphabet has this one.
    """
    if "<0x14>" in tokenizer.get_vocab():
        return "<0x14>"
    ids = _ids(tokenizer, "\x14")
    if len(ids) != 1 or ids[0] in _special_ids(tokenizer):
        return None
    token = tokenizer.convert_ids_to_tokens(ids[0])
    return token if isinstance(token, str) else None
