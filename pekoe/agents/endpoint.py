"""An HTTP endpoint in OpenAI's form whose answers sessions record: programs that exist talk with the model through it.

It runs in the event loop of its sessions. A key is a session's. Nothing is queued without bound: what is more than
`Bounds.at_once` answers is refused with a 429, which clients send again after a pause. An answer whose client goes away
is not sampled to its end.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from pekoe.agents.answers import Delta
from pekoe.agents.anthropic_messages import MESSAGES
from pekoe.agents.openai_chat import OpenAIChat, openai_error
from pekoe.agents.openai_responses import RESPONSES
from pekoe.agents.session import EpisodeLimit, EpisodeOver, Reply, Session
from pekoe.agents.tools import family_of
from pekoe.agents.wire import Api, Asked, Event, Fields, Refused, parse_object
from pekoe.core.errors import RunError, UserError
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine.async_thread import AsyncThread

_STOP_LIMIT_S = 5
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What clients may ask of an endpoint."""

    at_once: int = 1024  # answers that are sampled
    body_bytes: int = 4 << 20
    read_s: float = 60.0  # for a request's body, and for what a client takes of an answer before it takes more
    connections: int = 4096


class _Gone(Exception):
    """The client has closed its connection."""


class Endpoint:
    """The application (ASGI), and the server that runs it.

    Args:
        tokenizer: of the model, for log-probs token by token.
        session_of: the session of a key; None: there is none. Called in the loop of the sessions.
        model: its name in /v1/models; requests may name any.
        report: called with a line for what fails on our side.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        session_of: Callable[[str], Session | None],
        model: str,
        bounds: Bounds | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.num_sampling = 0  # answers, now
        self._session_of, self._model, self._bounds, self._report = session_of, model, bounds or Bounds(), report
        self._calls_tools = family_of(tokenizer) is not None
        openai = OpenAIChat(tokenizer)
        routes = [
            Route("/v1/chat/completions", self._answering(openai.chat), methods=["POST"]),
            Route("/v1/completions", self._answering(openai.completions), methods=["POST"]),
            Route("/v1/responses", self._answering(RESPONSES), methods=["POST"]),
            Route("/v1/messages", self._answering(MESSAGES), methods=["POST"]),
            Route("/v1/v1/messages", self._answering(MESSAGES), methods=["POST"]),  # Anthropic's clients add /v1
            Route("/v1/models", self._models),
            Route("/v1/session", self._record),
            Route("/health", self._health),
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None
        self.port = 0

    # The server

    def start(self, thread: AsyncThread, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; requests are served in the thread's loop. UserError where the port is taken."""
        self.listen(host, port)

        async def serve() -> None:
            self.serve()

        thread.run(serve())

    def listen(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Let clients connect; `serve` answers them. UserError where the port is taken."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=2048)
        except (OSError, OverflowError) as error:
            raise UserError(f"endpoint: expected a free port of this machine, got {host}:{port}: {error}") from None
        self.port = int(self._socket.getsockname()[1])
        config = uvicorn.Config(
            self._bounded,
            interface="asgi3",
            proxy_headers=False,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            limit_concurrency=self._bounds.connections,
            timeout_graceful_shutdown=_STOP_LIMIT_S,
        )
        self._server = uvicorn.Server(config)

    def serve(self) -> None:
        """Serve in the event loop that runs."""
        assert self._server is not None
        assert self._socket is not None
        self._serving = asyncio.ensure_future(self._server.serve([self._socket]))

    def stop(self, thread: AsyncThread) -> None:
        """Take no more requests, and cancel those that are answered."""

        async def stop() -> None:
            if self._server is not None and self._serving is not None:
                self._server.should_exit = self._server.force_exit = True
                await asyncio.wait([self._serving], timeout=_STOP_LIMIT_S)

        with suppress(RunError):  # the thread has ended, and the server with it
            thread.run(stop())
        if self._socket is not None:
            self._socket.close()

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application; a client that does not read what it is sent is left."""

        async def sending(message: Message) -> None:
            async with asyncio.timeout(self._bounds.read_s):
                await send(message)

        with suppress(TimeoutError, _Gone):
            await self.app(scope, receive, sending)

    # Requests

    def _answering(self, api: Api) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def answer(request: Request) -> Response:
            try:
                return await self._answer(api, request)
            except (ClientDisconnect, _Gone):
                return Response(status_code=499)
            except Exception as error:
                failure = self._failure(error)
                body = api.error(failure.status, str(failure), failure.code)
                return _json(body, failure.status, _later(failure.status))

        return answer

    def _failure(self, error: Exception) -> Refused:
        """As a client is told of it; what fails on our side is reported."""
        match error:
            case Refused():
                return error
            case UserError():
                return Refused(400, str(error))
            case EpisodeLimit():
                return Refused(400, str(error), "context_length_exceeded")
            case EpisodeOver():
                return Refused(403, str(error), "episode_over")
            case RunError():
                self._report(f"endpoint: {error}")
                return Refused(503, f"the engines failed: {error}")
            case _:
                self._report(f"endpoint: {error!r}")
                return Refused(500, f"the endpoint failed: {type(error).__name__}")

    async def _answer(self, api: Api, request: Request) -> Response:
        session = self._session(request)
        asked = api.read(Fields(parse_object(await self._body(request))))
        asked = replace(asked, model=asked.model or self._model)
        if asked.tools and not self._calls_tools:
            why = "the model's chat template shows it none, or has it call them in a form that is not known here"
            raise UserError(f"tools: expected none, got {len(asked.tools)}: {why}")
        headers = {"x-pekoe-ignored": ", ".join(asked.ignored)[:1000]} if asked.ignored else {}
        headers = {name: value.encode("ascii", "replace").decode() for name, value in headers.items()}
        if not asked.stream:
            replies = await _unless_gone(request.receive, self._sampled(session, asked))
            return _json(api.answer(asked, replies), headers=headers)
        deltas = _Deltas()
        work = asyncio.ensure_future(self._sampled(session, asked, deltas.put))
        work.add_done_callback(deltas.wake)
        try:
            await _unless_gone(request.receive, deltas.begun(work))  # what fails before has a status
        except BaseException:
            await _drop(work)
            raise
        return _EventResponse(self._events(api, asked, work, deltas), work, headers)

    async def _events(
        self, api: Api, asked: Asked, work: asyncio.Future[list[Reply]], deltas: _Deltas
    ) -> AsyncGenerator[str]:
        """Of answers that are sampled."""
        stream = api.stream(asked)
        try:
            async for index, delta in deltas.until(work):
                for event in stream.more(index, delta):
                    yield _event(event)
            for event in stream.end(work.result()):
                yield _event(event)
        except Exception as error:
            failure = self._failure(error)
            yield _event((api.error_event, api.error(failure.status, str(failure), failure.code)))
        else:
            if api.end:
                yield f"data: {api.end}\n\n"

    async def _sampled(
        self, session: Session, asked: Asked, on_delta: Callable[[int, Delta], None] | None = None
    ) -> list[Reply]:
        """The answers of all conversations, those of one together."""
        most = self._bounds.at_once
        if asked.num_answers > most:
            raise Refused(400, f"n: expected at most {most} answers at once, got {asked.num_answers}")
        if self.num_sampling + asked.num_answers > most:
            why = f"expected at most {most} answers at once, and {self.num_sampling} are sampled; ask again later"
            raise Refused(429, why, "rate_limit_exceeded")
        self.num_sampling += asked.num_answers
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        session.complete(
                            conversation,
                            tools=asked.tools,
                            variables=asked.variables,
                            max_tokens=asked.max_tokens,
                            stop=asked.stop,
                            temperature=asked.temperature,
                            top_p=asked.top_p,
                            seed=asked.seed,
                            number=number,
                            on_delta=None if on_delta is None else partial(on_delta, first + number),
                        )
                    )
                    for first, conversation in zip(count(0, asked.n), asked.conversations, strict=False)
                    for number in range(asked.n)
                ]
        except BaseExceptionGroup as errors:
            error = _first(errors)
            session.refused = error if isinstance(error, EpisodeLimit) else session.refused
            raise error from None
        finally:
            self.num_sampling -= asked.num_answers
        return [task.result() for task in tasks]

    def _session(self, request: Request) -> Session:
        """By the key, as OpenAI's clients send it or as Anthropic's do."""
        bearer = request.headers.get("authorization", "")
        key = request.headers.get("x-api-key") or bearer.removeprefix("Bearer ").strip()
        session = self._session_of(key) if key else None
        if session is None:
            got = "a wrong one" if key else "none"
            raise Refused(401, f"key: expected the endpoint's, got {got}", "invalid_api_key")
        return session

    async def _body(self, request: Request) -> bytes:
        most, size, chunks = self._bounds.body_bytes, 0, list[bytes]()
        try:
            async with asyncio.timeout(self._bounds.read_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= most:
                        chunks.append(chunk)
                    elif size > 8 * most:  # a client that is only somewhat wrong sends all, and reads the answer
                        break
        except TimeoutError:
            raise Refused(408, f"body: expected it within {self._bounds.read_s:g} s, got {size:,} bytes") from None
        if size > most:
            raise Refused(413, f"body: expected at most {most:,} bytes, got more", "request_too_large")
        return b"".join(chunks)

    async def _models(self, request: Request) -> Response:
        entry = {"id": self._model, "object": "model", "created": 0, "owned_by": "pekoe"}
        return self._private(request, lambda _: {"object": "list", "data": [entry]})

    async def _record(self, request: Request) -> Response:
        return self._private(request, _record_of)

    async def _health(self, request: Request) -> Response:
        return _json({"sampling": self.num_sampling})

    def _private(self, request: Request, body: Callable[[Session], Mapping[str, Any]]) -> Response:
        try:
            return _json(body(self._session(request)))
        except Refused as error:
            return _json(openai_error(error.status, str(error), error.code), error.status)


def _record_of(session: Session) -> Mapping[str, Any]:
    """The sequences that the session's turns make, as they are trained on."""
    records = [(branch, branch.handle.resolve()) for branch in session.trajectory().branches if branch.num_tokens]
    return {
        "turns": len(session.turns),
        "branches": [
            {
                "tokens": record.tokens.tolist(),
                "loss_mask": record.loss_mask.tolist(),
                "logprobs": record.logprobs.tolist(),
                "versions": branch.versions,
            }
            for branch, record in records
        ],
    }


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns; it is cancelled, and _Gone raised, where the client goes away before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Gone
        return task.result()
    finally:
        await _drop(task, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drop(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what is not done, and wait for it."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # nobody else asks for it


class _Deltas:
    """What is new of answers that are sampled, until it is sent: a slow client gets more at once."""

    def __init__(self) -> None:
        self._new: dict[int, Delta] = {}
        self._any = asyncio.Event()

    def put(self, index: int, delta: Delta) -> None:
        self._new[index] = self._new.get(index, Delta()) + delta
        self._any.set()

    def wake(self, _: Any) -> None:
        self._any.set()

    async def begun(self, work: asyncio.Future[Any]) -> None:
        """Until there is something to send. Raises what the work raises, where that comes first."""
        await self._any.wait()
        if work.done():
            work.result()

    async def until(self, work: asyncio.Future[Any]) -> AsyncIterator[tuple[int, Delta]]:
        """What is new of answer `index`, until the work is done."""
        while not work.done():
            self._any.clear()
            new, self._new = self._new, {}
            for index, delta in new.items():
                yield index, delta
            if not work.done():
                await self._any.wait()


class _EventResponse(Response):
    """Server-sent events as they come; the work that they tell of is dropped when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str], work: asyncio.Future[Any], headers: Mapping[str, str]) -> None:
        super().__init__(None, 200, headers)
        del self.headers["content-length"]
        self._events, self._work = events, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send(send))
        finally:
            await _drop(self._work)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(event: Event) -> str:
    name, data = event
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    one = errors.exceptions[0]
    return _first(one) if isinstance(one, BaseExceptionGroup) else one


def _json(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        json.dumps(body), status, headers, "application/json"
    )  # ASCII: half a surrogate pair is none of ours


def _later(status: int) -> Mapping[str, str]:
    return {"retry-after": "1"} if status in (429, 503) else {}


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    routes = ", ".join(route.path for route in request.app.routes)
    why = f"{request.method} {request.url.path}: expected a route among {routes}, with its own method"
    return _json(openai_error(error.status_code, why, None), error.status_code)
