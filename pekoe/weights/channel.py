"""One channel for weights: every route, every kind of engine, one proof. Implements `core.loop.Weights`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_futures
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Literal, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch

from pekoe.core.errors import RunError
from pekoe.core.loop import ChecksumResult, Counters, Route, SyncReport
from pekoe.core.types import Completion, FloatArray, IntArray, Sample
from pekoe.engine.base import Broadcast, BroadcastGroup, Checksums, Engine, EngineKind, EngineLost, requests_of
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.engine.pool import EnginePool, Member, State
from pekoe.model import LanguageModel
from pekoe.weights.checksums import differing
from pekoe.weights.groups import new_group
from pekoe.weights.proof import TOLERANCE, TOLERANCE_BF16, Canary, History, canary_params, sample_of
from pekoe.weights.transport import SHARED_MEMORY, directory

_JOIN_LIMIT_S = 60.0
_ATTEMPTS = 5
_LOOK_S = 0.1
_STOP_S = 5.0  # that engines have to answer after the user asked to stop

T = TypeVar("T")


class _Stopped(Exception):
    """The user asked to stop, and engines do not answer."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A member with the engine that is updated: a member that is lost meanwhile comes back with another one."""

    member: Member
    engine: Engine

    @property
    def alive(self) -> bool:
        return self.member.current is self.engine


class Sender(Protocol):
    """The trainer's side of the channel. `model` is None where it is in other processes."""

    @property
    def model(self) -> LanguageModel | None: ...

    @property
    def compute_dtype(self) -> torch.dtype: ...

    def stage(self) -> bool:
        """Begin a version. Returns whether the weights were copied: the trainer may train on while they are sent."""
        ...

    def address(self) -> tuple[str, int]:
        """Where rank 0 of a broadcast group would listen: host and free port."""
        ...

    def open(self, kind: EngineKind, group: BroadcastGroup) -> None:
        """Join a group with engines of one kind as rank 0, and leave the one before; blocks until all have joined."""
        ...

    def broadcast(self, kind: EngineKind, bucket_bytes: int, checksum: bool) -> int:
        """Send all weights to the group; returns the bytes. RunError where an engine broke off."""
        ...

    def write(self, place: Path, kinds: Sequence[EngineKind], checksum: bool) -> int:
        """Write the weights as a Hugging Face directory; returns its bytes."""
        ...

    def checksums(self, kind: EngineKind) -> Checksums | None:
        """What engines of this kind should report, after `broadcast` or `write` with `checksum`, or where nothing was
        sent; None: theirs are not comparable."""
        ...

    def logprobs(self, samples: Sequence[Sample], /) -> Sequence[FloatArray]: ...


