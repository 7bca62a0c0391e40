"""What the endpoint's APIs have in common: requests as they are read, and errors with a status."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pekoe.agents.answers import Delta, Message
from pekoe.agents.session import Reply
from pekoe.core.errors import RunError, UserError

MAX_ANSWERS = 128  # of one request
_ROLES = ("system", "user", "assistant", "tool")
T = TypeVar("T")


class Refused(Exception):
    """A request that is answered with an error. `code` is for programs, as OpenAI's."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of any API, read."""

    model: str
    conversations: Sequence[Sequence[Message]]  # one, but of a completion request with several prompts
    n: int = 1  # answers to each
    tools: Sequence[Mapping[str, Any]] | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    variables: Mapping[str, Any] | None = None  # of the chat template
    stream: bool = False
    with_usage: bool = False  # at the end of a stream
    with_logprobs: bool = False
    with_ids: bool = False  # of contexts and answers
    ignored: Sequence[str] = ()  # keys that have no effect

    @property
    def num_answers(self) -> int:
        return self.n * len(self.conversations)


Event = tuple[str, Mapping[str, Any]]
"""A server-sent event: its name (empty: it has none), and its data."""


class Stream(Protocol):
    """Writes one request's answers as events."""

    def more(self, index: int, delta: Delta) -> Iterator[Event]:
        """What is new of answer `index`."""
        ...

    def end(self, replies: Sequence[Reply]) -> Iterator[Event]:
        """The answers are whole: what no delta had, and the ends. RunError where they do not begin as the deltas."""
        ...


@dataclass(slots=True)
class Sent:
    """What a stream has had of an answer."""

    whole: Delta = field(default_factory=Delta)

    def add(self, delta: Delta) -> None:
        self.whole += delta

    def rest(self, reply: Reply) -> Delta:
        """What is left of the answer."""

        def after(sent: str, now: str) -> str:
            if not now.startswith(sent):
                raise RunError("the answer is another than its stream began with: an engine was lost; ask again")
            return now[len(sent) :]

        sent = self.whole
        return Delta(
            after(sent.text, reply.text),
            after(sent.reasoning, reply.reasoning),
            after(sent.content, reply.content),
            len(reply.context),
        )


@dataclass(frozen=True, slots=True)
class Api:
    """How a program's request is read, and how it is answered."""

    read: Callable[[Fields], Asked]
    answer: Callable[[Asked, Sequence[Reply]], Mapping[str, Any]]
    stream: Callable[[Asked], Stream]
    error: Callable[[int, str, str | None], Mapping[str, Any]]
    end: str = ""  # data that ends a stream
    error_event: str = ""  # name of the event that a failure is told with


class Fields:
    """A request's JSON object, read key by key. UserError names what was expected."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body, self._seen = body, set[str]()

    def get(self, name: str, kind: type[T] | tuple[type[T], ...], expected: str) -> T | None:
        """None where it is absent or null."""
        self._seen.add(name)
        value = self._body.get(name)
        kinds: tuple[type, ...] = kind if isinstance(kind, tuple) else (kind,)
        if value is None or (isinstance(value, kind) and (not isinstance(value, bool) or bool in kinds)):
            return value
        raise UserError(f"{name}: expected {expected}, got {shown(value)}")

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.get(name, (int, float), f"a number from {low:g} to {high:g}")
        if value is not None and not low <= value <= high:
            raise UserError(f"{name}: expected a number from {low:g} to {high:g}, got {shown(value)}")
        return None if value is None else float(value)

    def count(self, name: str, high: int = 2**31 - 1, low: int = 1) -> int | None:
        value = self.get(name, int, f"a whole number from {low} to {high}")
        if value is not None and not low <= value <= high:
            raise UserError(f"{name}: expected a whole number from {low} to {high}, got {shown(value)}")
        return value

    def flag(self, name: str) -> bool:
        return bool(self.get(name, bool, "true or false"))

    def texts(self, name: str) -> Sequence[str]:
        """A text, or several."""
        value: Any = self.get(name, (str, list), "a text or a list of texts")
        texts: list[Any] = [] if value is None else [value] if isinstance(value, str) else value
        if not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"{name}: expected texts that are not empty, got {shown(value)}")
        return texts

    def refuse(self, name: str, neutral: Collection[Any], why: str) -> None:
        """UserError where the key asks for what cannot be done: for a value that is not `neutral`."""
        self._seen.add(name)
        value = self._body.get(name)
        if value is not None and value not in neutral:
            raise UserError(f"{name}: expected {why}, got {shown(value)}; nearest: leave it out")

    def ignore(self, *names: str) -> None:
        """Keys that have no effect, and are not reported."""
        self._seen.update(names)

    def rest(self) -> list[str]:
        """Keys that nothing has read."""
        return sorted(name for name, value in self._body.items() if name not in self._seen and value is not None)


def shown(value: Any) -> str:
    """A value in a message, at most a line of it."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object that a request's body is. UserError for anything else."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        value = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"body: expected a JSON object, got {len(data):,} bytes that are none: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"body: expected a JSON object, got {shown(value)}")
    return value


def text_of(content: Any, where: str) -> str:
    """A text, or the texts of its parts, one after another."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise UserError(f"{where}: expected a text or a list of texts, got {shown(content)}")
    texts: list[str] = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise UserError(
                f'{where}[{number}]: expected {{"type": "text", "text": ...}} (the model reads text alone), got '
                f"{shown(part)}"
            )
        texts.append(part["text"])
    return "".join(texts)


def read_messages(value: Any, where: str = "messages") -> list[dict[str, Any]]:
    """Messages of the chat completions API, with what a chat template takes."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a list of at least one message, got {shown(value)}")
    return [_message(message, f"{where}[{number}]") for number, message in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    role = value.get("role") if isinstance(value, dict) else None
    role = "system" if role == "developer" else role
    if role not in _ROLES:
        raise UserError(f"{where}: expected a message with a role among {', '.join(_ROLES)}, got {shown(value)}")
    message: dict[str, Any] = {"role": role, "content": text_of(value.get("content"), f"{where}.content")}
    for name in ("name", "tool_call_id"):
        if isinstance(value.get(name), str):
            message[name] = value[name]
    if role == "assistant":
        reasoning = value.get("reasoning_content") or value.get("reasoning")
        if isinstance(reasoning, str):
            message["reasoning_content"] = reasoning
        if value.get("tool_calls"):
            message["tool_calls"] = _calls(value["tool_calls"], f"{where}.tool_calls")
    return message


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, which is what templates print."""
    calls: list[dict[str, Any]] = []
    for number, call in enumerate(value if isinstance(value, list) else [value]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f'{where}[{number}]: expected {{"id", "function": {{"name", "arguments"}}}}, got {shown(call)}'
            )
        arguments = function.get("arguments")
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            parsed = arguments
        named = {"name": function["name"], "arguments": parsed if isinstance(parsed, dict) else arguments or {}}
        calls.append({"id": str(call.get("id", "")), "type": "function", "function": named})
    return calls
