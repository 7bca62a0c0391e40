"""I6 by property: the ledger accounts for every prompt drawn, once, with what became of it.

The real loop, run directory, data order and scoring; engine, judge, trainer and weights are stand-ins. A kill is
an exception that nothing catches, at any call of any of them, in the checkpoint's thread too.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pekoe.config import RLConfig, load_config
from pekoe.core.journal import JsonLines, read_lines
from pekoe.core.loop import StepStats, SyncReport
from pekoe.core.progress import NoProgress
from pekoe.core.spec import ModelSpec
from pekoe.core.types import AnySample, Completion, Problem, Record, Request, Trajectory, Verdict
from pekoe.data.order import DataOrder
from pekoe.engine.base import EngineStats
from pekoe.run import run_dir
from pekoe.run.build import RLParts, sampling
from pekoe.run.interrupt import LastStep, StepTimer, Stop
from pekoe.run.metrics import StepCounters
from pekoe.run.records import LocalRecords
from pekoe.run.rl import run_rl
from pekoe.run.rollouts import Rollouts
from pekoe.run.run_dir import RunDir

SAMPLES = 3  # responses to a prompt
FATES = ("mixed", "right", "wrong", "one fault", "faults", "aborted", "cut", "skipped")
Drawn = tuple[str, int]  # a problem and its epoch


class Killed(BaseException):
    """Nothing in the code under test catches it."""


@dataclass
class Life:
    """What hypothesis decides, and how often the process has been called so far."""

    fates: list[str]
    kills: list[int] = field(default_factory=list)  # calls between one kill and the next
    seed: int = 0
    calls: int = 0
    dead: bool = False
    version: int = 0  # of the weights

    def tick(self) -> None:
        self.calls += 1
        if self.kills and self.calls >= self.kills[0]:
            self.dead = True
        if self.dead:  # in whichever thread
            raise Killed

    def fate(self, uid: str, draw: int) -> str:
        return self.fates[(int(uid) * 5 + draw * 3) % len(self.fates)]


SPEC = ModelSpec("qwen3", 8, 8, 1, 1, 1, 8, 8, 64)


class Words:
    """A tokenizer whose prompts are the problem's number."""

    stop_token_ids = (1,)

    def encode_prompt(self, messages: Any) -> Any:
        return np.array([int(messages[0]["content"])])

    def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
        return ""


@dataclass
class Pool:
    """Answers at once, in any order."""

    life: Life
    num_lost: int = 0

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        futures: list[Future[Completion]] = [Future() for _ in requests]
        pairs = list(zip(requests, futures, strict=True))
        random.Random(self.life.seed + self.life.calls).shuffle(pairs)
        for request, future in pairs:
            self.life.tick()
            fate = self.life.fate(request.uid, request.draw)
            finish = {"aborted": "abort", "cut": "length"}.get(fate, "stop")
            record = Record.of(request.tokens, np.array([request.draw, request.sample]), np.zeros(2, np.float32))
            future.set_result(Completion(2, cast(Any, finish), ((0, 0),), record))
        return futures

    def abort(self) -> None: ...

    def close(self) -> None: ...

    def flush_cache(self) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats()

    def in_state(self, *states: str) -> list[Any]:
        return []


