"""The engines as the controller sees them: started, lost, started again, and given prompts to sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from pekoe.core.config import RLConfig
from pekoe.core.errors import RunError
from pekoe.core.types import Problem, SamplingParams
from pekoe.core.view import View
from pekoe.run.cluster.engine_worker import EngineWorker, Report
from pekoe.run.cluster.nodes import Depots, Lost, engine_bundles, node_of, place, reason, within

POLL_S = 2.0
_MAX_FAILURES = 3  # of one engine in a row to start, after which it is given up


@dataclass(eq=False)
class Engine:
    """One engine. `starting` until its process is ready, `stale` until it has the current weights, then `serving`."""

    number: int
    group: Any
    actor: Any = None
    state: Literal["starting", "stale", "serving", "gone"] = "starting"
    starting: Any = None  # reference that is ready once the process is
    since: float = 0.0
    failures: int = 0
    rows: set[int] = field(default_factory=set[int])  # of the batch, not finished
    polled: Any = None
    heard: float = 0.0  # when it last got on
    num_tokens: int = -1
    pid: int = 0


class Engines:
    """All engines.

    Args:
        config: the recipe.
        depots: of the nodes.
        longest: tokens of the longest prompt with its response.
        asked: every kind of sampling that they will be asked for.
        view: hears of every engine that is lost or comes back.
    """

    def __init__(
        self,
        config: RLConfig,
        depots: Depots,
        longest: int,
        asked: Sequence[SamplingParams],
        view: View,
        stack: ExitStack,
    ) -> None:
        assert config.cluster is not None
        self._config, self._section, self._depots, self._view = config, config.cluster, depots, view
        self._longest, self._asked = longest, list(asked)
        self._batch = 0
        self.num_lost = 0
        self.bring: Callable[[list[Engine]], None] = lambda _: None  # gives engines the current weights (see `sync`)
        limit = self._section.start_limit_s
        self.all = [
            Engine(i, place([bundle], "PACK", f"engine {i}", limit, stack))
            for i, bundle in enumerate(engine_bundles(self._section))
        ]
        stack.callback(self.close)
        for engine in self.all:
            self._start(engine)

    def in_state(self, state: str) -> list[Engine]:
        return [engine for engine in self.all if engine.state == state]

    def _start(self, engine: Engine) -> None:
        one = self._section.generation
        number, depot = self._depots.on(node_of(engine.group, 0))
        engine.actor = (
            ray.remote(EngineWorker)
            .options(
                num_cpus=one.cpus_per_engine,
                num_gpus=engine.group.bundle_specs[0].get("GPU", 0),
                scheduling_strategy=within(engine.group, 0),
                max_concurrency=4,
            )
            .remote(self._config, engine.number, number, depot, self._longest, self._asked)
        )
        engine.state, engine.starting, engine.since = "starting", engine.actor.ready.remote(), time.monotonic()
        engine.polled, engine.num_tokens = None, -1

    def wait_ready(self) -> None:
        """Until all have started; an engine that does not, stops the run before it begins."""
        for engine in self.all:
            left = self._section.start_limit_s - (time.monotonic() - engine.since)
            try:
                engine.pid = ray.get(engine.starting, timeout=max(1.0, left))
            except (RayError, TimeoutError) as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, (RunError, ValueError)):
                    raise cause from None
                raise RunError(f"engine {engine.number} did not start: {reason(error)}") from None
            engine.state = "stale"

    def look_after(self) -> None:
        """Bring back engines whose process has started again; give up those that cannot."""
        for engine in self.in_state("starting"):
            if ray.wait([engine.starting], timeout=0)[0]:
                try:
                    engine.pid = ray.get(engine.starting)
                    engine.state, engine.failures = "stale", 0
                except RayError as error:
                    self.lose(engine, f"did not start: {reason(error)}")
            elif time.monotonic() - engine.since > self._section.start_limit_s:
                self.lose(engine, f"did not start within {self._section.start_limit_s:g} s")
        if stale := self.in_state("stale"):
            self.bring(stale)
            for engine in stale:
                if engine.state == "serving":
                    self._view.say(f"engine {engine.number} came back (process {engine.pid})")
        if not self.in_state("serving") and not self.in_state("starting"):
            raise RunError(f"all {len(self.all)} engines are gone; see the messages above")

    def lose(self, engine: Engine, why: str) -> None:
        """It serves no longer, and is started again."""
        self._view.say(f"engine {engine.number} is lost: {why}")
        self.num_lost += 1
        engine.failures += engine.state == "starting"
        ray.kill(engine.actor)
        if engine.failures >= _MAX_FAILURES:
            engine.state = "gone"
            return
        self._start(engine)

    # Sampling

    def begin(self, drawn: list[tuple[Problem, int]], params: SamplingParams) -> int:
        """Give a batch to the engines that serve; returns its number."""
        self._batch += 1
        self.look_after()
        self.give(list(range(len(drawn))), drawn, params)
        return self._batch

    def give(self, rows: list[int], drawn: list[tuple[Problem, int]], params: SamplingParams) -> list[int]:
        """Share rows out to the engines that serve, evenly by what they have. Returns rows that nobody took."""
        serving = self.in_state("serving")
        if not serving:
            return rows
        shares: dict[int, list[int]] = {engine.number: [] for engine in serving}
        for row in rows:
            least = min(serving, key=lambda engine: (len(engine.rows), engine.number))
            least.rows.add(row)
            shares[least.number].append(row)
        for engine in serving:
            if some := shares[engine.number]:
                engine.heard = time.monotonic()
                asked = [(row, *drawn[row]) for row in some]
                self._depots.count(asked)
                engine.actor.sample.remote(self._batch, asked, params)
        return []

    def poll(self) -> list[tuple[Engine, Report]]:
        """What engines with work have finished. Loses those that died, broke off, or are silent for too long."""
        for engine in self.in_state("serving"):
            if engine.rows and engine.polled is None:
                engine.polled = engine.actor.poll.remote(POLL_S)
        polled = [engine for engine in self.in_state("serving") if engine.polled is not None]
        if not polled:
            time.sleep(0.1)
            return []
        done, _ = ray.wait([engine.polled for engine in polled], timeout=POLL_S)
        reports: list[tuple[Engine, Report]] = []
        for engine in polled:
            if engine.polled in done:
                try:
                    report: Report = ray.get(engine.polled)
                except RayError as error:
                    self.lose(engine, reason(error))
                    continue
                engine.polled = None
                if report.error:
                    self.lose(engine, report.error)
                    continue
                if report.results or report.num_tokens != engine.num_tokens:
                    engine.heard, engine.num_tokens = time.monotonic(), report.num_tokens
                self._depots.count(report)
                if report.batch == self._batch:
                    reports.append((engine, report))
            if time.monotonic() - engine.heard > self._section.silence_limit_s:
                self.lose(engine, f"silent for {self._section.silence_limit_s:g} s")
        return reports

    def cancel(self) -> None:
        for engine in self.in_state("serving"):
            engine.rows.clear()
            engine.actor.cancel.remote()

    def close(self) -> None:
        for engine in self.all:
            if engine.actor is not None:
                ray.kill(engine.actor)


__all__ = ["Engine", "Engines", "Lost"]
