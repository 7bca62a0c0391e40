"""OpenAI's responses API, without what a server would have to keep: conversations are sent whole."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pekoe.agents.openai_chat import openai_error, pieces, sampling_of
from pekoe.agents.session import Reply
from pekoe.agents.tools import check_tools
from pekoe.agents.wire import Api, Asked, Event, Fields, read_messages, shown, text_of
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


def _output(reply: Reply) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if reply.reasoning:
        thought = [{"type": "reasoning_text", "text": reply.reasoning}]
        items.append({"id": _id("rs"), "type": "reasoning", "summary": [], "content": thought})
    if reply.content or not reply.tool_calls:
        part = {"type": "output_text", "text": reply.content, "annotations": [], "logprobs": []}
        items.append({"id": _id("msg"), "type": "message", "role": "assistant", "content": [part]})
    for call in reply.tool_calls:
        called = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
        items.append({"id": _id("fc"), "type": "function_call"} | called)
    return [item | {"status": "completed"} for item in items]


def _answer(asked: Asked, replies: Sequence[Reply]) -> Mapping[str, Any]:
    (reply,) = replies
    cut = reply.finish == "length"
    prompt, sampled = len(reply.context), len(reply.tokens)
    usage = {"input_tokens": prompt, "output_tokens": sampled, "total_tokens": prompt + sampled}
    usage |= {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    ids = {"prompt_token_ids": reply.context.tolist(), "token_ids": reply.tokens.tolist()} if asked.with_ids else {}
    return {
        **{"id": _id("resp"), "object": "response", "created_at": int(time.time()), "model": asked.model},
        **{"status": "incomplete" if cut else "completed", "output": _output(reply), "usage": usage, "error": None},
        **{"incomplete_details": {"reason": "max_output_tokens"} if cut else None, "instructions": None},
        **{"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {}},
        **{"temperature": asked.temperature, "top_p": asked.top_p},
        **ids,
    }


def _events(asked: Asked, replies: Sequence[Reply]) -> Iterator[Event]:
    whole, number = _answer(asked, replies), 0

    def event(kind: str, **data: Any) -> Event:
        nonlocal number
        number += 1
        return kind, {"type": kind, "sequence_number": number - 1} | data

    begun = {**whole, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    for index, item in enumerate(whole["output"]):
        at = {"item_id": item["id"], "output_index": index}
        empty = {"arguments": ""} if item["type"] == "function_call" else {"content": []}
        yield event("response.output_item.added", output_index=index, item=item | empty | {"status": "in_progress"})
        if item["type"] == "function_call":
            yield event("response.function_call_arguments.delta", **at, delta=item["arguments"])
            yield event("response.function_call_arguments.done", **at, arguments=item["arguments"], name=item["name"])
        else:
            part, name = item["content"][0], item["content"][0]["type"]
            at |= {"content_index": 0}
            yield event("response.content_part.added", **at, part=part | {"text": ""})
            more = {"logprobs": []} if name == "output_text" else {}
            for piece in pieces(part["text"]):
                yield event(f"response.{name}.delta", **at, delta=piece, **more)
            yield event(f"response.{name}.done", **at, text=part["text"], **more)
            yield event("response.content_part.done", **at, part=part)
        yield event("response.output_item.done", output_index=index, item=item)
    yield event("response.incomplete" if whole["status"] == "incomplete" else "response.completed", response=whole)


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


RESPONSES = Api(_read, _answer, _events, openai_error)
"""/v1/responses"""
