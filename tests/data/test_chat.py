"""Chat templates to ids: the pair of sides is the template's own conversation, and it ends once.

The templates are the ways of real families: ChatML ends turns with EOS, Llama 3 with a token of its own and
trims texts, Gemma refuses system turns, some thinking models open a block only in the generation prompt.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, PreTrainedTokenizerFast

from ppolite.data import chat
from ppolite.data.chat import check_lengths, encode_example, encode_prompt, prepare_tokenizer, stop_ids
from ppolite.types import Prompt, UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIAL = ["<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|eot|>"]
TEXT = "The film was good. assistant: yes the user said so User Assistant\n\n system: critic " * 20


def tokenizer(template: str | None = None, special: list[str] = SPECIAL, **names: str):
    """A byte-level BPE of 300 tokens, as GPT-2's is one of 50,257."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEXT], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    made.chat_template = template
    return made


def asks(text: str = "How was it?", system: str = "") -> Prompt:
    before = ({"role": "system", "content": system},) if system else ()
    return Prompt(messages=(*before, {"role": "user", "content": text}), source="a.jsonl row 7")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ppolite"]


# SmolLM2's vocabulary has no token for some control bytes and rare lead bytes, and drops them.
WRITTEN = st.text(
    st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40
)


# ---- encoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "end", "eos"), [(CHATML, "<|im_end|>", "<|im_end|>"), (LLAMA3, "<|eot|>", "<eos>")]
)
def test_both_sides_are_the_templates_own_conversation(template: str, end: str, eos: str) -> None:
    tok = tokenizer(template, eos_token=eos, bos_token="<bos>")
    prompt = asks(system="You are a critic.")
    before, after = encode_example(tok, prompt, "It was good.")
    assert before == encode_prompt(tok, prompt)
    turns = [*prompt.messages, {"role": "assistant", "content": "It was good."}]
    whole = tok.apply_chat_template(turns, return_dict=False)
    assert before + after == whole[: len(before + after)]
    assert tok.decode(whole[len(before + after) :]).strip() == ""
    assert tok.decode(after) == f"It was good.{end}"
    assert before == tok.apply_chat_template(
        list(prompt.messages), add_generation_prompt=True, return_dict=False
    )


@pytest.fixture(scope="module")
def real_tokenizer(real_model: Path):
    return AutoTokenizer.from_pretrained(real_model)


@pytest.mark.real
@given(text=WRITTEN, response=WRITTEN)
@settings(deadline=None, max_examples=50)
def test_the_real_template(real_tokenizer, text: str, response: str) -> None:
    tok = real_tokenizer
    before, after = encode_example(tok, asks(text, "You are a film critic."), response)
    assert tok.decode(after) == response + "<|im_end|>"
    assert tok.decode(before).endswith(f"{text}<|im_end|>\n<|im_start|>assistant\n")
    assert after[-1] == 2
    assert 2 not in after[:-1]


def test_plain_text_ends_with_eos() -> None:
    tok = tokenizer(CHATML, eos_token="<eos>")
    before, after = encode_example(tok, Prompt(text="The film"), " was good.")
    assert tok.decode(before) == "The film"
    assert tok.decode(after) == " was good.<eos>"


def test_a_template_without_an_ending_gets_eos_and_sides_that_merge_are_encoded_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chat._warn_once.cache_clear()
    tok = tokenizer(BARE, eos_token="<eos>")
    assert len(tok.encode(" the")) == 1  # so the template's last space and this word are one token
    for _ in range(2):
        before, after = encode_example(tok, asks(), "the film")
        assert tok.decode(before).endswith("\nassistant: ")
        assert tok.decode(after) == "the film<eos>"
    assert warnings_of(caplog) == [
        "A token spans the border between prompt and answer; they are encoded apart"
    ]


def test_a_generation_prompt_of_its_own_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    chat._warn_once.cache_clear()
    tok = tokenizer(CHATML.replace("assistant\n'", "assistant\n<think>\n'"), eos_token="<|im_end|>")
    before, after = encode_example(tok, asks(), "It was good.")
    assert tok.decode(before).endswith("<|im_start|>assistant\n<think>\n")
    assert tok.decode(after) == "It was good.<|im_end|>"
    assert len(warnings_of(caplog)) == 1


def test_refusals_name_the_row() -> None:
    tok = tokenizer(GEMMA, eos_token="<eos>")
    with pytest.raises(UserError, match=r"a\.jsonl row 7: .*system, user \(System role not supported\)"):
        encode_prompt(tok, asks(system="x"))
    tok = tokenizer(CHATML, eos_token="<eos>")
    for spelled in ("<|im_end|>", "<eos>"):
        with pytest.raises(UserError, match=rf"a\.jsonl row 7: .*{spelled[1:4].strip('|')}"):
            encode_example(tok, asks(), f"good{spelled} bad")


