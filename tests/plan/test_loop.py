"""The loop itself, `run/rl.py`, driven by costs in place of work: the planner's schedule is the one that runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

from pekoe.algo.scoring import Scored
from pekoe.config.recipes import load_config
from pekoe.core.errors import UserError
from pekoe.core.loop import StepStats
from pekoe.core.progress import NoProgress
from pekoe.core.types import Draw, JudgedGroup, Problem
from pekoe.plan.own import calibrated
from pekoe.plan.recipe import Asked, read_plan
from pekoe.plan.schedule import _Engines, simulate
from pekoe.plan.step import Setup, times_beside
from pekoe.run import rl
from pekoe.run.interrupt import StepTimer

RECIPE = str(Path(__file__).resolve().parents[2] / "recipes" / "boba-7b-cluster.toml")
SMALL = ("rollout.prompts_per_step=24", "rollout.samples_per_prompt=4", "cluster.generation.engines=3",
         "cluster.training.ranks=4", "rollout.max_new_tokens=4096", "engine.server.during_update=keep")  # fmt: skip


@dataclass(frozen=True)
class Stub:
    group: int
    proximal_logprobs: Any = None
    reference_logprobs: Any = None


class Costs:
    """Rollouts, trainer and weights of the loop, whose only effect is that time passes."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.now, self.engines, self.orders = setup, 0.0, _Engines(setup), list[str]()
        self.passes, self.trained, self.published, self.overhead = times_beside(setup)
        self.num_not_finite = 0

    # Rollouts

    def put(self, draws: Sequence[Draw]) -> None:
        for _ in range(0, len(draws), self.setup.prompts):
            self.engines.put(self.now)
            self.orders.append(f"put {len(self.engines.batches)}")

    def take(self, n: int) -> list[JudgedGroup]:
        self.now = self.engines.take(n, self.now) + self.setup.judge_s + self.overhead
        return [JudgedGroup(Problem("a", (), "1"), i, (), ()) for i in range(n)]

    def drain(self) -> None:
        self.now = self.engines.drain(self.now)

    def in_flight(self) -> Any:
        return SimpleNamespace(draws=[], places=[], sampled=list)

    def restore(self, *_: Any) -> None: ...
    def offload(self) -> None: ...
    def flush_cache(self) -> None: ...

    # Trainer

    def step(self, samples: Sequence[Stub], *_: Any) -> StepStats:
        self.now += self.trained / self.setup.updates
        return StepStats(0.0, 0.0, 0.0, 1, 1, 1, {})

    def logprobs(self, samples: Sequence[Stub], reference: bool = False) -> Sequence[None]:
        self.now += self.passes / self.setup.forwards
        return [None] * len(samples)

    # Weights

    def publish(self, version: int, wait: bool = True) -> Any:
        self.engines.load(self.now, self.now + self.published)
        self.now += self.published
        self.orders.append(f"publish {version}")
        return SimpleNamespace(as_dict=dict)

    def settle(self) -> None: ...


class Recorded(Costs):
    """What a journal recorded of each step in turns, in place of costs."""

    def __init__(self, setup: Setup, recorded: Sequence[Mapping[str, float]]) -> None:
        super().__init__(setup)
        self.recorded, self.version = recorded, 0

    def put(self, draws: Sequence[Draw]) -> None: ...

    def take(self, n: int) -> list[JudgedGroup]:
        self._pass("rollout", "verify")
        return [JudgedGroup(Problem("a", (), "1"), i, (), ()) for i in range(n)]

    def drain(self) -> None: ...

    def step(self, samples: Sequence[Stub], *_: Any) -> StepStats:
        self._pass("train", parts=self.setup.updates)
        return StepStats(0.0, 0.0, 0.0, 1, 1, 1, {})

    def publish(self, version: int, wait: bool = True) -> Any:
        if version:  # the first is of no step
            self._pass("sync")
        self.version = version
        return SimpleNamespace(as_dict=dict)

    def _pass(self, *phases: str, parts: int = 1) -> None:
        self.now += sum(self.recorded[self.version].get(phase, 0.0) for phase in phases) / parts


