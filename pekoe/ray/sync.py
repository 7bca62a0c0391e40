"""`run.sync.WeightSync` of a cluster: the ranks bring the weights to all engines at once, and each engine proves it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from pekoe.config.cluster import ClusterSection
from pekoe.core.errors import RunError
from pekoe.core.types import Prompt, SamplingParams
from pekoe.engine.fingerprints import Fingerprints, Kind, differing
from pekoe.engine.transfer import Group
from pekoe.ray.engines import Engine, Engines
from pekoe.ray.placement import Lost, get, reason
from pekoe.ray.trainer_proxy import ClusterTrainer
from pekoe.run.sync import TOLERANCE, TOLERANCE_BF16, Checksum, Route, SyncReport

_JOIN_LIMIT_S = 60.0
_ATTEMPTS = 5


class ClusterSync:
    """See `WeightSync` for the proofs.

    Args:
        trainer: the ranks.
        engines: those that serve, and those that came back, get the weights.
        canary: sampled after each sync by every engine.
        params: of the canary.
        bf16: whether engines compute in bfloat16.
        checksum_every: syncs from one comparison of all parameters to the next; the first two have one.
        folder: for weights that go over the disk.
    """

    def __init__(
        self,
        trainer: ClusterTrainer,
        engines: Engines,
        section: ClusterSection,
        canary: Prompt,
        params: SamplingParams,
        bf16: bool,
        checksum_every: int,
        folder: Path,
    ) -> None:
        self._folder = folder.resolve()
        self._trainer, self._engines, self._section = trainer, engines, section
        self._canary, self._params, self._limit = canary, params, TOLERANCE_BF16 if bf16 else TOLERANCE
        self.route: Route = section.sync
        self._checksum_every, self._count = checksum_every, 0
        self._members: dict[Kind, list[Any]] = {}  # actors of the groups that are open, in order of rank
        self._version = 0
        self._gave_up = False  # whether all engines were started again since a sync last went well
        self._unknown = False  # whether an engine could not tell what it holds
        self.num_bytes, self.send_s = 0, 0.0
        engines.bring = self._catch_up

    def __call__(self, version: int) -> SyncReport:
        """Make all engines sample at `version`; RunError where one does not hold the trainer's weights."""
        start = time.perf_counter()
        self._version, self._unknown = version, False
        self.num_bytes, self.send_s, diff = 0, 0.0, 0.0
        if self._section.colocate:
            self._trainer.call("spare", self._section.step_limit_s, "the ranks to give memory back")
            self._engines.restore()
        due = self._count < 2 or self._count % self._checksum_every == 0
        self._count += 1
        for engine in self._engines.in_state("serving"):
            engine.state = "stale"
        while not self._engines.in_state("serving"):
            if stale := self._engines.in_state("stale"):
                diff = max(diff, self._bring(stale, due))
            else:
                self._engines.look_after()  # RunError if none can come back
                time.sleep(0.1)
        checksum: Checksum = "skipped" if not due else "unknown" if self._unknown else "equal"
        return SyncReport(version, self.route, time.perf_counter() - start, self.num_bytes, diff, checksum)

    def forget_group(self) -> None:
        """The ranks are others."""
        self._members = {}

    def _catch_up(self, engines: list[Engine]) -> None:
        """Engines that came back get what the others have, when the ranks are done with log-probs ahead."""
        self._trainer.call("idle", self._section.step_limit_s, "the ranks to finish log-probs")
        self._bring(engines, True)

    def _bring(self, engines: list[Engine], look: bool) -> float:
        """Send the weights; engines that hold them serve. Returns how far their canaries are off.

        Embedded engines and servers take them in different forms, so each kind has a turn.
        """
        if self.route == "broadcast":
            kinds = dict.fromkeys(engine.kind for engine in engines)
            return max(self._attempt([e for e in engines if e.kind == kind], look) for kind in kinds)
        return self._attempt(engines, look)

    def _attempt(self, engines: list[Engine], look: bool) -> float:
        for _ in range(_ATTEMPTS):
            engines = [engine for engine in engines if engine.state == "stale"]
            if not engines:
                return 0.0
            start = time.perf_counter()
            if self._send(engines, look):
                self.send_s += time.perf_counter() - start
                self._gave_up = False
                return self._prove(engines, look)
            self._lose_dead(engines)
        if self._gave_up:
            raise RunError(f"weight sync: {_ATTEMPTS} attempts to bring version {self._version} to the engines failed")
        self._gave_up = True
        for engine in engines:
            if engine.state == "stale":
                self._engines.lose(engine, f"weight sync: {_ATTEMPTS} attempts failed")
        return 0.0

    def _lose_dead(self, engines: list[Engine]) -> None:
        """Servers that died while the process beside them lives."""
        some = [engine for engine in engines if engine.state == "stale"]
        for engine, ref in zip(some, [engine.actor.alive.remote() for engine in some], strict=True):
            try:
                dead = not ray.get(ref, timeout=_JOIN_LIMIT_S)
            except (RayError, GetTimeoutError):
                dead = True
            if dead:
                self._engines.lose(engine, "weight sync: its server is dead")

    def _send(self, engines: list[Engine], look: bool) -> bool:
        """Whether all these engines took the weights. Those that died meanwhile are lost."""
        limit, size = self._section.sync_limit_s, self._section.bucket_mib << 20
        if self.route == "disk":
            return self._by_disk(engines, look)
        if not self._open(engines):
            return False
        coming = [engine.actor.receive.remote(self._version, size) for engine in engines]
        going = [rank.send.remote(engines[0].kind, size, look) for rank in self._trainer.ranks]
        sent, wrong = get(going, limit + _JOIN_LIMIT_S, "the ranks to send their weights")[0]
        self.num_bytes += sent
        good = self._settle(engines, coming, limit) and not wrong
        if not good:
            self._members.pop(engines[0].kind, None)  # a group that broke off is of no use
        return good

    def _by_disk(self, engines: list[Engine], look: bool) -> bool:
        """As `_send`, over a directory that all nodes see."""
        limit, place = self._section.sync_limit_s, self._folder / f"version-{self._version}"
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            kinds = list(dict.fromkeys(engine.kind for engine in engines)) if look else []
            self._trainer.call("save", limit, "the ranks to write their weights", str(place), kinds)
            self.num_bytes += sum(file.stat().st_size for file in place.glob("*.safetensors"))
            return self._settle(engines, [e.actor.load.remote(str(place), self._version) for e in engines], limit)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _open(self, engines: list[Engine]) -> bool:
        """Join the first rank and these engines, of one kind, in a group, unless they are in one."""
        kind, members = engines[0].kind, [engine.actor for engine in engines]
        if members == self._members.get(kind):
            return True
        self._members.pop(kind, None)
        first = self._trainer.ranks[0]
        host, port = get(first.meeting_point.remote(), _JOIN_LIMIT_S, "the first rank's address")
        # NCCL takes no two members on one GPU.
        backend = "nccl" if self._section.training.gpus_per_rank and not self._section.colocate else "gloo"
        ends = list(accumulate((engine.num_workers for engine in engines), initial=1))
        limit_s = min(_JOIN_LIMIT_S, self._section.sync_limit_s)
        group = Group(f"pekoe-{os.urandom(6).hex()}", host, port, ends[-1], backend, limit_s)
        opening = first.join.remote(kind, group)
        joining = [
            engine.actor.join.remote(replace(group, first_rank=rank))
            for engine, rank in zip(engines, ends[:-1], strict=True)
        ]
        good = self._settle(engines, joining, 2 * _JOIN_LIMIT_S)
        try:
            ray.get(opening, timeout=2 * _JOIN_LIMIT_S)
        except RayActorError as error:
            raise Lost(f"the first rank: {reason(error)}") from None
        except (RayError, GetTimeoutError):
            return False
        if good:
            self._members[kind] = members
        return good

    def _settle(self, engines: list[Engine], refs: list[Any], limit_s: float) -> bool:
        """Wait for an answer of each engine; those that are dead, or give none, are lost."""
        good, end = True, time.monotonic() + limit_s
        for engine, ref in zip(engines, refs, strict=True):
            try:
                ray.get(ref, timeout=max(0.1, end - time.monotonic()))
            except (RayActorError, GetTimeoutError) as error:
                self._engines.lose(engine, f"weight sync: {reason(error)}")
                good = False
            except RayError:  # its group broke off, as another died
                good = False
        return good

    def _prove(self, engines: list[Engine], look: bool) -> float:
        """I4: version, canary, and where it is due every parameter. What proves true serves."""
        limit, diffs = self._section.sync_limit_s, [0.0]
        asked = [(engine.actor.probe.remote(self._canary, self._params), engine) for engine in engines]
        prints = [engine.actor.fingerprints.remote() if look else None for engine in engines]
        first = self._trainer.ranks[0]
        kinds = dict.fromkeys(engine.kind for engine in engines) if look else {}
        expected = {kind: get(first.prints.remote(kind), limit, "the trainer's fingerprints") for kind in kinds}
        for (ref, engine), held in zip(asked, prints, strict=True):
            try:
                version, rollouts = ray.get(ref, timeout=limit)
                wrong = self._differing(expected[engine.kind], ray.get(held, timeout=limit)) if held else []
            except (RayError, GetTimeoutError) as error:
                self._engines.lose(engine, f"weight sync: {reason(error)}")
                continue
            diff = float(np.max(self._trainer.call("difference", limit, "the canary's log-probs", rollouts)[0]))
            versions = {version} | {each for rollout in rollouts for each, _ in rollout.versions}
            if versions != {self._version} or not diff <= self._limit:
                raise RunError(
                    f"weight sync: expected engine {engine.number} at version {self._version} with log-probs within "
                    f"{self._limit} of the trainer's, got version {' and '.join(map(str, sorted(versions)))} and {diff}"
                )
            if wrong:
                more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise RunError(
                    f"weight sync: engine {engine.number} holds other parameters than the trainer in "
                    f"{', '.join(wrong[:3])}{more}"
                )
            engine.state = "serving"
            diffs.append(diff)
        return float(np.max(diffs))

    def _differing(self, expected: Fingerprints | None, held: Fingerprints | None) -> list[str]:
        if expected is None or held is None:
            self._unknown = True
            return []
        return differing(expected, held)
