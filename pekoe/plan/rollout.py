"""How long engines take to sample a batch whose responses differ in length: a discrete-event model of one engine.

All sequences that run together advance a token a step; a step's time is `Engine.decode`'s. Between two events (a
response ends, another begins) nothing changes but the context: time passes from event to event, not token by token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import erf, exp, inf, log, sqrt
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
    """One engine in simulated time: sequences are submitted, `next_end` passes the time until one ends.

    Args:
        most: sequences that run together at most, if KV allows.
        share: of the engine's own speed, behind what sends it requests.
    """

    def __init__(self, engine: Engine, most: int = 256, share: float = 1.0) -> None:
        self.engine, self.most, self.share, self.now = engine, most, share, 0.0
        self.busy_s = 0.0
        self.num_running_s = 0.0  # sequences that ran, times how long
        self._tokens = 0.0  # steps so far
        self._waiting: deque[tuple[Any, float, int, float]] = deque()
        self._running: list[tuple[float, int, Any, float]] = []  # (the step at which it ends, number, key, its KV)
        self._context, self._held, self._number = 0.0, 0.0, 0
        self._room = float(engine.kv_tokens())
        self._fixed: dict[int, float] = {}
        self._per_token = (engine.decode(1, 1.0) - engine.decode(1, 0.0)) / share

    def submit(self, key: Any, prompt: float, length: int, prefill_s: float) -> None:
        """A response of `length` tokens to `prompt` tokens, whose prefill takes `prefill_s` (0: shared)."""
        self._waiting.append((key, prompt, length, prefill_s))

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    @property
    def num_sequences(self) -> int:
        return len(self._running) + len(self._waiting)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.most:
            key, prompt, length, prefill_s = self._waiting[0]
            need = prompt + length
            if self._running and self._held + need > self._room:
                return
            self._waiting.popleft()
            self._pass(prefill_s / self.share)
            self._held += need
            self._context += prompt - self._tokens
            self._number += 1
            heappush(self._running, (self._tokens + length, self._number, (key, prompt - self._tokens), need))

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        self.busy_s += seconds
        self.num_running_s += seconds * len(self._running)

    @property
    def _empty_s(self) -> float:
        """Of a step of so many sequences as run now, without their KV."""
        batch = len(self._running)
        if batch not in self._fixed:
            self._fixed[batch] = self.engine.decode(batch, 0.0) / self.share
        return self._fixed[batch]

    def _seconds(self, steps: float) -> float:
        """Of the next `steps` steps, while the same sequences run."""
        context = self._context + len(self._running) * (self._tokens + steps / 2)
        return steps * (self._empty_s + self._per_token * context)

    def _steps(self, seconds: float) -> float:
        """The inverse of `_seconds`: a root of a steps² + b steps = seconds."""
        a = self._per_token * len(self._running) / 2
        b = self._empty_s + self._per_token * (self._context + len(self._running) * self._tokens)
        return 2 * seconds / (b + sqrt(b * b + 4 * a * seconds))

    def peek(self) -> float:
        """When the next response ends, if nothing is submitted before; infinity where none runs."""
        self._admit()
        return self.now + self._seconds(self._running[0][0] - self._tokens) if self._running else inf

    def next_end(self) -> tuple[float, Any]:
        """Pass the time until the next response ends: when, and its key. There must be one."""
        self._admit()
        end = self._running[0][0]
        if end > self._tokens:
            self._pass(self._seconds(end - self._tokens))
            self._tokens = end
        _, _, (key, offset), need = heappop(self._running)
        self._context -= offset
        self._held -= need
        return self.now, key

    def run_until(self, until: float) -> None:
        """Pass the time until `until`, before which no response ends."""
        self._admit()
        if until <= self.now:  # it is still computing prompts
            return
        if self._running:
            self._tokens = min(self._running[0][0], self._tokens + self._steps(until - self.now))
            self._pass(until - self.now)
        self.now = until

    def pause(self, until: float) -> None:
        """Stand still until `until`, while weights are loaded."""
        self.now = max(self.now, until)


def parts_of(groups: Sequence[Sequence[int]], num_engines: int) -> list[tuple[int, list[int]]]:
    """What goes to one engine together, with the number of its group: a group, whose prompt is computed once; a
    response, where groups are too few."""
    if len(groups) < 2 * num_engines:
        return [(number, [length]) for number, group in enumerate(groups) for length in group]
    return [(number, list(group)) for number, group in enumerate(groups)]


def sampling_ends(
    engine: Engine, num_engines: int, prompt: float, lengths: Sequence[int], samples: int, most: int
) -> list[list[float]]:
    """When each engine ends each response of its part of a batch."""
    parts = parts_of([lengths[i : i + samples] for i in range(0, len(lengths), samples)], num_engines)
    ends, prefill = list[list[float]](), engine.prefill(prompt)
    for number in range(num_engines):
        model = EngineModel(engine, most)
        for _, part in parts[number::num_engines]:
            for i, length in enumerate(part):
                model.submit(None, prompt, int(length), 0.0 if i else prefill)
        own = list[float]()
        while not model.idle:
            own.append(model.next_end()[0])
        ends.append(own)
    return ends


def sampling_seconds(
    engine: Engine, num_engines: int, prompt: float, lengths: Sequence[int], samples: int, most: int
) -> NDArray[np.float64]:
    """[engines] when each engine has sampled its part of a batch."""
    ends = sampling_ends(engine, num_engines, prompt, lengths, samples, most)
    return np.array([own[-1] if own else 0.0 for own in ends])
