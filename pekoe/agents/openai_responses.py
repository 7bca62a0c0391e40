"""OpenAI's responses API, without what a server would have to keep: conversations are sent whole."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pekoe.agents.answers import Delta
from pekoe.agents.openai_chat import openai_error, pieces, sampling_of
from pekoe.agents.session import Reply
from pekoe.agents.tools import check_tools
from pekoe.agents.wire import Api, Asked, Event, Fields, Sent, Stream, read_messages, shown, text_of
from pekoe.core.errors import UserError

_WITHOUT_EFFECT = (
    *("store", "metadata", "user", "service_tier", "safety_identifier", "prompt_cache_key", "truncation", "include"),
    *("reasoning", "parallel_tool_calls", "prompt_cache_retention", "stream_options"),
)


def _read(fields: Fields) -> Asked:
    for name in ("previous_response_id", "conversation", "prompt"):
        fields.refuse(name, (), "none: nothing is kept here, so send the whole conversation as input")
    fields.refuse("background", (False,), "false")
    fields.refuse("top_logprobs", (0,), "0: the log-prob of the sampled token alone is known")
    text: dict[str, Any] = fields.get("text", dict, "an object") or {}
    if (text.get("format") or {"type": "text"}) != {"type": "text"}:
        raise UserError(f'text.format: expected type "text": nothing constrains what is sampled, got {shown(text)}')
    fields.refuse("tool_choice", ("auto", "none"), 'tool_choice "auto" or "none": the model decides what it calls')
    chosen = fields.get("tool_choice", str, "a text")
    tools = _tools(fields.get("tools", list, "a list of functions"))
    fields.ignore(*_WITHOUT_EFFECT)
    asked: dict[str, Any] = sampling_of(fields) | {
        "conversations": [_conversation(fields)],
        "tools": tools if chosen != "none" else None,
        "max_tokens": fields.count("max_output_tokens"),
        "variables": fields.get("chat_template_kwargs", dict, "an object"),
        "with_ids": fields.flag("return_token_ids"),
    }
    return Asked(**asked, ignored=fields.rest())


def _tools(value: list[Any] | None) -> list[Any] | None:
    """As functions of the chat completions API."""
    if not value:
        return None
    tools: list[Any] = []
    for number, tool in enumerate(value):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise UserError(f'tools[{number}]: expected {{"type": "function", "name": ...}}, got {shown(tool)}')
        known = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
        tools.append({"type": "function", "function": known})
    check_tools(tools)
    return tools


def _conversation(fields: Fields) -> list[dict[str, Any]]:
    """As messages of the chat completions API: what an assistant thought, said and called in a row is one message."""
    instructions = fields.get("instructions", str, "a text")
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    value: Any = fields.get("input", (str, list), "a text or a list of items")
    items: list[Any] = [{"role": "user", "content": value}] if isinstance(value, str) else value or []
    for number, item in enumerate(items):
        where = f"input[{number}]"
        if not isinstance(item, dict):
            raise UserError(f"{where}: expected an item, got {shown(item)}")
        kind = item.get("type", "message")
        if kind == "function_call_output":
            output = text_of(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind == "message" and item.get("role") != "assistant":
            messages.append({"role": item.get("role"), "content": text_of(item.get("content"), f"{where}.content")})
        elif kind in ("message", "function_call", "reasoning"):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []})
            _add(messages[-1], kind, item, where)
        else:
            expected = "message, function_call, function_call_output or reasoning"
            raise UserError(f"{where}: expected an item of type {expected}, got {shown(item)}")
    return read_messages(messages, "input")


def _add(message: dict[str, Any], kind: str, item: Mapping[str, Any], where: str) -> None:
    if kind == "message":
        message["content"] += text_of(item.get("content"), f"{where}.content")
    elif kind == "reasoning":
        message["reasoning_content"] += text_of(item.get("content"), f"{where}.content")
    else:
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        message["tool_calls"].append({"id": item.get("call_id"), "function": function})


@dataclass(frozen=True, slots=True)
class _Names:
    """Of one response and what it has."""

    response: str = field(default_factory=lambda: _id("resp"))
    reasoning: str = field(default_factory=lambda: _id("rs"))
    message: str = field(default_factory=lambda: _id("msg"))


def _part(kind: str, text: str) -> dict[str, Any]:
    """Of an item of type "reasoning" or "message"."""
    more = {"annotations": [], "logprobs": []} if kind == "message" else {}
    return {"type": "output_text" if kind == "message" else "reasoning_text", "text": text} | more


def _item(kind: str, names: _Names, parts: list[Any]) -> dict[str, Any]:
    more = {"role": "assistant"} if kind == "message" else {"summary": []}
    name = names.message if kind == "message" else names.reasoning
    return {"id": name, "type": kind, "status": "completed", "content": parts} | more


def _output(reply: Reply, names: _Names) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if reply.reasoning:
        items.append(_item("reasoning", names, [_part("reasoning", reply.reasoning)]))
    if reply.content or not reply.tool_calls:
        items.append(_item("message", names, [_part("message", reply.content)]))
    for call in reply.tool_calls:
        called = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
        items.append({"id": _id("fc"), "type": "function_call", "status": "completed"} | called)
    return items


def _answer(asked: Asked, replies: Sequence[Reply], names: _Names | None = None) -> Mapping[str, Any]:
    (reply,) = replies
    names = names or _Names()
    cut = reply.finish == "length"
    prompt, sampled = len(reply.context), len(reply.tokens)
    usage = {"input_tokens": prompt, "output_tokens": sampled, "total_tokens": prompt + sampled}
    usage |= {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    ids = {"prompt_token_ids": reply.context.tolist(), "token_ids": reply.tokens.tolist()} if asked.with_ids else {}
    return {
        **_head(asked, names),
        **{"status": "incomplete" if cut else "completed", "output": _output(reply, names), "usage": usage},
        **{"incomplete_details": {"reason": "max_output_tokens"} if cut else None},
        **ids,
    }


def _head(asked: Asked, names: _Names) -> dict[str, Any]:
    """Of a response that has just begun."""
    return {
        **{"id": names.response, "object": "response", "created_at": int(time.time()), "model": asked.model},
        **{"status": "in_progress", "output": [], "usage": None, "error": None, "incomplete_details": None},
        **{"instructions": None, "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {}},
        **{"temperature": asked.temperature, "top_p": asked.top_p},
    }


class _Stream(Stream):
    """Its events: items one after another, each added, filled and done."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._names, self._sent = asked, _Names(), Sent()
        self._num_events = self._num_items = 0
        self._open = ""  # the type of the item that is filled

    def more(self, index: int, delta: Delta) -> Iterator[Event]:
        if not self._num_events:
            begun = _head(self._asked, self._names)
            yield self._event("response.created", response=begun)
            yield self._event("response.in_progress", response=begun)
        self._sent.add(delta)  # what begins next ends what is open, with its whole text
        for kind, text in (("reasoning", delta.reasoning), ("message", delta.content)):
            if text and self._open != kind:
                yield from self._begin(kind)
            for piece in pieces(text):
                yield self._event(
                    f"response.{_part(kind, '')['type']}.delta", **self._place, delta=piece, **self._logprobs
                )

    def end(self, replies: Sequence[Reply]) -> Iterator[Event]:
        (reply,) = replies
        yield from self.more(0, self._sent.rest(reply))
        whole = _answer(self._asked, replies, self._names)
        for item in whole["output"][self._num_items :]:  # calls, or a text that is empty
            if item["type"] == "function_call":
                yield from self._call(item)
            else:
                yield from self._begin(item["type"])
        yield from self._close()
        kind = "response.incomplete" if whole["status"] == "incomplete" else "response.completed"
        yield self._event(kind, response=whole)

    def _begin(self, kind: str) -> Iterator[Event]:
        yield from self._close()
        item = _item(kind, self._names, []) | {"status": "in_progress"}
        yield self._event("response.output_item.added", output_index=self._num_items, item=item)
        self._open, self._num_items = kind, self._num_items + 1
        yield self._event("response.content_part.added", **self._place, part=_part(kind, ""))

    def _close(self) -> Iterator[Event]:
        kind = self._open
        if not kind:
            return
        part = _part(kind, self._sent.whole.content if kind == "message" else self._sent.whole.reasoning)
        yield self._event(f"response.{part['type']}.done", **self._place, text=part["text"], **self._logprobs)
        yield self._event("response.content_part.done", **self._place, part=part)
        item = _item(kind, self._names, [part])
        yield self._event("response.output_item.done", output_index=self._num_items - 1, item=item)
        self._open = ""

    def _call(self, item: Mapping[str, Any]) -> Iterator[Event]:
        yield from self._close()
        index, arguments = self._num_items, item["arguments"]
        self._num_items += 1
        at = {"item_id": item["id"], "output_index": index}
        added = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=added)
        yield self._event("response.function_call_arguments.delta", **at, delta=arguments)
        yield self._event("response.function_call_arguments.done", **at, arguments=arguments, name=item["name"])
        yield self._event("response.output_item.done", output_index=index, item=item)

    @property
    def _place(self) -> dict[str, Any]:
        name = self._names.message if self._open == "message" else self._names.reasoning
        return {"item_id": name, "output_index": self._num_items - 1, "content_index": 0}

    @property
    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self._open == "message" else {}

    def _event(self, kind: str, **data: Any) -> Event:
        self._num_events += 1
        return kind, {"type": kind, "sequence_number": self._num_events - 1} | data


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


RESPONSES = Api(_read, _answer, _Stream, openai_error, error_event="error")
"""/v1/responses"""
