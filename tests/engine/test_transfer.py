"""Weights on their way to a server: directories that vanish, buckets, and a group of two processes."""

import fcntl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pekoe.core.errors import RunError
from pekoe.engine.servers.process import free_port
from pekoe.engine.transfer import Group, broadcast, buckets, close_group, open_group, written
from pekoe.model import Decoder, load_model

MakeModel = Callable[..., Decoder]


def test_a_directory_is_there_as_long_as_it_is_needed(make_model: MakeModel, tmp_path: Path):
    model = make_model()
    with written(model, tmp_path / "weights", torch.float32) as directory:
        read = load_model(directory)
        assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))
    assert list((tmp_path / "weights").iterdir()) == []
    with written(model, tmp_path / "weights", torch.bfloat16) as directory:
        assert (directory / "model.safetensors").stat().st_size < 2.5 * model.spec.num_parameters
    with pytest.raises(RunError, match="no"), written(model, tmp_path / "weights", torch.float32) as directory:
        raise RunError("no")
    assert list((tmp_path / "weights").iterdir()) == []


def test_what_a_killed_process_left_in_shared_memory_is_removed(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("pekoe.engine.transfer.SHARED_MEMORY", tmp_path)
    orphan, living = tmp_path / "pekoe-weights-1-x", tmp_path / "pekoe-weights-2-x"
    for path in (orphan, living):
        (path / "model").mkdir(parents=True)
        (path / "lock").touch()
    with (living / "lock").open() as lock:  # perhaps of another container, where process numbers mean nothing
        fcntl.flock(lock, fcntl.LOCK_EX)
        with written(make_model(), tmp_path, torch.float32) as ours, written(make_model(), tmp_path, torch.float32):
            assert not orphan.exists()
            assert living.exists()
            assert ours.exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_where_nothing_can_be_written_the_run_is_told(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
):
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pekoe.engine.transfer.save_model", full)
    with (
        pytest.raises(RunError, match=r"cannot write .*No space left"),
        written(make_model(), tmp_path, torch.float32),
    ):
        pass


@pytest.mark.parametrize("tied", [True, False])
def test_buckets_hold_every_parameter_once(make_model: MakeModel, tied: bool):
    model = make_model(tied_embeddings=tied)
    parts = list(buckets(model, 3000, torch.bfloat16))
    sent = {name: tensor for part in parts for name, tensor in part}
    assert list(sent) == [name for part in parts for name, _ in part] == [name for name, _ in model.named_parameters()]
    assert ("lm_head.weight" in sent) is not tied
    assert len(parts) > 3
    assert all(len(part) == 1 or sum(t.nbytes for _, t in part) <= 3000 for part in parts)
    for name, parameter in model.named_parameters():
        assert torch.equal(sent[name], parameter.to(torch.bfloat16))


WORKER = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
port, name = int(sys.argv[1]), sys.argv[2]
limit = timedelta(seconds=30)
store, rank, size = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 1, 2, timeout=limit))
group, _ = c10d._new_process_group_helper(
    size, rank, [], "gloo", c10d.PrefixStore(name, store), group_name=name, timeout=limit)
c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
for shape, dtype in (((3, 4), torch.float32), ((5,), torch.bfloat16)):
    tensor = torch.empty(shape, dtype=dtype)
    dist.broadcast(tensor, src=0, group=group)
    print(tensor.double().sum().item())
"""


def test_a_group_of_this_process_and_a_worker():
    group = Group("pekoe-test", "127.0.0.1", free_port(), 2, "gloo", 30.0)
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(group.port), group.name], stdout=subprocess.PIPE, text=True
    )
    try:
        handle = open_group(group)
        assert not torch.distributed.is_initialized()  # a trainer's own default group is neither needed nor made
        tensors = [("a", torch.arange(12.0).view(3, 4)), ("b", torch.ones(5, dtype=torch.bfloat16))]
        broadcast(handle, tensors)
        out, _ = worker.communicate(timeout=60)
        assert out.split() == ["66.0", "5.0"]
        close_group(handle)
    finally:
        worker.kill()
        worker.wait()
