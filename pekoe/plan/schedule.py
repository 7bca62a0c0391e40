"""The loop in simulated time: engines with uneven responses under the schedule of `run/rl.py`, step after step.

Groups of step t are put when version t - 1 - lag is published. With `goes_on`, responses in flight go on under new
weights; without it a publish waits until all that was put is sampled. Engines stand still while they load weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

import numpy as np

from pekoe.plan.rollout import EngineModel, parts_of
from pekoe.plan.step import Setup, StepTime, times_beside


@dataclass(frozen=True, slots=True)
class Simulated:
    """Means over the simulated steps, the first ones left out."""

    time: StepTime
    last_tenth_s: float  # of a batch: from the end of 90 % of its responses to that of the last
    running: float  # sequences that an engine decodes together, mean over the time in which it samples
    timeline: list[tuple[float, float, float, float]]  # of each step: put, sampled, trained on, published, in seconds


@dataclass(slots=True)
class _Batch:
    """The responses of one step."""

    began: float
    ends: list[float] = field(default_factory=list[float])


class _Engines:
    """All engines, and which groups are sampled."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        share = setup.constants.rollout_share
        self.models = [EngineModel(setup.engine, setup.most, share) for _ in range(setup.num_engines)]
        self.batches: list[_Batch] = []
        self._prefill = setup.engine.prefill(setup.prompt)
        self._left: list[int] = []  # responses of each group that are not sampled, in the order of puts
        self._taken = set[int]()
        self._oldest = 0  # group that is not taken
        self._events: list[tuple[float, int]] = []  # (when an engine's next response ends, its number)

    def put(self, now: float) -> None:
        """Give each group of a batch to the engine that has the fewest sequences."""
        setup, first, batch = self.setup, len(self._left), len(self.batches)
        rng = np.random.default_rng([setup.seed, batch]) if batch else np.random.default_rng(setup.seed)
        lengths = setup.lengths.draw(setup.responses, rng).tolist()
        groups = [lengths[i : i + setup.samples] for i in range(0, len(lengths), setup.samples)]
        self._pass_until(now)
        self.batches.append(_Batch(now))
        self._left += [len(group) for group in groups]
        loads = [(model.num_sequences, i) for i, model in enumerate(self.models)]
        heapify(loads)
        for number, part in parts_of(groups, setup.num_engines):
            load, i = heappop(loads)
            for sample, length in enumerate(part):
                key = batch, first + number
                self.models[i].submit(key, setup.prompt, length, 0.0 if sample else self._prefill)
            heappush(loads, (load + len(part), i))
        self._plan_events()

    def _plan_events(self) -> None:
        self._events = [(model.peek(), i) for i, model in enumerate(self.models) if not model.idle]
        heapify(self._events)

    def _advance(self) -> float:
        """Pass the time until the next response ends anywhere."""
        _, i = heappop(self._events)
        now, (batch, group) = self.models[i].next_end()
        self.batches[batch].ends.append(now)
        self._left[group] -= 1
        if not self.models[i].idle:
            heappush(self._events, (self.models[i].peek(), i))
        return now

    def _pass_until(self, now: float) -> None:
        while self._events and self._events[0][0] <= now:
            self._advance()
        for model in self.models:
            model.run_until(now)

    def take(self, n: int, now: float) -> float:
        """When the next n groups are sampled, in the order of puts but for the window."""
        for _ in range(n):
            while (group := next(self._ready(), None)) is None:
                now = max(now, self._advance())
            self._taken.add(group)
            while self._oldest in self._taken:
                self._oldest += 1
        return now

    def _ready(self) -> Iterator[int]:
        end = min(self._oldest + self.setup.window, len(self._left))
        return (i for i in range(self._oldest, end) if not self._left[i] and i not in self._taken)

    def drain(self, now: float) -> float:
        """When everything that was put is sampled."""
        while self._events:
            now = max(now, self._advance())
        return now

    def load(self, now: float, until: float) -> None:
        """Stand still from `now` until `until`."""
        self._pass_until(now)
        for model in self.models:
            model.pause(until)
        self._plan_events()


def simulate(setup: Setup, num_steps: int | None = None, most_engines: int | None = None) -> Simulated:
    """Steps of `setup`, their means once engines and trainer have found their pace.

    Args:
        most_engines: with more, so many of them stand for all, each with as many responses as it would have: good
            enough to compare layouts by, as the longest of fewer responses is a little shorter.
        num_steps: steps that count; as many as lag + 2 come before them, none without lag. By default 1 without lag,
            where each step is like the first, else 4.
    """
    if setup.colocated:  # who takes turns is never ahead, whatever the recipe's lag
        setup = replace(setup, lag=0, goes_on=False)
    passes, trained, published, overhead = times_beside(setup)
    if most_engines and setup.num_engines > most_engines:
        prompts = max(1, round(setup.prompts * most_engines / setup.num_engines))
        setup = replace(setup, num_engines=most_engines, prompts=prompts)
    engines, now = _Engines(setup), 0.0
    before, counted = (setup.lag + 2, num_steps or 4) if setup.lag else (0, num_steps or 1)
    ends, waits, busy, timeline = [0.0], list[float](), [(0.0, 0.0)], list[tuple[float, float, float, float]]()
    for step in range(before + counted):
        while len(engines.batches) < step + 1 + setup.lag:
            engines.put(now)
        sampled = engines.take(setup.prompts, now)
        wait, now = sampled - now, sampled + setup.judge_s + passes + trained + overhead
        if not setup.goes_on:
            drained = engines.drain(now)
            wait, now = wait + drained - now, drained
        engines.load(now, now + published)
        timeline.append((engines.batches[step].began, sampled, now, now + published))
        now += published
        ends.append(now)
        waits.append(wait)
        busy.append((sum(m.busy_s for m in engines.models), sum(m.num_running_s for m in engines.models)))
    seconds = (ends[-1] - ends[before]) / counted
    worked, running = (last - first for last, first in zip(busy[-1], busy[before], strict=True))
    batches = [batch for batch in engines.batches if len(batch.ends) == setup.responses][-counted:]
    sampling = float(np.mean([batch.ends[-1] - batch.began for batch in batches]))
    tenth = float(np.mean([batch.ends[-1] - batch.ends[int(0.9 * len(batch.ends))] for batch in batches]))
    time = StepTime(
        sampling, setup.judge_s, passes, trained, published, overhead, float(np.mean(waits[before:])),
        min(1.0, worked / counted / setup.num_engines / seconds), (passes + trained) / seconds,
    )  # fmt: skip
    return Simulated(time, tenth, running / worked if worked else 0.0, timeline)
