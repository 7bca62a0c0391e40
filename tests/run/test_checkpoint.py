"""Checkpoints are written while training goes on, and hold what the trainer held when they were begun."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

import pekoe
from pekoe.config import RLConfig
from pekoe.core import RunError
from pekoe.core.journal import read_lines
from pekoe.model import load_model
from pekoe.run.build import RLParts
from pekoe.run.run_dir import checkpoints
from pekoe.train import checkpoint

Build = Callable[..., RLConfig]
Train = Callable[..., None]


def events(config: RLConfig, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == kind]


def test_training_goes_on_while_a_checkpoint_is_written(
    build: Build, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    short = build("num_steps=1", f"run.dir={tmp_path / 'short'}", "train.save_every=1")
    train(short)
    config = build("num_steps=3", "train.save_every=1", "train.keep_checkpoints=3")
    write, written = checkpoint.write, threading.Event()

    def held(*args: Any) -> None:
        assert written.wait(60), "training waited for the first checkpoint"
        write(*args)

    monkeypatch.setattr(checkpoint, "write", held)

    def release_in_step_two(parts: RLParts) -> None:
        step = parts.trainer.step

        def counted(*args: Any, **more: Any):
            stats = step(*args, **more)
            if parts.trainer.num_updates == 5:  # the first of step 2's four has changed the weights
                assert not checkpoints(parts.run.path)
                written.set()
            return stats

        parts.trainer.step = counted  # type: ignore[method-assign]

    train(config, release_in_step_two)
    saved = events(config, "checkpoint")
    assert [e["step"] for e in saved] == [1, 2, 3]
    assert saved[0]["seconds"] > saved[0]["stall_s"]
    assert all(e["bytes"] > 10_000 for e in saved)
    loaded = build("num_steps=1", f"run.dir={tmp_path / 'loaded'}")
    path = Path(config.run.dir) / "checkpoints" / "step-000001"

    def compare(parts: RLParts) -> None:
        parts.trainer.load(path / "trainer")
        expected = load_model(Path(short.run.dir) / "model")
        for ours, theirs in zip(parts.trainer.model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert parts.trainer.num_updates == 4
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(loaded, compare)


@pytest.mark.parametrize(
    ("name", "stands"),  # tensors, state.json, the model
    [("train.checkpoint.write", 1), ("run.checkpoints._to_disk", 1), ("train.checkpoint.save_model", 2)],
)
def test_a_full_disk_stops_the_run_and_a_checkpoint_stands(
    build: Build, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stands: int
):
    unbroken = build("num_steps=4", f"run.dir={tmp_path / 'unbroken'}", "train.save_every=1")
    train(unbroken)
    config = build("num_steps=4", "train.save_every=1")
    write, calls = attrgetter(name)(pekoe), []

    def full(*args: Any, **more: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", "step-000002")
        return write(*args, **more)

    monkeypatch.setattr(f"pekoe.{name}", full)
    with pytest.raises(RunError, match=r"checkpoint of step 2: .*No space left.*that of step " + f"{stands} stands"):
        train(config)
    assert max(p.name for p in (Path(config.run.dir) / "checkpoints").iterdir()) == f"step-00000{stands}"
    train(config)
    a, b = (load_model(Path(c.run.dir) / "model") for c in (config, unbroken))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
