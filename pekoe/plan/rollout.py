"""How long engines take to sample a batch whose responses differ in length: a discrete-event model of one engine.

All sequences that run together advance a token a step; a step's time is `Engine.decode`'s. Between two events (a
response ends, another begins) nothing changes but the context: time passes from event to event, not token by token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import erf, exp, log, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pekoe.plan.costs import Engine

SIGMA = 0.9  # of a log-normal, where nothing else is known: assumed, as docs/benchmarks.md says


@dataclass(frozen=True, slots=True)
class Lengths:
    """Response lengths, log-normal and cut at `maximum`, or drawn from `seen` ones of a run."""

    median: float
    maximum: int
    sigma: float = SIGMA
    seen: tuple[int, ...] = ()

    @classmethod
    def of_mean(cls, mean: float, maximum: int, sigma: float = SIGMA) -> Lengths:
        """So that the mean, after the cut, is `mean`. ValueError where it is not below the maximum."""
        if not 0 < mean < maximum:
            raise ValueError(f"mean length: expected between 0 and the maximum, {maximum}, got {mean}")
        low, high = 1e-3, 1e9
        for _ in range(100):
            middle = sqrt(low * high)
            low, high = (middle, high) if cls(middle, maximum, sigma).mean < mean else (low, middle)
        return cls(sqrt(low * high), maximum, sigma)

    @property
    def mean(self) -> float:
        """Of the lengths after the cut: E[min(X, m)] of a log-normal X."""
        if self.seen:
            return float(np.mean(np.minimum(self.seen, self.maximum)))
        location, top = log(self.median), log(self.maximum)
        below = exp(location + self.sigma**2 / 2) * _phi((top - location - self.sigma**2) / self.sigma)
        return below + self.maximum * (1 - _phi((top - location) / self.sigma))

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """[n] lengths, one from each n-th of the distribution, in random order: their mean hardly varies."""
        shares = (rng.permutation(n) + rng.random(n)) / n
        if self.seen:
            lengths = np.quantile(np.asarray(self.seen), shares)
        else:
            lengths = self.median * np.exp(self.sigma * _normal_quantiles(shares))
        return np.clip(lengths, 1, self.maximum).astype(np.int64)


def _phi(x: float) -> float:
    return (1 + erf(x / sqrt(2))) / 2


_GRID = np.linspace(-4.0, 4.0, 2001)
_SHARES = np.array([NormalDist().cdf(float(x)) for x in _GRID])


def _normal_quantiles(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.interp(shares, _SHARES, _GRID)


class EngineModel:
    """One engine in simulated time: sequences are submitted, `advance` says what ended until when.

    Args:
        most: sequences that run together at most, if KV allows.
    """

    def __init__(self, engine: Engine, most: int = 256) -> None:
        self.engine, self.most, self.now = engine, most, 0.0
        self.busy_s = 0.0
        self._tokens = 0.0  # steps so far
        self._waiting: deque[tuple[Any, float, int, float]] = deque()
        self._running: list[tuple[float, int, Any, float]] = []  # (the step at which it ends, number, key, its KV)
        self._context, self._held, self._number = 0.0, 0.0, 0
        self._room = float(engine.kv_tokens())
        self._fixed: dict[int, float] = {}
        self._per_token = engine.decode(1, 1.0) - engine.decode(1, 0.0)

    def submit(self, key: Any, prompt: float, length: int, prefill_s: float) -> None:
        """A response of `length` tokens to `prompt` tokens, whose prefill takes `prefill_s` (0: shared)."""
        self._waiting.append((key, prompt, length, prefill_s))

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.most:
            key, prompt, length, prefill_s = self._waiting[0]
            need = prompt + length
            if self._running and self._held + need > self._room:
                return
            self._waiting.popleft()
            self.now += prefill_s
            self.busy_s += prefill_s
            self._held += need
            self._context += prompt - self._tokens
            self._number += 1
            heappush(self._running, (self._tokens + length, self._number, (key, prompt - self._tokens), need))

    def next_end(self) -> tuple[float, Any]:
        """Pass the time until the next response ends: when, and its key. There must be one."""
        self._admit()
        end, _, (key, offset), need = heappop(self._running)
        batch = len(self._running) + 1
        steps = end - self._tokens
        if steps > 0:
            if batch not in self._fixed:
                self._fixed[batch] = self.engine.decode(batch, 0.0)
            context = self._context + batch * (self._tokens + steps / 2)
            passed = steps * (self._fixed[batch] + self._per_token * context)
            self.now += passed
            self.busy_s += passed
            self._tokens = end
        self._context -= offset
        self._held -= need
        return self.now, key


def sampling_seconds(
    engine: Engine, num_engines: int, prompt: float, lengths: Sequence[int], samples: int, most: int
) -> NDArray[np.float64]:
    """[engines] when each engine has sampled its part of a batch; a group stays on one engine, prefilled once."""
    groups = [lengths[i : i + samples] for i in range(0, len(lengths), samples)]
    if len(groups) < 2 * num_engines:  # too few to keep together
        groups, shares = [[length] for length in lengths], 1
    else:
        shares = samples
    ends = np.zeros(num_engines)
    prefill = engine.prefill(prompt)
    for number in range(min(num_engines, len(groups))):
        model = EngineModel(engine, most)
        for group in groups[number::num_engines]:
            for i, length in enumerate(group):
                model.submit(None, prompt, int(length), prefill if i % shares == 0 else 0.0)
        while not model.idle:
            ends[number], _ = model.next_end()
    return ends
