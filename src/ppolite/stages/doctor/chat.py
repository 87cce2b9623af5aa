"""Tokens and chat template, on conversations of the data: what training sees is what generation meets.

`pairs` are prompts with an answer each, none of them empty. Texts are compared without white space, which some
tokenizers do not keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppolite.data.chat import encode_example, encode_prompt, render, turn_ending
from ppolite.obs.visible import visible
from ppolite.stages.doctor.finding import Finding, graded, skipped
from ppolite.stages.opening import Opened
from ppolite.types import Prompt, UserError

Pairs = Sequence[tuple[Prompt, str]]
Tokenizer = PreTrainedTokenizerBase


def examine(opened: Opened, pairs: Pairs) -> list[Finding]:
    """Of what SFT and the reward model learn from."""
    return [
        *asking(opened, *pairs[0]),
        round_trip(opened.tokenizer, pairs),
        mask(opened.tokenizer, pairs),
    ]


def asking(opened: Opened, prompt: Prompt, answer: str = "ppolite") -> list[Finding]:
    """Of what generation begins with; without an answer to show, one word stands for it."""
    return [
        tokens(opened),
        begin(opened.tokenizer, prompt),
        template(opened.tokenizer, prompt, answer),
    ]


def tokens(opened: Opened) -> Finding:
    """Every ending is a token that the model can draw; what was repaired is told."""
    tokenizer = opened.tokenizer
    embedding: Any = opened.model.get_input_embeddings()
    size: int = embedding.weight.shape[0]
    ends = {i: repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(opened.stop_ids)}
    beyond = [f"{token} ({i})" for i, token in ends.items() if i >= size]
    repaired = "".join(f"; repaired: {said}" for said in opened.repairs)
    return graded(
        "chat/tokens",
        f"{', '.join(beyond)} beyond the model's {size:,} tokens"
        if beyond
        else f"pad {tokenizer.pad_token!r}, ends with {', '.join(ends.values())}{repaired}",
        "they can never be drawn: name tokens of the model's vocabulary as eos_token in tokenizer_config.json and "
        "generation_config.json",
        fail=bool(beyond),
    )


def begin(tokenizer: Tokenizer, prompt: Prompt) -> Finding:
    """A text that begins with one BOS by the tokenizer begins with one by the template."""
    name, bos = "chat/begin", tokenizer.bos_token_id
    if bos is None or tokenizer.encode("x")[:1] != [bos]:
        return Finding(name, "ok", "the tokenizer begins no text with a token of its own")
    count = 0
    for token in encode_prompt(tokenizer, prompt):
        if token != bos:
            break
        count += 1
    return graded(
        name,
        f"prompts begin with {count} × {tokenizer.bos_token!r}",
        f"have the chat template write {tokenizer.bos_token!r} once, at the beginning",
        warn=count == 0,
        fail=count > 1,
    )


def template(tokenizer: Tokenizer, prompt: Prompt, answer: str) -> Finding:
    """The template keeps the answer, asks for it with a generation prompt that it continues, and ends its turn."""
    name = "chat/template"
    if not prompt.messages:
        return skipped(name, "prompts are plain text")
    turn = {"role": "assistant", "content": answer}
    whole = render(tokenizer, [*prompt.messages, turn], prompt.source)
    header = render(tokenizer, prompt.messages, prompt.source, header=True)
    if _bare(answer) not in _bare(whole):
        return Finding(
            name, "fail", "leaves out what the assistant says", "mend its branch for the assistant's turns"
        )
    _, ending = turn_ending(tokenizer, tokenizer.get_chat_template())
    asks = header.removeprefix(render(tokenizer, prompt.messages, prompt.source)).strip()
    between = whole[len(header) :].partition(answer.strip())[0].strip() if whole.startswith(header) else None
    fault = _fault(asks, between, ending)
    return graded(
        name,
        fault or f"asks with {_shown(asks)!r}, ends with {tokenizer.convert_ids_to_tokens(ending or 0)!r}",
        "with add_generation_prompt it should end where an answer begins, and an answer with a special token; mend it "
        "in chat_template.jinja or tokenizer_config.json",
        warn=bool(fault),
    )


def _fault(asks: str, between: str | None, ending: int | None) -> str:
    """What is wrong with a template that writes `between` after its generation prompt `asks`; empty: nothing."""
    if between is None:
        return "its generation prompt is not what stands before an answer"
    if between and not asks:
        return f"has no generation prompt: {_shown(between)!r} comes before an answer"
    if between:
        return f"writes {_shown(between)!r} between generation prompt and answer"
    return "ends no turn with a special token, so EOS is put there" if ending is None else ""


def round_trip(tokenizer: Tokenizer, pairs: Pairs) -> Finding:
    """Texts survive encode and decode, without unknown tokens."""
    texts = [text for prompt, answer in pairs for text in (prompt.last, answer)]
    coded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ids = [i for row in coded for i in row]
    unknown = sum(i == tokenizer.unk_token_id for i in ids) / max(len(ids), 1)
    lost = [
        text for text, row in zip(texts, coded, strict=True) if _bare(_decoded(tokenizer, row)) != _bare(text)
    ]
    return graded(
        "chat/round trip",
        f"{len(texts) - len(lost)} of {len(texts)} texts come back, {unknown:.1%} of their tokens unknown",
        f"use a model whose tokenizer knows this language; lost: {_shown(lost[0]) if lost else ''!r}",
        warn=len(lost) > 0.05 * len(texts) or unknown > 0.01,
        fail=unknown > 0.2,
    )


def mask(tokenizer: Tokenizer, pairs: Pairs) -> Finding:
    """The tokens that SFT's loss covers are the answer and its ending, and nothing else. Shows the first pair."""
    name, count = "chat/mask", len(pairs)
    coded: list[tuple[str, list[int], list[int]]] = []
    refused = ""
    for prompt, answer in pairs:
        try:
            coded.append((answer, *encode_example(tokenizer, prompt, answer)))
        except UserError as error:
            refused = str(error)
    if not coded:
        return Finding(name, "fail", f"none of {count} answers can be encoded", refused)
    lost = more = 0
    for answer, _, response in coded:
        wanted = _bare(_decoded(tokenizer, tokenizer.encode(answer, add_special_tokens=False)))
        seen = _bare(_decoded(tokenizer, response[:-1]))
        lost += wanted not in seen
        more += wanted in seen and wanted != seen
    before, response = (_decoded(tokenizer, ids) for ids in coded[0][1:])
    return graded(
        name,
        f"{_shown(before, last=True)} ▸ {_shown(response)}",
        f"of {count} answers the loss leaves out {lost}, and of {more} it covers more than the answer; mend the chat "
        "template",
        warn=lost + more > 0,
        fail=lost > count / 2,
    )


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def _bare(text: str) -> str:
    return "".join(text.split())


def _shown(text: str, most: int = 48, *, last: bool = False) -> str:
    line = visible(text.replace("\n", "↵"))
    if len(line) <= most:
        return line
    return f"…{line[-most:]}" if last else f"{line[:most]}…"
