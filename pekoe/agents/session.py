"""One episode's talk with the engines, recorded turn by turn as it is sampled (I11).

The ids of a longer conversation are built on those of a recorded turn: where the template's text begins with the text
of that turn (context and answer), its ids are used as they were sampled, and only the rest is tokenised. Where the
template rewrites what came before (Qwen3 drops earlier thinking), or the caller does, the whole is tokenised: the turn
begins a branch. Either way a turn is trained on in the very context that the engine was given.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

import numpy as np

from pekoe.agents.answers import Delta, Ending, Growing, Message, Parser, Plain, ToolCall, Tools
from pekoe.agents.turns import NOTHING, branches_of, cut
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import (
    Completion,
    EpisodeStats,
    FinishReason,
    FloatArray,
    IntArray,
    Record,
    Request,
    SamplingParams,
    Trajectory,
    Turn,
)
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine.base import Sampler

_LONG = 200_000  # characters of a conversation that takes a tokenizer a tenth of a second and more


class EpisodeLimit(Exception):
    """A limit of the episode is reached. Its message names the key. Not caught, it ends the episode: UNPARSED."""


class EpisodeOver(Exception):
    """Something is asked for after the episode's end."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, as read and as sampled."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    malformed: str
    text: str  # as the model wrote it, without the stop token
    finish: FinishReason
    context: IntArray  # [P]
    tokens: IntArray  # [R]
    logprobs: FloatArray  # [R]
    versions: tuple[tuple[int, int], ...]

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message, to be put behind the conversation that it answers."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_message() for call in self.tool_calls]
        return message


@dataclass(frozen=True, slots=True)
class Limits:
    """What an episode may take; None: as much as it likes. Keys of the recipe, by which messages name them."""

    max_turns: int | None = None
    max_new_tokens: int | None = None  # of a sequence, beyond the first context: answers and what stands between
    turn_tokens: int | None = None  # of one answer
    longest: int | None = None  # tokens of any sequence, the engine's limit


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A turn, and the text by which a later conversation is known to continue it."""

    turn: Turn
    messages: Sequence[Message]  # that it answers
    before: tuple[str, ...]  # their keys
    key: str  # of the answer
    raw: str  # what the template is given as the answer's content
    texts: tuple[str, ...]  # of context and answer: as sampled, and as templates trim it

    @property
    def ids(self) -> IntArray:
        return np.concatenate([self.turn.context, self.turn.completion.tokens])


class Dispatcher:
    """Hands requests that are made at one moment to the engines together, so that a group's prompt is computed once.

    With `lockstep` they wait until every episode that runs has asked: what is computed together, and so every bit,
    does not depend on how long tools take.
    """

    def __init__(self, sampler: Sampler, lockstep: bool = False) -> None:
        self.num_active = 0  # episodes that run
        self._sampler, self._lockstep = sampler, lockstep
        self._waiting: list[tuple[Request, asyncio.Future[Completion]]] = []

    def submit(self, request: Request) -> asyncio.Future[Completion]:
        """In the running event loop. The future ends as `Sampler.submit` says."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()
        if not self._waiting and not self._lockstep:
            loop.call_soon(self._flush)
        self._waiting.append((request, future))
        if self._lockstep:
            self._flush_round()
        return future

    def leave(self) -> None:
        """An episode is over."""
        self.num_active -= 1
        if self._lockstep:
            self._flush_round()

    def _flush_round(self) -> None:
        asked = {(request.uid, request.draw, request.sample) for request, _ in self._waiting}
        if asked and len(asked) >= self.num_active:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._lockstep:
            waiting.sort(key=lambda pair: (pair[0].draw, pair[0].uid, pair[0].sample, pair[0].turn))
        try:
            inner = self._sampler.submit([request for request, _ in waiting])
        except UserError:  # of one of them; nothing is sampled
            inner = [self._alone(request) for request, _ in waiting]
        except Exception as error:
            inner = [_failed(error) for _ in waiting]
        for future, (_, outer) in zip(inner, waiting, strict=True):
            outer.add_done_callback(partial(_drop, future))
            asyncio.ensure_future(_pass_on(future, outer))  # noqa: RUF006  # the loop's until it is done

    def _alone(self, request: Request) -> Future[Completion]:
        try:
            return self._sampler.submit([request])[0]
        except Exception as error:
            return _failed(error)


