"""The loop on Ray: it learns what one process learns, keeps tokens off the controller, and survives what dies."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from pekoe.config import RLConfig
from pekoe.core.errors import UserError
from pekoe.core.loop import StepStats
from pekoe.core.progress import NoProgress
from pekoe.core.records import read_records
from pekoe.core.types import Draw, SamplingParams
from pekoe.engine.base import requests_of
from pekoe.model import load_model
from pekoe.model.peft import read_weights
from pekoe.ray.run import build_cluster, run_cluster, run_with_restarts
from pekoe.ray.trainer import RayTrainer
from pekoe.report.findings import findings
from pekoe.report.history import read_history
from pekoe.run.interrupt import Stop
from pekoe.run.replay import replay
from pekoe.run.rollouts import Rollouts
from tests.ray.conftest import events, ledger
from tests.run.conftest import Messages

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
MakeConfig = Callable[..., RLConfig]
Run = Callable[[RLConfig], list[str]]


def test_on_the_same_rollouts_it_loses_what_one_process_loses(cluster: MakeConfig, run: Run):
    config = cluster("algo.proximal=recompute", "algo.correction=truncate", "algo.kl=0.01", "train.keep_checkpoints=9")
    run(config)
    steps = events(config, "step")
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["logprob_diff_max"] < 1e-4  # I1
        assert step["sync_canary_diff"] < 1e-4  # I4
        assert step["transfer_bytes"] > 0
        assert 0 <= step.get("overlap_saved_s", 0) < step["step_s"]
        assert 0 < step["controller_bytes"] / step["num_rollouts"] < 2048  # three ways of log-probs, of 4 samples
        again = replay(Path(config.run.dir), step["step"], NoProgress())
        assert again.loss == pytest.approx(step["loss"], abs=1e-5)
        assert again.grad_norm == pytest.approx(step["grad_norm"], rel=1e-4)
        lines = read_records(Path(config.run.dir), step["step"])
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


@pytest.mark.long
def test_engines_and_ranks_may_take_turns(cluster: MakeConfig, run: Run):
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


def test_weights_may_go_over_the_disk(cluster: MakeConfig, run: Run):
    config = cluster("cluster.sync=disk", "cluster.training.ranks=1", "num_steps=2", "optim.lr=1e-2")
    run(config)
    steps = events(config, "step")
    assert [(step["sync_route"], step["sync_checksum"]) for step in steps] == [("disk", "equal"), ("disk", "skipped")]
    assert all(0 < step["sync_canary_diff"] < 1e-4 for step in steps)
    assert not any((Path(config.run.dir) / "logs" / "weights").iterdir())


def test_engines_hold_weights_in_bfloat16(cluster: MakeConfig, run: Run):
    """And are sent those: two bytes a parameter. They compute as ranks do, which gather theirs in it."""
    config = cluster("model.dtype=bfloat16", "num_steps=2", "optim.lr=1e-2")
    run(config)
    parameters = load_model(Path(config.model.path)).spec.num_parameters
    for step in events(config, "step"):
        assert step["sync_bytes"] == 2 * parameters
        assert step["logprob_diff"] < 2e-2  # I1
        assert 0 < step["sync_canary_diff"] < 0.5  # I4
    assert events(config, "step")[0]["sync_checksum"] == "equal"


@pytest.mark.parametrize("sync", ["broadcast", pytest.param("disk", marks=pytest.mark.long)])
def test_engines_are_sent_an_adapter_alone(cluster: MakeConfig, run: Run, sync: str):
    config = cluster(f"cluster.sync={sync}", "model.lora.rank=4", "algo.kl=0.01", "num_steps=2", "optim.lr=1e-2")
    run(config)
    steps = events(config, "step")
    folder = Path(config.run.dir) / "model"
    weights, _ = read_weights(folder)
    size = (folder / "adapter_model.safetensors").stat().st_size
    size = size if sync == "disk" else sum(tensor.nbytes for tensor in weights.values())
    for step in steps:
        assert step["logprob_diff_max"] < 1e-4  # I1
        assert step["sync_canary_diff"] < 1e-4  # I4
        assert step["sync_bytes"] == size
        again = replay(Path(config.run.dir), step["step"], NoProgress())
        assert again.loss == pytest.approx(step["loss"], abs=1e-5)
    assert steps[0]["sync_checksum"] == "equal"


def test_an_engine_that_is_killed_while_sampling(cluster: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    """What it had is sampled by the other; it comes back. And what it is asked for afterwards is answered as before."""
    put, steps = Rollouts.put, []

    def killing(self: Rollouts, draws: Sequence[Draw], params: SamplingParams | None = None) -> None:
        steps.append(1)
        if len(steps) == 3:  # the step after the kill's
            wait_until(lambda: bool(built.pool.members[0].current))
        put(self, draws, params)
        if len(steps) == 2:
            os.kill(built.pool.members[0].engine.info.pid, signal.SIGKILL)

    monkeypatch.setattr(Rollouts, "put", killing)
    config, messages = cluster("num_steps=4", "rollout.samples_per_prompt=16"), Messages()
    with ExitStack() as stack:
        built = build_cluster(config, messages, Stop(), stack)
        run_with_restarts(built)
    assert any("engine 0 is lost" in text for text in messages.said)
    assert any("engine 0 came back" in text for text in messages.said)
    assert len(events(config, "step")) == 4
    assert len(set(ledger(config))) == len(ledger(config)) == 16


@pytest.mark.parametrize(
    ("minibatch", "goes_on_from"),  # of steps 1, before any checkpoint, and 2
    [pytest.param(3, 0, marks=pytest.mark.long), (7, 1)],
)
def test_a_rank_that_is_killed_while_training(
    cluster: MakeConfig, run: Run, monkeypatch: pytest.MonkeyPatch, minibatch: int, goes_on_from: int
):
    unbroken = cluster(
        "num_steps=4", "train.save_every=1", "run.dir=" + str(Path(cluster().run.dir).with_name("whole"))
    )
    run(unbroken)
    step, calls = RayTrainer.step, []

    def killing(self: RayTrainer, *args: Any, **more: Any) -> StepStats:
        calls.append(1)
        if len(calls) == minibatch:
            os.kill(self.pids[1], signal.SIGKILL)
        return step(self, *args, **more)

    monkeypatch.setattr(RayTrainer, "step", killing)
    config = cluster("num_steps=4", "train.save_every=1")
    said = run(config)
    assert any("begins again" in text for text in said)
    assert [event["step"] for event in events(config, "resumed")] == [goes_on_from]
    for ours, theirs in zip(events(config, "step"), events(unbroken, "step"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert ledger(config) == ledger(unbroken)


def test_a_store_that_is_killed_loses_the_step_alone(cluster: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    step, calls = RayTrainer.step, []

    def killing(self: RayTrainer, *args: Any, **more: Any) -> StepStats:
        calls.append(1)
        if len(calls) == 4:
            os.kill(ray.get(built.stores.actors[0].pid.remote()), signal.SIGKILL)
        return step(self, *args, **more)

    monkeypatch.setattr(RayTrainer, "step", killing)
    config, messages = cluster("train.save_every=1"), Messages()
    with ExitStack() as stack:
        built = build_cluster(config, messages, Stop(), stack)
        run_with_restarts(built)
    assert any("begins again" in text for text in messages.said)
    assert [event["step"] for event in events(config, "step")] == [1, 2, 3]
    assert len(set(ledger(config))) == len(ledger(config)) == 12


@pytest.mark.long
def test_a_cluster_goes_back_from_a_damaged_checkpoint(cluster: MakeConfig, run: Run):
    config = cluster("cluster.generation.engines=1", "train.save_every=1", "train.keep_checkpoints=9", "num_steps=2")
    run(config)
    shard = Path(config.run.dir) / "checkpoints" / "step-000002" / "trainer" / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"__1_0\.distcp: .*checkpoint of step 2; .*--from 1 goes back") as caught:
        run(config)
    assert "\n" not in str(caught.value)
    before = events(config, "step")
    run_cluster(config, Messages(), Stop(), from_step=1)
    assert [event["step"] for event in events(config, "resumed")] == [1]
    for ours, theirs in zip(events(config, "step"), before, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert len(set(ledger(config))) == len(ledger(config)) == 8


def test_an_engine_in_an_actor_is_an_engine(cluster: MakeConfig):
    """Requests at any time, aborts, and futures that end when it is closed."""
    config = cluster("cluster.generation.engines=1", "cluster.training.ranks=1")
    with ExitStack() as stack:
        built = build_cluster(config, Messages(), Stop(), stack)
        engine = built.pool.members[0].engine
        params = SamplingParams(n=3, max_new_tokens=5, stop_token_ids=())
        first = engine.submit(requests_of("a", 0, [1, 2, 3], params))
        second = engine.submit(requests_of("a", 0, [1, 2, 3], params))
        tokens = [[future.result(60).tokens.tolist() for future in some] for some in (first, second)]
        assert tokens[0] == tokens[1]
        assert len({tuple(each) for each in tokens[0]}) == 3
        assert {future.result().handle.resolve().tokens[:3].tolist() == [1, 2, 3] for future in first} == {True}
        assert engine.stats().num_decode_tokens == 30
        assert engine.checksums()
        long = engine.submit(requests_of("b", 0, [1, 2, 3], replace(params, max_new_tokens=17)) * 20)
        engine.abort(["b"])
        assert {future.result(60).finish for future in long} <= {"abort", "length"}
        engine.flush_cache()
        assert engine.health()
        engine.close()
        assert not engine.health()


def wait_until(condition: Callable[[], bool]) -> None:
    ready = threading.Event()
    for _ in range(600):
        if condition():
            return
        ready.wait(0.1)
    raise AssertionError("waited in vain")
