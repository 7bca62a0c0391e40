"""One `generate` on several servers: who samples what, what is sent again, and when to wait.

Lives in the engine's event loop; only `take` is for the thread that consumes. A prompt's samples (a unit) go together
to the least loaded server that has room for all of them, so that it computes the prompt once. A response holds its
place at the server until it is consumed: whoever stops consuming stops the sending (back-pressure).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import queue
import uuid
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from pekoe.core.errors import RunError
from pekoe.core.types import Payload, Prompt, Rollout, SamplingParams
from pekoe.engine.servers.client import Answer, Backend, Server, SilenceError, TransportError

_BACKOFF_S = 0.2
_ABORT_AGAIN_S = 0.2
_CLOSE_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Taken:
    """A finished response. `server` gets its place back by `Batch.release`; None: none was held."""

    rollout: Rollout
    num_cached_tokens: int
    server: Server | None


@dataclass(eq=False, slots=True)
class _Flight:
    prompt: Prompt
    index: int
    server: Server
    prefill: asyncio.Task[None] | None
    version: int | None
    rid: str = ""
    answered: bool = False  # the answer is finished; its place at the server is held until it is consumed
    failed: bool = False


class Batch:
    """The work of one `generate`.

    Args:
        lose: called with a server, what was seen, and whether it is dead or else holds weights that are not ours.
        blocked: true while nothing may be sent (paused, weights on their way, a server about to come back).
        nobody: the message for when no server is left.
    """

    def __init__(
        self,
        backend: Backend,
        servers: list[Server],
        prompts: list[Prompt],
        params: SamplingParams,
        lose: Callable[[Server, str, bool], None],
        blocked: Callable[[], bool],
        nobody: Callable[[], str],
    ) -> None:
        self._backend, self._servers, self._params = backend, servers, params
        self._config = backend.setup.config
        self._lose, self._blocked, self._nobody = lose, blocked, nobody
        step = self._config.max_requests
        self._pending = deque(
            (prompt, tuple(range(i, min(i + step, params.n)))) for prompt in prompts for i in range(0, params.n, step)
        )
        self._flights: dict[asyncio.Task[None], _Flight] = {}
        self._helpers: set[asyncio.Task[Any]] = set()
        self._aborted: set[str] = set()
        self._finished: queue.SimpleQueue[Taken | BaseException] = queue.SimpleQueue()
        self._wake = asyncio.Event()
        self._closing = False
        self.num_prefilled_tokens = 0  # for whole groups, not for single responses
        self._name, self._count = uuid.uuid4().hex[:12], itertools.count()

    def start(self) -> None:
        self._spawn(self._dispatch())

    def take(self, limit_s: float) -> Taken | BaseException | None:
        """The next response, or what went wrong; None after `limit_s`. For another thread."""
        try:
            return self._finished.get(timeout=limit_s)
        except queue.Empty:
            return None

    def release(self, taken: Taken) -> None:
        """It was consumed: another may be sent."""
        if taken.server is not None:
            taken.server.held -= 1
        self._wake.set()

    def wake(self) -> None:
        """Look again: a server serves, or the engine is no longer blocked."""
        self._wake.set()

    def fail(self, error: BaseException) -> None:
        self._finished.put(error)

    def leave(self, server: Server) -> None:
        """This server no longer serves: what it was asked for goes elsewhere."""
        for task, flight in list(self._flights.items()):
            if flight.server is server and task is not asyncio.current_task():
                task.cancel()
        self._wake.set()

    async def abort(self, uids: set[str] | None) -> None:
        """End these problems' responses (None: all). What was not sent yet ends with no tokens."""
        wanted = {prompt.uid for prompt, _ in self._pending} | {f.prompt.uid for f in self._flights.values()}
        self._aborted |= wanted if uids is None else uids & wanted
        dropped = [unit for unit in self._pending if unit[0].uid in self._aborted]
        self._pending = deque(unit for unit in self._pending if unit[0].uid not in self._aborted)
        for prompt, indices in dropped:
            for index in indices:
                self._finished.put(Taken(self._rollout(prompt, index, Answer([], [], "abort", []), None), 0, None))
        self._wake.set()
        await self._abort_flights()
        self._spawn(self._abort_again())

    async def close(self) -> None:
        """End everything; afterwards no request of this batch is at any server that can be reached."""
        self._closing = True
        self._pending.clear()
        self._aborted |= {flight.prompt.uid for flight in self._flights.values()}
        try:
            async with asyncio.timeout(_CLOSE_LIMIT_S):
                await self._abort_flights()
                while self._flights:
                    await asyncio.wait(list(self._flights), timeout=_ABORT_AGAIN_S)
                    await self._abort_flights()
        except TimeoutError:
            pass  # a closed connection ends the rest
        tasks = [*self._flights, *self._helpers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers:
            server.held = 0

    # Sending

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)
        return task

    async def _dispatch(self) -> None:
        try:
            while self._pending or self._flights:
                while self._pending and (server := self._pick(len(self._pending[0][1]))) is not None:
                    prompt, indices = self._pending.popleft()
                    self._send(prompt, indices, server)
                serving = any(s.state == "serving" for s in self._servers)
                if self._pending and not serving and not self._blocked():
                    raise RunError(self._nobody())
                await self._wake.wait()
                self._wake.clear()
        except Exception as error:
            self.fail(error)

    def _pick(self, number: int) -> Server | None:
        """The least loaded server with room for `number` responses."""
        if self._blocked():
            return None
        room = [s for s in self._servers if s.state == "serving" and s.held + number <= self._config.max_requests]
        return min(room, key=lambda server: server.held, default=None)

    def _send(self, prompt: Prompt, indices: tuple[int, ...], server: Server) -> None:
        prefill = self._spawn(self._prefill(server, prompt)) if len(indices) > 1 else None
        for index in indices:
            flight = _Flight(prompt, index, server, prefill, server.version)
            server.held += 1
            task = asyncio.get_running_loop().create_task(self._fly(flight))
            self._flights[task] = flight
            task.add_done_callback(self._landed)

    async def _prefill(self, server: Server, prompt: Prompt) -> None:
        with contextlib.suppress(TransportError, RunError):  # the samples themselves will tell
            num_tokens = await self._backend.prefill(server, prompt)
            self.num_prefilled_tokens += num_tokens  # not in one line: the sum of before the wait would be written

    async def _fly(self, flight: _Flight) -> None:
        try:
            answer = await self._answer(flight)
            if answer is not None:
                rollout = self._rollout(flight.prompt, flight.index, answer, flight)
                self._finished.put(Taken(rollout, answer.num_cached_tokens, flight.server))
                flight.answered = True
        except Exception as error:
            flight.failed = True
            self.fail(error)

    def _landed(self, task: asyncio.Task[None]) -> None:
        """Whatever became of it: also where it was cancelled before it began, which no `finally` of its own sees."""
        flight = self._flights.pop(task)
        if not flight.answered:
            flight.server.held -= 1
            if not flight.failed and not self._closing:  # its server is lost
                self._again(flight.prompt, flight.index)
        self._wake.set()

    def _again(self, prompt: Prompt, index: int) -> None:
        """Have a sample sent again, together with others of its prompt that are."""
        if self._pending and self._pending[0][0] is prompt and len(self._pending[0][1]) < self._config.max_requests:
            self._pending[0] = (prompt, (*self._pending[0][1], index))
        else:
            self._pending.appendleft((prompt, (index,)))

    async def _answer(self, flight: _Flight) -> Answer | None:
        """What the server says; None when it proves dead, or sampled from other weights than it was given."""
        if flight.prefill is not None:
            await asyncio.wait([flight.prefill])
        server, why = flight.server, ""
        for attempt in range(self._config.retries + 1):
            if flight.prompt.uid in self._aborted:
                return Answer([], [], "abort", [])
            # A new one each time: the old may live on. Of one length: SGLang aborts whatever an id is a prefix of.
            flight.rid = f"pekoe-{self._name}-{next(self._count):012d}"
            flight.version = server.version
            try:
                answer = await self._backend.sample(server, flight.prompt, flight.index, self._params, flight.rid)
                return answer if self._is_current(flight, answer) else None
            except TransportError as error:
                why = f"{error} ({attempt + 1} attempts)"
            except SilenceError as error:
                if self._blocked() or await self._backend.ready(server) or self._blocked():  # paused: it may fail
                    raise
                why = f"{error}, and its health check fails"
                break
            await asyncio.sleep(_BACKOFF_S * 2**attempt)
            if server.process is not None and server.process.exit_code is not None:
                break
        self._lose(server, why, True)
        return None

    def _is_current(self, flight: _Flight, answer: Answer) -> bool:
        """Whether every token is of a version that the server had meanwhile; else it is lost. (A server that somebody
        restarted, or a router before several, answers from weights that no update brought.)"""
        server, told = flight.server, [version for version, _ in answer.versions]
        first, last = flight.version, server.version
        if first is None or last is None or all(first <= version <= last for version in told):
            return True
        self._lose(server, f"expected tokens of versions {first} to {last}, got {told}", False)
        return False

    async def _abort_flights(self) -> int:
        """Ask every server to end what was aborted; returns how many of these are still there."""
        rids: dict[Server, list[str]] = {}
        for flight in self._flights.values():
            if flight.prompt.uid in self._aborted and flight.rid:
                rids.setdefault(flight.server, []).append(flight.rid)
        calls = [self._backend.abort(server, each) for server, each in rids.items()]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, TransportError | RunError):
                raise outcome
        return sum(map(len, rids.values()))

    async def _abort_again(self) -> None:
        """A request on its way was not there yet when the abort was: ask until all have ended."""
        while any(flight.prompt.uid in self._aborted for flight in self._flights.values()):
            await asyncio.sleep(_ABORT_AGAIN_S)
            await self._abort_flights()

    def _rollout(self, prompt: Prompt, index: int, answer: Answer, flight: _Flight | None) -> Rollout:
        """Check an answer, and make it a rollout."""
        versions = answer.versions
        if answer.tokens and not versions:  # the server does not say: true if nothing changed meanwhile
            assert flight is not None
            if flight.version is None or flight.version != flight.server.version:
                raise RunError(f"{flight.server.url}: tells no versions, and its weights changed during a response")
            versions = [(flight.version, 0)]
        starts = [start for _, start in versions]
        size, params = len(answer.tokens), self._params
        vocab = self._backend.setup.spec.vocab_size
        good = [
            (len(answer.logprobs) == size, f"{size} log-probs, got {len(answer.logprobs)}"),
            (all(math.isfinite(x) and x <= 1e-3 for x in answer.logprobs), "log-probs that are finite and <= 0"),
            (all(0 <= token < vocab for token in answer.tokens), f"token ids in [0, {vocab})"),
            (size <= params.max_new_tokens, f"at most {params.max_new_tokens} tokens, got {size}"),
            (size > 0 or answer.reason == "abort", "at least one token"),
            (
                answer.reason != "stop" or (size > 0 and answer.tokens[-1] in params.stop_token_ids),
                f"a stop at one of {params.stop_token_ids}, got {answer.tokens[-1:]}",
            ),
            (answer.reason != "length" or size == params.max_new_tokens, f"{params.max_new_tokens} tokens, got {size}"),
            (
                not size or (starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < size),
                f"versions that cover {size} tokens, got {versions}",
            ),
        ]
        for holds, expected in good:
            if not holds:
                where = flight.server.url if flight is not None else "abort"
                raise RunError(f"{where}: prompt {prompt.uid}, sample {index}: expected {expected}")
        payload = Payload(prompt.tokens, np.array(answer.tokens, np.int64), np.array(answer.logprobs, np.float32))
        return Rollout(
            uid=prompt.uid,
            draw=prompt.draw,
            sample_index=index,
            num_prompt_tokens=len(prompt.tokens),
            num_tokens=size,
            finish_reason=answer.reason,
            versions=tuple(versions) if size else (),
            payload=payload,
        )
