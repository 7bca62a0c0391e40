"""What an inference server can do, as `RemoteEngine` sees it: the part that differs between SGLang and vLLM.

A backend translates; it keeps no account. It raises TransportError where no answer came (the request may be sent
again, or elsewhere), and RunError for an answer that says no, or that it does not understand.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast
from urllib.parse import urlsplit

import httpx

from pekoe.config.engine import ServerSection
from pekoe.core.errors import RunError
from pekoe.core.spec import ModelSpec
from pekoe.core.types import FinishReason, Prompt, SamplingParams
from pekoe.engine import transfer
from pekoe.engine.fingerprints import Fingerprints, Prints, differing, prints_of
from pekoe.engine.servers.process import ServerProcess
from pekoe.engine.transfer import Group, Tensors
from pekoe.model import Decoder

_CONNECT_LIMIT_S = 10.0
_HEALTH_LIMIT_S = 10.0


class TransportError(Exception):
    """No answer came: refused, reset, closed half-way, or not connected in time."""


class SilenceError(RunError):
    """Connected, but no answer within the limit."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every backend is told."""

    model: Path
    config: ServerSection
    spec: ModelSpec
    max_sequence_tokens: int
    kv_tokens: int | None  # that the KV cache should hold; None: as many as the server likes
    max_running: int  # EngineSection.max_running
    dtype: str  # "float32" | "bfloat16"
    device: str  # "cpu" | "cuda"
    releases: bool = False  # whether it will be asked to `release`


@dataclass(eq=False, slots=True)
class Server:
    """A server. `stale`: alive, but not known to hold the current version. Only `serving` ones are asked to sample."""

    url: str
    process: ServerProcess | None = None  # None: attached
    state: Literal["serving", "stale", "dead"] = "stale"
    version: int | None = None
    held: int = 0  # responses in flight, and finished ones that nobody has taken yet
    why: str = "not started"  # why it does not serve
    group: Any = None  # our end of its weight-update group, where there is one

    @property
    def is_local(self) -> bool:
        return urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server says of one response."""

    tokens: list[int]
    logprobs: list[float]  # one a token, at the sampling temperature (at 1 for greedy), before top-p and top-k
    reason: FinishReason
    versions: list[tuple[int, int]]  # (policy version, index of its first token), first index 0; [] where not told
    num_cached_tokens: int = 0  # of the prompt


class Backend(ABC):
    """One kind of server. `client` is set before any request and lives in the engine's event loop."""

    name: ClassVar[str]  # "SGLang"

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.client: httpx.AsyncClient | None = None

    # Starting

    @abstractmethod
    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """The command line of a server on 127.0.0.1:port (`config.args` at its end), and variables that are added to
        our environment (`config.env` is added by the engine, last)."""

    async def ready(self, server: Server) -> bool:
        """Does it answer its health check? Never raises. A server that is paused may fail it: SGLang's samples."""
        assert self.client is not None
        try:
            answer = await self.client.get(server.url + "/health", timeout=_HEALTH_LIMIT_S)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def check(self, server: Server) -> None:  # noqa: B027
        """UserError for an attached server whose answers would be misread."""

    async def reachable(self, server: Server) -> bool:
        """Does anyone answer there, paused or not? Never raises."""
        try:
            await self.version_of(server)
        except TransportError:
            return False
        except RunError:
            pass
        return True

    # Sampling

    @abstractmethod
    def check_params(self, params: SamplingParams) -> None:
        """UserError for what this server cannot do."""

    async def prefill(self, server: Server, prompt: Prompt) -> int:
        """Bring the prompt's KV into the prefix cache, before its n > 1 samples are asked for, where a server does not
        share it by itself. Returns how many tokens it computed for it."""
        return 0

    @abstractmethod
    async def sample(self, server: Server, prompt: Prompt, index: int, params: SamplingParams, rid: str) -> Answer:
        """One response: sample `index` of the prompt, under the request id `rid`, with a seed of its own made from
        `sampling.sequence_key(params, prompt.uid, prompt.draw, index)`."""

    @abstractmethod
    async def abort(self, server: Server, rids: Sequence[str]) -> None:
        """End these requests; they are answered with reason abort. Unknown ones are ignored."""

    # Weights

    @abstractmethod
    async def pause(self, server: Server, mode: Literal["abort", "keep"]) -> None:
        """Stop sampling. keep: what is in flight goes on after `resume`, its KV recomputed or still right. Pausing
        what is paused is no error."""

    @abstractmethod
    async def resume(self, server: Server) -> None: ...

    @abstractmethod
    async def flush(self, server: Server) -> None:
        """Forget all cached KV. Called when paused, after new weights. RunError where the server did not."""

    @abstractmethod
    async def version_of(self, server: Server) -> str:
        """The tag that the server itself gives its weights."""

    @abstractmethod
    async def set_version(self, server: Server, version: int) -> None:
        """Tag the weights that it holds (at start)."""

    @abstractmethod
    async def load_from_disk(self, server: Server, directory: Path, version: int) -> None:
        """Load a Hugging Face directory and tag it `version`. Called when paused."""

    async def num_workers(self, server: Server) -> int:
        """Processes of this server that join its weight-update group."""
        return 1

    @abstractmethod
    async def join_group(self, server: Server, group: Group) -> None:
        """Make the server's workers join, as ranks `group.first_rank` and up; the others join meanwhile."""

    def open_group(self, group: Group) -> Any:
        """Our end, rank 0. Runs in a thread while `join_group` runs."""
        return transfer.open_group(group)

    def broadcast(self, handle: Any, tensors: Tensors) -> None:
        """Send, as rank 0. Runs in a thread while `receive` runs."""
        transfer.broadcast(handle, tensors)

    def close_group(self, handle: Any) -> None:
        transfer.close_group(handle)

    async def begin_update(self, server: Server) -> None:  # noqa: B027
        """Before the first `receive` of an update. An update that broke off earlier must not stand in the way."""

    @abstractmethod
    async def receive(self, server: Server, group: Group, tensors: Tensors) -> None:
        """Make the server take these from the group (their names, dtypes, shapes; the values come by broadcast)."""

    @abstractmethod
    async def finish_update(self, server: Server, version: int) -> None:
        """After the last `receive`: everything is there; tag it `version`."""

    def prints(self) -> Prints | None:
        """To be shown weights, and say what `fingerprints` should of a server that has them. None: it would speak of
        something else."""
        return None

    def expected(self, model: Decoder) -> Fingerprints | None:
        """What `fingerprints` should say of a server that samples from `model`; None as in `prints`."""
        prints = self.prints()
        return None if prints is None else prints_of(model, prints)

    async def fingerprints(self, server: Server) -> Fingerprints | None:
        """Of every parameter that it samples from, over all its bits. None: it cannot tell."""
        return None

    async def part(self, server: Server, group: Group | None) -> None:
        """Leave an attached server as it may go on without us: not paused, and out of `group`."""
        await self.resume(server)

    # Turns with a trainer on the same device

    async def release(self, server: Server) -> None:  # noqa: B027
        """Give back the memory of weights and KV. Called when nothing is in flight. A no-op on CPU."""

    async def restore(self, server: Server) -> None:  # noqa: B027
        """Take it again. The weights are nobody's until the next update."""

    # HTTP

    async def get(self, server: Server, path: str, limit_s: float | None = None) -> Any:
        return await self._request("GET", server, path, None, limit_s)

    async def post(self, server: Server, path: str, body: Any = None, limit_s: float | None = None) -> Any:
        """The answer's JSON (None where it has no body; text where it is no JSON).

        Raises TransportError, SilenceError (after `limit_s`, by default config.update_limit_s), and RunError with the
        server's message for any status but 200.
        """
        return await self._request("POST", server, path, body, limit_s)

    async def _request(self, method: str, server: Server, path: str, body: Any, limit_s: float | None) -> Any:
        assert self.client is not None
        limit = limit_s or self.setup.config.update_limit_s
        timeout = httpx.Timeout(limit, connect=_CONNECT_LIMIT_S)
        try:
            answer = await self.client.request(method, server.url + path, json=body, timeout=timeout)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise SilenceError(f"{server.url}{path}: expected an answer within {limit:g} s, got none") from None
        except httpx.HTTPError as error:
            raise TransportError(f"{server.url}{path}: {type(error).__name__}: {error}") from None
        try:
            content = answer.json() if answer.content else None
        except ValueError:
            content = answer.text
        if answer.status_code != 200:
            raise RunError(f"{server.url}{path}: expected status 200, got {answer.status_code}: {_message(content)}")
        return content


