"""Weights on their way: directories that vanish, buckets, groups, and broadcasts that break off."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import SafetensorError
from torch.distributed import distributed_c10d as c10d

from pekoe.core.errors import RunError
from pekoe.engine.base import BroadcastGroup
from pekoe.engine.buckets import buckets
from pekoe.model import Decoder, load_model
from pekoe.weights import LocalSender
from pekoe.weights.groups import close_group, free_port, new_group, open_group, open_store, poll
from pekoe.weights.transport import directory, receive, send
from tests.forked import Child

MakeModel = Callable[..., Decoder]


def sender_of(model: Decoder, dtype: torch.dtype = torch.float32) -> LocalSender:
    return LocalSender(model, dtype, lambda samples: [])


def test_a_directory_is_there_as_long_as_it_is_needed(make_model: MakeModel, tmp_path: Path):
    model, parent = make_model(), tmp_path / "weights"
    with directory(parent) as place:
        written = sender_of(model).write(place, ["sglang"], False)
        read = load_model(place)
        assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))
        assert written == (place / "model.safetensors").stat().st_size
    assert list(parent.iterdir()) == []
    with directory(parent) as place:
        assert sender_of(model, torch.bfloat16).write(place, ["sglang"], False) < 0.6 * written
    with pytest.raises(RunError, match="no"), directory(parent):
        raise RunError("no")
    assert list(parent.iterdir()) == []


def test_what_a_killed_process_left_in_shared_memory_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("pekoe.weights.transport.SHARED_MEMORY", tmp_path)
    orphan, living = tmp_path / "pekoe-weights-1-x", tmp_path / "pekoe-weights-2-x"
    for path in (orphan, living):
        (path / "model").mkdir(parents=True)
        (path / "lock").touch()
    with (living / "lock").open() as lock:  # perhaps of another container, where process numbers mean nothing
        fcntl.flock(lock, fcntl.LOCK_EX)
        with directory(tmp_path) as ours, directory(tmp_path):
            assert not orphan.exists()
            assert living.exists()
            assert ours.parent.exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_weights_that_cannot_be_written_end_the_run(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
):
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pekoe.weights.transport.save_model", full)
    with pytest.raises(RunError, match=r"cannot write .*No space left"):
        sender_of(make_model()).write(tmp_path, ["sglang"], False)


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


# Groups of this process and a worker, which speaks torch.distributed as servers do


def worker(port: int, name: str, leaves: bool) -> None:
    limit = timedelta(seconds=30)
    store, rank, size = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 1, 2, timeout=limit))
    prefixed = c10d.PrefixStore(name, store)
    group, _ = c10d._new_process_group_helper(size, rank, [], "gloo", prefixed, group_name=name, timeout=limit)
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    for shape, dtype in (((3, 4), torch.float32), ((5,), torch.bfloat16)):
        tensor = torch.empty(shape, dtype=dtype)
        torch.distributed.broadcast(tensor, src=0, group=group)
        print(tensor.double().sum().item(), flush=True)
        if leaves:
            os._exit(1)


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[[BroadcastGroup, str], Child]]:
    workers: list[Child] = []

    def start(group: BroadcastGroup, how: str) -> Child:
        workers.append(Child(tmp_path / f"worker-{len(workers)}", worker, group.port, group.name, how == "leaves"))
        return workers[-1]

    yield start
    for each in workers:
        each.kill()


def parts() -> Iterator[list[tuple[str, torch.Tensor]]]:
    yield [("a", torch.arange(12.0).view(3, 4))]
    yield [("b", torch.ones(5, dtype=torch.bfloat16))]


def test_servers_are_sent_tensor_by_tensor(start_worker: Callable[..., Child]):
    group = new_group("127.0.0.1", free_port("127.0.0.1"), 2, "gloo", 30.0)
    other = start_worker(group, "stays")
    handle = open_group(group)
    assert not torch.distributed.is_initialized()  # a trainer's own default group is neither needed nor made
    names: list[str] = []
    assert send(handle, parts(), 30, lambda name, tensor: names.append(name), one_by_one=True) == 58
    assert names == ["a", "b"]
    out, _ = other.communicate(timeout=60)
    assert out.split() == ["66.0", "5.0"]
    close_group(handle)


def test_a_member_that_dies_is_an_error_and_all_is_gathered_still(start_worker: Callable[..., Child]):
    """The ranks beside the first wait for it: it has to take part in gathering to the end."""
    group = new_group("127.0.0.1", free_port("127.0.0.1"), 2, "gloo", 5.0)
    other = start_worker(group, "leaves")
    handle = open_group(group)
    gathered: list[str] = []

    def some() -> Iterator[list[tuple[str, torch.Tensor]]]:
        for number, part in enumerate([*parts(), *parts()]):
            if number == 1:
                other.communicate(60)
            gathered.append(part[0][0])
            yield part

    start = time.monotonic()
    with pytest.raises(RunError, match="an engine broke off"):
        send(handle, some(), 5.0, one_by_one=True)
    assert time.monotonic() - start < 60
    assert gathered == ["a", "b", "a", "b"]
    close_group(handle)


@pytest.mark.usefixtures("several_ranks")
def test_polling_finds_the_end_of_a_broadcast_and_one_that_never_ends():
    group = new_group("127.0.0.1", free_port("127.0.0.1"), 2, "gloo", 5.0)
    handles: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda r=r: handles.update({r: open_group(group, r)})) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    tensor, aborted = torch.ones(1 << 20), list[str]()
    work = torch.distributed.broadcast(torch.ones(1 << 20), src=0, group=handles[0], async_op=True)
    receiver = threading.Thread(target=lambda: torch.distributed.broadcast(tensor, src=0, group=handles[1]))
    receiver.start()
    poll([work], 10, lambda: aborted.append("too early"))
    receiver.join()
    waits = torch.distributed.broadcast(tensor, src=0, group=handles[1], async_op=True)  # nobody sends
    with pytest.raises(RunError, match=r"expected a broadcast to end within 0\.1 s"):
        poll([waits], 0.1, lambda: aborted.append("aborted"))
    assert aborted == ["aborted"]
    for handle in handles.values():
        close_group(handle)


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("size", [1, 600])
def test_embedded_engines_take_large_tensors_in_place_and_small_ones_together(size: int):
    """Also those that do not lie as they are sent."""
    group = new_group("127.0.0.1", free_port("127.0.0.1"), 2, "gloo", 10.0)
    source = [("large", torch.randn(size, 1000)), ("small", torch.randn(3, 5)), ("turned", torch.randn(4, 6).T)]
    target = [(name, torch.zeros_like(tensor)) for name, tensor in source]
    lies = [tensor.data_ptr() for _, tensor in target]
    thread = threading.Thread(target=lambda: receive(open_group(group, 1), iter([target, target]), 10))
    thread.start()
    send(open_group(group), iter([source, source]), 10)
    thread.join()
    assert lies == [tensor.data_ptr() for _, tensor in target]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(source, target, strict=True))


def test_a_store_listens_at_its_host_alone():
    """torch lets whoever connects read and write: left to itself it listens on every address."""
    port = free_port("127.0.0.1")
    store = open_store("127.0.0.1", port, 1, 0, timedelta(seconds=10))
    store.set("a", "b")
    assert open_store("127.0.0.1", port, 1, 1, timedelta(seconds=10)).get("a") == b"b"
    listening = [each for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN]
    assert {each.laddr.ip for each in listening if each.laddr.port == port} == {"127.0.0.1"}
