"""The protocol of every engine: in this process, behind HTTP, or in a Ray actor. A request is the unit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Completion, IntArray, Request, SamplingParams
from pekoe.data.tokenizer import Tokenizer
from pekoe.model import LanguageModel

EngineKind = Literal["embedded", "sglang", "vllm"]
Checksums = Mapping[str, str | int]
"""Of each parameter, by its name. Equal ones mean equal parameters."""


@dataclass(frozen=True, slots=True)
class BroadcastGroup:
    """A torch.distributed group for weights: the trainer is rank 0, engines' workers are 1 to world_size - 1."""

    name: str  # a new one for each group: a broken group's may still be taken
    host: str  # where rank 0 listens
    port: int
    world_size: int
    backend: Literal["gloo", "nccl"]
    limit_s: float
    first_rank: int = 1  # of the engine that joins; it has the ranks up to first_rank + num_workers - 1


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Weights that rank 0 of a group sends while `update_weights` runs, in `engine.buckets` of at most `bucket_bytes`.

    An engine that is not in `group` yet joins it first, and leaves the one before. Embedded engines take buckets in
    float32, servers tensor by tensor in their own dtype.
    """

    group: BroadcastGroup
    bucket_bytes: int


WeightSource = LanguageModel | Path | Broadcast
"""Weights to sample from: a model in this process, a Hugging Face directory, or a broadcast."""


class EngineLost(RunError):
    """The engine died, hangs, or gives answers that cannot be used. Its requests may be sent to another one."""


class NoPlace(RunError):
    """An engine cannot start now: the machine that it was on is lost, and no other has room yet."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine was made. Engines behind HTTP know some of them only."""

    num_prefill_tokens: int = 0  # context tokens computed
    num_cached_tokens: int = 0  # context tokens found in the prefix cache instead
    num_shared_tokens: int = 0  # context tokens that samples got from their group's one prefill
    num_decode_tokens: int = 0  # response tokens sampled
    num_forwards: int = 0
    num_preemptions: int = 0
    num_retries: int = 0  # requests that were sent to a server once more
    busy_s: float = 0.0  # seconds in which at least one request was unfinished

    def plus(self, **more: float) -> EngineStats:
        return replace(self, **{name: getattr(self, name) + number for name, number in more.items()})

    def __add__(self, other: EngineStats) -> EngineStats:
        return self.plus(**asdict(other))


def validate(requests: Iterable[Request], vocab_size: int, limit: int, limit_name: str) -> None:
    """UserError for what no engine can sample: empty prompts, unknown tokens, sequences above `limit` tokens.

    `limit_name` says where the limit comes from.
    """
    for request in requests:
        params, size = request.params, len(request.tokens)
        for token in params.stops:
            if not 0 <= token < vocab_size:
                raise UserError(f"stop token: expected an id in [0, {vocab_size}), got {token}")
        if not size:
            raise UserError(f"prompt {request.uid}: expected at least one token, got none")
        if size + params.max_new_tokens > limit:
            raise UserError(
                f"prompt {request.uid}: expected at most {limit} tokens with its response ({limit_name}), got "
                f"{size} + {params.max_new_tokens} new; most new tokens that fit: {max(0, limit - size)}"
            )
        low, high = int(request.tokens.min()), int(request.tokens.max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise UserError(f"prompt {request.uid}: expected token ids in [0, {vocab_size}), got {bad}")


def end_tokens(model: LanguageModel | Path) -> tuple[int, ...]:
    """The ids that end a response, as a model's tokenizer files name them; none for a model that has no such files."""
    if isinstance(model, Path):
        return Tokenizer.load(model).stop_token_ids if (model / "tokenizer.json").is_file() else ()
    config = json.dumps(model.hf_config).encode()
    return Tokenizer(model.assets, config).stop_token_ids if "tokenizer.json" in model.assets else ()


def with_stops(requests: Sequence[Request], own: Callable[[], tuple[int, ...]]) -> Sequence[Request]:
    """The requests, with the model's `own` end tokens where `stop_token_ids` is None."""
    if all(request.params.stop_token_ids is not None for request in requests):
        return requests
    given = dict.fromkeys(r.params for r in requests if r.params.stop_token_ids is None)
    filled = {params: replace(params, stop_token_ids=own()) for params in given}
    return [replace(r, params=filled.get(r.params, r.params)) for r in requests]


def requests_of(
    uid: str, draw: int, tokens: Sequence[int] | IntArray, params: SamplingParams, priority: int = 0
) -> list[Request]:
    """The `params.n` requests of one group, which share their tokens."""
    array = np.asarray(tokens, np.int64)
    return [Request(uid, draw, sample, array, params, priority) for sample in range(params.n)]


class Sampler(Protocol):
    """One engine, or a pool of them. All methods may be called from any thread."""

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        """Begin to sample one response to each request; at any time, also while others run and during an update.

        Requests of one call are scheduled together. Wrong requests (an empty prompt, an unknown token, a sequence
        longer than the context) raise UserError at the call, and nothing of it is sampled. Each future ends with a
        completion (one with `finish = "abort"` where `abort` ended it), or an error: EngineLost where another engine
        may be asked, RunError where the run must stop.
        """
        ...

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[Completion]]:
        """Sample `params.n` responses to each prompt, and wait for all; in the prompts' order.

        A convenience over `submit`: prompt i has the uid "prompt-i" and draw 0.
        """
        groups = [requests_of(f"prompt-{i}", 0, tokens, params) for i, tokens in enumerate(prompts)]
        futures = self.submit([request for group in groups for request in group])
        completions = iter([future.result() for future in futures])
        return [[next(completions) for _ in group] for group in groups]


class Engine(Sampler, Protocol):
    """Samples responses, at a known version of the weights."""

    kind: EngineKind

    @property
    def version(self) -> int:
        """The policy version of the weights now sampling."""
        ...

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt with response that fits."""
        ...

    @property
    def max_requests(self) -> int | None:
        """How many unfinished requests it should have at most, where others could take more. None: any number."""
        ...

    @property
    def num_workers(self) -> int:
        """Processes of it that join a broadcast group."""
        ...

    def check(self, params: SamplingParams) -> None:
        """UserError for sampling that this engine cannot do."""
        ...

    def abort(self, uids: Iterable[str] | None = None) -> None:
        """End unfinished requests of these uids (None: all); their completions have `finish = "abort"`."""
        ...

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Sample from other weights from now on; returns when it does. Flushes every cached KV (I4).

        Requests in flight go on under the new version, their KV recomputed, their `versions` telling where. RunError
        where the weights cannot be taken; EngineLost where the engine died.
        """
        ...

    def flush_cache(self) -> None:
        """Forget cached KV that no running request uses."""
        ...

    def checksums(self) -> Checksums | None:
        """Of every parameter that it samples from, over all bits. None: it cannot tell."""
        ...

    def offload(self) -> None:
        """Give back the memory of KV and weights to a trainer on the same device. Nothing may be in flight."""
        ...

    def onload(self) -> None:
        """Take that memory again. An update of the weights must follow before anything is sampled."""
        ...

    def health(self) -> bool:
        """Whether it answers. May take some seconds."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Free everything; unfinished futures end with RunError. Safe to call twice."""
        ...
