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

from pekoe.core.config import RLConfig
from pekoe.core.types import Payload, Problem, Prompt, Rollout, SamplingParams, Verdict
from pekoe.core.view import NoView
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine import EmbeddedEngine
from pekoe.engine.transfer import Group, buckets, open_group
from pekoe.engine.vllm import fingerprint
from pekoe.model import load_model
from pekoe.run.build import open_engine
from pekoe.run.cluster.depot import Stored
from pekoe.run.cluster.weights import receive, use_interface
from pekoe.run.judging import make_judge

_LOOK_S = 0.05  # between looks at verdicts that are awaited
_DEPOT_LIMIT_S = 60.0
Awaited = deque[tuple[int, Rollout, Future[Verdict]]]


@dataclass(frozen=True, slots=True)
class Result:
    """A rollout, judged. Its payload is `Stored`."""

    row: int  # of the batch
    rollout: Rollout
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine did since it was last asked."""

    batch: int
    results: tuple[Result, ...]
    num_tokens: int  # sampled since it started: it lives
    error: str = ""


class EngineWorker:
    """The actor. `sample` only begins; `poll` tells what is finished.

    Args:
        config: the recipe.
        number: which of the engines.
        node: of the depot.
        depot: of this node.
        longest: tokens of the longest prompt with its response.
        asked: every kind of sampling that it will be asked for.
    """

    def __init__(
        self, config: RLConfig, number: int, node: int, depot: Any, longest: int, asked: Sequence[SamplingParams]
    ) -> None:
        assert config.cluster is not None
        self._config, self._number, self._node, self._depot = config, number, node, depot
        generation = config.cluster.generation
        torch.set_num_threads(max(1, int(generation.cpus_per_engine)))
        device = "cuda" if generation.gpus_per_engine else "cpu"
        use_interface(ray.util.get_node_ip_address())
        self._stack = ExitStack()
        self._tokenizer = Tokenizer.load(Path(config.model.path)).with_template(config.model.template)
        self._model = load_model(config.model.path, torch.float32, device)
        logs = Path(config.run.dir) / "logs" / f"engine-{number}"
        self._engine = open_engine(config, self._model, longest, asked, logs, NoView())
        self._stack.callback(self._engine.close)
        each = max(1, config.verify.workers // generation.engines)
        self._judge = make_judge(config.verify.model_copy(update={"workers": each}), self._tokenizer, config.run.seed)
        self._stack.callback(self._judge.close)
        self._jobs: queue.SimpleQueue[tuple[int, list[tuple[int, Problem, int]], SamplingParams]] = queue.SimpleQueue()
        self._told = threading.Condition()
        self._results: list[Result] = []
        self._error, self._batch = "", -1
        self._group: tuple[Group, Any] | None = None
        threading.Thread(target=self._work, name="sampling", daemon=True).start()

    def ready(self) -> int:
        """Its process id, once everything is there."""
        return os.getpid()

    # Sampling

    def sample(self, batch: int, drawn: list[tuple[int, Problem, int]], params: SamplingParams) -> None:
        """Begin to sample these (row, problem, draw), after what it was given before. Another `batch` drops that."""
        with self._told:
            if batch != self._batch:
                self._batch, self._results = batch, []
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
            return Report(self._batch, tuple(results), self._engine.stats().num_decode_tokens, self._error)

    def _work(self) -> None:
        while True:
            batch, drawn, params = self._jobs.get()
            try:
                self._sample(batch, drawn, params)
            except BaseException as error:  # told at the next poll: whatever it is, this engine serves no longer
                with self._told:
                    self._error = f"{type(error).__name__}: {error}"
                    self._told.notify_all()
                return

    def _sample(self, batch: int, drawn: list[tuple[int, Problem, int]], params: SamplingParams) -> None:
        rows = {(problem.uid, draw): (row, problem) for row, problem, draw in drawn}
        prompts = [Prompt(p.uid, draw, self._tokenizer.encode_prompt(p.messages)) for _, p, draw in drawn]
        awaited: Awaited = deque()
        for rollout in self._engine.generate(prompts, params):
            if batch != self._batch:
                return
            row, problem = rows[rollout.uid, rollout.draw]
            awaited.append((row, rollout, self._judge.submit(problem, rollout)))
            self._deliver(batch, awaited, params)
        while awaited and batch == self._batch:
            end = time.monotonic() + self._judge.limit_s
            while not awaited[0][2].done():
                assert time.monotonic() < end, "the judge pool does not answer"
                time.sleep(_LOOK_S)
            self._deliver(batch, awaited, params)

    def _deliver(self, batch: int, awaited: Awaited, params: SamplingParams) -> None:
        """Tell of what is judged; its payload is at the depot before."""
        done: list[Result] = []
        values: dict[Any, Payload] = {}
        while awaited and awaited[0][2].done():
            row, rollout, verdict = awaited.popleft()
            key = rollout.uid, rollout.draw, rollout.sample_index
            values[key] = rollout.payload.resolve()
            done.append(Result(row, replace(rollout, payload=Stored(self._node, key)), verdict.result()))
        if not done:
            return
        if params.stream == "train":  # of an evaluation, nobody asks for the tokens
            ray.get(self._depot.put.remote(values), timeout=_DEPOT_LIMIT_S)
        with self._told:
            if batch == self._batch:
                self._results += done
                self._told.notify_all()

    # Weights

    def join(self, group: Group, rank: int) -> None:
        """Become a member of the group by which weights come."""
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group[1])
        self._group = group, open_group(group, rank)

    def receive(self, version: int, max_bytes: int) -> None:
        """Take the weights that the first rank sends meanwhile."""
        assert self._group is not None
        assert isinstance(self._engine, EmbeddedEngine)
        receive(self._group[1], buckets(self._model, max_bytes))
        self._engine.update_weights(self._model, version)

    def load(self, directory: str, version: int) -> None:
        """Take the weights of a Hugging Face directory."""
        self._engine.update_weights(Path(directory), version)
        if isinstance(self._engine, EmbeddedEngine):
            self._model = self._engine.model

    def probe(self, canary: Prompt, params: SamplingParams) -> tuple[int, list[Rollout]]:
        """Its version, and a short response, tokens and all."""
        return self._engine.version, list(self._engine.generate([canary], params))

    def fingerprints(self) -> dict[str, int]:
        """Of every parameter that it samples from."""
        assert self._engine.holds(self._model), "packed copies of the weights differ from them"
        return {name: fingerprint(parameter.detach()) for name, parameter in self._model.named_parameters()}

    def close(self) -> None:
        self.cancel()
        self._stack.close()
