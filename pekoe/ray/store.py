"""The data plane: one store a node keeps what engines there sampled, until the ranks that train on it fetch it.

Tokens and log-probs go from a store to a rank directly, by Ray's transfer from node to node; responses are judged, and
rollouts written, at the store. The controller knows names, lengths and verdicts alone. A store is a process of its own,
so that what an engine finished outlives the engine.
"""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pekoe.config.recipes import RLConfig
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import FloatArray, Handle, JudgedGroup, Problem, Record, Trajectory, Verdict
from pekoe.data.tokenizer import Tokenizer
from pekoe.ray.placement import ByteCount, ray_get, translated
from pekoe.ray.streams import StreamFollower, as_they_end
from pekoe.run.judging import Judge, make_judge
from pekoe.run.records import RecordLine, write_lines

_FETCH_LIMIT_S = 600.0
_WRITE_LIMIT_S = 3600.0
_CLOSE_LIMIT_S = 10.0
_CLOSED = "the judges are closed"
_NAME = "store-{}"  # by which Ray finds a store within the run's job
_KEPT_STEPS = 2  # writes after which a record is of no use: an evaluation's, or one that a lost engine sampled

Key = tuple[str | int, ...]
"""Of a record: (uid, draw, sample, incarnation of the engine's process, number of the request there), as two processes
may sample the same request, and one twice; of log-probs: that, and "proximal" or "reference"."""
_RECORD = slice(5)  # the part of a key that is the record's
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoreRef(Generic[T]):
    """Refers to a value in a node's store: a record (implements `core.types.Handle`), or log-probs [L].

    Example: StoreRef(node=0, key=("gsm8k/17", 0, 3, 2, 57)).
    """

    node: int
    key: Key

    def resolve(self) -> T:
        return fetch([self])[self]


def fetch(refs: Iterable[StoreRef[Any]]) -> dict[StoreRef[Any], Any]:
    """Get values from their stores, from each store in one piece, from all at once."""
    wanted: dict[int, dict[StoreRef[Any], Key]] = {}
    for ref in refs:
        wanted.setdefault(ref.node, {})[ref] = ref.key
    stores: dict[int, Any] = {node: ray.get_actor(_NAME.format(node)) for node in wanted}
    parts = [stores[node].get.remote(list(keys.values())) for node, keys in wanted.items()]
    values = ray_get(parts, _FETCH_LIMIT_S, "tokens from their store")
    return dict(zip(chain(*wanted.values()), chain(*values), strict=True))


class StoreActor:
    """Values of one node, and `num_judges` processes that judge. A record that is missing raises KeyError: the store
    died, and came back empty."""

    def __init__(self, config: RLConfig, num_judges: int) -> None:
        self._config, self._num_judges = config, num_judges
        self._values: dict[Key, tuple[int, Any]] = {}  # with the number of writes before it was put
        self._num_writes = 0
        rollout = config.rollout  # what is sampled ahead of training is used so much later
        self._kept_steps = _KEPT_STEPS + rollout.lag_bound

    async def put(self, values: Mapping[Key, Record | FloatArray]) -> None:
        self._values |= {key: (self._num_writes, value) for key, value in values.items()}

    async def get(self, keys: Sequence[Key]) -> list[Record | FloatArray]:
        return [self._values[key][1] for key in keys]

    async def judge(self, packed: bytes) -> AsyncIterator[bytes]:
        """The verdicts of [(problem, trajectory), ...], whose records are here, as `streams.StreamFollower` has it."""
        futures = [
            self._judge.submit(problem, with_handles(trajectory, [self._values[ref_of(trajectory).key][1]]))
            for problem, trajectory in pickle.loads(packed)
        ]
        async for ended in as_they_end(futures):
            yield pickle.dumps(ended)

    async def write(self, stem: str, packed: bytes) -> None:
        """Write a node's part of a step's rollouts. The records of the lines are dropped, and what is older."""
        lines: list[tuple[dict[str, Any], Key]] = pickle.loads(packed)
        records = [RecordLine(fields, self._values[key][1]) for fields, key in lines]
        self._num_writes += 1
        written, oldest = {key for _, key in lines}, self._num_writes - self._kept_steps
        self._values = {
            key: value for key, value in self._values.items() if key[_RECORD] not in written and value[0] >= oldest
        }
        if lines:
            await asyncio.to_thread(write_lines, Path(stem), records, self._tokenizer)

    @cached_property
    def _judge(self) -> Judge:
        verify = self._config.verify.model_copy(update={"workers": self._num_judges})
        logs = Path(self._config.run.dir) / "logs"
        return make_judge(verify, self._tokenizer, self._config.run.seed, log_dir=logs)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        model = self._config.model
        return Tokenizer.load(Path(model.path)).with_template(model.template)

    async def pid(self) -> int:
        return os.getpid()

    async def close(self) -> None:
        if "_judge" in vars(self):
            await asyncio.to_thread(self._judge.close)


