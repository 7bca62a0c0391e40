"""Samplers that say what a test wants, or nothing until it says so; and an endpoint on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np

from pekoe.agents.endpoint import Bounds, Endpoint
from pekoe.core.types import Completion, Record, Request, SamplingParams
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine.async_thread import AsyncThread
from pekoe.engine.base import Sampler
from pekoe.run.serve import KeyedSessions

KEY = "a-secret-key"


class ScriptedSampler(Sampler):
    """Answers with these texts, one after another, the last for ever."""

    def __init__(self, tokenizer: Tokenizer, *texts: str) -> None:
        self._tokenizer, self._texts = tokenizer, list(texts)
        self.asked: list[Request] = []

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Future[Completion]:
        self.asked.append(request)
        text = self._texts.pop(0) if len(self._texts) > 1 else self._texts[0]
        tokens = np.array([*self._tokenizer.encode(text), self._tokenizer.eos_token_id])
        finish, most = "stop", request.params.max_new_tokens
        if len(tokens) > most:
            tokens, finish = tokens[:most], "length"
        record = Record.of(request.tokens, tokens, np.linspace(-1, -0.5, len(tokens), dtype=np.float32))
        future: Future[Completion] = Future()
        future.set_result(Completion(len(tokens), finish, ((3, 0),), record))  # type: ignore[arg-type]
        return future


class HeldSampler(Sampler):
    """Answers nothing until the test ends its futures."""

    def __init__(self) -> None:
        self.held: list[Future[Completion]] = []

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        futures: list[Future[Completion]] = [Future() for _ in requests]
        self.held += futures
        return futures


class Serving:
    """An endpoint that listens, with what it knows."""

    def __init__(self, endpoint: Endpoint, sessions: KeyedSessions, lines: list[str]) -> None:
        self.endpoint, self.sessions, self.lines = endpoint, sessions, lines

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.endpoint.port}"

    @property
    def url(self) -> str:
        return f"{self.host}/v1"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {KEY}"}


@contextmanager
def serving(sampler: Sampler, tokenizer: Tokenizer, longest: int | None = None, **bounds: Any) -> Iterator[Serving]:
    """An endpoint of sessions by key, on any sampler."""
    lines: list[str] = []
    sessions = KeyedSessions(sampler, tokenizer, SamplingParams(max_new_tokens=24), KEY, longest)
    endpoint, thread = Endpoint(tokenizer, sessions, "tiny", Bounds(**bounds), lines.append), AsyncThread("endpoint")
    try:
        endpoint.start(thread)
        yield Serving(endpoint, sessions, lines)
    finally:
        endpoint.stop(thread)
        thread.stop()


class SlowSampler(Sampler):
    """Tells of a text piece by piece, when the test says so; the answer may be another in the end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.asked: list[tuple[Request, Future[Completion]]] = []

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        new: list[tuple[Request, Future[Completion]]] = [(request, Future()) for request in requests]
        self.asked += new
        return [future for _, future in new]

    def tell(self, number: int, text: str, start: int = 0) -> None:
        """The tokens of this text, whose first is the answer's token `start`."""
        listener = self.asked[number][0].listener
        assert listener is not None
        listener(start, np.array(self._tokenizer.encode(text), np.int64))

    def end(self, number: int, text: str) -> None:
        """Of which the whole answer is this text."""
        request, future = self.asked[number]
        future.set_result(ScriptedSampler(self._tokenizer, text).submit([request])[0].result())
