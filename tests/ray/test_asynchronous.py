"""Sampling ahead of training on Ray: versions, what is in flight over an interrupt, and engines that die meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from pekoe.config import RLConfig
from pekoe.core import Interrupted
from pekoe.core.loop import StepStats
from pekoe.core.progress import NoProgress
from pekoe.core.records import read_records
from pekoe.core.types import Draw, JudgedGroup, SamplingParams
from pekoe.model import Decoder, load_model
from pekoe.ray.run import Cluster, build_cluster, run_with_restarts
from pekoe.ray.store import RayRecords
from pekoe.ray.trainer import RaySender, RayTrainer
from pekoe.run import replay
from pekoe.run.interrupt import Stop
from pekoe.run.replay import replay_run
from pekoe.run.rollouts import Rollouts
from tests.ray.conftest import events, ledger
from tests.run.conftest import Messages

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
MakeConfig = Callable[..., RLConfig]
Run = Callable[[RLConfig], list[str]]
PINNED = "num_steps=5", "rollout.max_lag=1", "train.save_every=1"


def versions(config: RLConfig) -> dict[int, set[int]]:
    return {
        step: {version for line in read_records(Path(config.run.dir), step) for version, _ in line["versions"]}
        for step in range(1, config.num_steps + 1)
    }


def pinned(config: RLConfig) -> dict[int, set[int]]:
    return {step: {max(0, step - 1 - config.rollout.max_lag)} for step in range(1, config.num_steps + 1)}


def assert_trained_again(config: RLConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process trains on the records to the same weights but for rounding: ranks add gradients in another order."""
    make, models = replay.make_trainer, list[Decoder]()

    def keeping(config: RLConfig, model: Decoder, dtype: torch.dtype) -> Any:
        models.append(model)
        return make(config, model, dtype)

    monkeypatch.setattr(replay, "make_trainer", keeping)
    again = replay_run(Path(config.run.dir), NoProgress())
    assert max(again.logprob_diffs.values()) < 1e-4  # I1, version by version
    theirs = dict(load_model(Path(config.run.dir) / "model").named_parameters())
    gaps = torch.cat([(p - theirs[name]).detach().abs().flatten() for name, p in models[0].named_parameters()])
    assert gaps.max() < 1e-5, "an update moves a weight by up to optim.lr = 1e-3"


def kill_engines(cluster: Cluster) -> None:
    for member in cluster.pool.members:
        if member.current is not None:
            os.kill(member.engine.info.pid, signal.SIGKILL)


@pytest.mark.long
def test_a_pinned_batch_is_sampled_by_one_version_also_after_an_interrupt(
    cluster: MakeConfig, run: Run, monkeypatch: pytest.MonkeyPatch
):
    unbroken = cluster(*PINNED, "run.dir=" + str(Path(cluster().run.dir).with_name("whole")))
    run(unbroken)
    assert versions(unbroken) == pinned(unbroken)
    assert [step["lag_max"] for step in events(unbroken, "step")] == [0, 1, 1, 1, 1]
    assert_trained_again(unbroken, monkeypatch)
    step, adopt, stop, adopted = RayTrainer.step, RayRecords.adopt, Stop(), list[int]()

    def stopping(self: RayTrainer, *args: Any, **more: Any) -> StepStats:
        stop.requested |= self.num_updates >= 9  # in step 3
        return step(self, *args, **more)

    def counted(self: RayRecords, groups: Sequence[JudgedGroup]) -> list[JudgedGroup]:
        adopted.append(len(groups))
        return adopt(self, groups)

    monkeypatch.setattr(RayTrainer, "step", stopping)
    monkeypatch.setattr(RayRecords, "adopt", counted)
    config = cluster(*PINNED)
    with pytest.raises(Interrupted, match="stopped after step 3"), ExitStack() as stack:
        run_with_restarts(build_cluster(config, Messages(), stop, stack))
    monkeypatch.setattr(RayTrainer, "step", step)
    run(config)
    assert adopted == [0, 4], "the groups of step 4 are not sampled again"
    assert ledger(config) == ledger(unbroken)
    assert versions(config) == pinned(config)
    assert_trained_again(config, monkeypatch)


