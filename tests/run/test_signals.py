"""Signals to real runs: each keeps the last complete step, says how to go on, and ends with a status of its own."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pekoe.config import dump_config, load_config
from pekoe.core.journal import read_lines
from pekoe.run.interrupt import Stop
from pekoe.run.run_dir import checkpoints

LIMIT_S = 120
CLUSTER = {"generation": {"engines": 1}, "training": {"ranks": 1}, "silence_limit_s": 20}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(recipe: dict[str, Any], tmp_path: Path) -> Start:
    """Start `pekoe rl` with a recipe that goes on for long, in a process of its own."""

    def run(*overrides: str, **options: Any) -> subprocess.Popen[str]:
        file = tmp_path / "rl.toml"
        file.write_text(dump_config(load_config(recipe, overrides)))
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        command = [sys.executable, "-m", "pekoe.cli", "rl", str(file)]
        return subprocess.Popen(command, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)

    return run


def steps(run: Path) -> list[int]:
    journal = run / "journal.jsonl"
    return [line["step"] for line in read_lines(journal) if line["event"] == "step"] if journal.exists() else []


def until_step(process: subprocess.Popen[str], run: Path, number: int) -> None:
    end = time.monotonic() + LIMIT_S
    while len(steps(run)) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no step {number} within {LIMIT_S} s"
        time.sleep(0.02)


def ends_well(process: subprocess.Popen[str], run: Path, number: int) -> None:
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
    process = start("num_steps=100000", "train.save_every=100000", stdout=theirs, stderr=theirs)
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


def test_nohup_holds():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop().listening() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)
