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
from pekoe.core.errors import Interrupted, StopRequested
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
        trainer: Any = parts.trainer
        asked = count(1)
        trainer.stopping = lambda: trainer.num_updates == num_updates and next(asked) >= asks

    return meddle


WORDS = ["algo.minibatches=2", "train.save_every=100"]


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize(
    ("proximal", "asks"),  # at a forward, a backward, another micro-batch; while log-probs are computed, and after it
    [("engine", 1), ("engine", 4), ("engine", 7), ("recompute", 3), ("recompute", 14)],
)
def test_before_the_steps_first_update_the_step_before_is_saved(
    build: Build, train: Train, tmp_path: Path, lag: int, proximal: str, asks: int
):
    words = [*WORDS, "num_steps=4", f"rollout.max_lag={lag}", f"algo.proximal={proximal}"]
    unbroken, broken = (build(*words, f"run.dir={tmp_path / name}") for name in ("unbroken", "broken"))
    train(unbroken)
    with pytest.raises(Interrupted, match="stopped after step 2 of 4, which is saved"):
        train(broken, stop_after(4, asks))
    assert saved_in(tmp_path / "broken") == [2]
    train(broken)
    assert torch.equal(weights_of(tmp_path / "broken"), weights_of(tmp_path / "unbroken"))
    entries = [
        [(line["step"], line["uid"], line["draw"]) for line in read_lines(tmp_path / name / "ledger.jsonl")]
        for name in ("unbroken", "broken")
    ]
    assert entries[0] == entries[1]


@pytest.mark.parametrize("lag", [0, 1])
def test_between_a_steps_updates_the_last_checkpoint_stands(build: Build, train: Train, tmp_path: Path, lag: int):
    words = ["algo.minibatches=2", "train.save_every=2", "num_steps=4", f"rollout.max_lag={lag}"]
    unbroken, broken = (build(*words, f"run.dir={tmp_path / name}") for name in ("unbroken", "broken"))
    train(unbroken)
    with pytest.raises(Interrupted, match="stopped in step 2 of 4, between its optimizer steps; nothing is saved yet"):
        train(broken, stop_after(3, 4))
    assert saved_in(tmp_path / "broken") == []
    with pytest.raises(Interrupted, match="stopped in step 4 of 4, between its optimizer steps; step 2 is saved"):
        train(broken, stop_after(7, 4))
    train(broken)
    assert torch.equal(weights_of(tmp_path / "broken"), weights_of(tmp_path / "unbroken"))


def test_a_run_that_goes_on_sampling_saves_the_step_before(build: Build, train: Train, tmp_path: Path):
    config = build(*WORDS, "num_steps=4", "rollout.max_lag=1", "rollout.during_update=go_on")
    with pytest.raises(Interrupted, match="stopped after step 2 of 4, which is saved"):
        train(config, stop_after(4, 4))
    train(config)
    drawn = [(line["uid"], line["draw"]) for line in read_lines(tmp_path / "run" / "ledger.jsonl")]
    assert len(drawn) == len(set(drawn)) == 16


def test_a_publish_is_proven_whoever_asks(build: Build, train: Train, tmp_path: Path):
    """Also where the trainer computes its log-probs, and the request is long overdue."""
    config, asked = build(*WORDS, "num_steps=2"), count(1)

    def meddle(parts: RLParts) -> None:
        trainer, weights = parts.trainer, parts.weights
        publish = weights.publish
        assert isinstance(trainer, Trainer)

        def overdue(*args: Any, **kwargs: Any) -> Any:
            trainer.stopping = lambda: next(asked) > 0
            report = publish(*args, **kwargs)
            trainer.stopping = None
            return report

        weights.publish = overdue  # type: ignore[method-assign]

    train(config, meddle)
    assert next(asked) == 1
    synced = [line for line in read_lines(tmp_path / "run" / "journal.jsonl") if "sync_canary_diff" in line]
    assert len(synced) == 3


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
    [(5, 1), (5, 4), pytest.param(6, 5, id="while it measures")],
)
def test_sft(sft: Callable[[str], SFTConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, asks: int):
    run_sft(sft("unbroken"), NoProgress())
    asked, trainers = count(1), list[Trainer]()
    make = Trainer.__init__

    def made(self: Trainer, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        trainers.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", made)
        patch.setattr(Stop, "overdue", lambda _: trainers[0].num_updates == step and next(asked) >= asks)
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


def test_a_signal_ends_a_step_that_would_take_minutes(build: Build, train: Train, monkeypatch: pytest.MonkeyPatch):
    """Each layer is made slow: the step is dropped some time after the signal, which comes in its midst."""
    monkeypatch.setattr("pekoe.run.interrupt._PATIENCE_S", 0.5)
    config, stop = build(*WORDS, "num_steps=100", "rollout.max_new_tokens=4"), Stop()
    sent: list[float] = []

    def meddle(parts: RLParts) -> None:
        trainer: Any = parts.trainer

        def slow() -> bool:
            if trainer.num_updates == 2:
                if not sent:
                    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                    sent.append(time.monotonic())
                assert time.monotonic() - sent[0] < 60
                time.sleep(0.3)
            return stop.overdue()

        trainer.stopping = slow

    with stop.listening(), pytest.raises(Interrupted, match="stopped after step 1 of 100") as caught:
        train(config, meddle)
    assert time.monotonic() - sent[0] < 60
    assert saved_in(Path(config.run.dir)) == [1]
    assert isinstance(caught.value.__context__, StopRequested)
