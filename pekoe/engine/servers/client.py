"""What differs between SGLang's and vLLM's HTTP APIs: a client sends requests to one server and keeps no state of them.

It raises TransportError if no response came (the request may be sent again), BusyError for a response that asks for
another try, and RunError for an error response or one that it cannot read. Its time and size have limits, and every
value that is read from it is checked.
"""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import httpx
import numpy as np
from numpy.typing import NDArray

from pekoe.config.engine import ServerSection
from pekoe.config.secrets import without_secrets
from pekoe.core.errors import RunError, UserError
from pekoe.core.spec import FamilySpec, ModelSpec
from pekoe.core.types import FinishReason, Request, SamplingParams
from pekoe.engine.base import BroadcastGroup, Checksums
from pekoe.engine.buckets import Tensors

ADAPTER = "pekoe"  # its name at a server
GIVES_EXPERTS = "--enable-return-routed-experts"  # of both servers
KEY_VARIABLE = "PEKOE_SERVER_KEY"  # of the environment of a launched server
_CONNECT_LIMIT_S = 10.0
_HEALTH_LIMIT_S = 10.0
_KEEP_ALIVE_S = 2.0  # shorter than any server's (uvicorn: 5 s), so that no request meets a closing connection
MOST_BYTES = 16 << 20  # of a response
_SAMPLE_BYTES, _TOKEN_BYTES = 1 << 20, 1 << 10  # of a sample's: of all that is no token, and of each token
_EXPERT_BYTES = 6  # of the number of an expert: 4 bytes in base64
_MOST_PAUSE_S = 60.0  # that `Retry-After` may ask for
_SHOWN = 500  # characters of a response that a message has
# What reading a response raises where something in it is not what it should be.
MISREAD = LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError


class TransportError(Exception):
    """No response: the connection was refused, reset, closed early, or not made in time."""


class SilenceError(RunError):
    """Connected, but no whole response within the limit."""