def test_stop_ids() -> None:
    tok = tokenizer(LLAMA3, eos_token="<eos>", bos_token="<bos>")
    ids = tok.get_vocab()
    assert stop_ids(tok) == {ids["<eos>"], ids["<|eot|>"]}
    assert stop_ids(tok, GenerationConfig(eos_token_id=[5, 9])) == {ids["<eos>"], ids["<|eot|>"], 5, 9}
    assert stop_ids(tok, GenerationConfig(eos_token_id=9)) == {ids["<eos>"], ids["<|eot|>"], 9}
    assert stop_ids(tok, GenerationConfig()) == stop_ids(tok)
    assert stop_ids(tokenizer(eos_token="<eos>")) == {ids["<eos>"]}


def test_lengths() -> None:
    keep, said = check_lengths([[1], [1, 2, 3], []], 2, ["f row 1", "f row 2", "f row 3"])
    assert keep == [0, 2]
    assert said == ["f row 2: 3 tokens, but the model's context holds 2; shorten it or raise the limit"]
    assert check_lengths([], 2, []) == ([], [])
    with pytest.raises(UserError, match=r"none of 1 rows fits\. f row 1: 3 tokens"):
        check_lengths([[1, 2, 3]], 2, ["f row 1"])


# ---- repairs ---------------------------------------------------------------------------------------------


def config(size: int = 300, **ids) -> GPT2Config:
    return GPT2Config(vocab_size=size, **{"bos_token_id": None, "eos_token_id": None} | ids)


@pytest.mark.parametrize(
    ("special", "names", "pad"),
    [
        (["<eos>", "<pad>"], {"pad_token": "<pad>"}, "<pad>"),  # nothing to repair
        (["<eos>", "<pad>"], {"pad_token": "<eos>"}, "<pad>"),
        (["<eos>", "<|endoftext|>"], {"pad_token": "<eos>"}, "<|endoftext|>"),  # SmolLM2, Qwen
        (["<eos>", "<unk>", "<bos>"], {"unk_token": "<unk>", "bos_token": "<bos>"}, "<unk>"),  # Llama 2
        (["<eos>"], {"pad_token": "<eos>", "unk_token": "<eos>", "bos_token": "<eos>"}, "Ĕ"),  # GPT-2
    ],
)
def test_pad_is_never_eos(special: list[str], names: dict[str, str], pad: str) -> None:
    tok = tokenizer(CHATML.replace("<|im_end|>", "<eos>"), special, eos_token="<eos>", **names)
    conf = config()
    said = prepare_tokenizer(tok, conf)
    assert tok.pad_token == pad
    assert conf.pad_token_id == tok.pad_token_id == tok.get_vocab()[pad]
    assert conf.eos_token_id == tok.eos_token_id != tok.pad_token_id
    assert len(said) == (names.get("pad_token") != pad)
    assert all(repr(pad) in sentence for sentence in said)
    assert prepare_tokenizer(tok, conf) == []


def test_pad_beyond_the_embedding_is_replaced() -> None:
    tok = tokenizer(CHATML, eos_token="<|im_end|>", unk_token="<unk>")
    tok.add_special_tokens({"pad_token": "[MINE]"})
    prepare_tokenizer(tok, config(size=300))
    assert tok.pad_token == "<unk>"


def test_pad_that_ends_turns_is_replaced() -> None:
    tok = tokenizer(LLAMA3, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", pad_token="<|eot|>")
    prepare_tokenizer(tok, config())
    assert tok.pad_token == "<unk>"


def test_no_pad_left() -> None:
    core = Tokenizer(models.WordLevel({"<eos>": 0, "film": 1}, unk_token="<eos>"))
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    with pytest.raises(UserError, match="set pad_token"):
        prepare_tokenizer(tok, config(size=2), chat=False)


def test_eos_comes_from_the_model_or_from_nowhere() -> None:
    tok = tokenizer(CHATML, unk_token="<unk>")
    said = prepare_tokenizer(tok, config(eos_token_id=[4, 0]))
    assert tok.eos_token == SPECIAL[4]
    assert "names no EOS" in said[0]
    with pytest.raises(UserError, match="no EOS token"):
        prepare_tokenizer(tokenizer(CHATML), config())


def test_fallback_template_is_announced_and_round_trips() -> None:
    tok = tokenizer(None, eos_token="<eos>", unk_token="<unk>")
    assert "no chat template" in prepare_tokenizer(tok, config())[0]
    before, after = encode_example(tok, asks("q", "s"), "the film")
    assert tok.decode(before) == "System:\ns\n\nUser:\nq\n\nAssistant:\n"
    assert tok.decode(after) == "the film<eos>"
    assert stop_ids(tok) == {tok.eos_token_id}
    assert tok.encode(tok.decode(before + after)) == before + after
    plain = tokenizer(None, eos_token="<eos>", unk_token="<unk>")
    assert len(prepare_tokenizer(plain, config(), chat=False)) == 1  # the pad alone
    assert plain.chat_template is None
