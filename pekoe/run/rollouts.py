"""Samples and judges: draws in, judged groups out. Training, evaluation and curation all use it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count, takewhile
from queue import Empty, SimpleQueue

from pekoe.agents.episodes import Attempt, Episodes
from pekoe.core.errors import RunError
from pekoe.core.loop import Counters
from pekoe.core.progress import ProgressReporter
from pekoe.core.types import Completion, Draw, JudgedGroup, Request, SamplingParams, Trajectory, Verdict
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine.base import requests_of
from pekoe.engine.pool import EnginePool
from pekoe.run.interrupt import StepTimer, Stop, StoppedInStep
from pekoe.run.judging import Judge, await_verdicts

_LOOK_S = 0.5  # between looks at the stop request while nothing finishes
_WAITING_S = 1.0  # between calls of `while_waiting`


@dataclass(slots=True, eq=False)
class _Group:
    """A group in flight."""

    draw: Draw
    params: SamplingParams
    order: int  # in which it was put
    trajectories: dict[int, Trajectory] = field(default_factory=dict[int, Trajectory])  # by sample index
    verdicts: dict[int, Future[Verdict]] = field(default_factory=dict[int, "Future[Verdict]"])

    @property
    def size(self) -> int:
        return self.params.n

    @property
    def sampled(self) -> bool:
        return len(self.trajectories) == self.size

    @property
    def judged(self) -> bool:
        return self.sampled and all(verdict.done() for verdict in self.verdicts.values())

    def judge(self, judge: Judge) -> JudgedGroup:
        """Wait for the verdicts of a group that is sampled."""
        verdicts = await_verdicts([self.verdicts[i] for i in range(self.size)], judge)
        trajectories = tuple(self.trajectories[i] for i in range(self.size))
        return JudgedGroup(self.draw.problem, self.draw.number, trajectories, tuple(verdicts))


@dataclass(frozen=True, slots=True)
class Flight:
    """Implements `core.loop.InFlight`."""

    groups: Sequence[_Group]
    judge: Judge

    @property
    def draws(self) -> list[Draw]:
        return [group.draw for group in self.groups]

    @property
    def places(self) -> list[int]:
        return [group.order - self.groups[0].order for group in self.groups]

    def sampled(self) -> list[JudgedGroup]:
        return [group.judge(self.judge) for group in self.groups if group.sampled]


_Finished = SimpleQueue[tuple[_Group, Trajectory, "Future[Verdict]"] | BaseException]


class Rollouts:
    """Implements `core.loop.Rollouts` on an engine pool and judges, in one process as on a cluster.

    Responses go to the judges as they finish, while others are still being sampled.

    Args:
        pool: samples. With one engine, what is put together is scheduled together.
        params: how training samples.
        timer: is given the phases "rollout" and "verify".
        while_waiting: called about once a second while `take` waits, when the trainer is idle.
        while_draining: called so while `drain` waits: the trainer's weights are newer than those that are wanted.
        on_group: called with each group of training, in the order in which they were put, as soon as it and those
            before it are sampled.
        offloads: whether engines and trainer take turns on the same devices.
        window: a group that is judged may overtake others, within so many from the oldest.
        at_once: responses that all engines together decode at a time, for the time left.
        episodes: of many turns, in place of single answers.
        adopt: brings the tokens of episodes, which are here, to where the trainer and the judges fetch them.
    """

    def __init__(
        self,
        pool: EnginePool,
        tokenizer: Tokenizer,
        judge: Judge,
        params: SamplingParams,
        timer: StepTimer,
        view: ProgressReporter,
        stop: Stop,
        while_waiting: Callable[[], None] = lambda: None,
        while_draining: Callable[[], None] = lambda: None,
        on_group: Callable[[Sequence[Trajectory]], None] | None = None,
        offloads: bool = False,
        window: int = 1,
        at_once: int = 1,
        episodes: Episodes | None = None,
        adopt: Callable[[Trajectory], Trajectory] = lambda trajectory: trajectory,
    ) -> None:
        self._pool, self._tokenizer, self._judge, self._params = pool, tokenizer, judge, params
        self._timer, self._view, self._stop = timer, view, stop
        self._while_waiting, self._while_draining = while_waiting, while_draining
        self._on_group, self._offloads, self._window = on_group, offloads, window
        self._at_once, self._episodes, self._adopt = at_once, episodes, adopt
        self._groups: deque[_Group] = deque()  # in the order in which they were put
        self._unreported: deque[_Group] = deque()  # those that `on_group` was not called with yet
        self._orders = count()
        self._finished: _Finished = SimpleQueue()
        self._to_judge = ThreadPoolExecutor(1, "to the judges")  # also while the caller trains
        self._waited = 0.0  # when a callback of those who wait was last called

    def put(self, draws: Sequence[Draw], params: SamplingParams | None = None) -> None:
        """See `core.loop.Rollouts`."""
        params = params or self._params
        self._begin([_Group(draw, params, next(self._orders)) for draw in draws], params)

    def _begin(self, groups: list[_Group], params: SamplingParams) -> None:
        requests: list[list[Request]] = []
        futures: Iterator[Future[Completion]] = iter(())
        if self._episodes is None:
            requests = [self._requests(group.draw, params) for group in groups]
            futures = iter(self._pool.submit([request for group in requests for request in group]))
        self._groups += groups
        if self._on_group is not None and params.stream == "train":
            self._unreported += groups
        if self._episodes is not None:
            attempts = self._episodes.begin([group.draw for group in groups], params)
            for group, its_attempts in zip(groups, attempts, strict=True):
                for attempt in its_attempts:
                    attempt.add_done_callback(partial(self._hand_over, self._finished, group, None))
            return
        for group, its_requests in zip(groups, requests, strict=True):
            for request in its_requests:
                next(futures).add_done_callback(partial(self._hand_over, self._finished, group, request))

    def _requests(self, draw: Draw, params: SamplingParams) -> list[Request]:
        prompt = self._tokenizer.encode_prompt(draw.problem.messages)
        return requests_of(draw.problem.uid, draw.number, prompt, params)

    def _hand_over(
        self, finished: _Finished, group: _Group, request: Request | None, future: Future[Completion] | Future[Attempt]
    ) -> None:
        """Called in a thread of an engine's, or of episodes, which has other things to do."""
        self._to_judge.submit(self._have_judged, finished, group, request, future)

    def _have_judged(
        self, finished: _Finished, group: _Group, request: Request | None, future: Future[Completion] | Future[Attempt]
    ) -> None:
        """Have what was sampled judged; errors are raised in `_receive`. What was cancelled is ignored."""
        if finished is not self._finished:
            return
        try:
            ended = future.result()
            if isinstance(ended, Attempt):
                finished.put((group, self._adopt(ended.trajectory), self._verdict(ended)))
                return
            assert request is not None
            trajectory = Trajectory.of(request, ended)
            finished.put((group, trajectory, self._judge.submit(group.draw.problem, trajectory)))
        except BaseException as error:
            finished.put(error)

    def _verdict(self, attempt: Attempt) -> Future[Verdict]:
        """The episode's own, or the judge's on its last turn."""
        if attempt.verdict is None:
            return self._judge.submit(attempt.problem, self._adopt(attempt.answer))
        verdict: Future[Verdict] = Future()
        verdict.set_result(attempt.verdict)
        return verdict

    def restore(self, draws: Sequence[Draw], places: Sequence[int], sampled: Sequence[JudgedGroup]) -> None:
        """See `core.loop.Rollouts`."""
        judged = {(group.problem.uid, group.draw): group for group in sampled}
        base = next(self._orders)
        for draw, place in zip(draws, places, strict=True):
            group = _Group(draw, self._params, base + place)
            if (known := judged.get((draw.problem.uid, draw.number))) is None:
                self._begin([group], self._params)
                continue
            group.trajectories = dict(enumerate(known.trajectories))
            for index, verdict in enumerate(known.verdicts):
                group.verdicts[index] = Future()
                group.verdicts[index].set_result(verdict)
            self._groups.append(group)
        self._orders = count(base + max(places, default=0) + 1)

    def take(self, n: int) -> list[JudgedGroup]:
        """See `core.loop.Rollouts`. StopRequested where the user asked to stop; everything in flight is dropped."""
        return list(self.stream(n))

    def stream(self, n: int) -> Iterator[JudgedGroup]:
        """As `take`; yields each group as soon as it is judged and its turn has come."""
        assert n <= len(self._groups), f"{n} groups are to be taken, {len(self._groups)} were put"
        wanted = [self._groups[i] for i in range(n)]
        left, last = n, wanted[-1].order if wanted else 0
        try:
            num_missing = sum(group.size - len(group.trajectories) for group in wanted)
            with self._timer("rollout", num_missing, self._at_once):
                while left:
                    self._stop.check()
                    judged = next((group for group in self._next() if group.judged), None)
                    if judged is not None:
                        left -= 1
                        yield self._pop(judged)
                    elif self._enough_sampled(left):
                        break
                    else:
                        self._receive(self._while_waiting, last)
            with self._timer("verify", left):
                for _ in range(left):
                    self._stop.check()
                    yield self._pop(next(self._next()))
                    self._view.advance()
        except BaseException:  # also where the caller stops iterating
            self.cancel()
            raise

    def drain(self) -> None:
        """See `core.loop.Rollouts`. StoppedInStep some seconds after the user asked to stop."""
        with self._timer("rollout"):
            while not all(group.sampled for group in self._groups):
                if self._stop.overdue():
                    self.cancel()
                    raise StoppedInStep
                self._receive(self._while_draining)

    def _next(self) -> Iterator[_Group]:
        """Groups that are sampled and whose turn it is: within the window from the oldest."""
        end = self._groups[0].order + self._window
        return (group for group in takewhile(lambda group: group.order < end, self._groups) if group.sampled)

    def _enough_sampled(self, n: int) -> bool:
        """Whether `n` groups can be given out without another being sampled."""
        oldest = next((group.order for group in self._groups if not group.sampled), None)
        end = float("inf") if oldest is None else oldest + self._window
        return sum(group.sampled for group in takewhile(lambda group: group.order < end, self._groups)) >= n

    def _receive(self, while_waiting: Callable[[], None], last: int = -1) -> None:
        """Wait a moment for a completion. Progress is that of groups put up to `last`."""
        if self._episodes is not None:
            self._episodes.check()
        if time.monotonic() - self._waited > _WAITING_S:
            while_waiting()
            self._waited = time.monotonic()
        try:
            finished = self._finished.get(timeout=_LOOK_S)
        except Empty:
            return
        if isinstance(finished, BaseException):
            raise finished
        group, trajectory, verdict = finished
        group.verdicts[trajectory.sample] = verdict
        group.trajectories[trajectory.sample] = trajectory
        if group.order <= last:
            self._view.advance(share=trajectory.num_tokens / group.params.max_new_tokens)
        while self._on_group is not None and self._unreported and self._unreported[0].sampled:
            first = self._unreported.popleft()
            self._on_group([first.trajectories[i] for i in range(first.size)])

    def _pop(self, group: _Group) -> JudgedGroup:
        """A group that is sampled, when it is judged."""
        judged = group.judge(self._judge)
        self._groups.remove(group)
        return judged

    def in_flight(self) -> Flight:
        return Flight(tuple(self._groups), self._judge)

    def cancel(self) -> None:
        """See `core.loop.Rollouts`. What the engines still finish is ignored."""
        self._groups.clear()
        self._unreported.clear()
        self._finished = SimpleQueue()
        if self._episodes is not None:
            self._episodes.cancel()
        self._pool.abort()

    def flush_cache(self) -> None:
        self._pool.flush_cache()

    def offload(self) -> None:
        if self._offloads:
            self._pool.offload()

    def counters(self) -> Counters:
        """Tokens, forwards and preemptions of all engines, by the journal's names; engines that serve and were lost."""
        stats = self._pool.stats()
        return {
            "prefill_tokens": stats.num_prefill_tokens,
            "cached_tokens": stats.num_cached_tokens,
            "shared_tokens": stats.num_shared_tokens,
            "num_preemptions": stats.num_preemptions,
            "num_forwards": stats.num_forwards,
            "num_retries": stats.num_retries,
            "engines_busy_s": stats.busy_s,
            "num_engines": len(self._pool.in_state("serving")),
            "num_lost_engines": self._pool.num_lost,
        }


@dataclass(slots=True)
class Batch:
    """The groups of one step, in the order of their draws, and those that dynamic sampling dropped."""

    groups: list[JudgedGroup] = field(default_factory=list[JudgedGroup])
    dropped: list[tuple[JudgedGroup, str]] = field(default_factory=list[tuple[JudgedGroup, str]])  # with the reason
    num_rounds: int = 0

    def everything(self) -> Iterator[JudgedGroup]:
        yield from self.groups
        yield from (group for group, _ in self.dropped)

    def verdicts(self) -> Iterator[Verdict]:
        return (verdict for group in self.everything() for verdict in group.verdicts)


def check_faults(verdicts: Iterable[Verdict], max_rate: float) -> float:
    """Return the share of FAULT verdicts; RunError where it is above `max_rate` (I9)."""
    verdicts = list(verdicts)
    faults = [v for v in verdicts if v.label == "fault"]
    rate = len(faults) / max(1, len(verdicts))
    if rate > max_rate:
        raise RunError(
            f"verifier: {len(faults)} of {len(verdicts)} verdicts are FAULT ({rate:.1%}), more than "
            f"verify.max_fault_rate = {max_rate:.1%} allows. The first: {faults[0].why}"
        )
    return rate