def _failed(error: Exception) -> Future[Completion]:
    future: Future[Completion] = Future()
    future.set_exception(error)
    return future


def _drop(inner: Future[Completion], outer: asyncio.Future[Completion]) -> None:
    if outer.cancelled():
        inner.cancel()  # it need not be sampled to its end


async def _pass_on(inner: Future[Completion], outer: asyncio.Future[Completion]) -> None:
    try:
        completion = await asyncio.wrap_future(inner)
    except BaseException as error:
        if not outer.done():
            outer.set_exception(error if isinstance(error, Exception) else RunError("the request was cancelled"))
    else:
        if not outer.done():
            outer.set_result(completion)


@dataclass(slots=True)
class _Clock:
    """Seconds in which at least one request is with the engines."""

    began: float = field(default_factory=time.monotonic)
    engine_s: float = 0.0
    running: int = 0
    since: float = 0.0

    def start(self) -> None:
        self.since = self.since if self.running else time.monotonic()
        self.running += 1

    def stop(self) -> None:
        self.running -= 1
        if not self.running:
            self.engine_s += time.monotonic() - self.since

    @property
    def tool_s(self) -> float:
        """Seconds in which none was."""
        now = time.monotonic()
        return now - self.began - self.engine_s - (now - self.since if self.running else 0.0)


