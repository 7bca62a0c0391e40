"""An HTTP endpoint in OpenAI's form whose answers sessions record: programs that exist talk with the model through it.

It runs in the event loop of its sessions. A key is a session's. Nothing is queued without bound: what is more than
`Bounds.at_once` answers is refused with a 429, which clients send again after a pause. An answer whose client goes away
is not sampled to its end.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

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
            except Refused as error:
                return _json(api.error(error.status, str(error), error.code), error.status, _later(error.status))
            except UserError as error:
                return _json(api.error(400, str(error), None), 400)
            except EpisodeLimit as error:
                return _json(api.error(400, str(error), "context_length_exceeded"), 400)
            except EpisodeOver as error:
                return _json(api.error(403, str(error), "episode_over"), 403)
            except RunError as error:
                self._report(f"endpoint: {error}")
                return _json(api.error(503, f"the engines failed: {error}", None), 503, _later(503))
            except (ClientDisconnect, _Gone):
                return Response(status_code=499)
            except Exception as error:
                self._report(f"endpoint: {error!r}")
                return _json(api.error(500, f"the endpoint failed: {type(error).__name__}", None), 500)

        return answer

    async def _answer(self, api: Api, request: Request) -> Response:
        session = self._session(request)
        asked = api.read(Fields(parse_object(await self._body(request))))
        asked = replace(asked, model=asked.model or self._model)
        if asked.tools and not self._calls_tools:
            why = "the model's chat template shows it none, or has it call them in a form that is not known here"
            raise UserError(f"tools: expected none, got {len(asked.tools)}: {why}")
        replies = await _unless_gone(request, self._sampled(session, asked))
        headers = {"x-pekoe-ignored": ", ".join(asked.ignored)[:1000]} if asked.ignored else {}
        headers = {name: value.encode("ascii", "replace").decode() for name, value in headers.items()}
        if not asked.stream:
            return _json(api.answer(asked, replies), headers=headers)
        return StreamingResponse(_events(api, asked, replies), media_type="text/event-stream", headers=headers)

    async def _sampled(self, session: Session, asked: Asked) -> list[Reply]:
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
                        )
                    )
                    for conversation in asked.conversations
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


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns; it is cancelled, and _Gone raised, where the client goes away before."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Gone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait({task, gone})
        if not task.cancelled():
            task.exception()  # nobody else asks for it


async def _events(api: Api, asked: Asked, replies: list[Reply]) -> AsyncIterator[str]:
    for name, data in api.events(asked, replies):
        yield _event((name, data))
    if api.end:
        yield f"data: {api.end}\n\n"


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
