"""SFT on several processes, as torchrun starts them: the same numbers, one that speaks, a resume on another number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pekoe.config import SFTConfig, dump_config, load_config
from pekoe.config.recipes import ParallelSection
from pekoe.core import UserError
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.data.problems import Demonstration, write_demonstrations
from pekoe.model import load_model
from pekoe.run.distributed import make_layout, process_group, require_single_process
from pekoe.run.sft import run_sft
from pekoe.weights.groups import free_port
from tests.forked import Child, command

LIMIT_S = 120


@pytest.fixture
def recipe(tiny_dir: Path, tmp_path: Path) -> Path:
    numbers = [(a, b) for a in range(4) for b in range(4)]
    demonstrations = [
        Demonstration(({"role": "user", "content": f"{a}+{b}="},), f"\\boxed{{{a + b}}}") for a, b in numbers
    ]
    write_demonstrations(tmp_path / "demos.jsonl", demonstrations)
    tree = {
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
        "model": {"path": str(tiny_dir / "model"), "device": "cpu"},
        "data": {"train": str(tmp_path / "demos.jsonl")},
        "sft": {"epochs": 2, "batch_size": 8},
        "optim": {"lr": 1e-3, "warmup_fraction": 0.0, "grad_clip": 0.1},
        "train": {"token_budget": 40},
    }
    (tmp_path / "sft.toml").write_text(dump_config(load_config(tree, kind=SFTConfig)))
    return tmp_path / "sft.toml"


def torchrun(number: int, *words: str) -> "subprocess.Popen[str]":
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    return subprocess.Popen(
        [*start, "-m", "pekoe.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def ranks_of_two() -> list[dict[str, str]]:
    """What torchrun sets for each of two processes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def weights(run: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_model(run / "model").parameters()])


def steps(run: Path) -> list[dict[str, float]]:
    return [line for line in read_lines(run / "journal.jsonl") if line["event"] == "step"]


def test_two_processes_are_as_one_and_one_goes_on_where_they_stopped(recipe: Path, tmp_path: Path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    run_sft(load_config(recipe, [f"run.dir={alone}", "sft.epochs=40"], SFTConfig), NoProgress())
    words = [str(recipe), f"run.dir={both}", "sft.epochs=40", "parallel.cp=2", "train.activation_checkpointing=true"]
    process = torchrun(2, "sft", *words)
    deadline = time.monotonic() + LIMIT_S
    journal = both / "journal.jsonl"
    while not (journal.exists() and journal.read_text().count('"event":"step"') >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no step within {LIMIT_S} s"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # torchrun passes a SIGTERM on
    stdout, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert stderr.count("which is saved; run the same command again") == 1, stderr
    assert stdout.count("saved step ") == 1, "one process speaks"
    done = len(steps(both))
    assert 3 <= done < 80
    run_sft(load_config(recipe, [f"run.dir={both}", "sft.epochs=40"], SFTConfig), NoProgress())  # another layout
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([s[key] for s in steps(both)], [s[key] for s in steps(alone)], rtol=1e-3)
    torch.testing.assert_close(weights(both), weights(alone), rtol=0, atol=1e-4)
    assert [json.loads(line)["step"] for line in journal.read_text().splitlines() if "resumed" in line] == [done]


@pytest.mark.slow
def test_several_processes_go_back(recipe: Path, tmp_path: Path):
    """A shard that one of them wrote is damaged: one message, and --from goes back to the same bits."""
    run, words = tmp_path / "run", ["sft", str(recipe), "train.save_every=1", "train.keep_checkpoints=9"]
    outcomes: list[tuple[int, str, torch.Tensor]] = []
    for more in ([], [], ["--from", "3"]):
        process = torchrun(2, *words, *more)
        _, stderr = process.communicate(timeout=LIMIT_S)
        outcomes.append((process.returncode, stderr, weights(run)))
        if len(outcomes) == 1:
            shard = run / "checkpoints" / "step-000004" / "trainer" / "__1_0.distcp"
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 0xFF
            shard.write_bytes(data)
    (first, _, whole), (second, message, _), (third, stderr, again) = outcomes
    assert (first, second, third) == (0, 1, 0), message + stderr
    assert "__1_0.distcp: " in message
    assert "--from 3 goes back to the one before it" in message
    assert torch.equal(again, whole)
    assert [step["step"] for step in steps(run)] == [1, 2, 3, 4]


def test_a_last_batch_of_one_trains_on_two_processes(recipe: Path, tmp_path: Path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    words = ["sft.batch_size=15", "sft.epochs=1"]  # of 16 demonstrations
    run_sft(load_config(recipe, [f"run.dir={alone}", *words], SFTConfig), NoProgress())
    ranks = [
        command(tmp_path / f"printed-{rank}", "sft", str(recipe), f"run.dir={both}", *words, environment=each)
        for rank, each in enumerate(ranks_of_two())
    ]
    printed = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert [bool(stdout) for stdout, _ in printed] == [True, False], "one process speaks"
    for key in ("loss", "grad_norm", "num_targets"):
        np.testing.assert_allclose([s[key] for s in steps(both)], [s[key] for s in steps(alone)], rtol=1e-3)
    torch.testing.assert_close(weights(both), weights(alone), rtol=0, atol=1e-4)


def test_what_several_processes_do_not_do(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_config(recipe, ["parallel.tp=2"], SFTConfig)
    with pytest.raises(
        UserError, match=r"parallel: expected 2 processes or a multiple, got one; .* --nproc-per-node 2"
    ):
        run_sft(config, NoProgress())
    spec = load_model(config.model.path).spec
    assert make_layout(spec, ParallelSection(), torch.device("cpu")) is None
    require_single_process("rl")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="rl: expected one process, got torchrun with 2; torchrun is for sft"):
        require_single_process("rl")


def join(name: str) -> None:
    with process_group(name) as rank:
        listening = psutil.Process().net_connections("inet")
        print(rank, sorted({each.laddr.ip for each in listening if each.status == psutil.CONN_LISTEN}), flush=True)


def test_what_processes_meet_at_is_loopback_where_all_are_here(tmp_path: Path):
    """torch's store has no key, and listens on every address by itself; torchrun's own is out of our hands."""
    processes = [
        Child(tmp_path / str(rank), join, "a name", environment=each) for rank, each in enumerate(ranks_of_two())
    ]
    printed = [process.communicate()[0].strip() for process in processes]
    assert printed == ["0 ['127.0.0.1']", "1 ['127.0.0.1']"]