class Session:
    """What an episode samples with. All methods are called in one event loop.

    Args:
        params: how to sample; of a run that trains, whatever a caller asks for: `may_choose` lets it choose
            temperature, top_p and seed.
        prompt: the messages of the problem, whose answer has the random numbers of a single answer.
        parser: reads reasoning and calls of tools from answers.
        keep: how many turns are remembered, the last ones; None: all.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer,
        params: SamplingParams,
        uid: str,
        draw: int = 0,
        sample: int = 0,
        *,
        limits: Limits | None = None,
        prompt: Sequence[Message] = (),
        parser: Parser | None = None,
        may_choose: bool = False,
        keep: int | None = None,
    ) -> None:
        self.uid, self.draw, self.sample, self.may_choose = uid, draw, sample, may_choose
        self.error: BaseException | None = None  # of the engines: it ends the run, whatever the episode does
        self.refused: EpisodeLimit | None = None  # what a program was told that asks through the endpoint
        self.open_endpoint: Callable[[Session], tuple[str, str]] | None = None
        self._dispatcher, self._tokenizer, self._params = dispatcher, tokenizer, params
        self._limits, self._parser, self._keep = limits or Limits(), parser or Plain(), keep
        self._prompt = tokenizer.encode_prompt(prompt) if prompt else None
        self._first = None if self._prompt is None else len(self._prompt)  # tokens of the first context
        self._recorded: list[_Recorded] = []
        self._answers: dict[str, list[_Recorded]] = {}  # by the key of the message
        self._requests: Counter[bytes] = Counter()  # by their contexts
        self._pending: set[asyncio.Future[Completion]] = set()
        self._num_begun = self._num_tool_calls = self._num_malformed = 0
        self._clock, self._closed = _Clock(), False

    @property
    def base_url(self) -> str:
        """The address, on this machine, at which a program that exists talks with the model as this session."""
        return self._address[0]

    @property
    def api_key(self) -> str:
        """The key by which the endpoint knows the session."""
        return self._address[1]

    @cached_property
    def _address(self) -> tuple[str, str]:
        if self.open_endpoint is None:
            raise UserError("base_url: expected the client of an episode, got a session that has no endpoint")
        return self.open_endpoint(self)

    # Sampling

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        variables: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        number: int = 0,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> Reply:
        """Sample the assistant's answer to a conversation, and record the turn.

        Args:
            messages: as of the chat completions API; answers of before stand as `Reply.message` gave them. Text that
                no template writes is one message of role "raw", whose content may be token ids.
            tools: functions that the model may call, as of the chat completions API.
            variables: of the template (Qwen3's enable_thinking).
            stop: texts; an answer ends before the first that it has, and the tokens after it are dropped. An embedded
                engine in this process samples no more of them.
            seed: of a session that may choose; the same seed and `number` give the same answer again.
            on_delta: told of the answer while it is sampled, where the engine can (the embedded one in this process).

        Raises EpisodeLimit where the episode may take no more, and UserError for messages that the template refuses.
        """
        if self._closed:
            raise EpisodeOver("the episode is over")
        limits = self._limits
        if limits.max_turns is not None and self._num_begun >= limits.max_turns:
            raise EpisodeLimit(f"rollout.max_turns = {limits.max_turns}: the episode asks for more answers")
        self._num_begun += 1
        messages = list(messages)
        if sum(len(message.get("content") or ()) for message in messages) < _LONG:
            text, opening, context = self._context(messages, tools, variables)
        else:  # the others are not to wait for it
            text, opening, context = await asyncio.to_thread(self._context, messages, tools, variables)
        room = self._room(len(context), max_tokens)
        params = self._sampling(room, temperature, top_p, seed)
        seeded = self.may_choose and seed is not None
        stops = tuple(one for one in ([stop] if isinstance(stop, str) else stop or ()) if one)
        in_thought = text.rstrip().endswith("<think>")
        begun = partial(self._parser.begun, tools=tools, in_thought=in_thought)
        growing = None
        if on_delta is not None:
            growing = Growing(self._tokenizer, self._stops, stops, begun, len(context), on_delta)
        listener = Ending(self._tokenizer, self._stops, stops, growing) if stops else growing
        try:
            completion = await self._sample(context, params, number if seeded else None, listener)
        finally:
            if growing is not None:
                growing.close()
        record = completion.handle.resolve() if isinstance(completion.handle, Record) else None
        if record is None:
            record = await asyncio.to_thread(completion.handle.resolve)
        turn = Turn(context, replace(completion, handle=record))
        turn, answer = self._until(turn, stops)
        parsed = self._parser.whole(answer, tools, in_thought)
        parsed = replace(parsed, tool_calls=_named(parsed.tool_calls, context))
        self._num_tool_calls += len(list(takewhile(lambda m: m["role"] == "tool", reversed(messages))))
        self._num_malformed += bool(parsed.malformed)
        completion = turn.completion
        reply = Reply(
            *(parsed.content, parsed.reasoning, parsed.tool_calls, parsed.malformed, answer, completion.finish),
            *(context, completion.tokens, completion.logprobs, completion.versions),
        )
        self._record(turn, messages, reply.message, text, opening, answer)
        return reply

    def _room(self, size: int, max_tokens: int | None) -> int:
        """How many tokens may be sampled after a context of `size` tokens."""
        limits = self._limits
        self._first = size if self._first is None else self._first
        room: list[int] = [] if max_tokens is None else [max_tokens]
        if not room and self.may_choose:
            room.append(self._params.max_new_tokens)
        if limits.turn_tokens is not None:
            room.append(limits.turn_tokens)
        if limits.max_new_tokens is not None:
            left = min(limits.max_new_tokens, self._first + limits.max_new_tokens - size)
            if left < 1:
                raise EpisodeLimit(
                    f"rollout.max_new_tokens = {limits.max_new_tokens}: answers and tools' results take {size} tokens, "
                    f"the prompt's {self._first} among them"
                )
            room.append(left)
        if limits.longest is not None:
            if size >= limits.longest:
                raise EpisodeLimit(f"the context of {size} tokens leaves no room below {limits.longest}")
            room.append(limits.longest - size)
        return min(room, default=self._params.max_new_tokens)

    def _sampling(self, room: int, temperature: float | None, top_p: float | None, seed: int | None) -> SamplingParams:
        params = self._params
        fewest = min(params.min_new_tokens, room)
        params = replace(params, n=1, max_new_tokens=room, min_new_tokens=fewest)
        if not self.may_choose:
            return params
        given = {"temperature": temperature, "top_p": top_p, "seed": seed}
        return replace(params, **{name: value for name, value in given.items() if value is not None})

    async def _sample(
        self, context: IntArray, params: SamplingParams, number: int | None, listener: Ending | Growing | None
    ) -> Completion:
        """RunError, which is kept, where the engines fail or the run stops. With a `number` the answer depends on it,
        the seed and the context alone."""
        later = bool(self._recorded)
        key, uid = context.tobytes(), self.uid if number is None else "seeded"
        if number is None and self._keep is None:
            number, self._requests[key] = self._requests[key], self._requests[key] + 1
        elif number is None:
            number = self._num_begun  # what was asked before is not remembered
        first = number == 0 and self._prompt is not None and np.array_equal(context, self._prompt)
        # By what is asked, not by when: turns that run side by side come in any order (I8).
        digest = hashlib.blake2b(key + number.to_bytes(4, "little"), digest_size=7).digest()
        turn = 0 if first else int.from_bytes(digest, "little") + 1
        request = Request(uid, self.draw, self.sample, context, params, int(later), turn, listener)
        future = self._dispatcher.submit(request)
        self._pending.add(future)
        future.add_done_callback(self._finished)
        self._clock.start()
        try:
            completion = await asyncio.shield(future)
        except asyncio.CancelledError:  # who asked has gone
            future.cancel()
            raise
        except UserError:  # wrong tokens: of this request
            raise
        except Exception as error:
            self.error = self.error or error
            raise
        if completion.finish == "abort":
            self.error = self.error or RunError("the request was aborted")
            raise self.error
        return completion

    def _finished(self, future: asyncio.Future[Completion]) -> None:
        self._clock.stop()
        self._pending.discard(future)
        if not future.cancelled():
            future.exception()  # an abandoned request's is nobody's

    def _until(self, turn: Turn, stops: tuple[str, ...]) -> tuple[Turn, str]:
        """The turn up to the first of the stop texts, and its text, without it and without a stop token."""
        tokens, text = turn.completion.tokens, self._text(turn.completion)
        found = [at for at in (text.find(one) for one in stops) if at >= 0]
        if not found:
            return turn, text
        end = min(found)
        size = next(n for n in range(1, len(tokens) + 1) if self._has(tokens[:n], stops, end))
        return cut(turn, size, "stop"), text[:end]

    def _has(self, tokens: IntArray, stops: tuple[str, ...], at: int) -> bool:
        text = self._tokenizer.decode(tokens)
        return any(text.startswith(one, at) for one in stops)

    def _text(self, completion: Completion) -> str:
        """Special tokens spelt out, the stop token left out."""
        tokens = completion.tokens
        ends = completion.finish == "stop" and len(tokens) and int(tokens[-1]) in self._stops
        return self._tokenizer.decode(tokens[:-1] if ends else tokens)

    @property
    def _stops(self) -> tuple[int, ...]:
        given = self._params.stop_token_ids
        return self._tokenizer.stop_token_ids if given is None else given

    # Contexts

    def _context(
        self, messages: Sequence[Message], tools: Tools | None, variables: Mapping[str, Any] | None
    ) -> tuple[str, str, IntArray]:
        """The text, what of it opens the answer, and ids, which begin with a recorded turn's where the text does."""
        if not isinstance(messages[0].get("content"), str | None):  # ids
            context = np.array(messages[0]["content"], np.int64)
            return self._tokenizer.decode(context), "", context
        body, opening = self._tokenizer.conversation(self._as_sampled(messages), tools, variables)
        text = body + opening
        known = [(len(start), r) for r in list(self._recorded) for start in r.texts if text.startswith(start)]
        if not known:
            return text, opening, self._tokenizer.encode_conversation(text, messages)
        size, recorded = max(known, key=lambda pair: pair[0])
        more = np.array(self._tokenizer.encode(text[size:]), np.int64)
        return text, opening, np.concatenate([recorded.ids, more])

    def _as_sampled(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, with earlier answers as the model wrote them in place of what was read from them."""
        keys = [_key(message) for message in messages]

        def one(i: int) -> Message:
            known = self._answers.get(keys[i], []) if messages[i]["role"] == "assistant" else []
            if not known:
                return messages[i]
            same = [recorded for recorded in known if recorded.before == tuple(keys[:i])]
            return {"role": "assistant", "content": (same or known)[-1].raw}

        return [one(i) for i in range(len(messages))]

    def _record(
        self, turn: Turn, messages: Sequence[Message], answer: Message, context: str, opening: str, written: str
    ) -> None:
        sampled = self._tokenizer.decode(turn.completion.tokens)
        end = sampled[len(written) :] if sampled.startswith(written) else ""
        texts = dict.fromkeys((context + sampled, context + written.strip() + end))
        before, key = tuple(_key(message) for message in messages), _key(answer)
        recorded = _Recorded(turn, messages, before, key, opening + written, tuple(texts))
        self._recorded.append(recorded)
        self._answers.setdefault(key, []).append(recorded)
        if self._keep is not None and len(self._recorded) > self._keep:
            self._forget(self._recorded.pop(0))

    def _forget(self, oldest: _Recorded) -> None:
        same = self._answers[oldest.key]
        del same[0]
        if not same:
            del self._answers[oldest.key]

    # The record

    @property
    def turns(self) -> list[Turn]:
        """In the order in which they ended."""
        return [recorded.turn for recorded in self._recorded]

    @property
    def tool_s(self) -> float:
        """Seconds so far in which no request was with the engines."""
        return self._clock.tool_s

    @property
    def stats(self) -> EpisodeStats:
        num_turns, tool_s = len(self._recorded), self._clock.tool_s
        counted = num_turns, self._num_tool_calls, self._num_malformed
        return EpisodeStats(*counted, round(self._clock.engine_s, 4), round(tool_s, 4))

    async def close(self) -> None:
        """Take no more requests, and wait for those that are with the engines; their answers are dropped."""
        self._closed = True
        while self._pending:
            await asyncio.wait(self._pending)

    @property
    def last_messages(self) -> Sequence[Message]:
        """The conversation that the last turn answers."""
        return self._recorded[-1].messages if self._recorded else ()

    def answer(self) -> Trajectory:
        """The last turn alone."""
        turns = self.turns[-1:]
        finish: FinishReason = turns[0].completion.finish if turns else "stop"
        return Trajectory(self.uid, self.draw, self.sample, finish, branches_of(turns) or (NOTHING,))

    def trajectory(self, finish: FinishReason | None = None) -> Trajectory:
        """What was recorded; `finish` is that of the last turn where it is None."""
        return replace(
            self.answer(),
            branches=branches_of(self.turns) or (NOTHING,),
            finish=finish or self.answer().finish,
            episode=self.stats,
        )


def _named(calls: tuple[ToolCall, ...], context: IntArray) -> tuple[ToolCall, ...]:
    """With ids that are others in each turn of a conversation, and the same when the run is repeated."""
    if not calls:
        return calls
    digest = hashlib.blake2b(context.tobytes(), digest_size=8).hexdigest()
    return tuple(replace(call, id=f"call_{digest}_{number}") for number, call in enumerate(calls))


def _key(message: Message) -> str:
    """By which a message is known again: what it says, without reasoning and the ids of calls."""
    calls = [
        (call["function"]["name"], _arguments(call["function"].get("arguments")))
        for call in message.get("tool_calls") or ()
    ]
    return json.dumps([message["role"], message.get("content") or "", calls], sort_keys=True, default=str)


def _arguments(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
