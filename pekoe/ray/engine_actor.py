"""An engine with its judges, in a process of its own: problems in, lengths and verdicts out. Tokens go to the depot."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from pekoe.config.recipes import RLConfig
from pekoe.core.errors import RunError
from pekoe.core.types import Payload, Problem, Prompt, Rollout, SamplingParams, Verdict
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine.fingerprints import Fingerprints
from pekoe.engine.transfer import Group
from pekoe.ray.member import EmbeddedMember, Member, ServerMember
from pekoe.ray.store import StoreRef
from pekoe.ray.weights import use_interface
from pekoe.run.judging import make_judge

_LOOK_S = 0.05  # between looks at verdicts that are awaited
_DEPOT_LIMIT_S = 60.0
Awaited = deque[tuple[int, Rollout, Future[Verdict]]]


@dataclass(frozen=True, slots=True)
class Result:
    """A rollout, judged. Its payload is `StoreRef`."""

    row: int  # of the batch
    rollout: Rollout
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine did since it was last asked."""

    batch: int
    results: tuple[Result, ...]
    signs_of_life: int  # grows while it gets on
    busy_s: float  # that it worked since it started
    error: str = ""


class EngineWorker:
    """The actor. `sample` only begins; `poll` tells what is finished.

    Args:
        config: the recipe.
        number: which of the engines.
        mark: of this process, in the names of what it samples: two may sample the same prompt.
        node: of the depot.
        depot: of this node.
        longest: tokens of the longest prompt with its response.
        asked: every kind of sampling that it will be asked for.
    """

    def __init__(
        self,
        config: RLConfig,
        number: int,
        mark: int,
        node: int,
        depot: Any,
        longest: int,
        asked: Sequence[SamplingParams],
    ) -> None:
        assert config.cluster is not None
        self._config, self._number, self._node, self._depot = config, number, node, depot
        generation = config.cluster.generation
        torch.set_num_threads(max(1, int(generation.cpus_per_engine)))
        device = "cuda" if generation.gpus_per_engine else "cpu"
        use_interface(ray.util.get_node_ip_address())
        self._stack = ExitStack()
        self._tokenizer = Tokenizer.load(Path(config.model.path)).with_template(config.model.template)
        logs = Path(config.run.dir).resolve() / "logs" / f"engine-{number}"
        kind = EmbeddedMember if config.kind_of_engine(number) == "embedded" else ServerMember
        self._member: Member = kind(config.engine_config(number), device, longest, asked, logs)
        self._stack.callback(self._member.engine.close)
        each = max(1, config.verify.workers // generation.engines)
        self._judge = make_judge(config.verify.model_copy(update={"workers": each}), self._tokenizer, config.run.seed)
        self._stack.callback(self._judge.close)
        self._jobs: queue.SimpleQueue[tuple[int, list[tuple[int, Problem, int]], SamplingParams]] = queue.SimpleQueue()
        self._told = threading.Condition()
        self._results: list[Result] = []
        self._error, self._batch = "", -1
        self._mark = mark
        self._num_given, self._num_done = 0, 0
        self._looks, self._busy_s, self._busy_since = 0, 0.0, 0.0
        threading.Thread(target=self._work, name="sampling", daemon=True).start()

    def close(self) -> None:
        """Stop its server and its judges."""
        self.cancel()
        self._stack.close()

    def ready(self) -> tuple[int, int]:
        """Its process id, once everything is there, and how many members of the group for weights it is."""
        return os.getpid(), self._member.num_workers

    # Sampling

    def sample(self, batch: int, drawn: list[tuple[int, Problem, int]], params: SamplingParams) -> None:
        """Begin to sample these (row, problem, draw), after what it was given before. Another `batch` drops that."""
        with self._told:
            if batch != self._batch:
                self._batch, self._results = batch, []
            self._num_given += 1
        self._jobs.put((batch, drawn, params))

    def cancel(self) -> None:
        """Drop what is unfinished."""
        with self._told:
            self._batch, self._results = -1, []

    def poll(self, limit_s: float) -> Report:
        """Wait until something is finished, at most `limit_s`."""
        with self._told:
            self._told.wait_for(lambda: self._results or self._error, limit_s)
            results, self._results = self._results, []
            batch, error = self._batch, self._error
        life = self._looks + (0 if results else self._member.signs_of_life())
        busy = self._busy_s + (time.monotonic() - self._busy_since if self._busy_since else 0.0)
        return Report(batch, tuple(results), life, busy, error)

    def _work(self) -> None:
        while True:
            batch, drawn, params = self._jobs.get()
            self._busy_since = time.monotonic()
            try:
                self._sample(batch, drawn, params)
            except BaseException as error:  # told at the next poll: whatever it is, this engine serves no longer
                with self._told:
                    self._error = f"{type(error).__name__}: {error}"
                    self._told.notify_all()
                return
            self._busy_s, self._busy_since = self._busy_s + time.monotonic() - self._busy_since, 0.0
            with self._told:
                self._num_done += 1
                self._told.notify_all()

    def _wait_idle(self) -> None:
        """What was cancelled ends at its next response; until then, weights and KV are in use."""
        assert self._config.cluster is not None
        limit_s = self._config.cluster.sync_limit_s
        with self._told:
            if not self._told.wait_for(lambda: self._num_done == self._num_given or self._error, limit_s):
                raise RunError(f"waited {limit_s:g} s for engine {self._number} to end what was cancelled")

    def _sample(self, batch: int, drawn: list[tuple[int, Problem, int]], params: SamplingParams) -> None:
        rows = {(problem.uid, draw): (row, problem) for row, problem, draw in drawn}
        prompts = [Prompt(p.uid, draw, self._tokenizer.encode_prompt(p.messages)) for _, p, draw in drawn]
        awaited: Awaited = deque()
        for rollout in self._member.engine.generate(prompts, params):
            if batch != self._batch:
                return
            row, problem = rows[rollout.uid, rollout.draw]
            awaited.append((row, rollout, self._judge.submit(problem, rollout)))
            self._deliver(batch, awaited, params)
        while awaited and batch == self._batch:
            end = time.monotonic() + self._judge.limit_s
            while not awaited[0][2].done():
                assert time.monotonic() < end, "the judge pool does not answer"
                self._looks += 1
                time.sleep(_LOOK_S)
            self._deliver(batch, awaited, params)

    def _deliver(self, batch: int, awaited: Awaited, params: SamplingParams) -> None:
        """Tell of what is judged; its payload is at the depot before."""
        done: list[Result] = []
        values: dict[Any, Payload] = {}
        while awaited and awaited[0][2].done():
            row, rollout, verdict = awaited.popleft()
            key = rollout.uid, rollout.draw, rollout.sample_index, self._mark
            values[key] = rollout.payload.resolve()
            done.append(Result(row, replace(rollout, payload=StoreRef(self._node, key)), verdict.result()))
        if not done:
            return
        if params.stream == "train":  # of an evaluation, nobody asks for the tokens
            ray.get(self._depot.put.remote(values), timeout=_DEPOT_LIMIT_S)
        with self._told:
            if batch == self._batch:
                self._results += done
                self._told.notify_all()

    # Weights

    def join(self, group: Group) -> None:
        self._wait_idle()
        self._member.join(group)

    def receive(self, version: int, max_bytes: int) -> None:
        self._wait_idle()
        self._member.receive(version, max_bytes)

    def load(self, directory: str, version: int) -> None:
        self._wait_idle()
        self._member.load(Path(directory), version)

    def probe(self, canary: Prompt, params: SamplingParams) -> tuple[int, list[Rollout]]:
        """Its version, and a short response, tokens and all."""
        return self._member.engine.version, self._member.probe(canary, params)

    def fingerprints(self) -> Fingerprints | None:
        return self._member.fingerprints()

    def alive(self) -> bool:
        return self._member.alive()

    # Turns with the ranks of the same devices

    def release(self) -> None:
        self._wait_idle()
        self._member.release()

    def restore(self) -> None:
        self._member.restore()
