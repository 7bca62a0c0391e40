# pyright: basic, reportMissingImports=false, reportPrivateImportUsage=false, reportArgumentType=false, reportReturnType=false
"""What Pekoe adds to a vLLM server's workers. Runs in vLLM's environment: needs vLLM and torch, never Pekoe.

Loaded through PYTHONPATH and `--worker-extension-cls pekoe_vllm_gloo.Extension`. Five things that vLLM lacks:

1. A weight-transfer backend ("pekoe") over a `torch.distributed` group, gloo or NCCL. vLLM's own NCCL engine speaks
   raw NCCL with a handshake of its own, so that a trainer without vLLM could not join; and it has none for the CPU.
2. On CPU a linear layer's weight is packed once, at loading. A head tied to the embedding has no weight of its own to
   load, so that an update leaves it packed from the old ones. Every update here packs it again.
3. A checksum of each parameter as it acts, unpacked by letting the layer work on the identity.
4. An adapter (LoRA) that is loaded again in place, while requests use it.
5. On CPU experts' weights are packed at the first loading alone, and an update would leave them as they were sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

try:
    from vllm._custom_ops import cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
except ImportError:  # a vLLM whose mixtures are built otherwise: what is said of them here does not hold
    cpu_prepack_moe_weight: Any = None
    UnquantizedMoeBackend: Any = None
    UnquantizedFusedMoEMethod: Any = None
    RoutedExperts: Any = ()

BACKEND = "pekoe"
PART_NUMBERS = 2**24  # summed at once: bounds the memory that it takes
PROBE_ROWS = 1024  # rows of the identity that a layer works on at once


@dataclass
class GroupInfo(WeightTransferInitInfo):
    """How to join the trainer's group. This server's workers are ranks `rank_offset` and up; the trainer is rank 0."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str
    backend: str
    limit_s: float


@dataclass
class TensorsInfo(WeightTransferUpdateInfo):
    """The tensors that the trainer broadcasts next, in this order, one by one."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class BroadcastEngine(WeightTransferEngine[GroupInfo, TensorsInfo]):
    """Receives weights by broadcast and loads them as a checkpoint's."""

    init_info_cls = GroupInfo
    update_info_cls = TensorsInfo
    group: dist.ProcessGroup | None = None

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        self.shutdown()  # of an earlier trainer
        self.group = _join(init_info, init_info.rank_offset + self.parallel_config.rank)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: TensorsInfo) -> None:
        if self.group is None:
            raise RuntimeError("weights were sent before init_weight_transfer_engine")

        def received() -> Iterator[tuple[str, Tensor]]:
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                dist.broadcast(tensor, src=0, group=self.group)
                yield name, tensor

        self.model.load_weights(received())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_heads(self.model)

    def shutdown(self) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None


def _join(info: GroupInfo, rank: int) -> dist.ProcessGroup:
    """Join a group of its own store, beside the default group that vLLM made."""
    limit = timedelta(seconds=info.limit_s)
    store = dist.TCPStore(info.master_address, info.master_port, info.world_size, is_master=False, timeout=limit)
    store = dist.PrefixStore(info.group_name, store)
    group, _ = distributed_c10d._new_process_group_helper(
        info.world_size, rank, [], info.backend, store, group_name=info.group_name, timeout=limit
    )
    distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(info.world_size)}
    return group


def refresh_heads(model: nn.Module) -> None:
    """Pack again, from the weights of now, what is packed beside an embedding's weight (CPU only)."""
    module: Any
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def checksum(tensor: Tensor) -> int:
    """The sum of bits(x_i) * (2 i + 1) modulo 2^64: exact, whatever the order of summation. -0 counts as 0.

    `pekoe.engine.checksum.checksum` is the same function on the trainer's side.
    """
    integer = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    total, place = 0, 0
    for part in tensor.detach().flatten().split(PART_NUMBERS):
        bits = (part + 0.0).view(integer).to(torch.int64)
        places = torch.arange(place, place + len(bits), device=bits.device, dtype=torch.int64)
        total += int((bits * (2 * places + 1)).sum())
        place += len(bits)
    return total % 2**64


def effective_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its checkpoint's name, as it acts in a forward now. Not for weights split between workers."""
    parts_of: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    module: Any
    for path, module in model.named_modules():
        path = path.removesuffix(".base_layer")  # beside an adapter
        parent, _, leaf = path.rpartition(".")
        is_head = leaf == "lm_head"
        for name, parameter in module.named_parameters(recurse=False):
            value: Tensor = parameter
            if name == "weight" and (is_head or isinstance(module, LinearBase)):
                value = _unpacked(module, parameter)
            if name == "weight" and isinstance(module, VocabParallelEmbedding):
                value = value[: module.org_vocab_size]  # without padding
            if isinstance(module, RoutedExperts) and name in ("w13_weight", "w2_weight"):
                yield from _each_expert(path.removesuffix("routed_experts"), module, name, parameter)
                continue
            if isinstance(module, LinearBase) and leaf in parts_of:
                pieces = value.split(list(module.output_partition_sizes))
                for part, piece in zip(parts_of[leaf], pieces, strict=True):
                    yield f"{parent}.{part}.{name}", piece
            else:
                yield f"{path}.{name}", value


