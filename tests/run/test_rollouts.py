"""Groups are reported as they are sampled, in the order in which they were put."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, cast

import numpy as np
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
