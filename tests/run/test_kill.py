"""I5: a run that is killed anywhere, and started again, ends with the bits of one that was not."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from pekoe.config import RLConfig, SFTConfig, load_config
from pekoe.core.journal import read_lines
from pekoe.data.problems import Demonstration, write_demonstrations
from pekoe.run.run_dir import checkpoints
from tests.forked import CONTEXT
from tests.run import killed
from tests.run.killed import Point

LIMIT_S = 60
Build = Callable[..., RLConfig]

# Of the files that are renamed, and the lines that are written, those meant.
_STEP = lambda _, to: Path(to).parent.name == "checkpoints" and Path(to).name.startswith("step-")  # noqa: E731
_DOOMED = lambda _, to: Path(to).name.startswith(".partial-")  # noqa: E731
_LEDGER = lambda lines, *_: lines.path.name == "ledger.jsonl"  # noqa: E731
_METRICS = lambda _, event: event.get("event") == "step"  # noqa: E731
_SAVED = lambda _, event: event.get("event") == "checkpoint"  # noqa: E731
_ROLLOUTS = lambda path, _: path.parent.name == "rollouts"  # noqa: E731
_IN_FLIGHT = lambda path, *_: Path(path).name.startswith(".in-flight")  # noqa: E731
_DRAINING = lambda *given: len(given) == 2  # noqa: E731

RESPONSE, OPTIMIZER = "pekoe.run.judging:RandomJudge.submit", "torch.optim:AdamW.step"
FORWARD, LINE = "pekoe.train.trainer:Trainer.forward", "pekoe.core.journal:JsonLines.append"
TENSORS, EXPORT = "pekoe.train.checkpoint:write", "pekoe.train.checkpoint:save_model"

# An evaluation of 14 responses, three steps of 16 responses and 4 optimizer steps each, another evaluation after the
# second; every step is saved, one kept.
POINTS: dict[str, Point] = {
    "nothing is done": Point("pekoe.run.run_dir:RunDir.resume"),
    "first response": Point(RESPONSE),
    "after the first evaluation": Point("pekoe.run.rl:evaluate", 1, "after"),
    "mid-rollout of step 1": Point(RESPONSE, 23),
    "mid-rollout of step 2": Point(RESPONSE, 39),
    "mid-decode": Point("pekoe.model.decoder:Decoder.forward", 30),
    "all responses of step 2": Point("pekoe.run.rl:collect", 2, "after"),
    "before learning": Point("pekoe.run.rl:learn", 2),
    "before a forward": Point(FORWARD, 7),
    "after a forward": Point(FORWARD, 11, "after"),
    "mid-backward of step 1": Point(FORWARD, 3, "in_backward"),
    "mid-backward of step 2": Point(FORWARD, 15, "in_backward"),
    "before an optimizer step": Point(OPTIMIZER, 6),
    "after an optimizer step": Point(OPTIMIZER, 6, "after"),
    "after the last optimizer step": Point(OPTIMIZER, 8, "after"),
    "before a sync": Point("pekoe.weights.channel:WeightChannel.publish", 3),
    "after a sync": Point("pekoe.weights.channel:WeightChannel.publish", 4, "after"),
    "half of a rollouts file": Point("pathlib:Path.write_bytes", 4, "torn_bytes", _ROLLOUTS),
    "after the rollouts of a step": Point("pekoe.run.records:write_lines", 2, "after"),
    "half of the first ledger line": Point(LINE, 1, "torn_line", _LEDGER),
    "half of a ledger line": Point(LINE, 7, "torn_line", _LEDGER),
    "between ledger lines": Point(LINE, 6, "after", _LEDGER),
    "after a step's ledger": Point(LINE, 8, "after", _LEDGER),
    "half of a journal line": Point(LINE, 2, "torn_line", _METRICS),
    "after a journal line": Point(LINE, 3, "after", _METRICS),
    "before the snapshot": Point("pekoe.train.checkpoint:snapshot", 2),
    "after the snapshot": Point("pekoe.train.checkpoint:snapshot", 2, "after"),
    "first save, half of the tensors": Point(TENSORS, 1, "torn_tensors"),
    "half of the tensors": Point(TENSORS, 2, "torn_tensors"),
    "after the tensors": Point(TENSORS, 2, "after"),
    "before the checkpoint is on disk": Point("pekoe.run.checkpoints:_to_disk", 2),
    "before the model": Point(EXPORT, 2),
    "after the model": Point(EXPORT, 2, "after"),
    "before the rename": Point("os:replace", 2, "before", _STEP),
    "after the rename": Point("os:replace", 2, "after", _STEP),
    "between rename and journal": Point(LINE, 2, "before", _SAVED),
    "half of the line on a save": Point(LINE, 2, "torn_line", _SAVED),
    "after the line on a save": Point(LINE, 1, "after", _SAVED),
    "before an old checkpoint goes": Point("os:replace", 1, "before", _DOOMED),
    "an old checkpoint has no name": Point("os:replace", 1, "after", _DOOMED),
    "an old checkpoint is half gone": Point("shutil:rmtree", 1, "half_removed", lambda path, *_: _DOOMED(0, path)),
    "before an evaluation": Point("pekoe.run.rl:evaluate", 2),
    "mid-evaluation": Point(RESPONSE, 49),
    "after an evaluation": Point("pekoe.run.rl:evaluate", 2, "after"),
    "the last save": Point("os:replace", 3, "after", _STEP),
}
AGAIN: dict[str, Point] = {  # and once more, by the run that goes on
    "before loading": Point("pekoe.train.checkpoint:read"),
    "after loading": Point("pekoe.train.checkpoint:read", 1, "after"),
    "between journal and ledger": Point("pekoe.core.journal:JsonLines.cut", 1, "after"),
    "before rollouts are set aside": Point("pekoe.run.run_dir:_set_aside"),
    "rollouts are set aside": Point("pekoe.run.run_dir:_set_aside", 1, "after"),
    "half of the line on going on": Point(LINE, 1, "torn_line"),
    "mid-rollout": Point(RESPONSE, 5),
}
TERMINATED: dict[str, Point] = {  # by SIGTERM, in each phase
    "in a rollout": Point(RESPONSE, 23, "terminated"),
    "in a training step": Point(OPTIMIZER, 6, "terminated"),
    "in a sync": Point("pekoe.weights.channel:WeightChannel.publish", 3, "terminated"),
    "in a save": Point("pekoe.train.checkpoint:snapshot", 2, "terminated"),
    "while a save is written": Point(TENSORS, 2, "terminated"),
    "in an evaluation": Point(RESPONSE, 49, "terminated"),
}
# Five steps sampled ahead of training by one version each, with an evaluation after the third and saves after 2, 4, 5.
DRAIN, RECEIVE = "pekoe.run.rollouts:Rollouts.drain", "pekoe.run.rollouts:Rollouts._receive"
AHEAD: dict[str, Point] = {
    "before a drain": Point(DRAIN, 2),
    "mid-drain": Point(RECEIVE, 20, "before", _DRAINING),
    "after a drain": Point(DRAIN, 3, "after"),
    "mid-rollout of the first put": Point(RESPONSE, 16),
    "mid-rollout of a step to come": Point(RESPONSE, 64),
    "ahead: before an optimizer step": Point(OPTIMIZER, 10),
    "ahead: mid-backward of step 4": Point(FORWARD, 26, "in_backward"),
    "ahead: before a sync": Point("pekoe.weights.channel:WeightChannel.publish", 4),
    "half of a copy of the weights": Point("pekoe.weights.transport:StagedSender.stage", 4),
    "ahead: after a sync": Point("pekoe.weights.channel:WeightChannel.publish", 4, "after"),
    "ahead: half of a ledger line": Point(LINE, 11, "torn_line", _LEDGER),
    "before the records in flight": Point("pekoe.run.checkpoints:write_groups", 2),
    "half of the arrays in flight": Point("pathlib:Path.write_bytes", 3, "torn_bytes", _IN_FLIGHT),
    "half of the lines in flight": Point("pathlib:Path.write_bytes", 4, "torn_bytes", _IN_FLIGHT),
    "between arrays and lines in flight": Point("os:replace", 3, "after", _IN_FLIGHT),
    "after the records in flight": Point("pekoe.run.checkpoints:write_groups", 2, "after"),
    "ahead: before the rename": Point("os:replace", 2, "before", _STEP),
    "ahead: after the rename": Point("os:replace", 1, "after", _STEP),
    "ahead: before an evaluation": Point("pekoe.run.rl:evaluate", 2),
    "ahead: after an evaluation": Point("pekoe.run.rl:evaluate", 2, "after"),
}
AHEAD_AGAIN: dict[str, Point] = {  # and once more, by the run that goes on from step 2
    "before groups in flight are read": Point("pekoe.run.run_dir:read_groups"),
    "after groups in flight are read": Point("pekoe.run.run_dir:read_groups", 1, "after"),
    "groups in flight are restored": Point("pekoe.run.rollouts:Rollouts.restore", 1, "after"),
    "before new groups are put": Point("pekoe.run.rl:put", 1),
}


@pytest.fixture(scope="module")
def life() -> Callable[..., int | None]:
    """Runs a recipe in a child forked from a process that has imported everything; gives its exit status."""

    def run(config: RLConfig | SFTConfig, *points: Point) -> int | None:
        # A Point's predicate is a lambda, which no pickle carries: children are told names.
        names = [name for point in points for name, each in ALL.items() if each is point]
        process = CONTEXT.Process(target=in_child, args=(config, names))
        process.start()
        process.join(LIMIT_S)
        assert process.exitcode is not None, f"a child ran for more than {LIMIT_S} s"
        return process.exitcode

    return run


def in_child(config: RLConfig | SFTConfig, names: list[str]) -> None:
    killed.run(config, [ALL[name] for name in names])


# Of a step's event, what depends on how much was sampled in it for steps to come.
COUNTED = "rollout_bytes", "prefill_tokens", "cached_tokens", "shared_tokens", "num_preemptions", "num_forwards"


def future_of(run: Path, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """All that decides what a run would do next, and what it said, but for times and what `but` names."""
    ends = ("_s", "time", "seconds", "peak_bytes", *but)
    said = {
        name: [
            {k: v for k, v in line.items() if not k.endswith(ends)}
            for line in read_lines(run / name)
            if line.get("event") not in ("machine", "resumed", "sync", "checkpoint")  # each start has its own
        ]
        for name in ("journal.jsonl", "ledger.jsonl")
    }
    rollouts = {p.name: p.read_bytes() for p in sorted((run / "rollouts").glob("*"))}
    return said | {"rollouts": rollouts} | trained(run)


def trained(run: Path) -> dict[str, Any]:
    """The last checkpoint, and the model."""
    last = checkpoints(run)[-1]
    progress = json.loads((last / "state.json").read_text())["progress"]
    dcp_to_torch_save(last / "trainer", run / "trainer.pt")  # files hold tensors in the order in which they came
    tensors = flat_bytes(torch.load(run / "trainer.pt"))
    model = (run / "model" / "model.safetensors").read_bytes()
    return {"progress": progress, "tensors": tensors, "model": model}


def flat_bytes(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by their path: bytes of tensors, other values as they are."""
    if isinstance(tree, dict):
        return {k: v for name, branch in tree.items() for k, v in flat_bytes(branch, f"{prefix}/{name}").items()}
    return {prefix: tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert found[name] == value, f"{name} differs"


MORE = ("num_steps=3", "train.save_every=1", "train.keep_checkpoints=1", "eval.every=2", "eval.samples=2")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return {}


@pytest.fixture
def rl(build: Build, tiny_dir: Path, life: Callable[..., int | None], expected: dict[str, Any], tmp_path: Path):
    """A recipe, and what it comes to when nobody kills it."""
    more = (*MORE, f"eval.data={tiny_dir / 'held_out.jsonl'}")
    if not expected:
        whole = build(*more, f"run.dir={tmp_path / 'whole'}")
        assert life(whole) == 0
        expected |= future_of(tmp_path / "whole")
        assert [e["step"] for e in expected["journal.jsonl"]] == [0, 1, 2, 2, 3]
    return build(*more)


def some_slow(names: Iterable[Any]) -> list[Any]:
    """Every fourth is always run."""
    return [name if i % 4 == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(names)]


@pytest.mark.parametrize("name", some_slow(POINTS))
def test_killed_and_started_again(name: str, rl: RLConfig, life: Callable[..., int | None], expected: dict[str, Any]):
    assert life(rl, POINTS[name]) == -signal.SIGKILL, "the point was not reached"
    assert life(rl) == 0
    assert_same(future_of(Path(rl.run.dir)), expected)


@pytest.mark.parametrize("name", some_slow(AGAIN))
def test_killed_while_going_on(name: str, rl: RLConfig, life: Callable[..., int | None], expected: dict[str, Any]):
    assert life(rl, POINTS["before the rename"]) == -signal.SIGKILL
    assert life(rl, AGAIN[name]) == -signal.SIGKILL, "the point was not reached"
    assert life(rl) == 0
    assert_same(future_of(Path(rl.run.dir)), expected)


@pytest.mark.parametrize("name", TERMINATED)
def test_terminated_and_started_again(
    name: str, rl: RLConfig, life: Callable[..., int | None], expected: dict[str, Any]
):
    start = time.monotonic()
    assert life(rl, TERMINATED[name]) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 20
    assert life(rl) == 0
    assert_same(future_of(Path(rl.run.dir)), expected)


@pytest.fixture(scope="module")
def unbroken() -> dict[int, dict[str, Any]]:
    return {}


@pytest.fixture
def ahead(
    build: Build, tiny_dir: Path, life: Callable[..., int | None], unbroken: dict[int, dict[str, Any]], tmp_path: Path
):
    """`ahead(lag)`: a recipe that samples ahead of training, and what it comes to when nobody kills it."""

    def make(lag: int) -> tuple[RLConfig, dict[str, Any]]:
        more = (*MORE, f"eval.data={tiny_dir / 'held_out.jsonl'}", f"rollout.max_lag={lag}", "eval.every=3")
        more = (*more, "num_steps=5", "train.save_every=2", "eval.samples=1")
        if lag not in unbroken:
            assert life(build(*more, f"run.dir={tmp_path / 'whole'}")) == 0
            unbroken[lag] = future_of(tmp_path / "whole", COUNTED)
            steps = [e for e in unbroken[lag]["journal.jsonl"] if e["event"] == "step"]
            assert [e["lag_max"] for e in steps] == [min(step, lag) for step in range(5)]
        return build(*more), unbroken[lag]

    return make


@pytest.mark.parametrize("at", some_slow(product(AHEAD, [1, 2])), ids=str)
def test_killed_while_sampling_ahead(
    at: tuple[str, int], ahead: Callable[..., tuple[RLConfig, dict[str, Any]]], life: Callable[..., int | None]
):
    name, lag = at
    config, expected = ahead(lag)
    assert life(config, AHEAD[name]) == -signal.SIGKILL, "the point was not reached"
    assert life(config) == 0
    assert_same(future_of(Path(config.run.dir), COUNTED), expected)


@pytest.mark.parametrize("at", some_slow(product(AHEAD_AGAIN, [1, 2])), ids=str)
def test_killed_while_restoring_what_was_in_flight(
    at: tuple[str, int], ahead: Callable[..., tuple[RLConfig, dict[str, Any]]], life: Callable[..., int | None]
):
    name, lag = at
    config, expected = ahead(lag)
    assert life(config, AHEAD["ahead: before the rename"]) == -signal.SIGKILL
    assert [path.name for path in checkpoints(Path(config.run.dir))] == ["step-000002"]
    assert life(config, AHEAD_AGAIN[name]) == -signal.SIGKILL, "the point was not reached"
    assert life(config) == 0
    assert_same(future_of(Path(config.run.dir), COUNTED), expected)


SFT: dict[str, Point] = {
    "SFT: mid-backward": Point(FORWARD, 8, "in_backward"),
    "SFT: after an optimizer step": Point(OPTIMIZER, 4, "after"),
    "SFT: half of a journal line": Point(LINE, 4, "torn_line", _METRICS),
    "SFT: half of the tensors": Point(TENSORS, 2, "torn_tensors"),
    "SFT: after the rename": Point("os:replace", 2, "after", _STEP),
    "SFT: between rename and journal": Point(LINE, 1, "before", _SAVED),
}


@pytest.fixture(scope="module")
def sft(
    tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory, life: Callable[..., int | None]
) -> tuple[Callable[[str], SFTConfig], dict[str, Any]]:
    """`sft(name)`: a recipe with a directory of this name; and what it comes to when nobody kills it."""
    tmp_path = tmp_path_factory.mktemp("sft")
    numbers = [(a, b) for a in range(5) for b in range(4)]
    write_demonstrations(
        tmp_path / "demos.jsonl",
        [Demonstration(({"role": "user", "content": f"{a}+{b}="},), f"\\boxed{{{a + b}}}") for a, b in numbers],
    )
    tree = {
        "model": {"path": str(tiny_dir / "model"), "device": "cpu"},
        "data": {"train": str(tmp_path / "demos.jsonl")},
        "sft": {"epochs": 2, "batch_size": 8},
        "train": {"token_budget": 64, "save_every": 1, "keep_checkpoints": 1},
    }

    def recipe(name: str) -> SFTConfig:
        return load_config(tree | {"run": {"dir": str(tmp_path / name), "threads": 1}}, kind=SFTConfig)

    assert life(recipe("whole")) == 0
    return recipe, trained(tmp_path / "whole")


@pytest.mark.parametrize("name", some_slow(SFT))
def test_sft_killed_and_started_again(
    name: str, sft: tuple[Callable[[str], SFTConfig], dict[str, Any]], life: Callable[..., int | None]
):
    recipe, expected = sft
    config = recipe(str(list(SFT).index(name)))
    assert life(config, SFT[name]) == -signal.SIGKILL, "the point was not reached"
    assert life(config) == 0
    assert_same(trained(Path(config.run.dir)), expected)


JUDGES: dict[str, Point] = {"judges": Point("pekoe.run.rl:collect", 1, "with_children")}
ALL = POINTS | AGAIN | TERMINATED | AHEAD | AHEAD_AGAIN | SFT | JUDGES


def test_no_judge_outlives_its_run(rl: RLConfig, life: Callable[..., int | None]):
    config = rl.model_copy(update={"verify": rl.verify.model_copy(update={"random": False})})
    assert life(config, JUDGES["judges"]) == -signal.SIGKILL
    children = [int(pid) for pid in Path(rl.run.dir, "children").read_text().split()]
    assert children, "judges are processes"
    deadline = time.monotonic() + 20
    while alive := [pid for pid in children if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.05)
