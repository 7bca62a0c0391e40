"""The section `engine` of a recipe: what samples."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from pekoe.config.base import ConfigSection, GiB, Processes, Seconds


class ServerSection(ConfigSection):
    """Inference servers, started here (`python`) or running already (`urls`)."""

    python: str | None = None
    """The Python of the environment that SGLang or vLLM is installed in; starts `count` servers with it."""
    urls: tuple[str, ...] = Field(default=(), strict=False)
    """Servers that run already, http://host:port each; instead of `python`."""
    key_env: str | None = None
    """The environment variable that has the key of `urls`, wherever engines run; a server started here has its own."""
    count: Processes = 1
    """Servers to start."""
    gpus: tuple[str, ...] = Field(default=(), strict=False)
    """CUDA_VISIBLE_DEVICES of each server to start, such as ["1", "2,3"]; not the trainer's with sync = "broadcast"."""
    args: tuple[str, ...] = Field(default=(), strict=False)
    """More arguments of the server's own command line, as they are."""
    env: dict[str, str] = Field(default_factory=dict[str, str])
    """More environment variables of the server."""
    sync: Literal["disk", "shm", "broadcast"] = "disk"
    """How weights reach a server: a checkpoint in the run directory, one in shared memory (same host), or a
    torch.distributed group (NCCL on GPU, gloo on CPU)."""
    checksum_every: int = Field(default=10, ge=1)
    """Weight updates between two checksums over all parameters, where a server can give a true one; the first two
    updates of a run always have one."""
    during_update: Literal["abort", "keep"] = "keep"
    """Responses in flight at an update: ended, or kept (which rollout.during_update = "go_on" needs)."""
    max_requests: int = Field(default=256, ge=1)
    """Requests that one server is given at a time; more wait here. It decodes at most `engine.max_running` together."""
    retries: int = Field(default=2, ge=0)
    """How often a request is sent again after a transport error or an answer of status 5xx (after 429: for as long as
    request_limit_s allows), after a pause that grows or that the server's Retry-After asks for."""
    start_limit_s: Seconds = 900
    """How long a server may take to start."""
    request_limit_s: Seconds = 3600
    """How long one request may take, to the last byte of its answer."""
    update_limit_s: Seconds = 600
    """How long a weight update, a pause or a flush may take."""

    @model_validator(mode="after")
    def _possible(self) -> ServerSection:
        if self.urls:
            unread = {"count": self.count > 1, "gpus": self.gpus, "args": self.args, "env": self.env}
            if named := [name for name, value in unread.items() if value]:
                raise ValueError(
                    f"engine.server.{named[0]}: expected none with urls, whose servers were started with their own, "
                    f"got {getattr(self, named[0])!r}; leave it out"
                )
        elif self.key_env:
            raise ValueError(
                f"engine.server.key_env: expected none without urls (a server that is started here has its own), "
                f"got {self.key_env!r}; leave it out"
            )
        if self.gpus and len(self.gpus) != self.count:
            raise ValueError(f"engine.server.gpus: expected one for each of {self.count} servers, got {len(self.gpus)}")
        for url in self.urls:
            try:
                parts = urlsplit(url)
                good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # a port that is no number
                good = False
            if not good:
                raise ValueError(f"engine.server.urls: expected http://host:port, got {url!r}")
        return self


KV_GIB = 2.0


class EngineSection(ConfigSection):
    backend: Literal["embedded", "sglang", "vllm"] = "embedded"
    """embedded: in this process. sglang, vllm: servers, see `server`."""
    server: ServerSection = ServerSection()
    kv_tokens: int | None = Field(default=None, ge=16)
    """Tokens that the KV cache holds. Absent: enough for max_running sequences of full length, within kv_gib."""
    kv_gib: GiB | None = None
    """The most memory that the KV cache takes when kv_tokens is absent. Absent: 2; on a GPU an embedded engine takes
    what weights and training leave, but for a tenth."""
    block_tokens: int = Field(default=16, ge=1)
    """Tokens of a KV block; prefixes are shared by whole blocks."""
    max_running: int = Field(default=512, ge=1)
    """Sequences that one engine, or one server, decodes together."""
    prefill_tokens: int = Field(default=8192, ge=1)
    """Tokens of one forward: what the running sequences leave of it goes to chunks of waiting prompts."""

    def kv_room(self, longest: int, bytes_per_token: int, left: int | None = None) -> int:
        """Tokens that the KV cache holds, for sequences of at most `longest` tokens. `left`: as in `kv_bytes`."""
        return self.kv_tokens or min(self.max_running * longest, self.kv_bytes(left) // bytes_per_token)

    def kv_bytes(self, left: int | None = None) -> int:
        """The most that the KV cache takes, where `kv_tokens` is absent. `left`: what a GPU has left for it."""
        if self.kv_gib is None and left is not None:
            return max(0, left)
        return int((self.kv_gib or KV_GIB) * 2**30)

    def server_kv(self, longest: int, values_per_token: int, dtype: str, device: str) -> int | None:
        """As `kv_room`, for a server. None: servers on a GPU take a share of its memory, unless kv_tokens is set."""
        if self.kv_tokens or device != "cpu":
            return self.kv_tokens
        return self.kv_room(longest, values_per_token * (4 if dtype == "float32" else 2))

    def refuse_unread(self) -> None:
        """ValueError for settings that servers do not read."""
        if self.backend == "embedded":
            return
        options = "engine.server.args has a server's own options"
        unread = {"block_tokens": options, "prefill_tokens": options}
        if self.server.urls:
            unread["max_running"] = "engine.server.max_requests bounds what a server that runs already is given"
        for name, hint in unread.items():
            default, value = type(self).model_fields[name].default, getattr(self, name)
            if value != default:
                raise ValueError(
                    f"engine.{name}: expected the default, {default}, with engine.backend = {self.backend!r}, whose "
                    f"servers do not read it, got {value}; leave it out ({hint})"
                )

    @model_validator(mode="after")
    def _one_way(self) -> EngineSection:
        server = self.server
        if self.backend != "embedded" and (server.python is None) == (not server.urls):
            raise ValueError(
                f"engine.server: expected either python (start servers) or urls (use running ones) for "
                f"engine.backend = {self.backend!r}, got {'both' if server.urls else 'neither'}"
            )
        return self
