"""Weights on their way: in buckets by broadcast, or as a directory. The trainer's side in one process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pekoe.core.errors import RunError
from pekoe.core.types import FloatArray, Sample
from pekoe.engine.base import Broadcast, BroadcastGroup, Checksums, EngineKind
from pekoe.engine.buckets import buckets
from pekoe.model import LanguageModel, file_weights, save_adapter, save_model
from pekoe.model.lora import is_factor, merged
from pekoe.train import Layout
from pekoe.train.checkpoint import whole_weights
from pekoe.weights.checksums import ChecksumBuilder, checksum_builder_for, checksums_of
from pekoe.weights.groups import close_group, free_port, open_group, wait_for
from pekoe.weights.proof import forward_logprobs

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "pekoe-weights-"
_LARGE_BYTES = 1 << 20

Named = list[tuple[str, Tensor]]


def send(
    handle: Any | None,
    parts: Iterator[Named],
    limit_s: float,
    add: Callable[[str, Tensor], None] | None = None,
    one_by_one: bool = False,
) -> int:
    """Gather the buckets, at every rank, and broadcast them from the one that has `handle`. Returns the bytes sent.

    While one is on its way the next is gathered. A rank that cannot send goes on to gather, as the others wait for it;
    then it raises RunError.

    Args:
        limit_s: of each bucket's transfer.
        add: is given each whole parameter, at the rank that has `handle`.
        one_by_one: each tensor by itself, as servers take them; else as `Receiver` does.
    """
    sent, error = 0, ""
    on_its_way: list[tuple[Any, Tensor]] = []
    for part in chain(parts, [[]]):  # at the empty one the last bucket is waited for
        whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for _, tensor in part]
        if handle is None or error:
            continue
        large, small = (whole, []) if one_by_one else _by_size(whole)
        pieces = [*large, torch.cat([tensor.reshape(-1) for tensor in small])] if small else large
        try:
            wait_for([work for work, _ in on_its_way], handle, limit_s)
            on_its_way = [(dist.broadcast(piece, src=0, group=handle, async_op=True), piece) for piece in pieces]
        except RuntimeError as broken:
            error = str(broken)
        sent += sum(piece.nbytes for piece in pieces)
        if add is not None:
            for (name, _), tensor in zip(part, whole, strict=True):
                add(name, tensor)
    if error:
        raise RunError(f"weights: an engine broke off: {error}")
    return sent


class Receiver:
    """The receiving end in an engine's process: given to `EmbeddedEngine` as its `receive`."""

    def __init__(self) -> None:
        self._group: BroadcastGroup | None = None
        self._handle: Any = None

    def __call__(self, model: LanguageModel, broadcast: Broadcast) -> None:
        """Take what `send` sends into `model`'s parameters, after joining the group where it is a new one."""
        if broadcast.group != self._group:
            close_group(self._handle)
            self._group, self._handle = None, None
            self._handle = open_group(broadcast.group, broadcast.group.first_rank)
            self._group = broadcast.group
        receive(self._handle, buckets(model, broadcast.bucket_bytes), broadcast.group.limit_s)


def receive(handle: Any, parts: Iterator[Named], limit_s: float) -> None:
    """Take what `send` sends, of the same buckets: large tensors come into their place, the others into a buffer from
    which they are copied while the next bucket comes."""
    coming: list[tuple[list[Any], Tensor, list[Tensor]]] = []

    def load() -> None:
        while coming:
            works, flat, small = coming.pop()
            wait_for(works, handle, limit_s)
            for tensor, piece in zip(small, flat.split([tensor.numel() for tensor in small]), strict=True):
                tensor.copy_(piece.view_as(tensor))

    for part in parts:
        large, small = _by_size([tensor for _, tensor in part])
        flat = part[0][1].new_empty(sum(tensor.numel() for tensor in small))
        pieces = [*large, flat] if small else large
        works = [dist.broadcast(piece, src=0, group=handle, async_op=True) for piece in pieces]
        load()
        coming.append((works, flat, small))
    load()