class BusyError(RunError):
    """A response of status 429 or 5xx: the request may be sent again, after `pause_s` where the server says when."""

    def __init__(self, message: str, status: int, pause_s: float | None) -> None:
        super().__init__(message)
        self.status, self.pause_s = status, pause_s


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
    lora_rank: int = 0  # of the adapter that updates bring; 0: they bring whole weights
    routing: bool = False  # whether experts of tokens will be asked for


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's response to one request, before it is checked.

    Example: Answer([4, 5, 6], [-1.0, -2.0, -0.5], "length", [(1, 0), (2, 2)], "rid-7", 17, 16): the third token is of
    version 2.
    """

    tokens: list[int]
    logprobs: list[float]  # of each token, at the sampling temperature (at 1 for greedy), before top-p and top-k
    finish: FinishReason
    versions: list[tuple[int, int]]  # (policy version, index of its first token)
    rid: str = ""  # the id of the request that it is for
    num_prompt_tokens: int | None = None  # None: ended before it was looked at
    num_cached_tokens: int = 0  # of the prompt
    experts: NDArray[np.integer[Any]] | None = None  # of all tokens but the last, in all layers, as one row of numbers


ABORTED = Answer([], [], "abort", [])


class ServerClient(ABC):
    """A client of the server at `url`, used from one event loop. `key`: sent with every request (a bearer token)."""

    sample_path: ClassVar[str]
    resume_path: ClassVar[str]
    offload_path: ClassVar[str]
    onload_path: ClassVar[str]
    empty_body: ClassVar[dict[str, Any] | None] = None  # of calls without arguments

    def __init__(
        self, options: ServerOptions, url: str, key: str = "", transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.options, self.key = options, key
        self.adapter: dict[str, Any] = {}  # how a request names the adapter, once there is one
        self._address, self.url = url, without_secrets(url)  # `url` is for messages
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S)
        self._http = httpx.AsyncClient(headers=headers, limits=limits, trust_env=False, transport=transport)

    # Starting

    @abstractmethod
    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """The command line of a server on 127.0.0.1:port, `config.args` at its end, and additional environment
        variables."""

    async def ready(self) -> bool:
        """Whether its health check passes. A paused server may fail it (SGLang's does)."""
        try:
            await self.get("/health", _HEALTH_LIMIT_S)
        except (TransportError, RunError):
            return False
        return True

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
        params, spec = request.params, self.options.spec
        body, most = self.body(request, rid) | self.adapter, _SAMPLE_BYTES + _TOKEN_BYTES * params.max_new_tokens
        if self.options.routing and isinstance(spec, FamilySpec):  # vLLM gives them to whoever asks for anything
            num_tokens = len(request.tokens) + params.max_new_tokens
            most += _EXPERT_BYTES * num_tokens * spec.num_layers * spec.experts_per_token
        content = await self.post(self.sample_path, body, self.options.config.request_limit_s, most)
        size = len(request.tokens)
        try:
            answer = self.parse(content)
            if answer.finish not in ("stop", "length", "abort"):
                raise ValueError(f"finish reason {shown(answer.finish)}")
            if answer is not ABORTED and (answer.rid, answer.num_prompt_tokens) != (rid, size):
                raise ValueError(f"it answers {shown(answer.rid)} with {answer.num_prompt_tokens} prompt tokens")
            if not 0 <= answer.num_cached_tokens <= size:
                raise ValueError(f"{answer.num_cached_tokens} of {size} prompt tokens from its cache")
        except MISREAD as error:
            raise RunError(
                f"{self.url}{self.sample_path}: expected one response of numbered weights to request {rid!r} of {size} "
                f"prompt tokens, got {shown(content)} ({type(error).__name__}: {shown(str(error))})"
            ) from None
        return answer

    @staticmethod
    @abstractmethod
    def body(request: Request, rid: str) -> dict[str, Any]:
        """The JSON of a request."""

    @staticmethod
    @abstractmethod
    def parse(content: Any) -> Answer:
        """Read the response to one request. An error of MISREAD for anything unexpected."""

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
        """Load a Hugging Face directory, or an adapter's, and tag it `version`."""

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
        """As `post`."""
        return await self._request("GET", path, None, limit_s)

    async def post(
        self, path: str, body: Any = None, limit_s: float | None = None, most_bytes: int = MOST_BYTES
    ) -> Any:
        """The response's JSON (None without a body; text if it is not JSON).

        Raises TransportError, SilenceError (after `limit_s`, or config.update_limit_s, for all of it), BusyError,
        and RunError with the server's message for any other status but 200, or for more than `most_bytes`.
        """
        return await self._request("POST", path, body, limit_s, most_bytes)

    async def close(self) -> None:
        await self._http.aclose()

    async def _request(
        self, method: str, path: str, body: Any, limit_s: float | None, most_bytes: int = MOST_BYTES
    ) -> Any:
        limit, place = limit_s or self.options.config.update_limit_s, self.url + path
        timeout = httpx.Timeout(limit, connect=_CONNECT_LIMIT_S)
        sending = self._http.stream(method, self._address + path, json=body, timeout=timeout)
        try:
            async with asyncio.timeout(limit), sending as answer:  # httpx's limits are of each read alone
                if (coding := answer.headers.get("content-encoding", "identity").lower()) != "identity":
                    raise RunError(f"{place}: expected an answer that is not compressed, got {shown(coding)}")
                data = bytearray()
                async for piece in answer.aiter_bytes():
                    data += piece
                    if len(data) > most_bytes:
                        raise RunError(f"{place}: expected an answer of at most {most_bytes:,} bytes, got more")
        except (TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout):
            raise SilenceError(f"{place}: expected an answer within {limit:g} s, got none, or a part") from None
        except httpx.HTTPError as error:
            raise TransportError(f"{place}: {type(error).__name__}: {error}") from None
        try:
            content = json.loads(data) if data else None
        except (ValueError, RecursionError):
            content = data.decode(errors="backslashreplace")
        if (status := answer.status_code) != 200:
            message = f"{place}: expected status 200, got {status}: {_message(content)}"
            if status == 401 and not self.key:
                message += "; engine.server.key_env names the variable that has the server's key"
            if status == 429 or status >= 500:
                raise BusyError(message, status, _pause_s(answer.headers.get("retry-after", "")))
            raise RunError(message)
        return content

    def field(self, content: Any, name: str, kind: type) -> Any:
        """content[name]; RunError if it is missing or of another type, as from another program at this address."""
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise RunError(f"{self.url}: expected an answer with {name!r}, got {shown(content)}")
        return cast("dict[str, Any]", content)[name]


def refuse_key(args: Sequence[str]) -> None:
    """UserError where `engine.server.args` has a key, next to which a launched server would not take its own."""
    if any(arg.replace("_", "-").split("=")[0] in ("--api-key", "--admin-api-key") for arg in args):
        raise UserError(
            "engine.server.args: expected no --api-key: a server that is started here gets a key of its own, and "
            "engine.server.key_env is for the key of a server that runs already (urls)"
        )


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


def whole(value: Any) -> int:
    """An integer that fits 31 bits, in JSON or in decimal digits; an error of MISREAD for anything else."""
    if isinstance(value, str) and len(value) < 11 and value.isascii() and value.isdecimal():
        value = int(value)
    if type(value) is not int or not -(2**31) < value < 2**31:
        raise TypeError(f"expected a whole number, got {shown(value)}")
    return value


def token_ids(values: Any) -> list[int]:
    """A list of integers; an error of MISREAD for anything else."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"expected a list of token ids, got {shown(values)}")
    return [whole(value) for value in cast("list[int]", values)]


def logprob(value: Any) -> float:
    """A number; TypeError for anything else. Whether it can be a log-prob is checked with all of a response."""
    if type(value) not in (int, float):
        raise TypeError(f"expected a log-prob, got {shown(value)}")
    return float(value)


def shown(content: Any) -> str:
    """The beginning of what a server sent, for a message: never long, and without control characters."""
    text = ""
    try:
        for part in [content] if isinstance(content, str) else json.JSONEncoder().iterencode(content):
            text += part
            if len(text) > _SHOWN:
                break
    except RecursionError:
        text = text[:_SHOWN] or "JSON of too many levels"
    return _printable(text[:_SHOWN])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _message(content: Any) -> str:
    """The innermost message of an error response."""
    while isinstance(content, dict):
        inner = next((content[key] for key in ("error", "message", "detail") if content.get(key)), None)
        if inner is None:
            break
        content = inner
    return _printable(content[:2000]) if isinstance(content, str) else shown(content)


def _pause_s(retry_after: str) -> float | None:
    """Seconds that a Retry-After header asks to wait, as a number or a date; None for anything else."""
    try:
        seconds = float(whole(retry_after)) if retry_after[:1].isdigit() else None
        seconds = parsedate_to_datetime(retry_after).timestamp() - time.time() if seconds is None else seconds
    except MISREAD:
        return None
    return min(max(seconds, 0.0), _MOST_PAUSE_S)
