"""What a model's answer says: whole, and as far as it is certain while it is sampled."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pekoe.core.types import IntArray
from pekoe.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
_NO_TEXT = "\ufffd"  # what a decoder writes for bytes that are not a whole character yet


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model wrote. Example: ToolCall("call-0", "calculator", '{"expression": "2+3"}')."""

    id: str
    name: str
    arguments: str  # JSON

    def as_message(self) -> dict[str, Any]:
        """As in a message of the chat completions API."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a model's text says. `malformed`: why what looks like a call of a tool is none."""

    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: str = ""


class Parser(Protocol):
    """Reads an answer's text: special tokens spelt out, no stop token.

    `in_thought`: the text goes on from an open <think>.
    """

    def whole(self, text: str, tools: Tools | None, in_thought: bool) -> Parsed:
        """What the text says."""
        ...

    def begun(self, text: str, tools: Tools | None, in_thought: bool) -> tuple[str, str]:
        """Reasoning and content with which `whole` begins for this text and every longer one that begins with it."""
        ...


class Plain(Parser):
    """An answer is its text."""

    def whole(self, text: str, tools: Tools | None, in_thought: bool) -> Parsed:
        return Parsed(text)

    def begun(self, text: str, tools: Tools | None, in_thought: bool) -> tuple[str, str]:
        return "", text


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of an answer that is sampled, and certain: the whole answer begins with all deltas so far."""

    text: str = ""  # as the model writes it
    reasoning: str = ""
    content: str = ""
    num_context: int = 0  # tokens that it answers

    def __add__(self, later: Delta) -> Delta:
        texts = self.text + later.text, self.reasoning + later.reasoning, self.content + later.content
        return Delta(*texts, later.num_context or self.num_context)


@dataclass(slots=True)
class GrowingText:
    """The text of tokens that come one after another, without characters that are not whole yet.

    A few tokens are decoded again each time, from where the last addition began: decoders write a token otherwise
    where it is the first. Tokens of single bytes wait for one of another kind: what they spell is known together.
    """

    tokenizer: Tokenizer
    text: str = ""
    _first: int = 0  # of the tokens that are decoded again
    _done: int = 0  # tokens whose text is in `text`

    def update(self, tokens: Sequence[int]) -> str:
        """The text of all tokens so far, which begin with those of before."""
        end = len(tokens)
        while end > self._done and self.tokenizer.is_byte(tokens[end - 1]):
            end -= 1
        before = self.tokenizer.decode(tokens[self._first : self._done])
        now = self.tokenizer.decode(tokens[self._first : end])
        if len(now) > len(before) and not now.endswith(_NO_TEXT):
            self.text += now[len(before) :]
            self._first, self._done = self._done, end
        return self.text


class Growing:
    """Tells what is certain of an answer, in the event loop in which it was made, while an engine samples it.

    Args:
        stops: texts before whose first the answer ends; what may become one is held back.
        begun: as `Parser.begun`.
        tell: called with each delta.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_token_ids: Collection[int],
        stops: Sequence[str],
        begun: Callable[[str], tuple[str, str]],
        num_context: int,
        tell: Callable[[Delta], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._tokenizer, self._stop_token_ids = tokenizer, stop_token_ids
        self._stops, self._begun, self._tell = [stop for stop in stops if stop], begun, tell
        self._num_context = num_context
        self._news: deque[tuple[int, IntArray]] = deque()
        self._called = self._over = False
        self._tokens: list[int] = []
        self._growing = GrowingText(tokenizer)
        self._sent = Delta()

    def __call__(self, start: int, tokens: IntArray) -> None:
        """As `Request.listener`."""
        self._news.append((start, tokens))
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._read)

    def close(self) -> None:
        """The answer is whole, or nobody waits for it: nothing more is told."""
        self._over = True

    def _read(self) -> None:
        self._called = False  # first: what comes meanwhile calls again
        while self._news:
            start, tokens = self._news.popleft()
            if start < len(self._tokens):  # another engine begins again
                del self._tokens[start:]
                self._growing = GrowingText(self._tokenizer)
            self._tokens += tokens.tolist()
        if self._over or not self._tokens:
            return
        ended = self._tokens[-1] in self._stop_token_ids
        text = self._before_stops(self._growing.update(self._tokens[:-1] if ended else self._tokens))
        reasoning, content = self._begun(text)
        sent = self._sent
        delta = Delta(
            *(_more(sent.text, text), _more(sent.reasoning, reasoning), _more(sent.content, content)),
            num_context=self._num_context,
        )
        if delta.text or delta.reasoning or delta.content:
            self._sent = sent + delta
            self._tell(delta)

    def _before_stops(self, text: str) -> str:
        """Without the first stop text and what follows it, and without what may become one."""
        found = [at for at in map(text.find, self._stops) if at >= 0]
        return text[: min(found)] if found else held_back(text, self._stops)


class Ending:
    """Ends an answer that has a stop text, as `Request.listener`.

    It reads in the engine's thread, not when the event loop comes to it: an answer always ends at the same token (I8).
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_token_ids: Collection[int], stops: Sequence[str], then: Growing | None
    ) -> None:
        self._tokenizer, self._stop_token_ids, self._stops, self._then = tokenizer, stop_token_ids, stops, then
        self._longest = max(map(len, stops))
        self._tokens: list[int] = []
        self._growing = GrowingText(tokenizer)

    def __call__(self, start: int, tokens: IntArray) -> bool:
        if self._then is not None:
            self._then(start, tokens)
        if start < len(self._tokens):  # another engine begins again
            self._tokens, self._growing = self._tokens[:start], GrowingText(self._tokenizer)
        self._tokens += tokens.tolist()
        if not self._tokens or self._tokens[-1] in self._stop_token_ids:  # whose text is not the answer's
            return False
        read = max(0, len(self._growing.text) - self._longest)
        text = self._growing.update(self._tokens)
        return any(text.find(stop, read) >= 0 for stop in self._stops)


def _more(sent: str, now: str) -> str:
    """What follows what was sent; nothing where it does not begin so (the stream's end tells)."""
    return now[len(sent) :] if len(now) > len(sent) and now.startswith(sent) else ""


def held_back(text: str, marks: Sequence[str]) -> str:
    """The text without an end that may become one of these marks."""
    longest = max((len(mark) - 1 for mark in marks), default=0)
    for start in range(max(0, len(text) - longest), len(text)):
        end = text[start:]
        if any(mark.startswith(end) for mark in marks):
            return text[:start]
    return text
