"""Reads reasoning and calls of tools from what models write, as their families write them.

A call that cannot be read is the model's fault, not ours: the answer is then its text, and `malformed` says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pekoe.agents.answers import Parsed, Parser, ToolCall, Tools, held_back
from pekoe.core.errors import UserError
from pekoe.data.tokenizer import Tokenizer

Family = Literal["hermes", "qwen-xml", "llama3", "deepseek"]
Calls = Iterator[tuple[str, Any]]
"""(name, arguments) of each call."""

_BEGIN, _END = "<think>", "</think>"


class _Malformed(Exception):
    pass


def family_of(tokenizer: Tokenizer) -> Family | None:
    """In which form a model's chat template has it call tools. None: the template shows it no tools."""
    source = tokenizer.template_source
    if "tools" not in source and "tool_calls" not in source:
        return None
    if "<｜tool▁call▁begin｜>" in source:
        return "deepseek"
    if "<tool_call>" in source:  # Qwen 2.5 and 3, Hermes; Qwen3-Coder writes <function=NAME> inside
        return "qwen-xml" if "<function=" in source else "hermes"
    return "llama3" if "<|python_tag|>" in source or "ipython" in source else None


class AnswerParser(Parser):
    """Reads the answers of models that call tools as `family` does."""

    def __init__(self, family: Family | None) -> None:
        self._family: Family | None = family

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> AnswerParser:
        """For a model with this tokenizer and template."""
        return cls(family_of(tokenizer))

    def whole(self, text: str, tools: Tools | None, in_thought: bool) -> Parsed:
        return read_answer(self._family, text, tools, in_thought)

    def begun(self, text: str, tools: Tools | None, in_thought: bool) -> tuple[str, str]:
        return read_begun(self._family, text, tools, in_thought)


def check_tools(tools: Any, where: str = "tools") -> None:
    """UserError unless these are functions as of the chat completions API."""
    if not isinstance(tools, list):
        raise UserError(f"{where}: expected a list of functions, got {_shown(tools)}")
    for number, tool in enumerate(tools):
        at = f"{where}[{number}]"
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise UserError(f'{at}: expected {{"type": "function", "function": {{"name": ...}}}}, got {_shown(tool)}')
        function = tool["function"]
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise UserError(f"{at}.function.name: expected a name, got {_shown(function.get('name'))}")
        schema = function.get("parameters")
        if schema is not None and (not isinstance(schema, dict) or schema.get("type", "object") != "object"):
            raise UserError(
                f'{at}.function.parameters: expected a JSON schema of type "object", got {_shown(schema)}; nearest: '
                f'{{"type": "object", "properties": {{}}}}'
            )


def read_answer(family: Family | None, text: str, tools: Tools | None = None, in_thought: bool = False) -> Parsed:
    """Split an answer's text into reasoning, content, and, where there are `tools`, the calls of them.

    `in_thought`: the context ends with an opened <think>, which the text goes on from.
    """
    reasoning, content = _split(text, in_thought)
    if not tools or family is None:
        return Parsed(content, reasoning)
    find = _READERS[family]
    head = _first_call(family, content)
    if head is None:
        return Parsed(content, reasoning)
    try:
        found = [_call(name, arguments, number) for number, (name, arguments) in enumerate(find(content))]
    except _Malformed as error:
        return Parsed(content, reasoning, malformed=str(error))
    known = {tool["function"]["name"] for tool in tools}
    unknown = next((call.name for call in found if call.name not in known), None)
    if not found:  # what looked like the beginning of a call is text
        return Parsed(content, reasoning)
    why = "" if unknown is None else f"expected a tool among {sorted(known)}, got {unknown!r}"
    return Parsed(content[:head].rstrip(), reasoning, tuple(found), why)


def read_begun(
    family: Family | None, text: str, tools: Tools | None = None, in_thought: bool = False
) -> tuple[str, str]:
    """Reasoning and content with which `read_answer` begins for every text that begins with this one."""
    if not in_thought and _BEGIN.startswith(text.lstrip()):  # it may become one
        return "", ""
    if in_thought or text.lstrip().startswith(_BEGIN):
        thought, end, content = text.partition(_END)
        if not end:
            thought = held_back(thought, [_END])
            return ("" if _BEGIN.startswith(thought.strip()) else _split(thought, in_thought)[0]), ""
        reasoning, content = _split(text, in_thought)
    else:
        reasoning, content = "", text
    if not tools or family is None:
        return reasoning, content
    head = _first_call(family, content)
    return reasoning, (held_back(content, _MARKS[family]) if head is None else content[:head]).rstrip()


