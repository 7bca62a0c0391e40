"""Run directories that are damaged, or somebody else's: one message that names the file and a way back, or the same
bits."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pekoe.cli import app
from pekoe.config import RLConfig
from pekoe.core import Interrupted, RunError, UserError
from pekoe.core.io import SUMS
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.core.records import write_records
from pekoe.core.types import Problem, Record
from pekoe.data import Tokenizer
from pekoe.run.build import build_rl
from pekoe.run.checkpoints import checkpoints
from pekoe.run.inputs import inputs_of
from pekoe.run.interrupt import Stop
from pekoe.run.replay import replay_run
from pekoe.run.rl import run_rl
from pekoe.run.run_dir import RunDir, exported_model
from pekoe.train import checkpoint
from tests.run.conftest import Messages, checkpoint_in_name, stop_after_responses

Build = Callable[..., RLConfig]
Train = Callable[..., None]
Trained = Callable[..., RLConfig]

MORE = ("train.save_every=1", "train.keep_checkpoints=4", "optim.schedule=constant", "optim.warmup_fraction=0")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.fixture
def trained(build: Build, train: Train, kept: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """trained(): a config of four steps whose directory has three, with a checkpoint of each."""

    def make(*more: str) -> RLConfig:
        key = " ".join(more)
        if key not in kept:
            kept[key] = tmp_path_factory.mktemp("kept") / "run"
            train(build(*MORE, *more, "num_steps=3", f"run.dir={kept[key]}"))
        config = build(*MORE, *more, "num_steps=4")
        shutil.copytree(kept[key], config.run.dir)
        return config

    return make


@pytest.fixture
def whole(build: Build, train: Train, kept: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the same run when nothing comes between."""
    if "whole" not in kept:
        kept["whole"] = tmp_path_factory.mktemp("kept") / "run"
        train(build(*MORE, "num_steps=4", f"run.dir={kept['whole']}"))
    return kept["whole"]


def weights(run: Path, folder: str = "model") -> bytes:
    return (run / folder / "model.safetensors").read_bytes()


def lines(run: Path, name: str = "ledger") -> list[dict[str, Any]]:
    return list(read_lines(run / f"{name}.jsonl"))


def go_back(config: RLConfig, step: int) -> None:
    """As `pekoe rl --from STEP`."""
    with ExitStack() as stack:
        run_rl(build_rl(config, NoProgress(), Stop(), stack, step))


