"""Environments as TRL's users write them: a class with `reset()`, whose other public methods are tools."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import types
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pekoe.agents.answers import ToolCall
from pekoe.agents.session import Session
from pekoe.core.errors import UserError
from pekoe.core.types import Problem

_JSON_TYPES: dict[Any, str] = {
    **{str: "string", int: "integer", float: "number", bool: "boolean"},
    **{type(None): "null", list: "array", dict: "object"},
}


def episode_of(environment: type) -> Callable[[Problem, Session], Awaitable[Any]]:
    """An episode for `rollout.episode`: a new environment each time, whose tools the model calls until it calls none.

    `reset` is given those fields of the problem's row that it takes; a text that it returns follows the question. The
    verdict is the environment's attribute `reward` at the end; without one, or where it is None, the problem's judge
    decides. What a tool raises as a ValueError is a result that the model sees; any other error is FAULT.

    Raises UserError for a class without reset or tools, and for a tool without type hints.
    """
    if not callable(getattr(environment, "reset", None)):
        raise UserError(f"{environment.__name__}: expected a class with reset(), got none")
    names = [name for name, _ in inspect.getmembers(environment, callable) if name[0] != "_" and name != "reset"]
    if not names:
        raise UserError(
            f"{environment.__name__}: expected at least one public method beside reset, as a tool, got none"
        )
    tools = [schema_of(getattr(environment, name), name) for name in sorted(names)]

    async def episode(problem: Problem, client: Session) -> Any:
        made: Any = environment()
        messages: list[Any] = list(problem.messages)
        told = await _call(made.reset, _taken(made.reset, problem.row))
        if isinstance(told, str) and told:
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + told}
        while True:
            reply = await client.complete(messages, tools=tools)
            messages.append(reply.message)
            if not reply.tool_calls:
                return getattr(made, "reward", None)
            for call in reply.tool_calls:
                result = await _result(made, names, call)
                messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result})

    return episode


async def _result(made: Any, names: list[str], call: ToolCall) -> str:
    """What the model is shown."""
    if call.name not in names:
        return f"error: expected a tool among {', '.join(sorted(names))}, got {call.name}"
    tool, arguments = getattr(made, call.name), json.loads(call.arguments)
    try:
        inspect.signature(tool).bind(**arguments)
    except TypeError as error:  # the model's
        return f"error: {call.name}: {error}"
    try:
        result = await _call(tool, arguments)
    except ValueError as error:
        return f"error: {error}"
    return result if isinstance(result, str) else json.dumps(result, default=str)


async def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(**arguments)
    return await asyncio.to_thread(function, **arguments)


def _taken(reset: Callable[..., Any], row: Any) -> dict[str, Any]:
    """The fields of a row that `reset` takes."""
    fields: dict[str, Any] = row if isinstance(row, dict) else {}
    parameters = inspect.signature(reset).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return fields
    return {parameter.name: fields[parameter.name] for parameter in parameters if parameter.name in fields}


def schema_of(method: Callable[..., Any], name: str) -> dict[str, Any]:
    """A tool's schema, of the chat completions API, from its signature and docstring (its part "Args:" too)."""
    hints = get_type_hints(method)
    text = inspect.getdoc(method) or ""
    head, _, described = text.partition("Args:")
    told = dict(re.findall(r"^\s*(\w+)(?:\s*\([^)]*\))?:\s*(.+)$", described.partition("Returns:")[0], re.MULTILINE))
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        at = f"{method.__qualname__}({parameter.name})"
        if parameter.name not in hints:
            raise UserError(f"{at}: expected a type hint, which the tool's schema is made of, got none")
        properties[parameter.name] = _json_schema(hints[parameter.name], at)
        if parameter.name in told:
            properties[parameter.name]["description"] = told[parameter.name].strip()
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": head.strip(), "parameters": parameters}}


def _json_schema(hint: Any, at: str) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_json_schema(one, at) for one in inner]}
    kind = _JSON_TYPES.get(origin or hint)
    if kind is None:
        known = "str, int, float, bool, list, dict, Literal and unions of these"
        raise UserError(f"{at}: expected a type among {known}, got {hint!r}")
    return {"type": kind} | ({"items": _json_schema(inner[0], at)} if kind == "array" and inner else {})
