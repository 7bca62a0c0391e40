"""Training on several processes: how they share weights and micro-batches.

FSDP2 (with replicas: HSDP), context parallelism (`context_parallel.py`) and tensor parallelism by DTensor, on one mesh
[replicas, shards, cp, tp]. Numbers change by the order of sums alone (I2, I3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from pekoe.core.errors import UserError
from pekoe.core.spec import FamilySpec, ModelSpec
from pekoe.model import LanguageModel
from pekoe.model.lora import BASE, A, B, LoRALinear

# Heads and intermediate channels are split, the residual stream, embeddings and norms are not.
_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_ROWS = ("self_attn.o_proj", "mlp.down_proj")
_NORMS_OF_HEADS = ("q_norm.weight", "k_norm.weight")

# Of plans of transformers: what is split by columns, by rows, or whole with gradients that are summed in `clip`.
_STYLES = ("colwise", "rowwise", "replicated_with_grad_allreduce")
_LAYER = "layers.*."
_SPLIT = """arcee cohere2 cwm ernie4_5 exaone exaone4 gemma gemma2 gemma3_text gpt_neox granite helium internlm3
iquestcoder llama ministral ministral3 mistral nanochat nemotron phi qwen2 qwen3 seed_oss smollm3 starcoder2
vaultgemma youtu"""
SPLIT = frozenset(_SPLIT.split())
"""Families whose plan gives the numbers of one process, in tests/families/test_parallel.py."""


class Layout:
    """A mesh of the processes of this `torch.distributed` group, [replicas, shards, cp, tp].

    Args:
        spec: the model's shape.
        tp: processes that share each layer's heads and channels.
        cp: processes that share the tokens of each micro-batch.
        replicas: groups of processes that each hold all weights, sharded over the group.
        device: "cpu" or "cuda".
        apart: in groups of its own, for a copy of the model that is sent while the model itself is trained in another
            thread: the two would mix their messages in one group.

    Raises:
        UserError: sizes that do not divide the processes, or the model.
    """

    def __init__(
        self, spec: ModelSpec, tp: int = 1, cp: int = 1, replicas: int = 1, device: str = "cpu", apart: bool = False
    ) -> None:
        world = dist.get_world_size()
        if world % (tp * cp * replicas):
            raise UserError(
                f"parallel: expected tp x cp x replicas to divide {world} processes, got {tp} x {cp} x {replicas}"
            )
        if isinstance(spec, FamilySpec):
            _check_family(spec, tp, cp)
        _check_sizes(spec, tp, cp)
        shards = world // (tp * cp * replicas)
        # Weights are also sharded over the processes that share a micro-batch: gradients of its shards are summed, too.
        weights, work = (replicas, shards * cp, tp), (replicas * shards, cp, tp)
        # Where a dimension has all processes torch takes the default group, unless it is asked for a backend. DTensor
        # keeps what it knows of an operation by its mesh: of two with the same names it takes the first one's groups.
        self._names = ("sent_replicas", "sent_shards", "sent_tp") if apart else ("replicas", "shards", "tp")
        own: dict[int | str, Any] | None = dict.fromkeys(self._names, dist.get_backend()) if apart else None
        self._weights = init_device_mesh(device, weights, mesh_dim_names=self._names, backend_override=own)
        self._work: DeviceMesh = init_device_mesh(device, work, mesh_dim_names=("ranks", "cp", "tp"))
        self._device = device
        self.num_ranks, self.rank = replicas * shards, self._work["ranks"].get_local_rank()
        """Data-parallel ranks: each has micro-batches of its own."""
        self.cp = cp
        self.context = self._work["cp"].get_group() if cp > 1 else None
        """The processes that share this one's micro-batches; None without context parallelism."""
        self.writers = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        """All processes, for checkpoints, which are written while training goes on in the other groups."""

    def apply(self, model: LanguageModel, compute_dtype: torch.dtype | None = None) -> None:
        """Shard the model's parameters in place (DTensors, on the mesh's device). Gradients are sums over all ranks.

        Args:
            compute_dtype: of gathered weights and of what is computed with them; gradients are summed in float32.
                None: the weights' own.
        """
        policy = MixedPrecisionPolicy(compute_dtype, torch.float32) if compute_dtype else MixedPrecisionPolicy()
        replicas, shards, split = self._names
        tp, replicated = self._weights[split], self._weights[replicas].size() > 1
        data = self._weights[replicas, shards] if replicated else self._weights[shards]
        for layer in model.blocks:
            if tp.size() > 1:
                parallelize_module(layer, tp, _plan(layer, model.spec))
            fully_shard(layer, mesh=data, mp_policy=policy)
        fully_shard(model, mesh=data, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # losses are divided by the one denominator already (I3)
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums

    def sum(self, values: Tensor, largest: bool = False) -> Tensor:
        """The sum (or the largest) of `values` over the data-parallel ranks, in place."""
        if self.num_ranks > 1:
            operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            dist.all_reduce(values, operation, self._work["ranks"].get_group())
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set at any process."""
        flags = torch.tensor([float(flag)], device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def clip(self, model: nn.Module, limit: float) -> float:
        """Finish the gradients after the last backward, and clip them. Returns their norm.

        `torch.nn.utils.clip_grad_norm_` refuses parameters of several meshes.
        """
        tp = self._weights["tp"]
        if tp.size() > 1:  # each process has the gradients of q and k norms from its own heads alone
            for name, parameter in model.named_parameters():
                if name.endswith(_NORMS_OF_HEADS) and parameter.grad is not None:
                    dist.all_reduce(_local(parameter.grad), group=tp.get_group())
        squares = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)  # whole, split by tp
        gradients = list(self._gradients(model))
        for gradient, split in gradients:
            squares[split] += _local(gradient).double().square().sum()
        if self._weights["shards"].size() > 1:
            dist.all_reduce(squares, group=self._weights["shards"].get_group())
        if tp.size() > 1:
            dist.all_reduce(squares[1:], group=tp.get_group())
        norm = float(squares.sum().sqrt())
        scale = min(1.0, limit / (norm + 1e-6))
        for gradient, _ in gradients:
            _local(gradient).mul_(scale)
        return norm

    def _gradients(self, model: nn.Module) -> Iterator[tuple[Tensor, int]]:
        """Each gradient, and whether tp splits it."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                assert isinstance(parameter, DTensor)
                names = parameter.device_mesh.mesh_dim_names or ()
                yield parameter.grad, int("tp" in names and parameter.placements[names.index("tp")].is_shard())


def _check_family(spec: FamilySpec, tp: int, cp: int) -> None:
    """UserError for a layout that changes the numbers of a family of transformers, or may."""
    if cp > 1 and spec.num_experts:
        raise UserError(
            f"parallel.cp: expected 1 for {spec.family}, got {cp}: how evenly experts are used is counted over all "
            "tokens of a micro-batch, of which each process would have a part"
        )
    layers = {name: style for name, style in spec.plan if name.startswith(_LAYER)}
    other = next((name for name, style in layers.items() if style not in _STYLES), None)
    if other is not None:
        why = f"its plan splits {other} as {layers[other]!r}, which is not done here"
    elif not layers:
        why = "transformers has no plan to split its layers"
    else:
        why = "" if spec.family in SPLIT else "its plan was not shown to give the numbers of one process"
    if tp > 1 and why:
        raise UserError(f"parallel.tp: expected 1 for {spec.family}, got {tp}: {why}; it is sharded whole (FSDP)")


def _check_sizes(spec: ModelSpec, tp: int, cp: int) -> None:
    """UserError for heads or channels that cannot be dealt out."""
    if spec.intermediate_size % tp:
        raise UserError(
            f"parallel.tp: expected a divisor of the model's intermediate_size = {spec.intermediate_size}, got {tp}"
        )
    for shape in dict.fromkeys(spec.attention_layers):
        if shape.num_kv_heads % tp:
            raise UserError(
                f"parallel.tp: expected a divisor of the model's num_key_value_heads = {shape.num_kv_heads}, got {tp}"
            )
        heads, kv_heads = shape.num_heads // tp, shape.num_kv_heads // tp
        if heads % cp or (kv_heads % cp and cp % kv_heads):
            raise UserError(
                f"parallel.cp: expected a divisor of the {heads} attention heads that each process has, and a divisor "
                f"or multiple of its {kv_heads} key/value heads, got {cp}"
            )


def _plan(layer: nn.Module, spec: ModelSpec) -> dict[str, ParallelStyle]:
    """How a layer's linear layers are split. Of an adapter, B is split with its base's rows, or A with its columns, and
    the other factor is whole: its gradient is the same at every process."""
    styles = dict.fromkeys(_COLUMNS, "colwise") | dict.fromkeys(_ROWS, "rowwise")
    if isinstance(spec, FamilySpec):
        there = {name for name, _ in layer.named_modules()}
        styles = {name.removeprefix(_LAYER): style for name, style in spec.plan if name.startswith(_LAYER)}
        styles = {name: style for name, style in styles.items() if name in there}
    plan: dict[str, ParallelStyle] = {}
    for name, kind in styles.items():
        if kind not in ("colwise", "rowwise"):
            continue
        style, factor = (ColwiseParallel(), B) if kind == "colwise" else (RowwiseParallel(), A)
        adapted = isinstance(layer.get_submodule(name), LoRALinear)
        plan |= {f"{name}.{BASE}": style, f"{name}.{factor}": style} if adapted else {name: style}
    return plan


def compute_of(length: int, spec: ModelSpec) -> float:
    """Estimated multiplications of a sequence's forward, with the quadratic part of attention."""
    return spec.num_parameters * length + spec.num_layers * spec.num_heads * spec.head_dim * length * length


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
