"""An engine under the contract: how to make one, what is its own, and how to take what it yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pytest

from pekoe.core.errors import UserError
from pekoe.core.types import Prompt, Rollout, SamplingParams
from pekoe.engine import Generator
from pekoe.model import Decoder
from tests.engine.reference import worst_difference

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
Key = tuple[str, int, int]  # uid, draw, sample index
Rollouts = dict[Key, Rollout]


class Open(Protocol):
    def __call__(self, room: int | None = None) -> Generator:
        """A new engine at version 0 of `Harness.model`. `room`: responses that it may hold at once."""
        ...


@dataclass(frozen=True)
class Harness:
    """An engine and what is its own.

    Args:
        model: the weights that it starts with, float32 on CPU.
        other: other weights of that shape.
        open: makes an engine; the test closes it.
        launch: makes one that starts whatever it needs itself, and must end it.
        refuses: sampling that it refuses with UserError, by name, and why.
        cannot: what it does not do, by name, and why; its tests are skipped.
        prompt_tokens_again: how many tokens of a prompt of that length each further sample computes once more.
        reusable: how many tokens of such a prompt are found when it is asked for again.
        check: proves the engine's accounts, after every response.
        num_held: responses in flight or finished and not taken yet; None: it works only while it is asked for the next.
        num_draws: for statistics of first tokens.
    """

    model: Decoder
    other: Decoder
    open: Open
    launch: Callable[[], Generator]
    tolerance: float = 1e-4
    refuses: dict[str, str] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)
    prompt_tokens_again: Callable[[int], int] = lambda length: 0
    reusable: Callable[[int], int] = lambda length: 0
    check: Callable[[Any], None] = lambda engine: None
    num_held: Callable[[Any], int] | None = None
    num_draws: int = 3000

    def need(self, ability: str) -> None:
        if ability in self.cannot:
            pytest.skip(self.cannot[ability])

    def accepts(self, name: str, engine: Generator, prompts: list[Prompt], params: SamplingParams) -> bool:
        """False where the engine refuses such sampling, which it then must do at the call."""
        if name in self.refuses:
            with pytest.raises(UserError, match=r"expected .* got"):
                engine.generate(prompts, params)
        return name not in self.refuses

    def drain(self, engine: Generator, stream: Iterator[Rollout], into: Rollouts | None = None) -> Rollouts:
        """Take all that comes, each looked at by itself."""
        rollouts = {} if into is None else into
        for rollout in stream:
            self.take(engine, rollout, rollouts)
        return rollouts

    def take(self, engine: Generator, rollout: Rollout, into: Rollouts) -> Rollout:
        self.check(engine)
        key = (rollout.uid, rollout.draw, rollout.sample_index)
        assert key not in into, f"{key} was yielded twice"
        payload = rollout.payload.resolve()
        assert payload.tokens.dtype == np.int64
        assert payload.logprobs.dtype == np.float32
        assert payload.logprobs.shape == payload.tokens.shape == (rollout.num_tokens,)
        assert rollout.num_prompt_tokens == len(payload.prompt_tokens)
        assert np.isfinite(payload.logprobs).all()
        assert (payload.logprobs <= self.tolerance).all()
        assert ((payload.tokens >= 0) & (payload.tokens < VOCAB)).all()
        assert rollout.num_tokens > 0 or rollout.finish_reason == "abort"
        versions, starts = [v for v, _ in rollout.versions], [start for _, start in rollout.versions]
        assert starts[:1] == ([0] if rollout.num_tokens else [])
        assert starts == sorted(set(starts))
        assert versions == sorted(set(versions))
        assert all(start < rollout.num_tokens for start in starts)
        into[key] = rollout
        return rollout

    def collect(self, engine: Generator, prompts: list[Prompt], params: SamplingParams) -> Rollouts:
        """Generate to the end: every response comes once, with its own prompt, within its bounds."""
        rollouts = self.drain(engine, engine.generate(prompts, params))
        asked = {(p.uid, p.draw): p for p in prompts}
        assert set(rollouts) == {(*name, i) for name in asked for i in range(params.n)}
        for (uid, draw, _), rollout in rollouts.items():
            payload = rollout.payload.resolve()
            assert payload.prompt_tokens.tolist() == asked[uid, draw].tokens.tolist()
            assert rollout.finish_reason in ("stop", "length")
            assert_ended_rightly(rollout, params)
        return rollouts

    def assert_true(self, rollouts: Rollouts, models: dict[int, Decoder] | None = None, temperature: float = 1.0):
        """Each token's log-prob is that of its own version's weights, over all that truly came before it."""
        assert worst_difference(models or {0: self.model}, rollouts.values(), temperature) <= self.tolerance


def assert_ended_rightly(rollout: Rollout, params: SamplingParams) -> None:
    """A stop token ends a response, as its last token, beyond `min_new_tokens`; without one it is of full length."""
    tokens = rollout.payload.resolve().tokens
    stops = np.isin(tokens, params.stop_token_ids)
    assert not stops[:-1].any()
    assert not stops[: params.min_new_tokens].any()
    assert len(tokens) <= params.max_new_tokens
    match rollout.finish_reason:
        case "stop":
            assert stops[-1]
        case "length":
            assert len(tokens) == params.max_new_tokens
            assert not stops[-1]
        case "abort":
            assert len(tokens) < params.max_new_tokens


def tokens_of(rollouts: Rollouts) -> dict[Key, list[int]]:
    return {key: rollout.payload.resolve().tokens.tolist() for key, rollout in rollouts.items()}


def first_tokens(rollouts: Rollouts) -> np.ndarray:
    """By sample index, [n]."""
    return np.array([rollouts[key].payload.resolve().tokens[0] for key in sorted(rollouts)])


def prompt(uid: str, length: int, draw: int = 0) -> Prompt:
    """Random tokens; the same arguments but for `draw` give the same ones."""
    return Prompt(uid, draw, np.random.default_rng([length, *uid.encode()]).integers(0, VOCAB, length))


def total(rollouts: Rollouts) -> int:
    return sum(rollout.num_tokens for rollout in rollouts.values())
