"""A saved step trained on again gives the same loss; losses that are not finite end the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pekoe.cli import app
from pekoe.config import RLConfig
from pekoe.core import RunError, UserError
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.core.records import read_records
from pekoe.run import rl
from pekoe.run.replay import replay
from pekoe.run.run_dir import checkpoints

Build = Callable[..., RLConfig]
Train = Callable[..., None]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("step", "start", "words"),
    [
        (3, 2, []),  # from the checkpoint of step 2
        (2, 0, ["algo.proximal=recompute", "algo.correction=truncate", "algo.kl=0.01"]),  # step 1 is trained on too
        (3, 2, ["rollout.dynamic_rounds=2", "algo.advantage=grpo"]),
        (3, 2, ["grpo", "optim.schedule=linear"]),  # by sequence, with a KL term
    ],
)
def test_a_replayed_step_has_the_same_loss_bit_by_bit(
    build: Build, train: Train, step: int, start: int, words: list[str]
):
    config = build("train.keep_checkpoints=9", *words)
    train(config)
    before = contents(Path(config.run.dir))
    replayed = replay(Path(config.run.dir), step, NoProgress())
    event = [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step"][step - 1]
    assert replayed.started_from == start
    assert (replayed.loss, replayed.grad_norm) == (event["loss"], event["grad_norm"])
    assert str(replayed).count("the same in the run") == 2
    assert contents(Path(config.run.dir)) == before


def test_the_command(build: Build, train: Train):
    config = build("num_steps=1")
    train(config)
    done = CliRunner().invoke(app, ["rl", "--replay", config.run.dir, "1"])
    assert done.exit_code == 0, done.output
    assert "step 1, from the weights of step 0" in done.output
    assert done.output.count("the same in the run") == 2


def test_what_cannot_be_replayed(build: Build, train: Train, tmp_path: Path):
    with pytest.raises(UserError, match="expected the directory of an rl run"):
        replay(tmp_path / "nothing", 1, NoProgress())
    config = build("num_steps=1")
    train(config)
    with pytest.raises(UserError, match=r"expected a step of .* \(1 to 1\), got 2"):
        replay(Path(config.run.dir), 2, NoProgress())
    assert read_records(Path(config.run.dir), 1)
    for file in (Path(config.run.dir) / "rollouts").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="expected the rollouts of step 1"):
        replay(Path(config.run.dir), 1, NoProgress())


def test_losses_that_are_not_finite_in_a_row_end_the_run_and_teach_nothing(
    build: Build, train: Train, monkeypatch: pytest.MonkeyPatch
):
    right, calls = rl.ppo, [0]

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        loss, sums = right(*args, **kwargs)
        return (loss * torch.nan if calls[0] > 4 else loss), sums

    monkeypatch.setattr(rl, "ppo", broken)
    config = build("algo.minibatches=2", "train.max_not_finite=4", "num_steps=9", "train.token_budget=1000")
    parts: list[Any] = []
    with pytest.raises(RunError, match=r"last 4 optimizer steps was not finite .* pekoe rl --replay .*run 4"):
        train(config, parts.append)
    events = [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step"]
    assert [bool(e.get("skipped")) for e in events] == [False, False, True, True]
    assert "not finite: loss nan" in events[-1]["skipped"]
    assert all(torch.isfinite(p).all() for p in parts[0].trainer.model.parameters())
    monkeypatch.setattr(rl, "ppo", right)
    replayed = replay(Path(config.run.dir), 2, NoProgress())
    assert replayed.loss == events[1]["loss"]
    assert checkpoints(Path(config.run.dir))[-1].name == "step-000004"  # it is saved, and may go on with another rate
    train(config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1e-4})}))
    events = [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step"]
    assert [e["step"] for e in events] == list(range(1, 10))
