"""Stand-ins of `bench_async.py` whose work only takes time: engines, ranks and weights of a 7B model on H100s.

How long work takes comes from counted operations and bytes (`pekoe.core.roofline`) at the shares of a GPU's ceilings
in `Gpu`. Time is scaled: a second of a GPU is `scale` seconds here. One thread simulates all engines from event to
event (a response ends, requests arrive, weights come) and sleeps in between. What a controller of a Ray cluster packs
and unpacks is packed and unpacked here too, so its time and its bytes are real.
"""

from __future__ import annotations

import heapq
import math
import pickle
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from pekoe.core.loop import StepStats, SyncReport
from pekoe.core.roofline import training_flops
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Completion, JudgedGroup, Problem, Request, SamplingParams, Trajectory, Verdict
from pekoe.engine.base import EngineStats, Sampler, requests_of
from pekoe.engine.pool import EnginePool
from pekoe.ray.placement import ByteCount
from pekoe.ray.store import StoreRef, ref_of
from pekoe.run.judging import RandomJudge
from pekoe.run.records import RecordLine
from pekoe.train.trainer import pack_minibatch
from pekoe.weights.proof import CANARY_TOKENS

Q7B = ModelSpec(
    family="qwen2",
    vocab_size=152_064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18_944,
    max_positions=32_768,
    qkv_bias=True,
)
PROMPT_TOKENS, MAX_NEW_TOKENS, MEDIAN_TOKENS, SIGMA = 256, 27_648, 5_000, 0.9  # mean after clipping: about 7,000
TOKEN_BUDGET = 30_720
_ENDED = 1e-6  # of a forward: what is left by rounding