class Makes:
    """Unpickled, it is a call that makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for i in range(4):
        data[len(data) // 2 + i] ^= 0xFF
    file.write_bytes(data)


def test_a_checkpoint_of_somebody_else_runs_no_code(trained: Trained, train: Train, tmp_path: Path):
    """Neither its metadata nor the numbers beside its tensors may call anything, with checksums that fit or without."""
    config = trained()
    newest = checkpoints(Path(config.run.dir))[-1]
    for file in (newest / SUMS, newest / "trainer" / SUMS):
        file.unlink()
    state = newest / "state.json"
    state.write_text(state.read_text().replace('"checksums": true', '"checksums": false'))
    metadata = newest / "trainer" / ".metadata"
    found = pickle.loads(metadata.read_bytes())
    for hidden in ("metadata", "number"):
        bad = Makes(tmp_path / hidden)
        if hidden == "metadata":
            kept, found.planner_data = found.planner_data, bad
            metadata.write_bytes(pickle.dumps(found))
            found.planner_data = kept
        else:
            place = next(place for index, place in found.storage_data.items() if index.fqn == "num_updates")
            torch.save(bad, newest / "trainer" / "__0_1.distcp")
            size = (newest / "trainer" / "__0_1.distcp").stat().st_size
            object.__setattr__(place, "relative_path", "__0_1.distcp")
            object.__setattr__(place, "offset", 0)
            object.__setattr__(place, "length", size)
            metadata.write_bytes(pickle.dumps(found))
        with pytest.raises(UserError, match=r"may not name posix\.mkdir|Weights only load failed"):
            train(config)
        assert not (tmp_path / hidden).exists()
        pickle.loads(pickle.dumps(bad))  # it would have
        assert (tmp_path / hidden).exists()


CUT = (lambda file: os.truncate(file, 9), lambda file: os.truncate(file, 0), os.unlink)


@pytest.mark.parametrize("name", ["trainer/__0_0.distcp", "trainer/.metadata", "state.json", SUMS, "trainer/" + SUMS])
def test_a_damaged_checkpoint_names_the_file_and_the_older_one_goes_on_to_the_same_bits(
    trained: Trained, train: Train, whole: Path, name: str
):
    config = trained()
    run = Path(config.run.dir)
    file = run / "checkpoints" / "step-000003" / name
    written = file.read_bytes()
    for damage in (flip, *CUT):
        file.write_bytes(written)
        damage(file)
        with pytest.raises(UserError, match=rf"{file.name}.* from its checkpoint of step 3; .*--from 2 goes back"):
            train(config)
    go_back(config, 2)
    assert weights(run) == weights(whole)
    assert lines(run) == lines(whole)
    aside = {path.name for path in (run / "discarded").iterdir()}
    assert aside == {"step-000003", "journal.jsonl", "ledger.jsonl", "step-000003.jsonl.zst", "step-000003.npz.zst"}
    assert [e["step"] for e in lines(run, "journal") if e["event"] == "step"] == [1, 2, 3, 4]


def test_from_0_begins_anew_and_an_unknown_step_is_named(trained: Trained, whole: Path):
    config = trained()
    with pytest.raises(UserError, match=r"--from: .*\(0, 1, 2, 3; 0 begins anew\), got 5; nearest: 3"):
        go_back(config, 5)
    go_back(config, 0)
    assert weights(Path(config.run.dir)) == weights(whole)
    assert lines(Path(config.run.dir)) == lines(whole)


def test_a_stop_in_the_first_step_leaves_a_checkpoint_that_from_0_sets_aside(build: Build, train: Train, whole: Path):
    other = build(*MORE, "num_steps=4", "rollout.temperature=0.9")
    with pytest.raises(Interrupted, match="stopped after step 0"):
        train(other, stop_after_responses(0))
    config = build(*MORE, "num_steps=4")
    run = Path(config.run.dir)
    with pytest.raises(UserError, match=r"\(0; 0 begins anew\), got 5"):
        go_back(config, 5)
    first = run / "checkpoints" / "step-000000"
    flip(first / "trainer" / "__0_0.distcp")
    with pytest.raises(UserError, match=r"checkpoint of step 0; .*--from 0 begins anew"):
        train(other)
    shutil.copytree(first, run / "checkpoints" / "step-000004")
    with pytest.raises(UserError, match=r"checkpoint of step 4; .*--from 0 begins anew"):
        train(other)
    go_back(config, 0)
    assert weights(run) == weights(whole)
    assert lines(run) == lines(whole)


def test_nothing_is_set_aside_before_the_checkpoint_gone_back_to_is_found_whole(trained: Trained, train: Train):
    config = trained()
    run = Path(config.run.dir)
    flip(run / "checkpoints" / "step-000002" / "trainer" / "__0_0.distcp")
    with pytest.raises(UserError, match=r"__0_0.distcp: .*checkpoint of step 2; .*--from 1 goes back"):
        go_back(config, 2)
    assert [path.name[-1] for path in checkpoints(run)] == ["1", "2", "3"]
    assert not (run / "discarded").exists()
    train(config)
    assert [e["step"] for e in lines(run, "journal") if e["event"] == "step"] == [1, 2, 3, 4]


def test_a_kill_while_old_checkpoints_are_set_aside_leaves_their_inputs(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else the next command would go on from them with the new data."""
    config = build()
    old, new = (inputs_of(config, Tokenizer.load(Path(config.model.path)), problems(gold)) for gold in "12")
    with RunDir(config, inputs=old) as run:
        checkpoint_in_name(run.path, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pekoe.run.run_dir._set_aside", killed)
        with pytest.raises(KeyboardInterrupt):
            RunDir(config, inputs=new, from_step=0)
    with pytest.raises(UserError, match="cannot go on as it began"):
        RunDir(config, inputs=new)
    with RunDir(config, inputs=new, from_step=0) as run:
        assert not checkpoints(run.path)
    with RunDir(config, inputs=new):
        pass


def problems(gold: str) -> list[Problem]:
    return [Problem("1+1", ({"role": "user", "content": "1+1="},), gold)]


def test_who_went_back_goes_on_without_it(trained: Trained, train: Train):
    config, stop = trained(), Stop()
    with ExitStack() as stack:
        parts = build_rl(config, NoProgress(), stop, stack, 2)
        stop.requested = True
        with pytest.raises(Interrupted, match=r"run the same command \(without --from\) again to go on"):
            run_rl(parts)
    assert [path.name[-1] for path in checkpoints(Path(config.run.dir))] == ["1", "2"]


def test_the_only_checkpoint_is_damaged(trained: Trained, train: Train):
    config = trained()
    for path in checkpoints(Path(config.run.dir))[:2]:
        shutil.rmtree(path)
    flip(Path(config.run.dir) / "checkpoints" / "step-000003" / "trainer" / "__0_0.distcp")
    with pytest.raises(UserError, match="--from 0 begins anew"):
        train(config)


def test_going_back_exports_the_model_of_the_step_gone_back_to(trained: Trained, build: Build):
    config = trained()
    run = Path(config.run.dir)
    go_back(config.model_copy(update={"num_steps": 2}), 2)
    assert weights(run) != b""
    assert json.loads((run / "exported.json").read_text())["step"] == 2
    assert replay_run(run, NoProgress()).same_weights is True


def test_a_checkpoint_without_checksums_goes_on(trained: Trained, train: Train, whole: Path):
    """As older versions wrote them."""
    config = trained()
    run = Path(config.run.dir)
    for path in checkpoints(run):
        (path / SUMS).unlink()
        (path / "trainer" / SUMS).unlink()
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({name: state[name] for name in ("progress", "offsets")}))
    (run / "exported.json").unlink()
    train(config)
    assert weights(run) == weights(whole)
    assert lines(run) == lines(whole)