class WeightChannel:
    """Publishes the trainer's weights to the engines of a pool.

    Args:
        route: alias: the embedded engine samples from the trainer's own parameters.
        canary: the tokens of a prompt that is sampled after each update, by every engine.
        temperature: of the run's sampling, at which the trainer's log-probs are.
        checksum_every: publishes from one checksum over all parameters to the next; the first two have one (what the
            run starts from, and the first that training made).
        limit_s: of one update of an engine.
        folder: for weights that go over the disk.
        bucket_bytes: weights are gathered, sent and loaded in pieces of this size.
        backend: of broadcast groups.
        stopping: whether the user asked to stop. Engines that do not answer then are not waited for, but for a
            broadcast that has begun, which has limits of its own (60 s to open, then `limit_s`); a publish is not
            proven, and the next run begins with one.
    """

    def __init__(
        self,
        pool: EnginePool,
        sender: Sender,
        *,
        route: Route,
        canary: IntArray,
        temperature: float,
        checksum_every: int,
        limit_s: float,
        folder: Path,
        bucket_bytes: int = 256 << 20,
        backend: Literal["gloo", "nccl"] = "gloo",
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.route: Route = route
        self._pool, self._sender = pool, sender
        self._canary, self._temperature = canary, temperature
        self._checksum_every, self._limit_s, self._folder = checksum_every, limit_s, folder.resolve()
        self._bucket_bytes, self._backend = bucket_bytes, backend
        self._stopping, self._stopped_at = stopping, 0.0
        self._bf16 = sender.compute_dtype is torch.bfloat16
        self._version = -1  # none yet
        self._count = 0
        self._gave_up = False  # whether all engines were started again since an update last went well
        self._groups: dict[EngineKind, tuple[BroadcastGroup, list[Engine]]] = {}  # open ones, with their engines
        self._histories: WeakKeyDictionary[Engine, History] = WeakKeyDictionary()
        self._unknown = False  # whether an engine could not give a checksum in the publish in hand
        self._num_bytes, self._send_s = 0, 0.0
        self._thread = ThreadPoolExecutor(1, "publish")
        self._sending: Future[SyncReport] | None = None  # a publish that nobody waits for yet
        self._last: SyncReport | None = None

    def publish(self, version: int, wait: bool = True) -> SyncReport:
        """See `core.loop.Weights`. Members that die meanwhile are lost; the others go on."""
        before = self.settle()
        copied = self._sender.stage()
        self._pool.onload()
        self._pool.stale()  # requests from now on wait for this version
        if wait or not copied or before is None:
            self._last = self._publish(version)
            return self._last
        self._sending = self._thread.submit(lambda: replace(self._publish(version), completed=time.time()))
        return before

    def settle(self) -> SyncReport | None:
        """See `core.loop.Weights`."""
        sending, self._sending = self._sending, None
        if sending is not None:
            self._last = sending.result()  # each part of it has its limit
        return self._last

    def _publish(self, version: int) -> SyncReport:
        start, sent = time.perf_counter(), self._num_bytes
        self._version, self._unknown = version, False
        due = self._count < 2 or self._count % self._checksum_every == 0
        self._count += 1
        diff: float | None = 0.0
        try:
            while not self._pool.in_state("serving"):
                if targets := self._targets("stale"):
                    diff = max(diff, self._update(targets, due))
                else:
                    self._pool.check_alive()
                    self._check_stopping()
                    time.sleep(_LOOK_S)
        except _Stopped:
            diff, due = None, False
        checksum: ChecksumResult = "skipped" if not due else "unknown" if self._unknown else "equal"
        seconds = time.perf_counter() - start
        return SyncReport(version, self.route, seconds, self._num_bytes - sent, diff, checksum)

    def catch_up(self) -> None:
        """Engines that came back get the current weights. Called where the trainer does not change them, or keeps a
        copy. Raises what a publish that nobody waited for raised."""
        if self._sending is not None:
            if not self._sending.done():
                return
            self.settle()
        targets = [target for target in self._targets("stale") if not target.member.offloaded]
        if targets and self._version >= 0:
            with contextlib.suppress(_Stopped):
                self._update(targets, True)

    def prove(self, version: int) -> None:
        """Prove that engines which serve hold the trainer's weights as `version`, without sending them."""
        self._version = version
        with contextlib.suppress(_Stopped):
            self._prove(self._targets("serving"), True)

    def forget(self) -> None:
        """The trainer's processes are others, and a publish by those before has failed."""
        sending, self._sending = self._sending, None
        if sending is not None:
            wait_futures([sending])  # each part of it has its limit
        self._groups = {}

    def counters(self) -> Counters:
        return {"sync_send_s": self._send_s}

    # Engines, each asked in a thread

    def _targets(self, state: State) -> list[_Target]:
        members = ((member, member.current) for member in self._pool.in_state(state))
        return [_Target(member, engine) for member, engine in members if engine is not None]

    def _lose(self, target: _Target, why: str) -> None:
        self._pool.lose(target.member, f"weight sync: {why}", target.engine)

    def _begin(self, targets: list[_Target], action: Callable[[_Target], T]) -> dict[_Target, Future[T]]:
        threads = ThreadPoolExecutor(max(1, len(targets)), thread_name_prefix="weight sync")
        begun = {target: threads.submit(action, target) for target in targets}
        threads.shutdown(wait=False)
        return begun

    def _settle(self, begun: dict[_Target, Future[T]]) -> tuple[dict[_Target, T], str]:
        """Wait for all; members that died, or do not answer, are lost. Returns results, and errors of living ones."""
        results: dict[_Target, T] = {}
        errors: list[str] = []
        end = time.monotonic() + self._limit_s + _JOIN_LIMIT_S
        for target, future in begun.items():
            try:
                results[target] = self._wait(future, end)
            except EngineLost as error:
                self._lose(target, str(error))
            except TimeoutError:
                self._lose(target, f"expected an answer within {self._limit_s:g} s")
            except RuntimeError as error:
                errors.append(f"{target.member.name}: {error}")
        return {target: result for target, result in results.items() if target.alive}, "\n".join(errors)

    def _wait(self, future: Future[T], end: float) -> T:
        """Its result; TimeoutError after `end`, _Stopped some seconds after the user asked to stop."""
        while not future.done():
            wait_futures([future], _LOOK_S)
            if time.monotonic() > end:
                break
            self._check_stopping()
        return future.result(0)

    def _check_stopping(self) -> None:
        if self._stopping():
            self._stopped_at = self._stopped_at or time.monotonic()
            if time.monotonic() - self._stopped_at > _STOP_S:
                raise _Stopped

    # Sending

    def _update(self, targets: list[_Target], checksum: bool) -> float:
        """Send the weights and prove them; members that hold them serve. Returns the largest canary difference.

        Embedded engines and servers take broadcasts in different forms, so each kind has a turn.
        """
        parts = [targets]
        if self.route == "broadcast":
            parts = [[target for target in targets if target.member.kind == kind] for kind in _kinds(targets)]
        return max(self._attempt(part, checksum) for part in parts)

    def _attempt(self, targets: list[_Target], checksum: bool) -> float:
        """As `_update`. Where sending fails again and again all these engines are started again, once."""
        error = ""
        for _ in range(_ATTEMPTS):
            targets = [target for target in targets if target.alive]
            if not targets:
                return 0.0
            start = time.perf_counter()
            error = self._send(targets, checksum)
            self._send_s += time.perf_counter() - start
            if not error:
                self._gave_up = False
                return self._prove([target for target in targets if target.alive], checksum)
            for target in targets:
                if target.alive and not target.engine.health():
                    self._lose(target, "it does not answer")
        error = f"{_ATTEMPTS} attempts to send version {self._version} failed: {error}"
        if self._gave_up:
            raise RunError(f"weight sync: {error}")
        self._gave_up = True
        for target in targets:
            self._lose(target, error)
        return 0.0

    def _send(self, targets: list[_Target], checksum: bool) -> str:
        """Give these members the weights. Returns what went wrong at a living one: it may be tried again then."""
        if self.route == "broadcast":
            return self._broadcast(targets, checksum)
        if self.route in ("alias", "copy"):
            assert self._sender.model is not None, f"route {self.route!r} is for one process"
            return self._load(targets, self._sender.model)
        with directory(SHARED_MEMORY if self.route == "shm" else self._folder) as place:
            self._num_bytes += self._sender.write(place, _kinds(targets), checksum)
            return self._load(targets, place)

    def _load(self, targets: list[_Target], source: LanguageModel | Path) -> str:
        version = self._version
        return self._settle(self._begin(targets, lambda target: target.engine.update_weights(source, version)))[1]

    def _broadcast(self, targets: list[_Target], checksum: bool) -> str:
        """Send to all of one kind, in one group with rank 0; it stays open while its members are the same."""
        kind, version, size = targets[0].member.kind, self._version, self._bucket_bytes
        engines = [target.engine for target in targets]
        workers, broken = self._settle(self._begin(targets, lambda target: target.engine.num_workers))
        if len(workers) < len(targets):
            return broken or "an engine does not answer"
        ranks = list(accumulate(workers.values(), initial=1))
        group, joined = self._groups.pop(kind, (None, []))
        fresh = group is None or joined != engines
        if group is None or fresh:
            group = new_group(*self._sender.address(), ranks[-1], self._backend, min(_JOIN_LIMIT_S, self._limit_s))
        places = [replace(group, first_rank=rank) for rank in ranks[:-1]]
        sources = {target: Broadcast(place, size) for target, place in zip(workers, places, strict=True)}
        coming = self._begin(targets, lambda target: target.engine.update_weights(sources[target], version))
        try:
            if fresh:
                self._sender.open(kind, group)
            self._num_bytes += self._sender.broadcast(kind, size, checksum)
        except RuntimeError as error:  # RunError, and what torch.distributed raises
            broken = str(error)
        broken = self._settle(coming)[1] or broken
        if not broken:  # a group that broke off is of no use
            self._groups[kind] = group, engines
        return broken

    # Proof

    def _prove(self, targets: list[_Target], checksum: bool) -> float:
        """I4: version, canary, and where it is due every parameter. Members that hold the weights serve."""
        kinds = _kinds(targets) if checksum and self.route != "alias" else []
        expected: dict[EngineKind, Checksums | None] = {kind: self._sender.checksums(kind) for kind in kinds}
        answers, error = self._settle(self._begin(targets, lambda target: self._ask(target, expected, checksum)))
        if error:
            raise RunError(f"weight sync: {error}")
        samples = [sample_of(completion) for completions, _ in answers.values() for completion in completions]
        pairs = zip(samples, self._sender.logprobs(samples) if samples else [], strict=True)
        diffs = [0.0]
        for target, (completions, wrong) in answers.items():
            canary = Canary.of(list(islice(pairs, len(completions))), len(samples))
            self._check_canary(target, completions, canary)
            if wrong:
                more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise RunError(
                    f"weight sync: expected {target.member.name} at version {self._version} to hold the trainer's "
                    f"parameters bit by bit, got others in {', '.join(wrong[:3])}{more}: their checksums differ"
                )
            diffs.append(canary.difference)
            self._pool.serve(target.member, target.engine)
        return max(diffs)

    def _ask(
        self, target: _Target, expected: Mapping[EngineKind, Checksums | None], checksum: bool
    ) -> tuple[list[Completion], list[str]]:
        """Responses to the canary, and names of parameters that an engine should hold and does not."""
        engine = target.engine
        params = canary_params(self._canary, self._temperature, self._bf16, engine.max_sequence_tokens)
        futures = engine.submit(requests_of("canary", 0, self._canary, params, priority=1))
        completions = [future.result(self._limit_s) for future in futures]
        engine.flush_cache()  # the canary leaves nothing that later sampling would meet
        if not checksum:
            return completions, []
        if self.route == "alias":
            assert isinstance(engine, EmbeddedEngine)
            assert self._sender.model is not None
            return completions, [] if engine.holds(self._sender.model) else ["some"]
        held, wanted = engine.checksums(), expected[target.member.kind]
        self._unknown |= held is None or wanted is None
        return completions, [] if held is None or wanted is None else differing(wanted, held)

    def _check_canary(self, target: _Target, completions: list[Completion], canary: Canary) -> None:
        name, limit = target.member.name, TOLERANCE_BF16 if self._bf16 else TOLERANCE
        versions = {target.engine.version} | {v for completion in completions for v, _ in completion.versions}
        if versions != {self._version} or not canary.difference <= limit:
            raise RunError(
                f"weight sync: expected {name} at version {self._version} with log-probs within {limit} of the "
                f"trainer's, got version {' and '.join(map(str, sorted(versions)))} and {canary.difference}"
            )
        if self._histories.setdefault(target.engine, History()).stayed(canary):
            raise RunError(
                f"weight sync: expected {name} to sample from version {self._version}, got log-probs of a version "
                f"before: they did not move with the trainer's"
            )


def _kinds(targets: list[_Target]) -> list[EngineKind]:
    return list(dict.fromkeys(target.member.kind for target in targets))
