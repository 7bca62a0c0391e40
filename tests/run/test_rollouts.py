"""Groups are reported as they are sampled, in the order in which they were put; what was taken leaves nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, cast

import numpy as np
import psutil
import pytest

from pekoe.core.progress import NoProgress
from pekoe.core.types import Completion, Draw, Problem, Record, Request, SamplingParams, Trajectory
from pekoe.run.interrupt import StepTimer, Stop
from pekoe.run.judging import RandomJudge
from pekoe.run.rollouts import Rollouts


class Pool:
    """Keeps requests until it is told which to answer."""

    def __init__(self) -> None:
        self.futures: list[tuple[Request, Future[Completion]]] = []

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        self.futures = [(request, Future()) for request in requests]
        return [future for _, future in self.futures]

    def answer(self, order: Sequence[str]) -> None:
        for uid in order:
            for request, future in self.futures:
                if request.uid == uid:
                    record = Record.of(request.tokens, np.arange(2), np.zeros(2, np.float32))
                    future.set_result(Completion(2, "stop", ((0, 0),), record))

    def abort(self) -> None: ...


class Words:
    def encode_prompt(self, messages: Any) -> Any:
        return np.arange(3)


@pytest.mark.parametrize("order", ["abc", "cba", "bac"])
def test_groups_are_reported_in_order_whatever_is_finished_first(order: str):
    pool, params, reported = Pool(), SamplingParams(n=2), list[str]()

    def report(group: Sequence[Trajectory]) -> None:
        assert [trajectory.sample for trajectory in group] == [0, 1]
        reported.append(group[0].uid)

    draws = [Draw(Problem(uid, (), "0"), 0) for uid in "abc"]
    common = cast(Any, pool), cast(Any, Words()), RandomJudge(0), params, StepTimer(), NoProgress(), Stop()
    rollouts = Rollouts(*common, on_group=report)
    rollouts.put(draws)
    pool.answer(order)
    assert [group.problem.uid for group in rollouts.take(3)] == ["a", "b", "c"]
    assert reported == ["a", "b", "c"]
    rollouts.put(draws, replace(params, stream="eval"))  # nobody needs log-probs of an evaluation
    pool.answer(order)
    rollouts.take(3)
    assert reported == ["a", "b", "c"]


class PromptPool(Pool):
    """Answers at once."""

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        futures = super().submit(requests)
        for request, (_, future) in zip(requests, self.futures, strict=True):
            record = Record.of(request.tokens, np.arange(2), np.zeros(2, np.float32))
            future.set_result(Completion(2, "stop", ((0, 0),), record))
        return futures


@pytest.mark.parametrize("number", [1500, pytest.param(50_000, marks=pytest.mark.slow)])
def test_memory_is_flat_however_many_groups_are_taken(number: int):
    """Two steps of 50 groups of 4 are in flight. The processor time a group is that of all threads; it is printed."""
    common = cast(Any, PromptPool()), cast(Any, Words()), RandomJudge(0), SamplingParams(n=4), StepTimer()
    rollouts, step = Rollouts(*common, NoProgress(), Stop(), window=8), 50

    def run(steps: int) -> None:
        for at in range(steps):
            rollouts.put([Draw(Problem(str(i), (), "0"), at) for i in range(step)])
            rollouts.take(step)

    def held() -> tuple[int, int]:
        gc.collect()
        return len(gc.get_objects()), psutil.Process().memory_info().rss

    rollouts.put([Draw(Problem(str(i), (), "0"), -1) for i in range(step)])
    run(10)
    (objects, size), start = held(), time.process_time()
    run(number // step)
    seconds = (time.process_time() - start) / number
    print(f"{1e6 * seconds:.0f} us a group of 4")
    more_objects, more_bytes = (now - before for now, before in zip(held(), (objects, size), strict=True))
    assert more_objects < 2000, "some tens of objects belong to a group in flight"
    assert more_bytes < 8 << 20
    assert len(rollouts.in_flight().draws) == step
