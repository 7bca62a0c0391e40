"""The engines as the controller sees them: started, lost, started again, and given prompts to sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from pekoe.config.recipes import RLConfig
from pekoe.core.errors import RunError
from pekoe.core.progress import ProgressReporter, track
from pekoe.core.types import Problem, SamplingParams
from pekoe.engine.fingerprints import Kind
from pekoe.ray.engine_actor import EngineWorker, Report
from pekoe.ray.placement import StoreRegistry, engine_bundles, node_of, place, reason, within

POLL_S = 2.0
_LOOK_S = 1.0  # between looks for a lost engine's node
_CLOSE_LIMIT_S = 20.0  # then it is killed
_MAX_FAILURES = 5  # of one engine, without a response between them, after which it is given up


@dataclass(eq=False)
class Engine:
    """One engine. `starting` until its process is ready, `stale` until it has the current weights, then `serving`;
    `homeless` while its node is lost and no other has room."""

    number: int
    kind: Kind
    place: PlacementGroup
    bundle: int  # of the placement group
    devices: str | None = None  # CUDA_VISIBLE_DEVICES, where they are its ranks' (colocate)
    actor: Any = None
    state: Literal["starting", "stale", "serving", "homeless", "gone"] = "starting"
    starting: Any = None  # reference that is ready once the process is
    since: float = 0.0
    failures: int = 0
    rows: set[int] = field(default_factory=set[int])  # of the batch, not finished
    polled: Any = None
    heard: float = 0.0  # when it last got on
    signs_of_life: int = -1
    busy_s: float = 0.0  # as it said last; `Engines.busy_s` is the sum over all that ever were
    resting: bool = False  # its memory is the ranks'
    pid: int = 0
    num_workers: int = 1


class Engines:
    """All engines.

    Args:
        config: the recipe.
        depots: of the nodes.
        longest: tokens of the longest prompt with its response.
        asked: every kind of sampling that they will be asked for.
        view: hears of every engine that is lost or comes back.
        shared: where engines and ranks take turns: the ranks' placement, and the devices of each of its bundles.
    """

    def __init__(
        self,
        config: RLConfig,
        depots: StoreRegistry,
        longest: int,
        asked: Sequence[SamplingParams],
        view: ProgressReporter,
        stack: ExitStack,
        shared: tuple[PlacementGroup, list[str]] | None = None,
    ) -> None:
        assert config.cluster is not None
        self._config, self._section, self._depots, self._view = config, config.cluster, depots, view
        self._longest, self._asked = longest, list(asked)
        self._batch = 0
        self.num_lost, self.busy_s, self._num_started = 0, 0.0, 0
        self._nobody_since = 0.0  # when the last engine's node was lost; 0: there is one
        self.bring: Callable[[list[Engine]], None] = lambda _: None  # gives engines the current weights (see `sync`)
        limit = self._section.start_limit_s
        self.all: list[Engine] = []
        for i, bundle in enumerate(engine_bundles(self._section)):
            kind = config.kind_of_engine(i)
            if shared is not None:
                self.all.append(Engine(i, kind, shared[0], i, shared[1][i]))
            else:
                self.all.append(Engine(i, kind, place([bundle], "PACK", f"engine {i}", limit, stack), 0))
        stack.callback(self.close)
        for engine in self.all:
            self._start(engine)

    def in_state(self, state: str) -> list[Engine]:
        return [engine for engine in self.all if engine.state == state]

    def _start(self, engine: Engine) -> None:
        one = self._section.generation
        node = node_of(engine.place, engine.bundle)
        if node is None:
            engine.state, engine.since = "homeless", time.monotonic()
            return
        number, depot = self._depots.on(node)
        self._num_started += 1
        seen = {} if engine.devices is None else {"CUDA_VISIBLE_DEVICES": engine.devices}
        engine.actor = (
            ray.remote(EngineWorker)
            .options(
                num_cpus=one.cpus_per_engine,
                num_gpus=0 if engine.devices is not None else one.gpus_per_engine,
                runtime_env={"env_vars": seen},
                scheduling_strategy=within(engine.place, engine.bundle),
                max_concurrency=4,
            )
            .remote(self._config, engine.number, self._num_started, number, depot, self._longest, self._asked)
        )
        engine.state, engine.starting, engine.since = "starting", engine.actor.ready.remote(), time.monotonic()
        engine.polled, engine.signs_of_life, engine.busy_s = None, -1, 0.0

    def wait_ready(self) -> None:
        """Until all have started; an engine that does not, stops the run before it begins."""
        for engine in track(self._view, "engines", self.all):
            left = self._section.start_limit_s - (time.monotonic() - engine.since)
            try:
                engine.pid, engine.num_workers = ray.get(engine.starting, timeout=max(1.0, left))
            except (RayError, TimeoutError) as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, (RunError, ValueError)):
                    raise cause from None
                raise RunError(f"engine {engine.number} did not start: {reason(error)}") from None
            engine.state = "stale"

    def look_after(self) -> None:
        """Bring back engines whose process has started again; give up those that cannot."""
        for engine in self.in_state("homeless"):
            if time.monotonic() - engine.since > _LOOK_S:
                self._start(engine)
        for engine in self.in_state("starting"):
            if ray.wait([engine.starting], timeout=0)[0]:
                try:
                    engine.pid, engine.num_workers = ray.get(engine.starting)
                    engine.state = "stale"
                except RayError as error:
                    self.lose(engine, f"did not start: {reason(error)}")
            elif time.monotonic() - engine.since > self._section.start_limit_s:
                self.lose(engine, f"did not start within {self._section.start_limit_s:g} s")
        if stale := self.in_state("stale"):
            self.bring(stale)
            for engine in self.in_state("serving"):
                engine.heard = time.monotonic()  # nobody listened meanwhile
            for engine in stale:
                if engine.state == "serving":
                    self._view.say(f"engine {engine.number} came back (process {engine.pid})")
        if self.in_state("serving") or self.in_state("starting"):
            self._nobody_since = 0.0
            return
        self._nobody_since = self._nobody_since or time.monotonic()
        limit_s = self._section.start_limit_s
        if not self.in_state("homeless"):
            raise RunError(f"all {len(self.all)} engines are gone; see the messages above")
        if time.monotonic() - self._nobody_since > limit_s:
            raise RunError(f"waited {limit_s:g} s for a node with room for an engine: those of all engines are lost")

    def lose(self, engine: Engine, why: str) -> None:
        """It serves no longer, and is started again."""
        self._view.say(f"engine {engine.number} is lost: {why}")
        self.num_lost += 1
        engine.failures += 1
        engine.resting = False
        engine.rows.clear()  # others take them
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
        for engine in self.all:
            engine.rows.clear()
        self.give(list(range(len(drawn))), drawn, params)
        return self._batch

    def give(self, rows: list[int], drawn: list[tuple[Problem, int]], params: SamplingParams) -> None:
        """Share rows out to the engines that serve, evenly by what they have. Where none does, nobody has them yet."""
        serving = self.in_state("serving")
        if not serving:
            return
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
                if report.results or report.signs_of_life != engine.signs_of_life:
                    engine.heard, engine.signs_of_life = time.monotonic(), report.signs_of_life
                if report.results:
                    engine.failures = 0
                self.busy_s += report.busy_s - engine.busy_s
                engine.busy_s = report.busy_s
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

    # Turns

    def release(self) -> None:
        """Give the devices to the ranks. An engine that does not let go is lost."""
        awake = [engine for engine in self.in_state("serving") if not engine.resting]
        self._turn("release", awake, True)

    def restore(self) -> None:
        """Take them back; weights must be brought before anything is sampled."""
        self._turn("restore", [engine for engine in self.all if engine.resting], False)

    def _turn(self, method: str, engines: list[Engine], resting: bool) -> None:
        end = time.monotonic() + self._section.sync_limit_s
        refs = [getattr(engine.actor, method).remote() for engine in engines]
        for engine, ref in zip(engines, refs, strict=True):
            try:
                ray.get(ref, timeout=max(0.1, end - time.monotonic()))
                engine.resting = resting
            except (RayError, TimeoutError) as error:
                self.lose(engine, f"{method}: {reason(error)}")

    def close(self) -> None:
        closing = [e.actor.close.remote() for e in self.all if e.state in ("stale", "serving")]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_LIMIT_S)
        for engine in self.all:
            if engine.actor is not None:
                ray.kill(engine.actor)
