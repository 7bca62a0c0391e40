"""An engine under the contract: how to make one, what is its own, and how its completions are looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pytest

from pekoe.core.errors import UserError
from pekoe.core.types import Completion, Request, SamplingParams
from pekoe.engine.base import EngineStats, WeightSource, requests_of
from pekoe.model import Decoder
from tests.engine.reference import Pair, worst_difference

VOCAB = 48
SHAPE: dict[str, Any] = {  # heads of 32: vLLM knows no smaller ones; tied embeddings: what updates forget
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_positions": 512,
    "scale": 2.5,  # responses of some 1.6 nats a token: neither flat nor fixed
}
STOPS = (21, 36)
"""Either comes some five times in a hundred tokens."""
RARE_STOP = 30
"""Comes some 6 times in a thousand tokens, under both weights."""
LONG = SamplingParams(n=16, max_new_tokens=400, stop_token_ids=(RARE_STOP,))
"""Of 16 responses the first ends soon, and most are then far from their ends: the fastest server is met in flight."""
LIMIT_S = 120.0
Key = tuple[str, int, int]  # uid, draw, sample
Sampled = dict[Key, Pair]
Futures = list[Future[Completion]]


class Engine(Protocol):
    """What the contract asks of an Engine, and of a pool of them."""

    @property
    def version(self) -> int: ...
    @property
    def max_sequence_tokens(self) -> int: ...
    def submit(self, requests: Sequence[Request]) -> Futures: ...
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[Completion]]: ...
    def abort(self, uids: list[str] | None = None) -> None: ...
    def flush_cache(self) -> None: ...
    def offload(self) -> None: ...
    def onload(self) -> None: ...
    def health(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


def update_engine(engine: Any, source: WeightSource, version: int) -> None:
    engine.update_weights(source, version)


@dataclass(frozen=True)
class Harness:
    """An engine and what is its own.

    Args:
        model: the weights that it starts with, float32 on CPU, as version 0.
        other: other weights of that shape.
        open: makes an engine; the test closes it. `room`: requests that it may sample at once.
        launch: makes one that starts whatever it needs itself, and must end it.
        update: gives the engine weights.
        refuses: sampling that it refuses with UserError, by name, and why.
        cannot: what it does not do, by name, and why; its tests are skipped: "seeds", "refuse whole calls".
        prompt_tokens_again: how many tokens of a prompt of that length each further sample computes once more.
        reusable: how many tokens of such a prompt are found when it is asked for again.
        check: proves the engine's accounts.
        has_processes: whether a launched one has processes and ports.
        num_draws: for statistics of first tokens.
    """

    model: Decoder
    other: Decoder
    open: Callable[..., Any]
    launch: Callable[[], Any]
    update: Callable[[Any, WeightSource, int], None] = update_engine
    tolerance: float = 1e-4
    refuses: dict[str, str] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)
    prompt_tokens_again: Callable[[int], int] = lambda length: 0
    reusable: Callable[[int], int] = lambda length: 0
    check: Callable[[Any], None] = lambda engine: None
    has_processes: bool = False
    num_draws: int = 3000

    def need(self, ability: str) -> None:
        if ability in self.cannot:
            pytest.skip(self.cannot[ability])

    def accepts(self, name: str, engine: Engine, params: SamplingParams) -> bool:
        """False where the engine refuses such sampling, which it then must do at the call."""
        if name in self.refuses:
            with pytest.raises(UserError, match=r"expected .* got"):
                engine.submit(prompt("p", 9, params))
        return name not in self.refuses

    def collect(self, engine: Engine, requests: Sequence[Request]) -> Sampled:
        """Submit together, and wait for all: none is aborted."""
        sampled = self.drain(engine, requests, engine.submit(requests))
        assert {completion.finish for _, completion in sampled.values()} <= {"stop", "length"}
        return sampled

    def drain(self, engine: Engine, requests: Sequence[Request], futures: Futures) -> Sampled:
        """Wait for all, and look at each."""
        assert len(futures) == len(requests)
        sampled: Sampled = {}
        for request, future in zip(requests, futures, strict=True):
            completion = future.result(LIMIT_S)
            completion = replace(completion, handle=completion.handle.resolve())  # fetched once
            self.check_form(request, completion)
            sampled[key_of(request)] = request, completion
        assert len(sampled) == len(requests)
        self.check(engine)
        return sampled

    def check_form(self, request: Request, completion: Completion) -> None:
        record, size = completion.handle.resolve(), completion.num_tokens
        assert record.tokens[: len(request.tokens)].tolist() == request.tokens.tolist()
        assert record.loss_mask.tolist() == [False] * len(request.tokens) + [True] * size
        assert completion.tokens.dtype == np.int64
        assert completion.logprobs.dtype == np.float32
        assert np.isfinite(completion.logprobs).all()
        assert (completion.logprobs <= self.tolerance).all()
        assert ((completion.tokens >= 0) & (completion.tokens < VOCAB)).all()
        assert size > 0 or completion.finish == "abort"
        versions, starts = [v for v, _ in completion.versions], [start for _, start in completion.versions]
        assert starts[:1] == ([0] if size else [])
        assert starts == sorted(set(starts))
        assert versions == sorted(set(versions))
        assert all(start < size for start in starts)
        assert_ended_rightly(completion, request.params)

    def assert_true(self, sampled: Sampled, models: dict[int, Decoder] | None = None, noise: float = 1.0):
        """Each token's log-prob is that of its own version's weights, over all that truly came before it.

        `noise`: times the tolerance, where what is sampled differs from run to run: rounding then reaches 1.2e-4.
        """
        models = models or {0: self.model}
        assert {v for _, completion in sampled.values() for v, _ in completion.versions} <= set(models)
        assert worst_difference(models, sampled.values()) <= noise * self.tolerance


def wait_for_one(futures: Futures) -> Completion:
    """The first completion: others are well under way then."""
    ended, _ = wait(futures, LIMIT_S, FIRST_COMPLETED)
    return next(iter(ended)).result()


def assert_ended_rightly(completion: Completion, params: SamplingParams) -> None:
    """A stop token ends a response, as its last token, beyond `min_new_tokens`; without one it is of full length."""
    tokens = completion.tokens
    stops = np.isin(tokens, params.stops)
    assert not stops[:-1].any()
    assert not stops[: params.min_new_tokens].any()
    assert len(tokens) <= params.max_new_tokens
    match completion.finish:
        case "stop":
            assert stops[-1]
        case "length":
            assert len(tokens) == params.max_new_tokens
            assert not stops[-1]
        case "abort":
            assert len(tokens) < params.max_new_tokens


def key_of(request: Request) -> Key:
    return request.uid, request.draw, request.sample


def tokens_of(sampled: Sampled) -> dict[Key, list[int]]:
    return {key: completion.tokens.tolist() for key, (_, completion) in sampled.items()}


def prompt(uid: str, length: int, params: SamplingParams, draw: int = 0, priority: int = 0) -> list[Request]:
    """A group on random tokens; the same uid and length give the same ones."""
    tokens = np.random.default_rng([length, *uid.encode()]).integers(0, VOCAB, length)
    return requests_of(uid, draw, tokens, params, priority)


def total(sampled: Sampled) -> int:
    return sum(completion.num_tokens for _, completion in sampled.values())
