"""Calls of tools and reasoning, as each family writes them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pekoe.agents.tools import Family, check_tools, family_of, read_answer
from pekoe.core.errors import UserError
from pekoe.data.tokenizer import Tokenizer
from tests.agents.sampling import HERMES, text_tokenizer

TOOLS: Any = [{"type": "function", "function": {"name": name}} for name in ("add", "look_up")]
ADD = {"a": 1, "b": "x}"}
JSON = json.dumps(ADD)
DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
CASES: list[tuple[Family, str, list[Any]]] = [
    ("hermes", f'<tool_call>\n{{"name": "add", "arguments": {JSON}}}\n</tool_call>', [("add", ADD)]),
    (
        "hermes",
        f'<tool_call>{{"name": "add", "arguments": {json.dumps(JSON)}}}</tool_call>\n'
        '<tool_call>{"name": "look_up"}</tool_call>',
        [("add", ADD), ("look_up", {})],
    ),
    (
        "qwen-xml",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx}\n</parameter>\n</function>\n"
        "</tool_call>",
        [("add", ADD)],
    ),
    ("llama3", f'{{"name": "add", "parameters": {JSON}}}', [("add", ADD)]),
    (
        "llama3",
        f'<|python_tag|>{{"name": "add", "parameters": {JSON}}}; {{"name": "look_up", "parameters": {{}}}}',
        [("add", ADD), ("look_up", {})],
    ),
    ("llama3", f"<function=add>{JSON}</function>", [("add", ADD)]),
    (
        "deepseek",
        DEEPSEEK.format(
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{JSON}\n```<｜tool▁call▁end｜>\n"
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n```json\n{}\n```<｜tool▁call▁end｜>"
        ),
        [("add", ADD), ("look_up", {})],
    ),
    ("deepseek", DEEPSEEK.format(f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>"), [("add", ADD)]),
]


@pytest.mark.parametrize(("family", "text", "expected"), CASES)
def test_calls_are_read(family, text, expected):
    lead = "" if family == "llama3" else "let me see\n\n"
    read = read_answer(family, f"<think>\nhm\n</think>\n\n{lead}{text}", TOOLS)
    assert [(call.name, json.loads(call.arguments)) for call in read.tool_calls] == expected
    assert (read.content, read.reasoning, read.malformed) == (lead.strip(), "hm", "")
    assert len({call.id for call in read.tool_calls}) == len(expected)


@pytest.mark.parametrize(("family", "text", "expected"), CASES)
def test_what_is_cut_off_or_broken_is_the_models_text(family, text, expected):
    cut = text[: -len(text) // 4]
    for broken in (cut, text.replace("<function=add>\n", "") if family == "qwen-xml" else text.replace("}", "")):
        read = read_answer(family, broken, TOOLS)
        assert (read.tool_calls, read.content) == ((), broken)
        assert read.malformed.startswith("expected")


def test_without_tools_everything_is_text():
    for family, text, _ in CASES:
        assert read_answer(family, text, None).content == text


def test_a_tool_that_is_not_there_is_still_called():
    read = read_answer("hermes", '<tool_call>{"name": "fly", "arguments": {}}</tool_call>', TOOLS)
    assert read.tool_calls[0].name == "fly"
    assert read.malformed == "expected a tool among ['add', 'look_up'], got 'fly'"


def test_json_that_is_an_answer_is_no_call():
    assert read_answer("llama3", '{"total": 3}', TOOLS).content == '{"total": 3}'
    assert read_answer("llama3", '{"total": 3}', TOOLS).malformed == ""


@pytest.mark.parametrize(
    ("text", "in_thought", "expected"),
    [
        ("hm\n</think>\n\n3", True, ("hm", "3")),
        ("hm, no end", True, ("hm, no end", "")),
        ("<think>hm", False, ("hm", "")),
        ("<think></think>3", False, ("", "3")),
        ("a < b <think> c", False, ("", "a < b <think> c")),
        ("3", False, ("", "3")),
    ],
)
def test_reasoning(text, in_thought, expected):
    read = read_answer(None, text, TOOLS, in_thought)
    assert (read.reasoning, read.content) == expected


TAGS = "tool_call> /tool_call> think> /think> |python_tag|> function=add> /function> ｜tool▁call▁begin｜> ｜tool▁sep｜>"
PIECES = st.sampled_from([f"<{tag}" for tag in TAGS.split()] + ["<｜tool▁call▁end｜>", *'{}[];,:1"n', '{"name": "add"'])


@given(st.lists(PIECES, max_size=12).map("".join), st.sampled_from(["hermes", "qwen-xml", "llama3", "deepseek"]))
def test_no_text_breaks_a_reader(text, family):
    read = read_answer(family, text, TOOLS)
    assert all(isinstance(json.loads(call.arguments), dict) for call in read.tool_calls)
    assert not (read.malformed and "among" not in read.malformed and read.tool_calls)


def test_families_are_known_by_their_templates():
    known = {
        HERMES: "hermes",
        HERMES + "<function=": "qwen-xml",
        "{{ messages }}": None,
        "{{ tools }}<|python_tag|>": "llama3",
        "{{ tools }}{{ message.tool_calls }}<｜tool▁call▁begin｜>": "deepseek",
        "{{ tools }}": None,
    }
    assert {source: family_of(text_tokenizer(source)) for source in known} == known


@pytest.mark.parametrize("tools", [7, [7], [{}], [{"type": "function", "function": {"name": ""}}]])
def test_tools_that_are_none(tools):
    with pytest.raises(UserError, match="expected"):
        check_tools(tools)


@pytest.mark.parametrize(("name", "family"), [("qwen3", "hermes"), ("deepseek_v3", "deepseek")])
def test_what_a_known_template_writes_for_a_call_is_read_back(name, family):
    root = Path(os.environ.get("PEKOE_TOKENIZERS", "absent")) / name
    if not root.is_dir():
        pytest.skip(f"the tokenizer of {name} is not here: make test-tokenizers fetches it")
    tokenizer = Tokenizer.load(root)
    assert family_of(tokenizer) == family
    question: Any = {"role": "user", "content": "1+2="}
    arguments: Any = json.dumps(ADD) if family == "deepseek" else ADD
    call = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": arguments}}
    said: Any = {"role": "assistant", "content": None if family == "deepseek" else "", "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]
    before = "".join(tokenizer.conversation([question], tools))
    after = tokenizer.apply_chat_template([question, said], False, tools)
    assert after.startswith(before)
    text = re.sub(r"(<\|im_end\|>\s*|<｜end▁of▁sentence｜>)\Z", "", after[len(before) :])
    read = read_answer(family, text, tools)
    assert [(one.name, json.loads(one.arguments)) for one in read.tool_calls] == [("add", ADD)]
    assert (read.content, read.malformed) == ("", "")