class LatePool(Pool):
    """Answers from a thread of its own, in random order; some requests when there is nothing else to answer. A token is
    sampled when its request comes, another when it is answered."""

    def __init__(self, life: Life) -> None:
        super().__init__(life)
        self._waiting: list[tuple[Request, Future[Completion], int]] = []
        self._changed, self._closed = threading.Condition(), False
        self._random = random.Random(life.seed)
        self._thread = threading.Thread(target=self._answer_all, daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        self.life.tick()
        futures: list[Future[Completion]] = [Future() for _ in requests]
        with self._changed:
            self._waiting += [(r, f, self.life.version) for r, f in zip(requests, futures, strict=True)]
            self._changed.notify()
        return futures

    def abort(self) -> None:
        with self._changed:
            self._waiting.clear()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _answer_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                early = [each for each in self._waiting if not self._late(each[0])]
                chosen = self._random.choice(early or self._waiting)
                self._waiting.remove(chosen)
            if self._random.random() < 0.2 or not early:
                time.sleep(self._random.choice([1e-4, 1e-3]))
            self._answer(*chosen)

    def _late(self, request: Request) -> bool:
        return random.Random(f"{self.life.seed} {request.uid} {request.draw} {request.sample}").random() < 0.2

    def _answer(self, request: Request, future: Future[Completion], begun: int) -> None:
        try:
            self.life.tick()
        except Killed as error:
            future.set_exception(error)
            return
        fate, now = self.life.fate(request.uid, request.draw), self.life.version
        finish = {"aborted": "abort", "cut": "length"}.get(fate, "stop")
        record = Record.of(request.tokens, np.array([request.draw, request.sample]), np.zeros(2, np.float32))
        versions = ((begun, 0),) if begun == now else ((begun, 0), (now, 1))
        future.set_result(Completion(2, cast(Any, finish), versions, record))


@dataclass
class Judge:
    life: Life
    limit_s: float = 1.0

    def submit(self, problem: Problem, trajectory: Trajectory) -> Future[Verdict]:
        self.life.tick()
        fate, first = self.life.fate(problem.uid, trajectory.draw), trajectory.sample == 0
        right = fate == "right" or (fate not in ("wrong", "cut") and trajectory.sample == 1)
        label = "fault" if fate == "faults" or (fate == "one fault" and first) else "correct" if right else "wrong"
        future: Future[Verdict] = Future()
        future.set_result(Verdict(cast(Any, label), None, "told"))
        return future

    def close(self) -> None: ...


class Trainer:
    """Remembers what it was trained on; a minibatch with a group whose fate is "skipped" makes no update."""

    num_not_finite = 0

    def __init__(self, life: Life, problems: Sequence[Problem]) -> None:
        self._life, self._problems = life, problems
        self.num_updates = 0
        self.log: list[tuple[str, int, bool]] = []  # problem, epoch, whether an update was made

    def step(self, samples: Sequence[AnySample], *args: Any) -> StepStats:
        self._life.tick()
        drawn = {(str(s.tokens[0]), int(s.tokens[1])) for s in (sample.resolve() for sample in samples)}
        skipped = any(self._life.fate(*each) == "skipped" for each in drawn)
        self.log += [(*each, not skipped) for each in sorted(drawn)]
        self.num_updates += 1
        self._life.tick()
        names = ("entropy", "clip_fraction", "ratio", "approx_kl", "logprob_diff", "logprob_diff_max")
        return StepStats(
            0.0, 0.0, 0.0, 1, len(samples), 1, dict.fromkeys(names, 0.0), "told to skip" if skipped else None
        )

    def skip(self, num_updates: int) -> None:
        self.num_updates += num_updates

    def snapshot(self) -> Saved:
        self._life.tick()
        return Saved(self._life, json.dumps([self.num_updates, self.log]))

    def load(self, path: Path) -> None:
        self.num_updates, log = json.loads((path / "log.json").read_text())
        self.log = [tuple(each) for each in log]


@dataclass
class Saved:
    life: Life
    text: str

    def write(self, path: Path) -> None:
        self.life.tick()
        path.mkdir(parents=True)
        (path / "log.json").write_text(self.text)
        self.life.tick()

    def export(self, path: Path) -> None:
        self.life.tick()


@dataclass
class Weights:
    life: Life

    def publish(self, version: int, wait: bool = True) -> SyncReport:
        self.life.tick()
        self.life.version = version
        return SyncReport(version, "alias", 0.0, 0, 0.0, "equal")

    def settle(self) -> None: ...


def ticks_around_files(monkeypatch: pytest.MonkeyPatch, life: Callable[[], Life]) -> None:
    """Every write and rename may be the last."""

    def ticking(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            life().tick()
            result = function(*args, **more)
            life().tick()
            return result

        return call

    monkeypatch.setattr(run_dir, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for owner, name in ((JsonLines, "append"), (JsonLines, "cut"), (LocalRecords, "write"), (os, "replace")):
        monkeypatch.setattr(owner, name, ticking(getattr(owner, name)))


def live(config: RLConfig, life: Life, make_pool: Callable[[Life], Pool] = Pool) -> tuple[Trainer, DataOrder]:
    """Run until the end, starting again after each kill."""
    problems = [Problem(str(i), ({"role": "user", "content": str(i)},), "0") for i in range(7)]
    while True:
        trainer, words = Trainer(life, problems), cast(Any, Words())
        timer, order = StepTimer(), DataOrder([p.uid for p in problems], 0)
        params = sampling(config.rollout, (1,), 0)
        pool = make_pool(life)
        common = cast(Any, pool), words, Judge(life), params, timer, NoProgress(), Stop()
        rollouts = Rollouts(*common, window=config.rollout.window)
        try:
            with ExitStack() as stack:
                run = stack.enter_context(RunDir(config))
                records = LocalRecords(run.path, words)
                stack.callback(records.close)
                run_rl(
                    RLParts(
                        config=config,
                        problems=problems,
                        held_out=[],
                        order=order,
                        stop_token_ids=(1,),
                        trainer=cast(Any, trainer),
                        last_step=LastStep(cast(Any, trainer), Stop(), copies=False),
                        rollouts=rollouts,
                        eval_rollouts=Rollouts(*common),
                        weights=cast(Any, Weights(life)),
                        records=records,
                        run=run,
                        view=NoProgress(),
                        timer=timer,
                        counters=StepCounters([rollouts.counters]),
                        spec=SPEC,
                    )
                )
            pool.close()
            return trainer, order
        except Killed:
            pool.close()
            life.kills.pop(0)
            life.calls, life.dead = 0, False


def expected_reason(fate: str, config: RLConfig) -> str | None:
    """Why a group is dropped, None where it is trained on."""
    if fate == "faults":
        return "3 of 3 rollouts faulted or aborted"
    if config.rollout.dynamic_rounds and fate in ("right", "wrong", "cut"):
        return f"dynamic sampling: {'all' if fate == 'right' else 'none'} right"
    if fate == "aborted":
        return "3 of 3 rollouts faulted or aborted"
    return "all responses truncated, and algo.mask_truncated is on" if fate == "cut" else None


def check(config: RLConfig, life: Life, trainer: Trainer, order: DataOrder) -> list[dict[str, Any]]:
    """Everything that I6 says of a run that has ended. Returns the ledger."""
    run = Path(config.run.dir)
    lines = list(read_lines(run / "ledger.jsonl"))
    drawn: list[Drawn] = [(line["uid"], line["draw"]) for line in lines]
    at = order.state()
    assert len(drawn) == at["epoch"] * 7 + at["position"], "what the order gave is what the ledger has"
    assert len(set(drawn)) == len(drawn), "none twice in an epoch"
    whole = Counter(epoch for _, epoch in drawn)
    assert all(whole[epoch] == 7 for epoch in range(at["epoch"])), "none missing"
    for line in lines:
        assert set(line) == {"step", "uid", "draw", "outcome"} | ({"reason"} if line["outcome"] == "dropped" else set())
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    steps = [event for event in read_lines(run / "journal.jsonl") if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, config.num_steps + 1))
    assert Counter(line["step"] for line in lines) == {e["step"]: e["num_prompts"] for e in steps if e["num_prompts"]}
    learned: list[Drawn] = [(uid, draw) for uid, draw, updated in trainer.log if updated]
    assert len(learned) == len(set(learned)), "none trained on twice"
    assert set(learned) == {(line["uid"], line["draw"]) for line in lines if line["outcome"] == "trained"}
    seen = {(uid, draw) for uid, draw, _ in trainer.log}
    for line in lines:
        fate = expected_reason(life.fate(line["uid"], line["draw"]), config)
        if (line["uid"], line["draw"]) in seen:
            assert fate is None
            assert line.get("reason") in (None, "told to skip")
        else:  # where all rewards of each group of a step are equal, nothing of it is trained on
            assert line["reason"] == (fate or "all rewards of each group are equal")
    return lines


RUNS = st.fixed_dictionaries(
    {
        "fates": st.lists(st.sampled_from(FATES), min_size=1, max_size=12),
        "kills": st.lists(st.integers(1, 150), max_size=5),
        "num_steps": st.integers(1, 6),
        "prompts": st.integers(1, 7),
        "rounds": st.sampled_from([0, 0, 1, 3]),
        "minibatches": st.integers(1, 3),
        "save_every": st.integers(1, 3),
        "lag": st.integers(0, 3),
        "window": st.sampled_from([0, 1, 1, 2, 5]),  # 0: during_update = "wait"
    }
)


def recipe_of(run: dict[str, Any], folder: str, rollout: dict[str, Any]) -> RLConfig:
    tree: dict[str, Any] = {
        "num_steps": run["num_steps"],
        "run": {"dir": folder},
        "model": {"path": "none"},
        "data": {"train": "none", "max_prompt_tokens": 1},
        "rollout": {"samples_per_prompt": SAMPLES, "max_new_tokens": 2} | rollout,
        "algo": {"minibatches": run["minibatches"], "advantage": "grpo", "mask_truncated": True, "proximal": "engine"},
        "train": {"save_every": run["save_every"], "keep_checkpoints": 1},
        "verify": {"max_fault_rate": 1.0},
    }
    return load_config(tree)


def prove(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lives: list[Life] = []
    ticks_around_files(monkeypatch, lambda: lives[-1])
    ledgers: list[list[dict[str, Any]]] = []
    prompts = -(-run["prompts"] // run["minibatches"]) * run["minibatches"]
    schedule: dict[str, Any] = {"max_lag": run["lag"]}
    if run["lag"] and run["window"]:
        schedule |= {"during_update": "go_on", "window": run["window"]}
    rounds = 0 if run["lag"] and not run["window"] else run["rounds"]
    for kills in ([], run["kills"]):
        with tempfile.TemporaryDirectory() as folder:
            config = recipe_of(run, folder, {"prompts_per_step": prompts, "dynamic_rounds": rounds, **schedule})
            lives.append(Life(run["fates"], list(kills)))
            ledgers.append(check(config, lives[-1], *live(config, lives[-1])))
    if schedule.get("window", 1) == 1:
        assert ledgers[0] == ledgers[1], "kills leave no trace"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(run=RUNS)
def test_every_prompt_drawn_is_accounted_for(run: dict[str, Any]):
    with pytest.MonkeyPatch.context() as monkeypatch:
        prove(run, monkeypatch)


@pytest.mark.long
@settings(max_examples=1000, deadline=None)
@given(run=RUNS)
def test_every_prompt_drawn_is_accounted_for_in_many_runs(run: dict[str, Any]):
    with pytest.MonkeyPatch.context() as monkeypatch:
        prove(run, monkeypatch)


WINDOWS = st.fixed_dictionaries(
    {
        "fates": st.lists(st.sampled_from(FATES), min_size=1, max_size=12),
        "kills": st.lists(st.integers(1, 150), max_size=4),
        "seed": st.integers(0, 1000),
        "num_steps": st.integers(2, 8),
        "prompts": st.integers(1, 4),
        "minibatches": st.just(1),
        "save_every": st.integers(1, 3),
        "lag": st.integers(1, 3),
        "window": st.integers(1, 9),
    }
)


def prove_bound(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost, no group is overtaken by more than window - 1 others, and no token is older than the bound."""
    life, window, prompts = Life(run["fates"], list(run["kills"]), run["seed"]), run["window"], run["prompts"]
    ticks_around_files(monkeypatch, lambda: life)
    rollout = {"prompts_per_step": prompts, "max_lag": run["lag"], "during_update": "go_on", "window": window}
    with tempfile.TemporaryDirectory() as folder:
        config = recipe_of(run, folder, rollout)
        lines = check(config, life, *live(config, life, LatePool))
        steps = [event for event in read_lines(Path(folder) / "journal.jsonl") if event["event"] == "step"]
    put = DataOrder([str(i) for i in range(7)], 0).draw(len(lines))
    order = {(str(i), epoch): place for place, (i, epoch) in enumerate(put)}
    taken = [order[line["uid"], line["draw"]] for line in lines]
    for place, group in enumerate(taken):
        overtakers = [other for other in taken[:place] if other > group]
        assert len(overtakers) < window, f"{group} was overtaken by {overtakers}"
    for event in steps:
        assert all(0 <= int(lag) <= run["lag"] - (-(window - 1) // prompts) for lag in event["lag_tokens"]), event


@settings(max_examples=25, deadline=None, derandomize=True)
@given(run=WINDOWS)
def test_the_window_bounds_who_overtakes_whom_and_the_lag(run: dict[str, Any]):
    with pytest.MonkeyPatch.context() as monkeypatch:
        prove_bound(run, monkeypatch)


@pytest.mark.long
@settings(max_examples=600, deadline=None)
@given(run=WINDOWS)
def test_the_window_bounds_who_overtakes_whom_and_the_lag_in_many_runs(run: dict[str, Any]):
    with pytest.MonkeyPatch.context() as monkeypatch:
        prove_bound(run, monkeypatch)
