"""The loop on Ray: it learns what one process learns, keeps tokens off the controller, and survives what dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from pekoe.config import RLConfig
from pekoe.core.progress import NoProgress
from pekoe.ray.engines import Engines
from pekoe.ray.trainer_proxy import ClusterTrainer
from pekoe.report.findings import findings
from pekoe.report.history import read_history
from pekoe.run.replay import replay
from pekoe.run.run_dir import read_rollouts
from tests.ray.conftest import events, ledger

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
Cluster = Callable[..., RLConfig]
Run = Callable[[RLConfig], list[str]]


def test_on_the_same_rollouts_it_loses_what_one_process_loses(cluster: Cluster, run: Run):
    config = cluster("algo.proximal=recompute", "algo.correction=truncate", "algo.kl=0.01", "train.keep_checkpoints=9")
    run(config)
    steps = events(config, "step")
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["logprob_diff_max"] < 1e-4  # I1
        assert step["sync_canary_diff"] < 1e-4  # I4
        assert step["transfer_bytes"] > 0
        assert 0 <= step["overlap_saved_s"] < step["step_s"]
        assert 0 < step["controller_bytes"] / step["num_rollouts"] < 1024 + 300  # three ways of log-probs, of 4 samples
        again = replay(Path(config.run.dir), step["step"], NoProgress())
        assert again.loss == pytest.approx(step["loss"], abs=1e-5)
        assert again.grad_norm == pytest.approx(step["grad_norm"], rel=1e-4)
        lines = read_rollouts(Path(config.run.dir), step["step"])
        assert len(lines) == 16
        assert all(len(line["tokens"]) == len(line["logprobs"]) for line in lines)
    (machine,) = events(config, "machine")
    assert machine["device"].startswith("2 x cpu")
    assert min(machine["flop_s"], machine["byte_s"]) > 1e6
    said = [sentence for sentence in findings(read_history(Path(config.run.dir))) if "GFLOP/s" in sentence]
    assert [sentence.split()[0] for sentence in said] == ["Training"]  # what engines sample on is not measured
    assert len(set(ledger(config))) == len(ledger(config)) == 12
    assert {e["sync_checksum"] for e in steps} <= {"equal", "skipped"}
    assert steps[0]["sync_checksum"] == "equal"


def test_engines_and_ranks_may_take_turns(cluster: Cluster, run: Run):
    """The same losses as side by side, but for the last bits: nothing else is another."""
    beside = cluster("run.dir=" + str(Path(cluster().run.dir).with_name("beside")))
    run(beside)
    config = cluster("cluster.colocate=true")
    run(config)
    assert ledger(config) == ledger(beside)
    for ours, theirs in zip(events(config, "step"), events(beside, "step"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["sync_canary_diff"] < 1e-4
        assert ours["idle_engines"] > 0
        assert ours["idle_ranks"] > 0


def test_weights_may_go_over_the_disk(cluster: Cluster, run: Run):
    config = cluster("cluster.sync=disk", "cluster.training.ranks=1", "num_steps=2", "optim.lr=1e-2")
    run(config)
    steps = events(config, "step")
    assert [(step["sync_route"], step["sync_checksum"]) for step in steps] == [("disk", "equal"), ("disk", "skipped")]
    assert all(0 < step["sync_canary_diff"] < 1e-4 for step in steps)
    assert not any((Path(config.run.dir) / "logs" / "weights").iterdir())


def test_an_engine_that_is_killed_while_sampling(cluster: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch):
    begin, batches = Engines.begin, []

    def killing(self: Engines, drawn: Any, params: Any) -> int:
        if len(batches) == 2:  # the one after the kill
            ray.wait([self.all[0].starting], timeout=60)
        number = begin(self, drawn, params)
        batches.append(number)
        if len(batches) == 2:
            os.kill(self.all[0].pid, signal.SIGKILL)
        return number

    monkeypatch.setattr(Engines, "begin", killing)
    config = cluster("num_steps=4", "rollout.samples_per_prompt=16")
    said = run(config)
    assert any("engine 0 is lost" in text for text in said)
    assert any("engine 0 came back" in text for text in said)
    assert len(events(config, "step")) == 4
    assert len(set(ledger(config))) == len(ledger(config)) == 16


@pytest.mark.parametrize(("minibatch", "goes_on_from"), [(3, 0), (7, 1)])  # of steps 1, before any checkpoint, and 2
def test_a_rank_that_is_killed_while_training(
    cluster: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch, minibatch: int, goes_on_from: int
):
    unbroken = cluster(
        "num_steps=4", "train.save_every=1", "run.dir=" + str(Path(cluster().run.dir).with_name("whole"))
    )
    run(unbroken)
    step, calls = ClusterTrainer.step, []

    def killing(self: ClusterTrainer, *args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == minibatch:
            os.kill(self.pids[1], signal.SIGKILL)
        return step(self, *args, **more)

    monkeypatch.setattr(ClusterTrainer, "step", killing)
    config = cluster("num_steps=4", "train.save_every=1")
    said = run(config)
    assert any("begins again" in text for text in said)
    assert [event["step"] for event in events(config, "resumed")] == [goes_on_from]
    for ours, theirs in zip(events(config, "step"), events(unbroken, "step"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert ledger(config) == ledger(unbroken)
