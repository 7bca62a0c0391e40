"""What differs between SGLang's and vLLM's servers: one client speaks to one server.

A client translates and keeps no account. It raises TransportError where no answer came (the request may be sent
again), and RunError for an answer that refuses, or that it does not understand.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import httpx

from pekoe.config.engine import ServerSection
from pekoe.core.errors import RunError
from pekoe.core.spec import ModelSpec
from pekoe.core.types import FinishReason, Request, SamplingParams
from pekoe.engine.base import BroadcastGroup, Checksums
from pekoe.engine.buckets import Tensors

_CONNECT_LIMIT_S = 10.0
_HEALTH_LIMIT_S = 10.0
_KEEP_ALIVE_S = 2.0  # shorter than any server's (uvicorn: 5 s), so that no request meets a closing connection


class TransportError(Exception):
    """No answer came: refused, reset, closed half-way, or not connected in time."""


class SilenceError(RunError):
    """Connected, but no answer within the limit."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server is launched, or what an attached one must be."""

    model: Path
    config: ServerSection
    spec: ModelSpec
    max_sequence_tokens: int
    kv_tokens: int | None  # that the KV cache should hold; None: as many as the server likes
    max_running: int  # sequences that decode together
    dtype: str  # "float32" | "bfloat16"
    device: str  # "cpu" | "cuda"
    offloads: bool = False  # whether `offload` will be called


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's response to one request, before it is checked.

    Example: Answer([4, 5, 6], [-1.0, -2.0, -0.5], "length", [(1, 0), (2, 2)], 16): the third token is of version 2.
    """

    tokens: list[int]
    logprobs: list[float]  # of each token, at the sampling temperature (at 1 for greedy), before top-p and top-k
    finish: FinishReason
    versions: list[tuple[int, int]]  # (policy version, index of its first token)
    num_cached_tokens: int = 0  # of the prompt


ABORTED = Answer([], [], "abort", [])


class ServerClient(ABC):
    """Speaks to the server at `url`, from one event loop."""

    def __init__(self, options: ServerOptions, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.options, self.url = options, url
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S)
        self._http = httpx.AsyncClient(limits=limits, trust_env=False, transport=transport)

    # Starting

    @abstractmethod
    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """The command line of a server on 127.0.0.1:port (`config.args` at its end), and environment variables that
        it needs beside ours."""

    async def ready(self) -> bool:
        """Whether its health check passes; False where nobody answers. A paused server may fail it (SGLang's does)."""
        try:
            answer = await self._http.get(self.url + "/health", timeout=_HEALTH_LIMIT_S)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def reachable(self) -> bool:
        """Whether anyone answers there, paused or not."""
        with contextlib.suppress(RunError):  # an answer, though not the one that was asked for
            try:
                async with asyncio.timeout(_HEALTH_LIMIT_S):
                    await self.version()
            except (TransportError, TimeoutError):
                return False
        return True

    async def check_attached(self) -> None:  # noqa: B027
        """UserError for an attached server whose answers would be misread."""

    # Sampling

    @staticmethod
    @abstractmethod
    def check_params(params: SamplingParams) -> None:
        """UserError for what this kind of server cannot do."""

    async def prefill(self, request: Request) -> int:
        """Bring the prompt's KV into the prefix cache before its samples are asked for, where a server does not share
        it by itself. Returns how many tokens it computed for it."""
        return 0

    @abstractmethod
    async def sample(self, request: Request, rid: str) -> Answer:
        """One response under the request id `rid`, with a seed of its own from `sampling.sequence_key`."""

    @abstractmethod
    async def abort(self, rids: Sequence[str]) -> None:
        """End these requests; they are answered with finish "abort". Unknown ones are ignored."""

    # Weights

    @abstractmethod
    async def pause(self, mode: Literal["abort", "keep"]) -> None:
        """Stop sampling. keep: what is in flight goes on after `resume`, with KV that is recomputed or still valid.
        Pausing what is paused is no error."""

    @abstractmethod
    async def resume(self) -> None: ...

    @abstractmethod
    async def flush(self) -> None:
        """Forget all cached KV; the server is paused, or idle. RunError where it did not."""

    @abstractmethod
    async def version(self) -> str:
        """The tag that the server itself gives its weights."""

    @abstractmethod
    async def set_version(self, version: int) -> None:
        """Tag the weights that it holds."""

    @abstractmethod
    async def load(self, directory: Path, version: int) -> None:
        """Load a Hugging Face directory and tag it `version`."""

    async def num_workers(self) -> int:
        """Processes of this server that join a broadcast group."""
        return 1

    @abstractmethod
    async def join_group(self, group: BroadcastGroup) -> None:
        """Make its workers join, as ranks `group.first_rank` and up; returns when all ranks have joined."""

    @abstractmethod
    async def leave_group(self, group: BroadcastGroup) -> None: ...

    @abstractmethod
    async def receive(self, group: BroadcastGroup, parts: Iterable[Tensors], version: int) -> None:
        """Take these tensors from rank 0 of `group`, one by one, and tag them `version`. Their names, dtypes and shapes
        are sent to the server, a part at a time; their values come by broadcast. An update that broke off earlier does
        not stand in the way."""

    async def checksums(self) -> Checksums | None:
        """See `Engine.checksums`."""
        return None

    @abstractmethod
    async def offload(self) -> None:
        """Give back the memory of weights and KV. Nothing is in flight. A no-op on CPU."""

    @abstractmethod
    async def onload(self) -> None:
        """Take it again. The weights are undefined until the next update."""

    # HTTP

    async def get(self, path: str, limit_s: float | None = None) -> Any:
        return await self._request("GET", path, None, limit_s)

    async def post(self, path: str, body: Any = None, limit_s: float | None = None) -> Any:
        """The answer's JSON (None where it has no body; text where it is no JSON).

        Raises TransportError, SilenceError (after `limit_s`, by default config.update_limit_s), and RunError with the
        server's message for any status but 200.
        """
        return await self._request("POST", path, body, limit_s)

    async def close(self) -> None:
        await self._http.aclose()

    async def _request(self, method: str, path: str, body: Any, limit_s: float | None) -> Any:
        limit = limit_s or self.options.config.update_limit_s
        timeout = httpx.Timeout(limit, connect=_CONNECT_LIMIT_S)
        try:
            answer = await self._http.request(method, self.url + path, json=body, timeout=timeout)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise SilenceError(f"{self.url}{path}: expected an answer within {limit:g} s, got none") from None
        except httpx.HTTPError as error:
            raise TransportError(f"{self.url}{path}: {type(error).__name__}: {error}") from None
        try:
            content = answer.json() if answer.content else None
        except ValueError:
            content = answer.text
        if answer.status_code != 200:
            raise RunError(f"{self.url}{path}: expected status 200, got {answer.status_code}: {_message(content)}")
        return content

    def field(self, content: Any, name: str, kind: type) -> Any:
        """content[name]; RunError where the answer has no such thing, as when somebody else answers there."""
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise RunError(f"{self.url}: expected an answer with {name!r}, got {json.dumps(content)[:300]}")
        return cast("dict[str, Any]", content)[name]


def group_fields(group: BroadcastGroup) -> dict[str, Any]:
    """A group, as both servers name its fields."""
    return {
        "master_address": group.host,
        "master_port": group.port,
        "rank_offset": group.first_rank,
        "world_size": group.world_size,
        "group_name": group.name,
        "backend": group.backend,
    }


def tensor_fields(tensors: Tensors, dtypes: str) -> dict[str, Any]:
    """What a server must know of tensors before their values come; `dtypes` is its name for that field."""
    return {
        "names": [name for name, _ in tensors],
        dtypes: [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }


def _message(content: Any) -> str:
    """What a server says of an error, without its wrapping."""
    while isinstance(content, dict):
        inner = next((content[key] for key in ("error", "message", "detail") if content.get(key)), None)
        if inner is None:
            break
        content = inner
    return str(content)[:2000]
