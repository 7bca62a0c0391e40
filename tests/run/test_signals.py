"""Signals to real runs: each keeps the last complete step, says how to go on, and ends with a status of its own."""

from __future__ import annotations

import os
import pty
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pekoe.config import RLConfig, dump_config, load_config
from pekoe.core.errors import Interrupted
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.run.build import build_rl
from pekoe.run.interrupt import Stop
from pekoe.run.rl import run_rl
from pekoe.run.run_dir import checkpoints
from tests.engine.servers.fake_sglang import FakeSGLang
from tests.forked import Child, command

LIMIT_S = 120
CLUSTER = {"generation": {"engines": 1}, "training": {"ranks": 1}, "silence_limit_s": 20}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
Start = Callable[..., Child]


@pytest.fixture
def start(recipe: dict[str, Any], tmp_path: Path) -> Start:
    """Start `pekoe rl` with a recipe that goes on for long, in a process of its own."""

    def run(*overrides: str, **options: Any) -> Child:
        file = tmp_path / "rl.toml"
        file.write_text(dump_config(load_config(recipe, overrides)))
        return command(tmp_path / "printed", "rl", str(file), **options)

    return run


def steps(run: Path) -> list[int]:
    journal = run / "journal.jsonl"
    return [line["step"] for line in read_lines(journal) if line["event"] == "step"] if journal.exists() else []


def until_step(process: Child, run: Path, number: int) -> None:
    end = time.monotonic() + LIMIT_S
    while len(steps(run)) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no step {number} within {LIMIT_S} s"
        time.sleep(0.02)


def ends_well(process: Child, run: Path, number: int) -> None:
    """Send the signal after two steps; the run ends, and its last step is saved."""
    try:
        until_step(process, run, 2)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 128 + number, stderr
        assert "run the same command again to go on from there" in stderr
        assert int(checkpoints(run)[-1].name[5:]) == steps(run)[-1] >= 2
    finally:
        process.kill()


@pytest.mark.parametrize("number", SIGNALS)
def test_one_process(start: Start, tmp_path: Path, number: int):
    ends_well(start("num_steps=100000", "train.save_every=100000"), tmp_path / "run", number)


@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_cluster(recipe: dict[str, Any], start: Start, tmp_path: Path, number: int):
    recipe["cluster"] = CLUSTER
    ends_well(start("num_steps=100000", "train.save_every=100000"), tmp_path / "run", number)


def test_a_terminal_that_is_gone_keeps_no_step_from_being_saved(start: Start, tmp_path: Path):
    ours, theirs = pty.openpty()
    process = start("num_steps=100000", "train.save_every=100000", terminal=Path(os.ttyname(theirs)))
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        until_step(process, tmp_path / "run", 2)
        os.close(ours)  # whoever writes to it from now on gets an error
        process.send_signal(signal.SIGHUP)
        assert process.wait(LIMIT_S) == 128 + signal.SIGHUP
        assert int(checkpoints(tmp_path / "run")[-1].name[5:]) == steps(tmp_path / "run")[-1]
    finally:
        process.kill()


@pytest.mark.parametrize("path", ["/health", "/update_weights_from_disk"])
def test_a_server_that_drips_keeps_no_run_from_ending(
    build: Callable[..., RLConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
):
    """While servers start, and while weights are published."""
    monkeypatch.setattr("pekoe.weights.channel._STOP_S", 0.2)
    server, stop = FakeSGLang(), Stop()
    server.faults[path] = ["drip"]
    config = build(
        "engine.backend=sglang",
        f'engine.server.urls=["{server.url}"]',
        "engine.block_tokens=16",
        "engine.server.start_limit_s=4",
    )

    def terminate() -> None:
        while not any(asked == path for asked, _ in server.requests):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    start = time.monotonic()
    try:
        with (
            pytest.raises(Interrupted, match="run the same command again") as caught,
            stop.listening(),
            ExitStack() as stack,
        ):
            run_rl(build_rl(config, NoProgress(), stop, stack))
        assert caught.value.status == 128 + signal.SIGTERM
        assert time.monotonic() - start < 20
    finally:
        server.die()
    while any(thread.name.startswith("pekoe ") for thread in threading.enumerate()):  # of an engine that starts
        assert time.monotonic() - start < 40
        time.sleep(0.05)
    journal = tmp_path / "run" / "journal.jsonl"
    synced = [line for line in read_lines(journal) if line["event"] == "sync"] if journal.exists() else []
    assert not any("sync_canary_diff" in line for line in synced)  # nothing is proven


def test_nohup_holds():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop().listening() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)
