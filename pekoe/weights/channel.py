"""One channel for weights: every route, every kind of engine, one proof. Implements `core.loop.Weights`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from pekoe.core.errors import RunError
from pekoe.core.loop import ChecksumResult, Counters, Route, SyncReport
from pekoe.core.types import Completion, FloatArray, IntArray, Sample
from pekoe.engine.base import Broadcast, BroadcastGroup, Checksums, EngineKind, EngineLost, WeightSource, requests_of
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.engine.pool import EnginePool, Member
from pekoe.model import Decoder
from pekoe.weights.checksums import differing
from pekoe.weights.groups import new_group
from pekoe.weights.proof import TOLERANCE, TOLERANCE_BF16, Canary, canary_params, moved_along, sample_of
from pekoe.weights.transport import SHARED_MEMORY, directory

_JOIN_LIMIT_S = 60.0
_ATTEMPTS = 5
_LOOK_S = 0.1


class Sender(Protocol):
    """The trainer's side of the channel."""

    model: Decoder | None  # where it is in this process
    compute_dtype: torch.dtype

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
        """What engines of this kind should report of the weights; None: theirs are not comparable. Asked after
        `broadcast` or `write` with `checksum`, or where nothing was sent."""
        ...

    def logprobs(self, samples: Sequence[Sample]) -> Sequence[FloatArray]: ...


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
    ) -> None:
        self._pool, self._sender, self.route = pool, sender, route
        self._canary, self._temperature = canary, temperature
        self._checksum_every, self._limit_s, self._folder = checksum_every, limit_s, folder.resolve()
        self._bucket_bytes, self._backend = bucket_bytes, backend
        self._bf16 = sender.compute_dtype is torch.bfloat16
        self._version: int | None = None
        self._count = 0
        self._groups: dict[EngineKind, tuple[BroadcastGroup, list[object]]] = {}  # open ones, with their engines
        self._canaries: dict[int, tuple[object, Canary]] = {}  # the last of each member, with its engine
        self._unknown = False  # whether an engine could not give a checksum in the publish in hand
        self._num_bytes, self._send_s = 0, 0.0

    def publish(self, version: int) -> SyncReport:
        """See `core.loop.Weights`. Members that die meanwhile are lost; the others go on."""
        start, sent = time.perf_counter(), self._num_bytes
        self._version, self._unknown = version, False
        due = self._count < 2 or self._count % self._checksum_every == 0
        self._count += 1
        self._pool.onload()
        self._pool.stale()
        diff = 0.0
        while not self._pool.in_state("serving"):
            if stale := self._pool.in_state("stale"):
                diff = max(diff, self._update(stale, due))
            else:
                self._pool.check_alive()
                time.sleep(_LOOK_S)
        checksum: ChecksumResult = "skipped" if not due else "unknown" if self._unknown else "equal"
        seconds = time.perf_counter() - start
        return SyncReport(version, self.route, seconds, self._num_bytes - sent, diff, checksum)

    def catch_up(self) -> None:
        """Engines that came back get the current weights. Called where the trainer does not change them."""
        stale = [member for member in self._pool.in_state("stale") if not member.offloaded]
        if stale and self._version is not None:
            self._update(stale, True)

    def prove(self, version: int) -> None:
        """Prove that engines which serve hold the trainer's weights as `version`, without sending them."""
        self._version = version
        self._prove(self._pool.in_state("serving"), True)

    def forget_groups(self) -> None:
        """The trainer's processes are others."""
        self._groups = {}

    def counters(self) -> Counters:
        return {"sync_send_s": self._send_s}

    # Sending

    def _update(self, members: Sequence[Member], checksum: bool) -> float:
        """Send the weights and prove them, kind by kind; members that hold them serve. Returns the largest canary
        difference."""
        diffs = [0.0]
        for kind in dict.fromkeys(member.kind for member in members):
            diffs.append(self._attempt([member for member in members if member.kind == kind], checksum))
        return float(np.max(diffs))

    def _attempt(self, members: list[Member], checksum: bool) -> float:
        error: RunError | None = None
        for _ in range(_ATTEMPTS):
            members = [member for member in members if member.state == "stale"]
            if not members:
                return 0.0
            start = time.perf_counter()
            try:
                self._send(members, checksum)
                self._send_s += time.perf_counter() - start
                return self._prove([member for member in members if member.state == "stale"], checksum)
            except _BrokenOff as broken:
                error = broken
                self._groups.pop(members[0].kind, None)
                for member in members:
                    if member.state == "stale" and not member.engine.health():
                        self._pool.lose(member, "weight sync: it does not answer")
        raise RunError(f"weight sync: {_ATTEMPTS} attempts to send version {self._version} failed: {error}")

    def _send(self, members: list[Member], checksum: bool) -> None:
        """Give these members, all of one kind, the weights. _BrokenOff where it may be tried again."""
        kind = members[0].kind
        if self.route in ("alias", "copy"):
            assert self._sender.model is not None, f"route {self.route!r} is for one process"
            self._load(members, self._sender.model)
        elif self.route == "broadcast":
            self._broadcast(members, kind, checksum)
        else:
            with directory(SHARED_MEMORY if self.route == "shm" else self._folder) as place:
                self._num_bytes += self._sender.write(place, [kind], checksum)
                self._load(members, place)

    def _load(self, members: list[Member], source: WeightSource) -> None:
        errors = self._settle(members, self._begin(members, lambda _: source))
        if errors:
            raise RunError("\n".join(errors))

    def _broadcast(self, members: list[Member], kind: EngineKind, checksum: bool) -> None:
        engines: list[object] = [member.engine for member in members]
        group, joined = self._groups.get(kind, (None, []))
        fresh = group is None or joined != engines
        ranks = [1]
        for member in members:
            ranks.append(ranks[-1] + member.engine.num_workers)
        if group is None or fresh:
            host, port = self._sender.address()
            limit_s = min(_JOIN_LIMIT_S, self._limit_s) if fresh else self._limit_s
            group = new_group(host, port, ranks[-1], self._backend, limit_s)
        first = dict(zip((member.number for member in members), ranks, strict=False))
        source = group
        coming = self._begin(
            members, lambda m: Broadcast(replace(source, first_rank=first[m.number]), self._bucket_bytes)
        )
        error: Exception | None = None
        try:
            if fresh:
                self._sender.open(kind, group)
            self._num_bytes += self._sender.broadcast(kind, self._bucket_bytes, checksum)
        except RuntimeError as broken:  # RunError, and what torch.distributed raises
            error = broken
        errors = self._settle(members, coming)
        if error is not None or errors:
            raise _BrokenOff(str(error) if error is not None else "\n".join(errors))
        self._groups[kind] = group, engines

    def _begin(self, members: list[Member], source: Callable[[Member], WeightSource]) -> list[Future[None]]:
        """Have all members update at once, each in a thread."""
        assert self._version is not None
        threads = ThreadPoolExecutor(len(members), thread_name_prefix="weight update")
        begun = [threads.submit(m.engine.update_weights, source(m), self._version) for m in members]
        threads.shutdown(wait=False)
        return begun

    def _settle(self, members: list[Member], updates: list[Future[None]]) -> list[str]:
        """Wait for all; members that died, or do not answer, are lost. Returns what living ones say went wrong."""
        errors: list[str] = []
        end = time.monotonic() + self._limit_s + _JOIN_LIMIT_S
        for member, update in zip(members, updates, strict=True):
            try:
                update.result(max(0.1, end - time.monotonic()))
            except EngineLost as error:
                self._pool.lose(member, f"weight sync: {error}")
            except FutureTimeout:
                self._pool.lose(member, f"weight sync: expected its update within {self._limit_s:g} s")
            except RuntimeError as error:
                errors.append(f"{member.name}: {error}")
        return errors

    # Proof

    def _prove(self, members: Sequence[Member], checksum: bool) -> float:
        """I4: version, canary, and where it is due every parameter. Members that hold the weights serve."""
        answers = [(member, completion) for member in members if (completion := self._ask(member)) is not None]
        samples = [sample_of(completion) for _, completion in answers]
        trained = self._sender.logprobs(samples) if samples else []
        diffs = [0.0]
        for (member, completion), sample, logprobs in zip(answers, samples, trained, strict=True):
            canary = Canary.of(sample, logprobs)
            self._check_canary(member, completion, canary)
            if checksum and not self._check_parameters(member):
                continue
            try:
                member.engine.flush_cache()  # the canary leaves nothing that later sampling would meet
            except EngineLost as error:
                self._pool.lose(member, f"weight sync: {error}")
                continue
            self._canaries[member.number] = member.engine, canary
            diffs.append(canary.difference)
            self._pool.serve(member)
        return float(np.max(diffs))  # not max(): it may pass over NaN

    def _ask(self, member: Member) -> Completion | None:
        """A short response to the canary; None where the engine is lost."""
        engine = member.engine
        params = canary_params(self._canary, self._temperature, self._bf16, engine.max_sequence_tokens)
        try:
            (future,) = engine.submit(requests_of("canary", 0, self._canary, params, priority=1))
            return future.result(self._limit_s)
        except EngineLost as error:
            self._pool.lose(member, f"weight sync: {error}")
        except FutureTimeout:
            self._pool.lose(member, f"weight sync: expected the canary within {self._limit_s:g} s")
        return None

    def _check_canary(self, member: Member, completion: Completion, canary: Canary) -> None:
        limit = TOLERANCE_BF16 if self._bf16 else TOLERANCE
        versions = {member.engine.version} | {version for version, _ in completion.versions}
        if versions != {self._version} or not canary.difference <= limit:
            raise RunError(
                f"weight sync: expected {member.name} at version {self._version} with log-probs within {limit} of the "
                f"trainer's, got version {' and '.join(map(str, sorted(versions)))} and {canary.difference}"
            )
        engine, before = self._canaries.get(member.number, (None, None))
        if before is not None and engine is member.engine and moved_along(before, canary) is False:
            raise RunError(
                f"weight sync: expected {member.name} to sample from version {self._version}, got log-probs of the "
                f"version before: they did not move with the trainer's"
            )

    def _check_parameters(self, member: Member) -> bool:
        """False where the engine is lost; RunError where it holds other parameters."""
        if self.route == "alias":
            assert isinstance(member.engine, EmbeddedEngine)
            assert self._sender.model is not None
            wrong = [] if member.engine.holds(self._sender.model) else ["some"]
        else:
            try:
                held = member.engine.checksums()
            except EngineLost as error:
                self._pool.lose(member, f"weight sync: {error}")
                return False
            expected = self._sender.checksums(member.kind)
            self._unknown |= held is None or expected is None
            wrong = [] if held is None or expected is None else differing(expected, held)
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise RunError(
                f"weight sync: expected {member.name} at version {self._version} to hold the trainer's parameters bit "
                f"by bit, got others in {', '.join(wrong[:3])}{more}: their checksums differ"
            )
        return True


class _BrokenOff(RunError):
    """A broadcast ended early, as a member of its group died; it may be tried again with the others."""