async def compare(
    backend: Backend,
    servers: Sequence[Server],
    expected: Fingerprints,
    lose: Callable[[Server, str], None],
    tell: Callable[[str], None],
) -> bool | None:
    """Whether all that serve hold the expected parameters; None: one cannot say, or none serves.

    `lose` hears of servers that do not answer, `tell` which parameters differ.
    """
    answers: list[bool | None] = []
    for server in servers:
        if server.state != "serving":
            continue
        try:
            held = await backend.fingerprints(server)
        except TransportError as error:
            lose(server, str(error))
            continue
        wrong = [] if held is None else differing(expected, held)
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            tell(f"{server.url} holds other weights than it should in {', '.join(wrong[:3])}{more}")
        answers.append(None if held is None else not wrong)
    if False in answers:
        return False
    return None if None in answers or not answers else True


def field(server: Server, content: Any, name: str, kind: type) -> Any:
    """content[name]; RunError where the answer has no such thing, as when somebody else answers there."""
    if not isinstance(content, dict) or not isinstance(content.get(name), kind):
        raise RunError(f"{server.url}: expected an answer with {name!r}, got {json.dumps(content)[:300]}")
    return cast("dict[str, Any]", content)[name]


def _message(content: Any) -> str:
    """What a server says of an error, without its wrapping."""
    while isinstance(content, dict):
        inner = next((content[key] for key in ("error", "message", "detail") if content.get(key)), None)
        if inner is None:
            break
        content = inner
    return str(content)[:2000]
