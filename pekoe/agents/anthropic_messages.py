"""Anthropic's messages API, as its clients speak it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pekoe.agents.answers import Delta
from pekoe.agents.openai_chat import pieces
from pekoe.agents.session import Reply
from pekoe.agents.tools import check_tools
from pekoe.agents.wire import Api, Asked, Event, Fields, Sent, Stream, read_messages, shown, text_of
from pekoe.core.errors import UserError

_ERRORS = {
    **{400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"},
    **{413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"},
}

_UNENDED = {"stop_reason": None, "stop_sequence": None}


def _error(status: int, message: str, code: str | None) -> Mapping[str, Any]:
    return {"type": "error", "error": {"type": _ERRORS.get(status, "api_error"), "message": message}}


def _read(fields: Fields) -> Asked:
    choice: dict[str, Any] = fields.get("tool_choice", dict, "an object") or {}
    if choice.get("type", "auto") not in ("auto", "none"):
        raise UserError(f'tool_choice: expected type "auto" or "none", got {shown(choice)}; nearest: leave it out')
    fields.ignore(
        "metadata", "service_tier", "thinking", "output_config", "context_management", "betas", "cache_control"
    )
    tools = _tools(fields.get("tools", list, "a list of tools"))
    return Asked(
        model=fields.get("model", str, "the model's name") or "",
        conversations=[_conversation(fields)],
        tools=tools if choice.get("type") != "none" else None,
        max_tokens=fields.count("max_tokens"),
        stop=fields.texts("stop_sequences"),
        temperature=fields.number("temperature", 0, 2),
        top_p=fields.number("top_p", 1e-6, 1),
        stream=fields.flag("stream"),
        variables=fields.get("chat_template_kwargs", dict, "an object"),
        with_ids=fields.flag("return_token_ids"),
        ignored=fields.rest(),
    )


def _tools(value: list[Any] | None) -> list[Any] | None:
    """As functions of the chat completions API."""
    if not value:
        return None
    tools: list[Any] = []
    for number, tool in enumerate(value):
        if not isinstance(tool, dict) or tool.get("type", "custom") != "custom":
            raise UserError(f'tools[{number}]: expected {{"name", "input_schema"}} of your own, got {shown(tool)}')
        function = {"name": tool.get("name"), "description": tool.get("description", "")}
        tools.append({"type": "function", "function": function | {"parameters": tool.get("input_schema")}})
    check_tools(tools)
    return tools


def _conversation(fields: Fields) -> list[dict[str, Any]]:
    """As messages of the chat completions API: results of tools are messages of their own."""
    system: Any = fields.get("system", (str, list), "a text or a list of texts")
    messages: list[dict[str, Any]] = [{"role": "system", "content": text_of(system, "system")}] if system else []
    value: Any = fields.get("messages", list, "a list of messages")
    number: int
    message: Any
    for number, message in enumerate(value or ()):
        where = f"messages[{number}]"
        content: Any = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            messages.append(message)
        elif message.get("role") == "assistant":
            messages.append(_assistant(content, where))
        else:
            messages += _user(message.get("role"), content, where)
    return read_messages(messages)


def _kind(block: Any, kinds: Sequence[str], where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind not in kinds:
        raise UserError(f"{where}: expected a block of type {' or '.join(kinds)}, got {shown(block)}")
    return str(kind)


def _assistant(blocks: list[Any], where: str) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    for number, block in enumerate(blocks):
        kind = _kind(block, ("text", "thinking", "redacted_thinking", "tool_use"), f"{where}.content[{number}]")
        if kind == "text":
            said["content"] += text_of([block], where)
        elif kind == "thinking":
            said["reasoning_content"] += str(block.get("thinking", ""))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            said["tool_calls"].append({"id": block.get("id"), "function": function})
    return said


def _user(role: Any, blocks: list[Any], where: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    texts: list[Any] = []
    for number, block in enumerate(blocks):
        at = f"{where}.content[{number}]"
        if _kind(block, ("text", "tool_result"), at) == "text":
            texts.append(block)
        else:
            content = text_of(block.get("content"), f"{at}.content")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content})
    return results + ([{"role": role, "content": text_of(texts, where)}] if texts or not results else [])


def _blocks(reply: Reply) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if reply.reasoning:
        blocks.append(_text_block("thinking", reply.reasoning))
    if reply.content or not reply.tool_calls:
        blocks.append(_text_block("text", reply.content))
    for call in reply.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)})
    return blocks


def _text_block(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, kind: text} | ({"signature": ""} if kind == "thinking" else {})


def _head(asked: Asked) -> dict[str, Any]:
    return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": asked.model}


def _ids(asked: Asked, reply: Reply) -> dict[str, Any]:
    return {"prompt_token_ids": reply.context.tolist(), "token_ids": reply.tokens.tolist()} if asked.with_ids else {}


def _answer(asked: Asked, replies: Sequence[Reply]) -> Mapping[str, Any]:
    (reply,) = replies
    reason = "tool_use" if reply.tool_calls else {"length": "max_tokens"}.get(reply.finish, "end_turn")
    usage = {"input_tokens": len(reply.context), "output_tokens": len(reply.tokens)}
    ends = {"stop_reason": reason, "stop_sequence": None}
    return _head(asked) | {"content": _blocks(reply), "usage": usage} | ends | _ids(asked, reply)


class _Stream(Stream):
    """Its events: blocks one after another, each begun, filled and ended."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._sent = asked, Sent()
        self._head = _head(asked)
        self._num_blocks, self._open = 0, ""  # the type of the block that is filled

    def more(self, index: int, delta: Delta) -> Iterator[Event]:
        if not self._sent.whole.num_context:
            usage = {"input_tokens": delta.num_context, "output_tokens": 0}
            yield _event("message_start", message=self._head | _UNENDED | {"content": [], "usage": usage})
        self._sent.add(delta)
        for kind, text in (("thinking", delta.reasoning), ("text", delta.content)):
            if text and self._open != kind:
                yield from self._begin(_text_block(kind, ""))
            for piece in pieces(text):
                yield self._filled({"type": f"{kind}_delta", kind: piece})

    def end(self, replies: Sequence[Reply]) -> Iterator[Event]:
        (reply,) = replies
        yield from self.more(0, self._sent.rest(reply))
        for block in _blocks(reply)[self._num_blocks :]:  # calls, or a text that is empty
            is_call = block["type"] == "tool_use"
            yield from self._begin(block | ({"input": {}} if is_call else {}))
            if is_call:
                yield self._filled({"type": "input_json_delta", "partial_json": json.dumps(block["input"])})
        yield from self._close()
        whole = _answer(self._asked, replies)
        usage = {"output_tokens": whole["usage"]["output_tokens"]}
        ends = {name: whole[name] for name in _UNENDED}
        yield _event("message_delta", delta=ends, usage=usage, **_ids(self._asked, reply))
        yield _event("message_stop")

    def _begin(self, block: Mapping[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self._open = block["type"]
        self._num_blocks += 1
        yield _event("content_block_start", index=self._num_blocks - 1, content_block=block)

    def _close(self) -> Iterator[Event]:
        if self._open:
            self._open = ""
            yield _event("content_block_stop", index=self._num_blocks - 1)

    def _filled(self, delta: Mapping[str, Any]) -> Event:
        return _event("content_block_delta", index=self._num_blocks - 1, delta=delta)


def _event(kind: str, **data: Any) -> Event:
    return kind, {"type": kind} | data


MESSAGES = Api(_read, _answer, _Stream, _error, error_event="error")
"""/v1/messages"""