def _by_size(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that are sent as they are, and those that are cheaper to send together."""
    large = [t for t in tensors if t.nbytes >= _LARGE_BYTES and t.is_contiguous()]
    return large, [t for t in tensors if t.nbytes < _LARGE_BYTES or not t.is_contiguous()]


@contextmanager
def directory(parent: Path) -> Generator[Path]:
    """A new directory below `parent` for weights, for as long as the context lasts."""
    parent.mkdir(parents=True, exist_ok=True)
    if parent == SHARED_MEMORY:
        for path in parent.glob(f"{_PREFIX}*"):  # what processes of this host left when they were killed
            with contextlib.suppress(OSError), (path / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
    place = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
    try:
        with (place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # this process lives: seen from any container that shares this memory
            yield place / "model"
    finally:
        shutil.rmtree(place, ignore_errors=True)


class LocalSender:
    """The trainer's side in one process (implements `channel.Sender`).

    Where the model is sharded each process has a sender; all call `broadcast` and `write` together, and the one that
    opened the group sends.

    Args:
        model: the weights; an embedded engine in this process samples from this very object.
        compute_dtype: of servers' weights.
        logprobs: the trainer's, of the canary.
        host: where engines reach this process.
        engine_dtype: of the weights of embedded engines; None: the model's. An adapter is sent in its own.
    """

    def __init__(
        self,
        model: LanguageModel,
        compute_dtype: torch.dtype,
        logprobs: Callable[[Sequence[Sample]], Sequence[FloatArray]],
        host: str = "127.0.0.1",
        engine_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.compute_dtype, self.logprobs, self._host = model, compute_dtype, logprobs, host
        self._engine_dtype = engine_dtype if model.lora is None else None
        self._handles: dict[EngineKind, tuple[Any, float]] = {}
        self._builders: dict[EngineKind, ChecksumBuilder | None] = {}

    def stage(self) -> bool:
        return False

    def address(self) -> tuple[str, int]:
        return self._host, free_port(self._host)

    def open(self, kind: EngineKind, group: BroadcastGroup) -> None:
        handle, _ = self._handles.pop(kind, (None, 0.0))
        close_group(handle)
        self._handles[kind] = open_group(group), group.limit_s

    def broadcast(self, kind: EngineKind, bucket_bytes: int, checksum: bool) -> int:
        handle, limit_s = self._handles.get(kind, (None, 0.0))
        self._builders = {kind: self._builder(kind)} if checksum else {}
        builder = self._builders.get(kind)
        embedded = kind == "embedded"
        dtype = self._engine_dtype if embedded else self.compute_dtype
        parts = buckets(self.model, bucket_bytes, dtype, files=not embedded)
        return send(handle, parts, limit_s, builder.add if builder else None, one_by_one=not embedded)

    def write(self, place: Path, kinds: Sequence[EngineKind], checksum: bool) -> int:
        """In the engines' dtype, or an adapter alone in its own; see `Sender.write`. SGLang is given an adapter's sum
        with its base: it would wait for the end of all requests before it changed an adapter."""
        whole: Mapping[str, Tensor] = dict(self.model.named_parameters())
        sharded, lora = any(isinstance(tensor, DTensor) for tensor in whole.values()), self.model.lora
        alone = lora is not None and "sglang" not in kinds
        if sharded:
            whole = whole_weights(self.model, trained=alone and not checksum)
            if not whole:  # the first process writes
                return 0
        if lora is not None and not alone:
            whole = merged(whole, lora.scale)
        dtype = (self._engine_dtype or torch.float32) if "embedded" in kinds else self.compute_dtype
        try:
            if alone:
                save_adapter(self.model, place, {name: t for name, t in whole.items() if is_factor(name)})
            else:
                save_model(self.model, place, weights=whole if sharded or lora else None, dtype=dtype)
        except (OSError, SafetensorError) as error:  # a full disk, mostly
            raise RunError(f"weight update: cannot write {place}: {error}") from error
        self._builders = {kind: self._builder(kind) for kind in kinds if checksum}
        for builder in filter(None, self._builders.values()):
            for name, tensor in (file_weights(self.model, whole) if builder.files else whole).items():
                builder.add(name, tensor)
        return sum(file.stat().st_size for file in place.glob("*.safetensors"))

    def checksums(self, kind: EngineKind) -> Checksums | None:
        if kind not in self._builders:  # nothing was sent: the weights as they are
            builder = self._builder(kind)
            return None if builder is None else checksums_of(self.model, builder)
        builder = self._builders[kind]
        return None if builder is None else builder.checksums()

    def _builder(self, kind: EngineKind) -> ChecksumBuilder | None:
        device = next(self.model.parameters()).device.type
        dtype: torch.dtype | None = self.compute_dtype
        if kind == "embedded":  # beside an adapter the base may be in bfloat16, here as there
            dtype = (self._engine_dtype or torch.float32) if self.model.lora is None else None
        return checksum_builder_for(kind, self.model.spec, dtype, device)

    def close(self) -> None:
        for handle, _ in self._handles.values():
            close_group(handle)
        self._handles = {}


class StagedSender(LocalSender):
    """For training that goes on while engines sample: sends a copy of the weights, made at each publish.

    Args:
        trained: the model that is trained, before a trainer has prepared it.
        temperature: of sampling.
        alternate: whether an engine in this process samples from the copy: then two take turns, and one is filled while
            the engine samples from the other.
        host: where engines reach this process.
        layout: shards the copy as the trainer shards the model; in groups of its own (`apart`).
        engine_dtype: see `LocalSender`.
    """

    def __init__(
        self,
        trained: LanguageModel,
        compute_dtype: torch.dtype,
        temperature: float,
        alternate: bool,
        host: str = "127.0.0.1",
        layout: Layout | None = None,
        engine_dtype: torch.dtype | None = None,
    ) -> None:
        self._trained = trained
        frozen = [p for p in trained.parameters() if not p.requires_grad]  # of an adapter's base there is one
        shared: list[dict[int, Any]] = [{id(p): p for p in frozen} for _ in range(1 + alternate)]
        self._copies = [deepcopy(trained, memo).requires_grad_(False) for memo in shared]
        if layout is not None:
            for copy in self._copies:
                layout.apply(copy)
        self._temperature = temperature
        super().__init__(self._copies[0], compute_dtype, self._logprobs, host, engine_dtype)

    def stage(self) -> bool:
        self._copies.reverse()
        self.model = self._copies[0]
        _reshard(self._trained)
        copies = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self._trained.named_parameters():
                if parameter.requires_grad:
                    _local(copies[name]).copy_(_local(parameter))
        return True

    def _logprobs(self, samples: Sequence[Sample]) -> list[FloatArray]:
        values = forward_logprobs(self.model, self._temperature, self.compute_dtype, samples)
        _reshard(self.model)
        return values


def _reshard(model: LanguageModel) -> None:
    """Give back the whole embeddings and head after a forward without a backward, which would do it."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
