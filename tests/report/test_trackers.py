"""Trackers get the journal's metrics by their names, follow a resumed run, and cannot stop one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pekoe.config.recipes import Logging
from pekoe.core.errors import UserError
from pekoe.core.progress import NoProgress
from pekoe.report.trackers import metrics_of, tracking
from tests.report.conftest import step_event


class Recorder(NoProgress):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.events: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event["event"])


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_numbers_have_the_journals_names():
    numbers = metrics_of(step_event(1))
    assert numbers["reward"] == -4.0
    assert numbers["seconds/rollout"] == 6.0
    assert not {"event", "time", "step", "seconds"} & set(numbers)
    event = {"event": "eval", "time": 1.0, "step": 3, "pass_at_1": 0.5, "ci95": [0.4, 0.6], "examples": ["x"]}
    assert metrics_of(event) == {"eval/pass_at_1": 0.5, "eval/ci95/low": 0.4, "eval/ci95/high": 0.6}


def test_tensorboard_shows_each_step_once_also_of_a_run_that_went_on(tmp_path: Path):
    section = Logging(tensorboard=True)
    with tracking(section, tmp_path, {}, NoProgress()) as view:
        for step in (1, 2, 3):
            view.event(step_event(step))
    with tracking(section, tmp_path, {}, NoProgress()) as view:
        view.event({"event": "resumed", "time": 0.0, "step": 1})
        for step in (2, 3, 4):
            view.event(step_event(step, reward=float(step)))
    assert scalars(tmp_path / "tensorboard", "reward") == [(1, -4.0), (2, 2.0), (3, 3.0), (4, 4.0)]


class FakeWandb(ModuleType):
    """Its calls; `log` fails from the second step on."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []

    def init(self, **given: Any) -> None:
        self.calls.append(("init", given))

    def log(self, numbers: dict[str, float], step: int) -> None:
        if step > 1:
            raise ConnectionError("no network")
        self.calls.append(("log", (step, numbers["reward"])))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb, ears = FakeWandb(), Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    section = Logging(wandb="project", tensorboard=True)
    with tracking(section, tmp_path / "run", {"seed": 1}, ears) as view:
        for step in (1, 2, 3):
            view.event(step_event(step))
    (_, given), logged = wandb.calls[0], wandb.calls[1:]
    assert (given["project"], given["name"], given["config"]) == ("project", "run", {"seed": 1})
    assert logged == [("log", (1, -4.0))]
    assert len(ears.said) == 1
    assert "no network" in ears.said[0]
    assert ears.events == ["step"] * 3
    assert len(scalars(tmp_path / "run" / "tensorboard", "reward")) == 3


def test_a_run_that_goes_on_is_the_same_run_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ids: list[str] = []
    for _ in range(2):
        wandb = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        with tracking(Logging(wandb="p"), tmp_path / "run", {}, NoProgress()):
            pass
        ids.append(wandb.calls[0][1]["id"])
    assert ids[0] == ids[1]


def test_an_absent_package_is_an_error_before_the_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    message = r"expected the package trackio, which is not installed: pip install 'pekoe\[trackio\]'"
    with pytest.raises(UserError, match=message), tracking(Logging(trackio="p"), tmp_path, {}, NoProgress()):
        pass
    with tracking(Logging(), tmp_path, {}, view := NoProgress()) as same:
        assert same is view


def test_secrets_reach_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = {"engine": {"server": {"env": {"HF_TOKEN": "s3cret"}, "urls": ("http://me:s3cret@host:1",)}}}
    with tracking(Logging(wandb="p"), tmp_path / "run", config, NoProgress()):
        pass
    assert "s3cret" not in str(wandb.calls)
    assert "http://***@host:1" in str(wandb.calls)