def _first_call(family: Family, content: str) -> int | None:
    """Where the calls begin, if any do."""
    if family == "llama3" and content.lstrip().startswith("{"):
        return 0
    return min((at for at in map(content.find, _MARKS[family]) if at >= 0), default=None)


def _split(text: str, in_thought: bool) -> tuple[str, str]:
    opened = text.lstrip().startswith(_BEGIN)
    if not opened and not in_thought:
        return "", text
    thought, end, rest = text.partition(_END)
    thought = thought.lstrip().removeprefix(_BEGIN).strip()
    return (thought, rest.lstrip("\n")) if end else (thought, "")


def _call(name: Any, arguments: Any, number: int) -> ToolCall:
    if not isinstance(name, str) or not name.strip():
        raise _Malformed(f"expected the name of a tool, got {_shown(name)}")
    if isinstance(arguments, str):  # some write the arguments' JSON as a string
        arguments = _json(arguments or "{}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise _Malformed(f"expected the arguments of {name} as a JSON object, got {_shown(arguments)}")
    return ToolCall(f"call-{number}", name.strip(), json.dumps(arguments, ensure_ascii=False))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"expected JSON, got {_shown(text.strip())}: {error}") from None


def _object(text: str) -> dict[str, Any]:
    value = _json(text)
    if not isinstance(value, dict):
        raise _Malformed(f"expected a JSON object with a name and arguments, got {_shown(value)}")
    return value


def _hermes(text: str) -> Calls:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, each call in its own."""
    for body in _between(text, "<tool_call>", "</tool_call>"):
        value = _object(body)
        yield value.get("name"), value.get("arguments")  # type: ignore[misc]


def _qwen_xml(text: str) -> Calls:
    """<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>; a value that is JSON is
    that, any other is a text."""
    for body in _between(text, "<tool_call>", "</tool_call>"):
        match = re.fullmatch(r"\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*", body, re.DOTALL)
        if match is None:
            raise _Malformed(f"expected <function=NAME>, got {_shown(body.strip())}")
        pairs = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", match[2], re.DOTALL)
        yield match[1], {key: _value(value) for key, value in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _llama3(text: str) -> Calls:
    """{"name": ..., "parameters": {...}}, several with ";" between; or <function=NAME>{...}</function>."""
    named = re.findall(r"<function=([^>\n]+)>(.*?)</function>", text, re.DOTALL)
    if named:
        yield from ((name, _json(arguments)) for name, arguments in named)
        return
    rest = text.strip().removeprefix("<|python_tag|>").strip()
    while rest:
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError) as error:
            raise _Malformed(f"expected JSON, got {_shown(rest)}: {error}") from None
        if not isinstance(value, dict) or "name" not in value:
            return  # JSON that is the answer
        yield value["name"], value.get("parameters", value.get("arguments"))
        rest = rest[end:].lstrip("; \n").removeprefix("<|python_tag|>")


def _deepseek(text: str) -> Calls:
    """<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜> (V3.1); before it, function<｜tool▁sep｜>NAME,
    a line end, and the arguments as a block of json."""
    for body in _between(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"):
        head, sep, rest = body.partition("<｜tool▁sep｜>")
        if not sep:
            raise _Malformed(f"expected <｜tool▁sep｜> in a call, got {_shown(body.strip())}")
        block = re.fullmatch(r"([^\n]*)\n```(?:json)?\n(.*?)\n?```\s*", rest, re.DOTALL)
        if head.strip() == "function" and block is not None:
            yield block[1], _json(block[2])
        else:
            yield head, _json(rest)


def _between(text: str, begin: str, end: str) -> Iterator[str]:
    for part in text.split(begin)[1:]:
        body, closed, _ = part.partition(end)
        if not closed:
            raise _Malformed(f"expected {end} after {begin}, got {_shown(body.strip())}")
        yield body


_READERS: dict[Family, Callable[[str], Calls]] = {
    "hermes": _hermes,
    "qwen-xml": _qwen_xml,
    "llama3": _llama3,
    "deepseek": _deepseek,
}
_MARKS: dict[Family, tuple[str, ...]] = {
    "hermes": ("<tool_call>",),
    "qwen-xml": ("<tool_call>",),
    "llama3": ("<|python_tag|>", "<function="),  # and a "{" at the beginning
    "deepseek": ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
}
"""Where calls begin in an answer."""


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