class StoreRegistry:
    """The stores, by number; each is started when its node is first asked for. Counts what passes through here."""

    def __init__(self, config: RLConfig) -> None:
        self.passed = ByteCount()
        self.num_judges = 1  # processes of each store that judge
        self.actors: dict[int, Any] = {}
        self._config, self._lock = config, Lock()
        self._numbers: dict[str, int] = {}  # by the node's id

    def on(self, node_id: str) -> tuple[int, Any]:
        """Number and actor of the store of this node."""
        with self._lock:
            number = self._numbers.setdefault(node_id, len(self._numbers))
            if number not in self.actors:
                actor = ray.remote(StoreActor).options(
                    name=_NAME.format(number),
                    num_cpus=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                    max_restarts=-1,  # it comes back empty: training starts again when a record is missed
                    max_task_retries=3,
                    max_concurrency=100_000,
                )
                self.actors[number] = actor.remote(self._config, self.num_judges)
            return number, self.actors[number]


class RayJudge:
    """Judges at the store that has the record (implements `run.judging.Judge`). What is submitted while calls are
    made goes by one call."""

    def __init__(self, stores: StoreRegistry, time_limit_s: float) -> None:
        self._stores, self._time_limit_s = stores, time_limit_s
        self._pending: set[Future[Verdict]] = set()
        self._unsent: dict[int, list[tuple[Problem, Trajectory, Future[Verdict]]]] = {}  # by node
        self._follower = StreamFollower("judges", stores.passed, _no_verdict, _CLOSED)

    @property
    def limit_s(self) -> float:
        return 180 + 4 * self._time_limit_s * len(self._pending)  # see `run.judging.PoolJudge`

    def submit(self, problem: Problem, trajectory: Trajectory) -> Future[Verdict]:
        """WorkerLost where the store or the record is lost."""
        verdict: Future[Verdict] = Future()
        self._pending.add(verdict)
        verdict.add_done_callback(self._pending.discard)
        if problem.row is None:  # else a reward of the user's may ask for the conversation
            problem = replace(problem, messages=())
        self._follower.soon(self._add, problem, trajectory, verdict)
        return verdict

    def _add(self, problem: Problem, trajectory: Trajectory, verdict: Future[Verdict]) -> None:
        node = ref_of(trajectory).node
        if node not in self._unsent:
            self._unsent[node] = []
            with suppress(RunError):  # closed: `close` ends the verdict
                self._follower.soon(self._send, node)  # after what is submitted already
        self._unsent[node].append((problem, trajectory, verdict))

    def _send(self, node: int) -> None:
        unsent = self._unsent.pop(node)
        verdicts = [verdict for _, _, verdict in unsent]
        # Not tried again: a store that came back is empty, and a second stream need not have the lists of the first.
        call = self._stores.actors[node].judge.options(num_returns="streaming", max_task_retries=0)
        try:
            stream = call.remote(self._stores.passed.pack([(problem, trajectory) for problem, trajectory, _ in unsent]))
            self._follower.follow(stream, verdicts)
        except Exception as error:  # Ray is shut down, or this is closed
            _end(verdicts, RunError(_CLOSED) if self._follower.closing else _no_verdict(error))

    def close(self) -> None:
        """What has no verdict yet ends with RunError."""
        self._follower.close()
        _end(list(self._pending), RunError(_CLOSED))
        closing = [actor.close.remote() for actor in self._stores.actors.values()]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_LIMIT_S)


def _end(verdicts: Sequence[Future[Verdict]], error: Exception) -> None:
    for verdict in verdicts:
        with suppress(InvalidStateError):  # it has ended
            verdict.set_exception(error)