def _each_expert(prefix: str, module: Any, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The matrices of each expert, by their names in a checkpoint; of other kernels than these, what they hold."""
    backend = getattr(module.quant_method, "unquantized_backend", None)
    if backend == UnquantizedMoeBackend.CPU:
        weight = _unpacked_experts(module, weight)
    elif backend != UnquantizedMoeBackend.TRITON:
        yield f"{prefix}{name}", weight
        return
    size, hidden = module.moe_config.intermediate_size_per_partition_unpadded, module.moe_config.hidden_dim_unpadded
    down, gate, up = module.ckpt_down_proj_name, module.ckpt_gate_proj_name, module.ckpt_up_proj_name
    parts = {down: weight} if name == "w2_weight" else dict(zip((gate, up), weight.chunk(2, dim=1), strict=True))
    for part, values in parts.items():
        whole = values[:, :hidden, :size] if part == down else values[:, :size, :hidden]  # without padding
        for expert, matrix in enumerate(whole):
            yield f"{prefix}{expert}.{part}.weight", matrix


def _unpacked_experts(module: Any, packed: Tensor) -> Tensor:
    """Experts' weights [E, out, in] as they were packed. Where each value went is found by packing numbers in its
    place, a byte of them at a time: bfloat16 holds no larger ones."""
    kernel = module.quant_method.moe_kernel.fused_experts
    if kernel._use_zentorch:  # it packs nothing
        return packed
    numbers = torch.arange(packed[0].numel())
    origin = torch.zeros_like(numbers)
    for shift in range(0, len(numbers).bit_length(), 8):
        digits = (numbers >> shift & 255).to(packed.dtype).view(1, *packed.shape[1:])
        origin += cpu_prepack_moe_weight(digits, kernel.isa).flatten().long() << shift
    plain = torch.empty_like(packed).flatten(1)
    plain[:, origin] = packed.flatten(1)
    return plain.view_as(packed)


def pack_experts_again(method: Any) -> None:
    """Let `_setup_kernel` of vLLM's experts pack their weights at each loading, not at the first alone."""
    plain = method._setup_kernel

    def setup(self: Any, layer: nn.Module, w13: Tensor, w2: Tensor) -> None:
        again = self.moe_kernel is not None
        plain(self, layer, w13, w2)
        if again and self.unquantized_backend == UnquantizedMoeBackend.CPU:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    method._setup_kernel = setup


def _unpacked(module: Any, weight: Tensor) -> Tensor:
    """A linear layer's weight [out, in]; where it was packed away, from what the layer makes of the identity."""
    if not hasattr(module, "cpu_linear"):
        return weight
    names = "input_size_per_partition", "input_size", "embedding_dim"  # the second: of a layer that is not split
    size = next(int(getattr(module, name)) for name in names if hasattr(module, name))
    rows: list[Tensor] = []
    for start in range(0, size, PROBE_ROWS):
        eye = torch.zeros(min(PROBE_ROWS, size - start), size, dtype=weight.dtype, device=weight.device)
        eye[torch.arange(len(eye)), torch.arange(start, start + len(eye))] = 1
        rows.append(module.quant_method.apply(module, eye, None))
    return torch.cat(rows).T


class Extension:
    """Methods that vLLM mixes into its worker, for POST /collective_rpc."""

    def pekoe_load(self: Any, path: str) -> str:
        """Load the checkpoint directory `path` in place of the weights."""
        self.reload_weights(weights_path=path)
        with set_current_vllm_config(self.vllm_config):
            refresh_heads(self.model_runner.get_model())
        return path

    def pekoe_load_adapter(self: Any, name: str, path: str) -> str:
        """Put the adapter of the directory `path` in the place of that which /v1/load_lora_adapter loaded last."""
        self.add_lora(LoRARequest(name, max(self.list_loras()), path, load_inplace=True))
        return path

    def pekoe_checksums(self: Any) -> dict[str, str] | None:
        """Each parameter's checksum (decimal), or None where the weights are split between workers."""
        if self.vllm_config.parallel_config.world_size > 1:
            return None
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            return {n: str(checksum(w)) for n, w in effective_weights(self.model_runner.get_model())}


if BACKEND not in WeightTransferEngineFactory._registry:
    if UnquantizedFusedMoEMethod is not None:
        pack_experts_again(UnquantizedFusedMoEMethod)
    WeightTransferEngineFactory.register_engine(BACKEND, __name__, BroadcastEngine.__name__)
