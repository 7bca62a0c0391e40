"""What differs between SGLang's and vLLM's HTTP APIs: a client sends requests to one server and keeps no state of them.

It raises TransportError if no response came (the request may be sent again), and RunError for an error response or
one that it cannot read.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

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
    """No response: the connection was refused, reset, closed early, or not made in time."""


class SilenceError(RunError):
    """Connected, but no response within the limit."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server is launched, or what an attached server must have been launched with."""

    model: Path
    config: ServerSection
    spec: ModelSpec
    max_sequence_tokens: int
    kv_tokens: int | None  # capacity of the KV cache; None: the server chooses
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
    """A client of the server at `url`, used from one event loop."""

    sample_path: ClassVar[str]
    resume_path: ClassVar[str]
    offload_path: ClassVar[str]
    onload_path: ClassVar[str]
    empty_body: ClassVar[dict[str, Any] | None] = None  # of calls without arguments

    def __init__(self, options: ServerOptions, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.options, self.url = options, url
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S)
        self._http = httpx.AsyncClient(limits=limits, trust_env=False, transport=transport)

    # Starting

    @abstractmethod
    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """The command line of a server on 127.0.0.1:port, `config.args` at its end, and additional environment
        variables."""

    async def ready(self) -> bool:
        """Whether its health check passes. A paused server may fail it (SGLang's does)."""
        try:
            answer = await self._http.get(self.url + "/health", timeout=_HEALTH_LIMIT_S)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def reachable(self) -> bool:
        """Whether the server responds, paused or not."""
        try:
            async with asyncio.timeout(_HEALTH_LIMIT_S):
                await self.version()
        except (TransportError, TimeoutError):
            return False
        except RunError:  # a response, if a wrong one
            pass
        return True

    async def check_attached(self) -> None:  # noqa: B027
        """UserError for an attached server whose responses would be misread."""

    # Sampling

    @staticmethod
    @abstractmethod
    def check_params(params: SamplingParams) -> None:
        """UserError for parameters that this kind of server does not support."""

    async def prefill(self, request: Request) -> int:
        """Compute the prompt's KV before its samples are requested, if the server does not share it by itself.
        Returns the number of tokens computed."""
        return 0

    async def sample(self, request: Request, rid: str) -> Answer:
        """One response under the request id `rid`, with a seed of its own from `sampling.sequence_key`."""
        content = await self.post(self.sample_path, self.body(request, rid), self.options.config.request_limit_s)
        try:
            answer = self.parse(content)
            if answer.finish not in ("stop", "length", "abort"):
                raise ValueError(f"finish reason {answer.finish!r}")
        except (LookupError, TypeError, ValueError) as error:
            why, shown = f"{type(error).__name__}: {error}", json.dumps(content)[:500]
            raise RunError(
                f"{self.url}{self.sample_path}: expected one response of numbered weights, got {shown} ({why})"
            ) from None
        return answer

    @staticmethod
    @abstractmethod
    def body(request: Request, rid: str) -> dict[str, Any]:
        """The JSON of a request."""

    @staticmethod
    @abstractmethod
    def parse(content: Any) -> Answer:
        """Read the response to one request. LookupError, TypeError or ValueError for anything unexpected."""

    @abstractmethod
    async def abort(self, rids: Sequence[str]) -> None:
        """End these requests; their responses have finish "abort". Unknown ids are ignored."""

    # Weights

    @abstractmethod
    async def pause(self, mode: Literal["abort", "keep"]) -> None:
        """Stop sampling. keep: requests in flight continue after `resume`, with KV that is recomputed or still valid.
        A paused server may be paused again."""

    async def resume(self) -> None:
        await self.post(self.resume_path, self.empty_body)

    @abstractmethod
    async def flush(self) -> None:
        """Drop all cached KV; the server is paused or idle. RunError if it does not."""

    @abstractmethod
    async def version(self) -> str:
        """The server's own tag of its weights."""

    @abstractmethod
    async def set_version(self, version: int) -> None:
        """Tag the weights that the server holds."""

    @abstractmethod
    async def load(self, directory: Path, version: int) -> None:
        """Load a Hugging Face directory and tag it `version`."""

    async def num_workers(self) -> int:
        """Processes of this server that join a broadcast group."""
        return 1

    @abstractmethod
    async def join_group(self, group: BroadcastGroup) -> None:
        """Its workers join as ranks `group.first_rank` and up; returns when all ranks have joined."""

    @abstractmethod
    async def leave_group(self, group: BroadcastGroup) -> None: ...

    @abstractmethod
    async def receive(self, group: BroadcastGroup, parts: Iterable[Tensors], version: int) -> None:
        """Receive these tensors from rank 0 of `group`, one by one, and tag them `version`. Names, dtypes and shapes go
        to the server by HTTP, a part at a time; values by broadcast. Ends an update that broke off earlier."""

    async def checksums(self) -> Checksums | None:
        """See `Engine.checksums`."""
        return None

    async def offload(self) -> None:
        """Free the memory of weights and KV. Nothing is in flight. A no-op on CPU."""
        await self.post(self.offload_path, self.empty_body)

    async def onload(self) -> None:
        """Allocate that memory again. The weights are undefined until the next update."""
        await self.post(self.onload_path, self.empty_body)

    # HTTP

    async def get(self, path: str, limit_s: float | None = None) -> Any:
        return await self._request("GET", path, None, limit_s)

    async def post(self, path: str, body: Any = None, limit_s: float | None = None) -> Any:
        """The response's JSON (None without a body; text if it is not JSON).

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
        """content[name]; RunError if it is missing or of another type, as from another program at this address."""
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise RunError(f"{self.url}: expected an answer with {name!r}, got {json.dumps(content)[:300]}")
        return cast("dict[str, Any]", content)[name]


def group_fields(group: BroadcastGroup) -> dict[str, Any]:
    """A group's fields by the names that both servers use."""
    return {
        "master_address": group.host,
        "master_port": group.port,
        "rank_offset": group.first_rank,
        "world_size": group.world_size,
        "group_name": group.name,
        "backend": group.backend,
    }


def tensor_fields(tensors: Tensors, dtypes: str) -> dict[str, Any]:
    """Names, dtypes (under the key `dtypes`) and shapes of tensors, which a server needs before the values."""
    return {
        "names": [name for name, _ in tensors],
        dtypes: [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }


def _message(content: Any) -> str:
    """The innermost message of an error response."""
    while isinstance(content, dict):
        inner = next((content[key] for key in ("error", "message", "detail") if content.get(key)), None)
        if inner is None:
            break
        content = inner
    return str(content)[:2000]