def _no_verdict(error: Exception) -> Exception:
    return error if isinstance(error, (UserError, RunError)) else translated(error, "a verdict")


class RayRecords:
    """Each node's store writes its own file (implements `run.records.RecordWriter`)."""

    def __init__(self, run_dir: Path, stores: StoreRegistry) -> None:
        self._folder, self._stores = (run_dir / "rollouts").resolve(), stores
        self._writing: list[Any] = []
        self._numbers = count()  # of what was adopted

    def write(self, step: int, lines: Sequence[RecordLine]) -> None:
        """See `RecordWriter`. A store takes the records out at once, so that the next step's may arrive."""
        self.settle()
        by_node: dict[int, list[tuple[dict[str, Any], Key]]] = {node: [] for node in self._stores.actors}
        for line in lines:
            ref = ref_of(line)
            by_node[ref.node].append((line.fields, ref.key))
        for node, of_node in by_node.items():
            stem = str(self._folder / f"step-{step:06d}.{node}")
            ref = self._stores.actors[node].write.remote(stem, self._stores.passed.pack(of_node))
            if of_node:  # else it only drops what is old, and its node may be gone
                self._writing.append(ref)

    def settle(self) -> None:
        writing, self._writing = self._writing, []
        try:
            ray_get(writing, _WRITE_LIMIT_S, "the rollouts to be written")
        except OSError as error:
            raise RunError(f"the rollouts of a step could not be written: {error}") from None

    def fetch(self, groups: Sequence[JudgedGroup]) -> list[JudgedGroup]:
        """See `RecordWriter.fetch`."""
        records = fetch(ref_of(branch) for group in groups for t in group.trajectories for branch in t.branches)
        return [
            replace(
                group,
                trajectories=tuple(
                    with_handles(t, [records[ref_of(b)] for b in t.branches]) for t in group.trajectories
                ),
            )
            for group in groups
        ]

    def adopt(self, groups: Sequence[JudgedGroup]) -> list[JudgedGroup]:
        """See `RecordWriter.adopt`: in the store of this process's node."""
        if not groups:
            return []
        node, actor = self._stores.on(ray.get_runtime_context().get_node_id())
        records: dict[Key, Record] = {}

        def adopted(t: Trajectory) -> Trajectory:
            keys: list[Key] = [(t.uid, t.draw, t.sample, -1, next(self._numbers)) for _ in t.branches]
            records.update(zip(keys, [branch.handle.resolve() for branch in t.branches], strict=True))
            return with_handles(t, [_ref(node, key) for key in keys])

        moved = [replace(group, trajectories=tuple(map(adopted, group.trajectories))) for group in groups]
        ray_get([actor.put.remote(records)], _FETCH_LIMIT_S, "tokens to be stored")
        return moved

    def adopt_one(self, trajectory: Trajectory) -> Trajectory:
        """See `RecordWriter.adopt`; of an episode's trajectory."""
        problem = Problem(trajectory.uid, (), None)
        ((moved,),) = (g.trajectories for g in self.adopt([JudgedGroup(problem, trajectory.draw, (trajectory,), ())]))
        return moved

    def forget(self) -> None:
        """Wait for what is being written, and ignore the outcome: the steps are made again."""
        if self._writing:
            ray.wait(self._writing, num_returns=len(self._writing), timeout=_WRITE_LIMIT_S)
        self._writing = []


def _ref(node: int, key: Key) -> StoreRef[Record]:
    return StoreRef(node, key)  # `StoreRef[Record](...)` would set an attribute, and it has no room for one


def with_handles(trajectory: Trajectory, handles: Sequence[Handle[Record]]) -> Trajectory:
    """A trajectory whose branches have these handles."""
    branches = [replace(branch, handle=h) for branch, h in zip(trajectory.branches, handles, strict=True)]
    return replace(trajectory, branches=tuple(branches))


def ref_of(value: object) -> StoreRef[Record]:
    """The handle of a single answer, a branch, a record line or a sample."""
    handle = getattr(value.branches[0] if isinstance(value, Trajectory) else value, "handle", None)
    assert isinstance(handle, StoreRef), "every record of a cluster is in a store"
    return handle


def bytes_of(value: Record | FloatArray) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    routing = 0 if value.routing is None else value.routing.nbytes
    return value.tokens.nbytes + value.loss_mask.nbytes + value.logprobs.nbytes + routing