def run_with_costs(config: Any, costs: Costs, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[str]]:
    """When each step of `run_rl` ended, and the order of what it did."""
    ends = list[float]()
    nothing: Any = SimpleNamespace(
        has=lambda *_: False, write=lambda *_, **__: None, settle=lambda *_, **__: None, fetch=list, adopt=list
    )
    order = SimpleNamespace(state=lambda: None, restore=lambda _: None, draw=lambda n: [(0, i) for i in range(n)])
    run = SimpleNamespace(
        resume=lambda _: None,
        journal=nothing,
        settle=lambda *_, **__: None,
        save=lambda *_: None,
        saved=0,
        same_command="the same command",
    )
    monkeypatch.setattr(rl, "score", lambda groups, *_: Scored(tuple(Stub(i) for i in range(len(groups))), {}))
    monkeypatch.setattr(rl, "commit", lambda *_: ends.append(costs.now))
    parts: Any = SimpleNamespace(
        config=config, problems=[Problem("a", (), "1")], held_out=[], order=order, trainer=costs, rollouts=costs,
        weights=costs, records=nothing, run=run, view=NoProgress(), timer=StepTimer(), machine={}, num_admitted=0,
        in_flight=None, begin_step=lambda: None, last_step=SimpleNamespace(kept=lambda _: nullcontext()),
    )  # fmt: skip
    rl.run_rl(parts)
    return ends, costs.orders


@pytest.mark.parametrize(
    ("lag", "goes_on", "window"), [(0, False, 1), (1, False, 1), (3, False, 1), (1, True, 1), (2, True, 8)]
)
def test_the_loop_itself_takes_what_is_simulated(lag: int, goes_on: bool, window: int, monkeypatch: pytest.MonkeyPatch):
    keys = (*SMALL, f"num_steps={2 * lag + 10}", f"rollout.max_lag={lag}", f"rollout.window={window}")
    keys += ("rollout.during_update=go_on",) if goes_on else ()
    asked = Asked(RECIPE, keys, "h800")
    plan = read_plan(asked)
    setup = replace(plan.setup, window=plan.config.rollout.window)
    ends, order = run_with_costs(load_config(RECIPE, keys), Costs(setup), monkeypatch)
    before, counted = (lag + 2, 4) if lag else (0, 4)
    published = times_beside(setup)[2]  # the first one, before all steps
    seconds = (ends[before + counted - 1] - (ends[before - 1] if before else published)) / counted
    assert seconds == pytest.approx(simulate(setup, counted).time.step_s, rel=1e-6)
    first = order.index("put 1")
    assert order[first : first + lag + 1] == [f"put {i + 1}" for i in range(lag + 1)]  # so many batches at first
    assert order.index(f"put {lag + 2}") == order.index("publish 1") + 1  # the next when a version is there


@pytest.mark.parametrize("run", ["one process", "cluster"])
def test_a_real_journals_phases_give_its_steps(run: str, monkeypatch: pytest.MonkeyPatch):
    """recorded.jsonl: twelve steps of the demo's RL stage on two cores. `time` is the clock's, when a step was over."""
    lines = [json.loads(line) for line in Path(__file__).with_name("recorded.jsonl").read_text().splitlines()]
    events = [line for line in lines if line["run"] == run]
    steps = events[1:]
    keys = ("algo.proximal=engine", "algo.correction=off", f"num_steps={len(steps)}", "model.path=Qwen2.5-0.5B")
    keys += ("cluster.generation.engines=2", "cluster.training.ranks=2") if run == "cluster" else ()
    recipe = RECIPE.replace("boba-7b-cluster", "laptop")
    config = load_config(recipe, keys)
    costs = Recorded(read_plan(Asked(recipe, keys)).setup, [step["seconds"] for step in steps])
    ends, _ = run_with_costs(config, costs, monkeypatch)
    real = steps[-1]["time"] - steps[0]["time"]
    assert ends[-1] - ends[0] == pytest.approx(real, rel=0.02)
    times = [step["time"] for step in steps]
    ratios = [(ends[i] - ends[i - 1]) / (times[i] - times[i - 1]) for i in range(1, len(steps))]
    assert median(ratios) == pytest.approx(1, abs=0.02)
    known = calibrated(config.model_dump(mode="json", exclude_none=True), events, Path("nowhere"))
    assert simulate(read_plan(known).setup).time.step_s == pytest.approx(
        median(step["step_s"] for step in steps[1:]), rel=0.02
    )


def test_lag_is_refused_where_devices_are_shared():
    with pytest.raises(UserError):
        read_plan(Asked(RECIPE, (*SMALL, "cluster.colocate=true", "rollout.max_lag=1"), "h800"))
