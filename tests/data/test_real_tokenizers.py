"""The tokenizers of models that people train, beside `transformers`: ids, text, chat templates, tools, variables.

`make test-tokenizers` fetches them; they are not committed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pekoe.core.errors import UserError
from pekoe.data import Tokenizer

NAMES = ("qwen3", "llama3_1", "deepseek_v3", "smollm2")
TEXTS = (
    "",
    "Hello, wörld! 12345 + 67 = ?\n\n\tdef f(x):\n    return x  # don't I'LL",
    "日本語テキスト 🍵 👩‍👩‍👧 e\u0301 é ½ ² \u200b ﷺ 3.14e-10",
    "   leading   spaces \r\n  ",
    "<|im_start|>user\nhi<|im_end|><think>\n</think><tool_call>{}</tool_call>",
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|python_tag|>",
    "<｜User｜>x<｜tool▁sep｜><｜end▁of▁sentence｜>",
)
SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & tomorrow, in °C.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Köln? "},
]


def calls(arguments: Any, content: str | None) -> list[dict[str, Any]]:
    """A conversation with two calls; families differ in whether arguments are text, and content is absent."""
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": arguments}}
    result = {"role": "tool", "content": "12 °C", "tool_call_id": "1"}
    return [*ASK, {"role": "assistant", "content": content, "tool_calls": [call, call]}, result, result]


THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n12 °C"}
DIALOGUES = (
    ASK,
    ASK[1:],
    [*ASK, THOUGHT, ASK[1]],
    [*ASK, THOUGHT],
    calls({"city": "Köln"}, ""),
    calls('{"city": "Köln"}', None),
    calls('{"city": "Köln"}', "Let me see."),
    [*ASK, {"role": "assistant", "reasoning": "hm", "content": "12 °C"}],
)


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    root = Path(os.environ.get("PEKOE_TOKENIZERS", "absent")) / request.param
    if not root.is_dir():
        pytest.skip(f"the tokenizer of {request.param} is not here: make test-tokenizers fetches it")
    gguf = next(root.glob("*.gguf"), None)
    if gguf is not None:  # the model itself; its tokenizer as transformers reads and saves it
        pytest.importorskip("gguf", reason="the tokenizer of smollm2 comes in a GGUF file")
        root = tmp_path_factory.mktemp("smollm2")
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(root)
    return Tokenizer.load(root), AutoTokenizer.from_pretrained(root)


def same(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == ids
    plain = {"clean_up_tokenization_spaces": False}
    assert ours.decode(ids) == theirs.decode(ids, **plain)
    assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True, **plain)


@pytest.mark.filterwarnings("ignore")
def test_ids_and_text(pair):
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    for text in TEXTS:
        same(ours, theirs, text)

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
    def any_text(text):
        same(ours, theirs, text)

    any_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tools", [None, [SCHEMA, SCHEMA]], ids=["plain", "tools"])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True, "bos_token": "!"}])
def test_chat_templates(pair, tools, variables):
    ours, theirs = pair
    rendered = 0
    for messages in DIALOGUES:
        for prompt in (True, False):
            try:
                text = theirs.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **variables
                )
            except Exception:  # it cannot: such a message, or content that is absent where the template asks for none
                if not any(message["content"] is None for message in messages):
                    with pytest.raises(UserError):
                        ours.apply_chat_template(messages, prompt, tools, variables)
                continue
            rendered += 1
            assert ours.apply_chat_template(messages, prompt, tools, variables) == text
            if prompt:
                ids = theirs(text, add_special_tokens=False)["input_ids"]
                assert ours.encode_chat(messages, tools, variables).tolist() == ids
    assert rendered >= 8


def test_calls_of_deepseek_without_content(pair):
    """The template asks whether content is none; `transformers` drops the key and fails."""
    ours, _ = pair
    if len(ours.encode("<｜tool▁calls▁begin｜>")) > 1:
        pytest.skip("a template with other calls")
    call = 'function<｜tool▁sep｜>weather\n```json\n{"city": "Köln"}\n```<｜tool▁call▁end｜>'
    result = "<｜tool▁output▁begin｜>12 °C<｜tool▁output▁end｜>"
    assert ours.apply_chat_template(calls('{"city": "Köln"}', None)).endswith(
        f"<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}\n<｜tool▁call▁begin｜>{call}<｜tool▁calls▁end｜>"
        f"<｜end▁of▁sentence｜><｜tool▁outputs▁begin｜>{result}\n{result}<｜tool▁outputs▁end｜>"
    )
