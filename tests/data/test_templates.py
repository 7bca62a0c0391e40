"""The built-in chat templates: what the families' published ones render, the directive, the forced opening."""

from __future__ import annotations

import json
from typing import Literal

import pytest
import tokenizers

from pekoe.config.data import TemplateSection
from pekoe.core.errors import UserError
from pekoe.data import Tokenizer

MARKERS = {
    "r1": ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    "qwen": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
}
ONE = [{"role": "user", "content": "1+1?"}]
MANY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\nwell\n</think>2"},
    {"role": "user", "content": "2+2?"},
]
# What the templates that come with DeepSeek-R1-Distill-Qwen and Qwen2.5-Instruct give for these, written by hand.
R1_MANY = "Be brief.<｜User｜>1+1?<｜Assistant｜>2<｜end▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜>"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN_MANY = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\nwell\n"
    "</think>2<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_ONE = f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
RENDERED = {
    "r1": ("<｜begin▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜>", f"<｜begin▁of▁sentence｜>{R1_MANY}"),
    "qwen": (QWEN_ONE, QWEN_MANY),
}
DIRECTIVE = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def byte_tokenizer(family: str, **config: str) -> Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKERS[family])
    special = {"bos_token": MARKERS["r1"][0], "eos_token": MARKERS["r1"][3]} if family == "r1" else {}
    special = special or {"eos_token": "<|endoftext|>"}
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(special | config).encode(),
    }
    return Tokenizer(files)


@pytest.mark.parametrize("family", ["r1", "qwen"])
def test_the_families_templates(family: Literal["r1", "qwen"]):
    tokenizer = byte_tokenizer(family).with_template(TemplateSection(name=family))
    for turns, expected in zip((ONE, MANY), RENDERED[family], strict=True):
        tokens = tokenizer.encode_prompt(turns)
        assert tokenizer.decode(tokens) == expected
        assert tokenizer.encode(MARKERS[family][1 if family == "r1" else 0])[0] in tokens  # markers are single tokens


def test_the_releases_prompt():
    section = TemplateSection(name="r1", directive=DIRECTIVE, think=True)
    tokenizer = byte_tokenizer("r1").with_template(section)
    prompt = f"<｜begin▁of▁sentence｜><｜User｜>1+1?{DIRECTIVE}<｜Assistant｜><think>\n"
    assert tokenizer.decode(tokenizer.encode_prompt(ONE)) == prompt
    assert tokenizer.decode(tokenizer.encode_prompt([{"role": "prompt", "content": "1+1?"}])) == prompt
    raw = [{"role": "raw", "content": "<｜User｜>1+1?<｜Assistant｜><think>\n"}]
    assert DIRECTIVE not in tokenizer.decode(tokenizer.encode_prompt(raw))
    end = "<｜end▁of▁sentence｜>"
    for response in ("<think>\nwell</think>2", "well</think>2"):  # the opening is the prompt's, once
        assert tokenizer.decode(tokenizer.encode_response(response)) == f"well</think>2{end}"


def test_responses_end_as_the_template_has_it():
    own = byte_tokenizer("qwen")
    tokenizer = own.with_template(TemplateSection(name="qwen"))
    end, before = (tokenizer.encode(text)[0] for text in ("<|im_end|>", "<|endoftext|>"))
    assert tokenizer.eos_token_id == end
    assert set(tokenizer.stop_token_ids) == {end, before}
    assert (own.eos_token_id, own.stop_token_ids) == (before, (before,))  # it is unchanged


def test_an_opening_that_the_models_own_template_has_is_not_doubled():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n{# #}"
    tokenizer = byte_tokenizer("qwen", chat_template=template).with_template(TemplateSection(think=True))
    assert tokenizer.decode(tokenizer.encode_prompt(ONE)) == "1+1?<think>\n"


def test_a_model_without_a_template_gets_directive_and_opening_too():
    tokenizer = byte_tokenizer("qwen").with_template(TemplateSection(directive="!", think=True))
    assert tokenizer.decode(tokenizer.encode_prompt([{"role": "prompt", "content": "1+1?"}])) == "1+1?!<think>\n"


def test_a_model_without_the_tokens_is_refused():
    with pytest.raises(UserError, match=r"tokens of 'r1', got tokenizer without <｜User｜>, .*; nearest: 'model'"):
        byte_tokenizer("qwen").with_template(TemplateSection(name="r1"))