@pytest.mark.parametrize("name", ["journal.jsonl", "ledger.jsonl"])
def test_a_journal_or_ledger_shorter_than_at_the_checkpoint_is_noticed_at_the_start(
    trained: Trained, train: Train, name: str
):
    config = trained()
    file = Path(config.run.dir) / name
    written = file.read_bytes()
    for damaged in (written[: len(written) // 2], written[:10] + bytes(len(written)), b"", None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}: expected a line that ends at byte \d+.*--from 2"):
            train(config)
    go_back(config, 0)
    assert [e["step"] for e in lines(Path(config.run.dir), "journal") if e["event"] == "step"] == [1, 2, 3, 4]


def test_rollouts_that_are_missing_or_short_are_said_and_the_run_goes_on(trained: Trained, train: Train, whole: Path):
    config = trained()
    run = Path(config.run.dir)
    (run / "rollouts" / "step-000001.npz.zst").unlink()
    os.truncate(run / "rollouts" / "step-000002.jsonl.zst", 20)
    for name in ("step-abc.jsonl.zst", "step-000002.jsonl.zst.bak", "step-000002.x.jsonl.zst", "README.md"):
        (run / "rollouts" / name).write_text("not ours")
    view = Messages()
    train(config, view=view)
    assert any("step-000001.npz.zst and 1 more: shorter than it was, or missing" in text for text in view.said)
    assert weights(run) == weights(whole)
    with pytest.raises(UserError, match=r"step-000001\.npz\.zst: cannot be read: No such file"):
        replay_run(run, NoProgress())
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.exception
    page = (run / "report.html").read_text()
    assert "2 steps cannot be read" in page


def test_names_that_are_not_ours_are_no_checkpoints(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    for name in (
        "step-abc",
        "step-2",
        "step-000003.bak",
        "step-000002",
        "step-1000000",
        ".partial-step-000004",
        "step-",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "step-000005").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-1000000"]


def test_a_foreign_file_in_the_model_directory_ends_no_run(build: Build, train: Train, whole: Path):
    config = build(*MORE, "num_steps=2")
    run = Path(config.run.dir)
    train(config)
    first = weights(run)
    (run / "model" / "README.md").write_text("mine")
    train(build(*MORE, "num_steps=4"))
    assert [path.name for path in checkpoints(run)][-1] == "step-000004"
    assert (run / "model" / "README.md").read_text() == "mine"
    assert weights(run) == first
    path, why = exported_model(run)
    assert (path, "README.md" in why) == (run / "model-latest", True)
    assert weights(run, "model-latest") == weights(whole)
    assert replay_run(run, NoProgress()).same_weights is True


def test_a_model_that_was_not_written_is_written_later(
    build: Build, train: Train, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    config = build(*MORE, "num_steps=4")
    save, calls = checkpoint.save_model, []

    def full(*args: Any, **more: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device", "model")
        save(*args, **more)

    monkeypatch.setattr(checkpoint, "save_model", full)
    with pytest.raises(RunError, match=r"No space left.*that of step 4 stands"):
        train(config)
    assert weights(Path(config.run.dir)) != weights(whole)
    train(config)
    assert weights(Path(config.run.dir)) == weights(whole)


def test_a_write_that_fails_gives_its_room_back(build: Build, train: Train, tmp_path: Path):
    """The system's own failure, of torch's writer and of ours: a limit on the size of files."""
    config = build(*MORE, "num_steps=1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))

    try:
        with pytest.raises(RunError, match=r"checkpoint of step 1: .*there is none before it"):
            train(config, limit)
        stem = tmp_path / "rollouts" / "step-000001"
        record = Record.of(np.array([1]), np.array([2]), np.array([-1.0], np.float32))
        with pytest.raises(OSError, match="File too large"):
            write_records(stem, [{"text": os.urandom(100_000).hex()}], [record])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list((Path(config.run.dir) / "checkpoints").iterdir()) == []
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-000001.npz.zst"]


@pytest.mark.parametrize(
    "name", ["config.toml", "inputs.json", "journal.jsonl", "ledger.jsonl", ".lock", "checkpoints"]
)
def test_a_directory_where_a_file_was_is_one_message(trained: Trained, train: Train, name: str):
    config = trained()
    path = Path(config.run.dir) / name
    if path.is_dir():
        shutil.rmtree(path)
        path.touch()
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    with pytest.raises((UserError, RunError)) as caught:
        train(config)
    assert "\n" not in str(caught.value)


def test_a_damaged_line_is_named(tmp_path: Path):
    (tmp_path / "journal.jsonl").write_text('{"event": "a"}\n[1]\n')
    with pytest.raises(UserError, match=r"journal.jsonl: line 2: expected a JSON object, got b'\[1\]"):
        list(read_lines(tmp_path / "journal.jsonl"))
    (tmp_path / "deep.jsonl").write_text("{}\n" + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"deep.jsonl: line 2"):
        list(read_lines(tmp_path / "deep.jsonl"))
    (tmp_path / "journal.jsonl").write_text('{"event": "step", "step": 1}\n')
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert "cannot be shown (KeyError: 'time')" in str(result.exception)
