"""A stop request in a training step of minutes: it is dropped, and the resumed run has the same bits (I5)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from pekoe.config import RLConfig, SFTConfig, load_config
from pekoe.core.errors import Interrupted
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.data.problems import Demonstration, write_demonstrations
from pekoe.model import load_model
from pekoe.run.build import RLParts
from pekoe.run.checkpoints import checkpoints, step_of
from pekoe.run.interrupt import Stop
from pekoe.run.sft import run_sft
from pekoe.train import Trainer

Build = Callable[..., RLConfig]
Train = Callable[..., None]


def weights_of(run: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_model(run / "model").parameters()])


def saved_in(run: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(run)]


def stop_after(num_updates: int, asks: int) -> Callable[[RLParts], None]:
    """Asks a run to stop after so many optimizer steps, when the trainer has been at so many layers more."""

    def meddle(parts: RLParts) -> None:
        trainer, last_step, asked = parts.trainer, parts.last_step, count(1)

        class Asked(Stop):
            def overdue(self, patience_s: float | None = None) -> bool:
                return trainer.num_updates == num_updates and next(asked) >= asks

        last_step._stop = Asked()

    return meddle


WORDS = ["algo.minibatches=2", "train.save_every=100", "num_steps=4"]


def assert_goes_on_to_the_same_bits(
    build: Build, train: Train, folder: Path, words: list[str], meddle: Callable[[RLParts], None]
):
    unbroken, broken = (build(*words, f"run.dir={folder / name}") for name in ("unbroken", "broken"))
    train(unbroken)
    with pytest.raises(Interrupted, match="stopped after step 2 of 4, which is saved"):
        train(broken, meddle)
    assert saved_in(folder / "broken") == [2]
    train(broken)
    assert torch.equal(weights_of(folder / "broken"), weights_of(folder / "unbroken"))
    entries = [
        [(line["step"], line["uid"], line["draw"]) for line in read_lines(folder / name / "ledger.jsonl")]
        for name in ("unbroken", "broken")
    ]
    assert entries[0] == entries[1]


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize(
    ("words", "asks"),  # at a forward, a backward, another micro-batch; while log-probs are computed, and after it
    [
        ([], 1),
        ([], 4),
        ([], 7),
        (["algo.proximal=recompute"], 3),
        (["algo.proximal=recompute"], 14),
        (["algo.kl=0.1"], 2),
        (["algo.kl=0.1"], 6),
        (["model.lora.rank=2"], 4),
        (["train.activation_checkpointing=true"], 4),
    ],
)
def test_before_the_steps_first_update(
    build: Build, train: Train, tmp_path: Path, lag: int, words: list[str], asks: int
):
    words = [*WORDS, f"rollout.max_lag={lag}", *words]
    assert_goes_on_to_the_same_bits(build, train, tmp_path, words, stop_after(4, asks))


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("words", [[], ["algo.proximal=recompute"], ["model.lora.rank=2"]])
def test_after_it_the_copy_of_a_long_step_is_saved(
    build: Build, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lag: int, words: list[str]
):
    monkeypatch.setattr("pekoe.run.interrupt._LONG_S", 0.0)
    words = [*WORDS, f"rollout.max_lag={lag}", *words]
    assert_goes_on_to_the_same_bits(build, train, tmp_path, words, stop_after(5, 4))


def test_after_it_a_step_without_a_copy_is_trained_to_its_end(build: Build, train: Train, tmp_path: Path):
    """Steps that are short, and those that several processes train."""
    config = build(*WORDS)
    train(config, stop_after(5, 1))
    assert saved_in(tmp_path / "run") == [4]


def test_a_run_that_goes_on_sampling_keeps_what_was_sampled(build: Build, train: Train, tmp_path: Path):
    config, adopted = build(*WORDS, "rollout.max_lag=1", "rollout.during_update=go_on"), list[int]()
    with pytest.raises(Interrupted, match="stopped after step 2 of 4, which is saved"):
        train(config, stop_after(4, 4))

    def count_adopted(parts: RLParts) -> None:
        records: Any = parts.records
        adopt = records.adopt

        def counted(groups: Any) -> Any:
            adopted.append(len(groups))
            return adopt(groups)

        records.adopt = counted

    train(config, count_adopted)
    drawn = [(line["uid"], line["draw"]) for line in read_lines(tmp_path / "run" / "ledger.jsonl")]
    assert len(drawn) == len(set(drawn)) == 16
    assert adopted[0] >= 4, "the groups of step 3 were taken, and are not sampled again"


def test_nothing_is_dropped_but_a_step_that_trains(build: Build, train: Train, tmp_path: Path):
    """A publish is proven by log-probs of the trainer, whoever asked to stop."""
    config, seen = build(*WORDS), list[bool]()

    def meddle(parts: RLParts) -> None:
        last_step, publish = parts.last_step, parts.weights.publish

        class Asked(Stop):
            def overdue(self, patience_s: float | None = None) -> bool:
                return bool(seen)

        def overdue(*args: Any, **kwargs: Any) -> Any:
            seen.append(True)
            report = publish(*args, **kwargs)
            assert not last_step.drops()
            seen.clear()
            return report

        last_step._stop = Asked()
        parts.weights.publish = overdue  # type: ignore[method-assign]

    train(config, meddle)
    synced = [line for line in read_lines(tmp_path / "run" / "journal.jsonl") if "sync_canary_diff" in line]
    assert len(synced) == 5


@pytest.fixture
def sft(tiny_dir: Path, tmp_path: Path) -> Callable[[str], SFTConfig]:
    file = tmp_path / "demos.jsonl"
    pairs = [(a, b) for a in range(5) for b in range(4)]
    prompts = [({"role": "user", "content": f"{a}+{b}="},) for a, b in pairs]
    write_demonstrations(
        file, [Demonstration(p, f"\\boxed{{{a + b}}}") for p, (a, b) in zip(prompts, pairs, strict=True)]
    )

    def make(name: str) -> SFTConfig:
        tree = {
            "run": {"dir": str(tmp_path / name), "threads": 1},
            "model": {"path": str(tiny_dir / "model"), "device": "cpu"},
            "data": {"train": str(file)},
            "sft": {"epochs": 3, "batch_size": 8, "eval_data": str(file), "eval_every": 3},
            "train": {"token_budget": 64, "save_every": 100},
        }
        return load_config(tree, [], SFTConfig)

    return make


@pytest.mark.parametrize(
    ("step", "asks"),
    [(5, 2), (5, 5), pytest.param(6, 5, id="while it measures"), pytest.param(9, 5, id="while it measures at the end")],
)
def test_sft(sft: Callable[[str], SFTConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, asks: int):
    run_sft(sft("unbroken"), NoProgress())
    asked, trainers = count(1), list[Trainer]()
    make = Trainer.__init__

    def made(self: Trainer, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        trainers.append(self)

    def requested(_: Stop) -> bool:
        return bool(trainers) and trainers[0].num_updates == step and next(asked) >= asks

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", made)
        patch.setattr(Stop, "requested", property(requested, lambda *_: None), raising=False)
        with pytest.raises(Interrupted, match=f"stopped after step {step} of 9, which is saved"):
            run_sft(sft("broken"), NoProgress())
    assert saved_in(tmp_path / "broken") == [step]
    run_sft(sft("broken"), NoProgress())
    assert torch.equal(weights_of(tmp_path / "broken"), weights_of(tmp_path / "unbroken"))
    losses = [
        [
            (line["step"], line["loss"])
            for line in read_lines(tmp_path / name / "journal.jsonl")
            if line["event"] == kind
        ]
        for kind in ("step", "eval_loss")
        for name in ("unbroken", "broken")
    ]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sft_ends_with_the_signals_status(
    sft: Callable[[str], SFTConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    step = Trainer.step

    def terminated(self: Trainer, *args: Any) -> Any:
        if self.num_updates == 2:
            os.kill(os.getpid(), number)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "step", terminated)
    with pytest.raises(Interrupted, match="stopped after step 2 of 9, which is saved") as caught:
        run_sft(sft("run"), NoProgress())
    assert caught.value.status == 128 + number


def test_a_short_step_is_given_time_to_end(monkeypatch: pytest.MonkeyPatch):
    stop = Stop()
    assert not stop.overdue(0.0)
    stop.requested = True
    assert not stop.overdue()  # from now on
    monkeypatch.setattr("pekoe.run.interrupt._PATIENCE_S", 0.2)
    assert not stop.overdue()
    end = time.monotonic() + 10
    while not stop.overdue():
        assert time.monotonic() < end
    assert stop.overdue(0.0)
    assert not stop.overdue(60.0)


@pytest.mark.parametrize("num_updates", [2, 3])
def test_a_signal_ends_a_step_that_would_take_minutes(
    build: Build, train: Train, monkeypatch: pytest.MonkeyPatch, num_updates: int
):
    """Each layer is made slow: the step is dropped some time after the signal, which comes in its midst."""
    monkeypatch.setattr("pekoe.run.interrupt._LONG_S", 0.0)
    config, stop = build("algo.minibatches=2", "train.save_every=100", "num_steps=100"), Stop()
    sent: list[float] = []

    def meddle(parts: RLParts) -> None:
        trainer: Any = parts.trainer
        parts.last_step._stop = stop
        drops = trainer.stopping

        def slow() -> bool:
            if trainer.num_updates == num_updates:
                if not sent:
                    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                    sent.append(time.monotonic())
                assert time.monotonic() - sent[0] < 60
                time.sleep(0.3)
            return drops()

        trainer.stopping = slow

    with stop.listening(), pytest.raises(Interrupted, match="stopped after step 1 of 100"):
        train(config, meddle)
    assert time.monotonic() - sent[0] < 60
    assert saved_in(Path(config.run.dir)) == [1]