@dataclass(frozen=True, slots=True)
class Gpu:
    """An H100 SXM (dense bf16, HBM3), and which share of its ceilings each kind of work reaches."""

    flop_s: float = 989e12
    byte_s: float = 3.35e12
    memory_bytes: float = 80e9
    decode_share: float = 0.75  # of memory's rate
    prefill_share: float = 0.5  # of arithmetic
    train_share: float = 0.4
    forward_share: float = 0.5  # of log-probs computed anew
    link_byte_s: float = 5e9  # of a publish: gather, broadcast and load
    prefill_tokens: int = 8192  # of one forward, beside which a token of the canary is sampled

    @property
    def max_running(self) -> int:
        """Responses that one engine decodes together: as many as its KV cache holds at their mean length, weighed by
        time (a long response is met more often)."""
        lengths = [length_of("mean", 0, i) for i in range(4096)]
        mean = sum(n * (PROMPT_TOKENS + n / 2) for n in lengths) / sum(lengths)
        room = 0.9 * self.memory_bytes - 2 * Q7B.num_parameters
        return int(room / (2 * Q7B.kv_values_per_token) / mean)

    def decode_s(self, num_running: float, kv_tokens: float) -> float:
        """Of one forward that gives each running response a token."""
        weights = 2 * Q7B.num_parameters / (self.byte_s * self.decode_share)
        products = 2 * Q7B.num_parameters * num_running / (self.flop_s * self.prefill_share)
        return max(weights, products) + 2 * Q7B.kv_values_per_token * kv_tokens / (self.byte_s * self.decode_share)

    def prefill_s(self, lengths: Iterable[int]) -> float:
        return training_flops(Q7B, lengths, 0).total / 3 / (self.flop_s * self.prefill_share)

    def train_s(self, lengths: Sequence[int], num_targets: int, passes: int = 3) -> float:
        """passes: 3 for a forward and backward, 1 for a forward."""
        share = self.train_share if passes == 3 else self.forward_share
        return training_flops(Q7B, lengths, num_targets).total * passes / 3 / (self.flop_s * share)

    @property
    def load_s(self) -> float:
        return 2 * Q7B.num_parameters / self.link_byte_s

    @property
    def canary_s(self) -> float:
        """The canary's tokens beside the KV that is computed anew: each with a full forward."""
        return CANARY_TOKENS * self.prefill_s([self.prefill_tokens // 4] * 4)


def length_of(uid: str, draw: int, sample: int) -> int:
    drawn = random.Random(f"{uid} {draw} {sample}").lognormvariate(math.log(MEDIAN_TOKENS), SIGMA)
    return min(MAX_NEW_TOKENS, max(32, round(drawn)))


class Simulated:
    """Processor time of this process that a cluster's controller would not spend: that of the simulation."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}  # by thread

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = time.thread_time()
        try:
            yield
        finally:
            thread = threading.get_ident()
            self.seconds[thread] = self.seconds.get(thread, 0.0) + time.thread_time() - start

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def here(self) -> float:
        return self.seconds.get(threading.get_ident(), 0.0)


class Clock:
    """The thread that ends what engines have finished."""

    def __init__(self, gpu: Gpu, scale: float, passed: ByteCount) -> None:
        self.gpu, self.scale, self.passed = gpu, scale, passed
        self.simulated = Simulated()
        self.changed = threading.Condition()
        self.engines: list[GpuEngine] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="clock", daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Seconds of the GPUs."""
        return time.monotonic() / self.scale

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds * self.scale)

    def _run(self) -> None:
        while not self._closed:
            with self.simulated(), self.changed:
                due = min((engine.due for engine in self.engines), default=math.inf)
                wait = (due - self.now()) * self.scale
                if wait > 0:
                    self.changed.wait(min(wait, 1.0))
                now = self.now()
                ended = [each for engine in self.engines if engine.due <= now for each in engine.advance(now)]
            for future, answer in ended:  # in an engine's proxy this would be the controller's work
                future.set_result(self.passed.unpack(answer))

    def close(self) -> None:
        self._closed = True
        with self.changed:
            self.changed.notify()
        self._thread.join()


@dataclass(slots=True)
class _Running:
    request: Request
    length: int
    future: Future[Completion]
    start: float = 0.0  # the engine's count of decoded tokens when this response began

    def __lt__(self, other: _Running) -> bool:
        return self.start + self.length < other.start + other.length


class GpuEngine(Sampler):
    """Implements `engine.base.Engine`: continuous batching of one GPU, in time alone.

    All running responses get their tokens together, so one count of tokens serves all: a response that began at count
    c ends at c + length. `stall` is time that must pass before the next token: prompts, weights, KV computed anew.
    """

    kind = "embedded"
    num_workers = 1
    max_sequence_tokens = Q7B.max_positions

    def __init__(self, clock: Clock, number: int, group: int) -> None:
        self.version, self.due = 0, math.inf
        self.max_requests = clock.gpu.max_running + group
        self._clock, self._gpu, self._number, self._keys = clock, clock.gpu, number, count()
        self._max_running = clock.gpu.max_running
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []  # a heap
        self._starts = 0.0  # the sum of `start` over those that run
        self._prompted: dict[tuple[str, int], int] = {}  # group: its responses that did not begin yet
        self._canaries: list[tuple[float, Request, Future[Completion]]] = []
        self._marks: list[tuple[int, float]] = [(0, 0.0)]  # (version, count of tokens when it came)
        self._at, self._count, self._stall = clock.now(), 0.0, 0.0
        self._num_tokens, self._num_forwards, self._busy_s = 0, 0.0, 0.0
        with clock.changed:
            clock.engines.append(self)

    def check(self, params: SamplingParams) -> None: ...

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        self._clock.passed.pack(list(requests))
        futures: list[Future[Completion]] = [Future() for _ in requests]
        with self._clock.simulated(), self._clock.changed:
            ended = self.advance(self._clock.now())
            for request, future in zip(requests, futures, strict=True):
                if request.priority:
                    self._canaries.append((self._at + self._gpu.canary_s, request, future))
                    continue
                length = length_of(request.uid, request.draw, request.sample)
                self._waiting.append(_Running(request, length, future))
            self._admit()
            self._clock.changed.notify()
        for future, answer in ended:
            future.set_result(self._clock.passed.unpack(answer))
        return futures

    def advance(self, now: float) -> list[tuple[Future[Completion], bytes]]:
        """Go on to `now`; returns what ended until then. With the clock's lock held."""
        ended: list[tuple[Future[Completion], bytes]] = []
        while True:
            if self._running and self._left() <= _ENDED:
                ended.append(self._end(heapq.heappop(self._running)))
                self._admit()
                continue
            if self._at >= now:
                break
            left = now - self._at
            self._busy_s += left if self._running else 0.0
            if self._stall:
                used = min(left, self._stall)
                self._stall, self._at = self._stall - used, self._at + used
                continue
            if not self._running:
                self._at = now
                break
            steps = self._left()
            needed = self._duration(steps)
            if needed > left:
                self._pass(self._steps_in(left))
                self._at = now
                break
            self._pass(steps)
            self._at += needed
        for canary in [each for each in self._canaries if each[0] <= now]:
            self._canaries.remove(canary)
            _, request, future = canary
            ended.append((future, self._answer(request, CANARY_TOKENS, ((self.version, 0),))))
        self._plan()
        return ended

    def _left(self) -> float:
        """Forwards until the first response ends."""
        return self._running[0].start + self._running[0].length - self._count

    def _pass(self, steps: float) -> None:
        self._count += steps
        self._num_forwards += steps
        self._num_tokens += round(steps * len(self._running))

    def _kv_tokens(self) -> float:
        number = len(self._running)
        return number * (PROMPT_TOKENS + self._count) - self._starts

    def _duration(self, steps: float) -> float:
        """Of so many forwards, over which KV grows by a token a response."""
        number = len(self._running)
        first, more = self._gpu.decode_s(number, self._kv_tokens()), self._growth()
        return steps * first + more * steps * (steps - 1) / 2

    def _growth(self) -> float:
        number = len(self._running)
        return self._gpu.decode_s(number, number) - self._gpu.decode_s(number, 0)

    def _steps_in(self, seconds: float) -> float:
        first, more = self._gpu.decode_s(len(self._running), self._kv_tokens()), self._growth()
        b = first - more / 2
        return 2 * seconds / (b + math.sqrt(b * b + 2 * more * seconds))

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            begun = self._waiting.popleft()
            begun.start = self._count
            self._starts += begun.start
            heapq.heappush(self._running, begun)
            group = begun.request.uid, begun.request.draw
            left = self._prompted.get(group, begun.request.params.n)
            if left == begun.request.params.n:  # its prompt is computed once
                self._stall += self._gpu.prefill_s([len(begun.request.tokens)])
            self._prompted[group] = left - 1
            if left == 1:
                del self._prompted[group]
        self._plan()

    def _plan(self) -> None:
        self.due = math.inf
        if self._running:
            self.due = self._at + self._stall + self._duration(max(0.0, self._left()))
        for at, _, _ in self._canaries:
            self.due = min(self.due, at)

    def _end(self, ended: _Running) -> tuple[Future[Completion], bytes]:
        self._starts -= ended.start
        since = [(version, max(0, round(at - ended.start))) for version, at in self._marks if at > ended.start]
        first = max((mark for mark in self._marks if mark[1] <= ended.start), key=lambda mark: mark[0])[0]
        versions = [(first, 0)]
        for version, at in since:
            if at < ended.length:
                versions = [*versions, (version, at)] if at > versions[-1][1] else [*versions[:-1], (version, at)]
        return ended.future, self._answer(ended.request, ended.length, tuple(versions))

    def _answer(self, request: Request, length: int, versions: tuple[tuple[int, int], ...]) -> bytes:
        key = request.uid, request.draw, request.sample, self._number, next(self._keys)
        finish = "length" if length == MAX_NEW_TOKENS else "stop"
        return pickle.dumps(Completion(length, finish, versions, StoreRef(self._number, key)))

    def abort(self, uids: Iterable[str] | None = None) -> None: ...

    def update_weights(self, source: object, version: int) -> None:
        """Decoding stands still while weights are loaded, and until the KV of what runs is computed anew."""
        with self._clock.simulated(), self._clock.changed:
            ended = self.advance(self._clock.now())
            self._stall += self._gpu.load_s
            self._plan()
            self._clock.changed.notify()
        for future, answer in ended:
            future.set_result(self._clock.passed.unpack(answer))
        self._clock.sleep(self._gpu.load_s)
        with self._clock.simulated(), self._clock.changed:
            lengths = [PROMPT_TOKENS + round(self._count - each.start) for each in self._running]
            self._stall += self._gpu.prefill_s(lengths) if lengths else 0.0
            self.version = version
            oldest = min((each.start for each in self._running), default=self._count)
            kept = [mark for mark in self._marks if mark[1] > oldest]
            before = [mark for mark in self._marks if mark[1] <= oldest][-1:]
            self._marks = [*before, *kept, (version, self._count)]
            self._plan()
            self._clock.changed.notify()

    def flush_cache(self) -> None: ...

    def checksums(self) -> Mapping[str, int] | None:
        return None

    def offload(self) -> None: ...

    def onload(self) -> None: ...

    def health(self) -> bool:
        return True

    def stats(self) -> EngineStats:
        with self._clock.changed:
            return EngineStats(
                num_decode_tokens=self._num_tokens,
                num_forwards=int(self._num_forwards),
                busy_s=self._busy_s * self._clock.scale,
            )

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class GpuStarter:
    clock: Clock
    number: int
    group: int
    kind: str = "embedded"

    @property
    def name(self) -> str:
        return f"engine {self.number}"

    def start(self) -> GpuEngine:
        return GpuEngine(self.clock, self.number, self.group)


class GpuWeights:
    """Implements `core.loop.Weights` as a cluster's ranks do, which keep no copy of what they send: loads every engine,
    proves it by a canary, lets it serve, and only then returns."""

    def __init__(self, pool: EnginePool, clock: Clock) -> None:
        self._pool, self._clock = pool, clock
        self._last: SyncReport | None = None

    def publish(self, version: int, wait: bool = True) -> SyncReport:
        start = time.perf_counter()
        self._pool.stale()
        members = self._pool.in_state("stale")
        prompt = requests_of("canary", 0, np.arange(PROMPT_TOKENS), SamplingParams(stream="eval"), priority=1)

        def update(member: Any) -> None:
            engine = member.engine
            engine.update_weights(None, version)
            for future in engine.submit(prompt):
                future.result()
            self._pool.serve(member, engine)

        with ThreadPoolExecutor(len(members)) as threads:
            list(threads.map(update, members))
        seconds = time.perf_counter() - start
        self._last = SyncReport(version, "broadcast", seconds, 2 * Q7B.num_parameters, 0.0, "skipped")
        return self._last

    def settle(self) -> SyncReport | None:
        return self._last

    def counters(self) -> dict[str, float]:
        return {}


class _Nothing:
    """A snapshot of nothing (implements `core.loop.Snapshot`)."""

    def write(self, path: Path) -> None:
        path.mkdir(parents=True)

    def export(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)


@dataclass(slots=True)
class GpuTrainer:
    """Implements `core.loop.Trainer`: packs and shares out as a cluster's does, and waits for the slowest rank."""

    clock: Clock
    num_ranks: int
    num_updates: int = 0
    num_not_finite: int = 0
    busy_s: float = 0.0
    seconds: list[float] = field(default_factory=list[float])  # of each call, a GPU's
    lengths: list[int] = field(default_factory=list[int])  # of the responses trained on

    def skip(self, num_updates: int) -> None:
        self.num_updates += num_updates

    def step(self, samples: Sequence[Any], objective: Any, *rest: Any) -> StepStats:
        shares = self._send(samples, rest, 3)
        self.num_updates += 1
        self.lengths += [sample.num_targets for sample in samples]
        tokens, targets = sum(map(len, samples)), sum(sample.num_targets for sample in samples)
        names = ("entropy", "clip_fraction", "ratio", "approx_kl", "logprob_diff", "logprob_diff_max")
        means = {name: 1.0 if name == "ratio" else 0.0 for name in names}
        return StepStats(0.5, 1.0, 1e-5, tokens, targets, sum(len(share.bins) for share in shares), means)

    def logprobs(self, samples: Sequence[Any], reference: bool = False) -> list[StoreRef[Any]]:
        self._send(samples, (), 1)
        return [StoreRef(ref_of(sample).node, (*ref_of(sample).key, "proximal")) for sample in samples]

    def _send(self, samples: Sequence[Any], rest: Any, passes: int) -> list[Any]:
        shares = pack_minibatch(samples, TOKEN_BUDGET, Q7B, self.num_ranks)
        for share in shares:
            self.clock.passed.pack((share, *rest))
        with self.clock.simulated():
            each = [list(chain.from_iterable(share.bins)) for share in shares]
            seconds = [
                self.clock.gpu.train_s([len(sample) for sample in own], sum(s.num_targets for s in own), passes)
                for own in each
            ]
        self.seconds.append(max(seconds))
        self.busy_s += sum(seconds)
        self.clock.sleep(max(seconds))
        return shares

    def snapshot(self) -> _Nothing:
        return _Nothing()

    def load(self, path: Path) -> None: ...

    def counters(self) -> dict[str, float]:
        return {"ranks_busy_s": self.busy_s * self.clock.scale, "num_ranks": self.num_ranks}


class PackedJudge(RandomJudge):
    """Verdicts by the toss of a coin, packed and unpacked as between a controller and stores."""

    def __init__(self, passed: ByteCount) -> None:
        super().__init__(0)
        self._passed = passed

    def submit(self, problem: Problem, trajectory: Trajectory) -> Future[Verdict]:
        self._passed.pack((problem, trajectory))
        verdict = super().submit(problem, trajectory)
        self._passed.unpack(pickle.dumps(verdict.result()))
        return verdict


@dataclass(frozen=True, slots=True)
class PackedRecords:
    """Implements `run.records.RecordWriter`: packs what stores would write."""

    passed: ByteCount

    def write(self, step: int, lines: Sequence[RecordLine]) -> None:
        self.passed.pack([(line.fields, ref_of(line).key) for line in lines])

    def settle(self) -> None: ...

    def fetch(self, groups: Sequence[JudgedGroup]) -> list[JudgedGroup]:
        return []

    def adopt(self, groups: Sequence[JudgedGroup]) -> list[JudgedGroup]:
        return list(groups)


class Prompts:
    """Stands in for a tokenizer: every prompt has as many tokens."""

    def encode_prompt(self, messages: object) -> Any:
        return np.arange(PROMPT_TOKENS)