def test_ranks_train_on_while_engines_are_given_weights(cluster: MakeConfig, run: Run, monkeypatch: pytest.MonkeyPatch):
    """The ranks send a copy: the first version that training made is held up until the step after it is trained on."""
    step, begun, sent, overlapped = RayTrainer.step, threading.Event(), list[str](), list[bool]()

    def stepping(self: RayTrainer, *args: Any, **more: Any) -> StepStats:
        if sent:
            begun.set()
        return step(self, *args, **more)

    def held_up(send: Callable[..., int]) -> Callable[..., int]:
        def sending(self: RaySender, *args: Any) -> int:
            begun.clear()
            sent.append(send.__name__)
            if len(sent) == 2:
                overlapped.append(begun.wait(60))
            return send(self, *args)

        return sending

    monkeypatch.setattr(RayTrainer, "step", stepping)
    for name in ("broadcast", "write"):
        monkeypatch.setattr(RaySender, name, held_up(getattr(RaySender, name)))
    config = cluster("num_steps=3", "rollout.max_lag=1", "cluster.training.tp=2")
    run(config)
    assert overlapped == [True]
    assert versions(config) == pinned(config)
    assert_trained_again(config, monkeypatch)


def test_in_flight_no_token_is_older_than_the_bound(cluster: MakeConfig, run: Run, monkeypatch: pytest.MonkeyPatch):
    synchronous = cluster("num_steps=5", "run.dir=" + str(Path(cluster().run.dir).with_name("synchronous")))
    run(synchronous)
    config = cluster("num_steps=5", "rollout.max_lag=2", "rollout.during_update=go_on")
    run(config)
    assert ledger(config) == ledger(synchronous), "in the order of their draws"
    for step, found in versions(config).items():
        assert found <= {max(0, step - 1 - lag) for lag in (0, 1, 2)}
    assert max(step["lag_max"] for step in events(config, "step")) == 2
    assert_trained_again(config, monkeypatch)


def test_an_engine_that_is_killed_while_sampling_ahead(cluster: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    """The other samples what it had, by the same version; it comes back, and is given the next."""
    put, puts = Rollouts.put, list[int]()

    def killing(self: Rollouts, draws: Sequence[Draw], params: SamplingParams | None = None) -> None:
        put(self, draws, params)
        puts.append(len(draws))
        if len(puts) == 2:
            os.kill(built.pool.members[0].engine.info.pid, signal.SIGKILL)

    monkeypatch.setattr(Rollouts, "put", killing)
    config, messages = cluster(*PINNED, "rollout.samples_per_prompt=16"), Messages()
    with ExitStack() as stack:
        built = build_cluster(config, messages, Stop(), stack)
        run_with_restarts(built)
    assert any("engine 0 is lost" in text for text in messages.said)
    assert not any("begins again" in text for text in messages.said)
    assert versions(config) == pinned(config)
    assert len(set(ledger(config))) == len(ledger(config)) == 20


@pytest.mark.long
def test_all_engines_killed_while_the_ranks_are_a_version_ahead(cluster: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    """Nobody has the weights that are to sample the rest: training begins again from the last checkpoint, which has the
    groups that were in flight."""
    put, puts = Rollouts.put, list[int]()

    def killing(self: Rollouts, draws: Sequence[Draw], params: SamplingParams | None = None) -> None:
        put(self, draws, params)
        puts.append(len(draws))
        if len(puts) == 3:  # in step 3, whose groups are sampled: of those of step 4
            kill_engines(built)

    monkeypatch.setattr(Rollouts, "put", killing)
    config, messages = cluster(*PINNED, "rollout.samples_per_prompt=16"), Messages()
    with ExitStack() as stack:
        built = build_cluster(config, messages, Stop(), stack)
        run_with_restarts(built)
    assert any("begins again" in text and "every engine was lost" in text for text in messages.said), messages.said
    assert [event["step"] for event in events(config, "resumed")] == [2]
    assert versions(config) == pinned(config)
    assert len(set(ledger(config))) == len(ledger(config)) == 20
