"""Predicts the memory that a training step takes.

It runs the trainer's own code under torch's memory tracker on fake tensors, which have no data. Memory is linear in
layers and in tokens, so models of one and of two layers suffice.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from pekoe.config.recipes import OptimSection
from pekoe.core.roofline import adapter_parameters
from pekoe.core.spec import FamilySpec, ModelSpec
from pekoe.model import Attention, Decoder, LoRA, PackedAttention, Scores
from pekoe.model.lora import add_lora
from pekoe.train.trainer import Trainer

_FLOAT = 4  # bytes of a weight, a gradient, each of Adam's moments
_MOST_TOKENS = 1 << 14  # that are tracked; memory is linear beyond


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of one process at the peak of a training step."""

    weights: int
    gradients: int
    moments: int
    gathered: int
    """What FSDP holds whole for a time, in the dtype of the products: weights of two layers, embeddings and head, and
    gradients of a layer, which are summed in float32."""
    fixed: int
    """Of forward and backward, independent of tokens: chunks of logits, low-precision copies of weights."""
    per_token: float
    """Of forward and backward, per token of a micro-batch."""
    token_budget: int

    @property
    def activations(self) -> int:
        return self.fixed + round(self.per_token * self.token_budget)

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.gathered + self.activations

    def largest_budget(self, available: int) -> int:
        """The most tokens of a micro-batch within `available` bytes; 0 where none fit."""
        return max(0, int((available - self.total + self.activations - self.fixed) / self.per_token))


def predict(
    spec: ModelSpec,
    token_budget: int,
    longest: int,
    compute_dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    device: str = "cpu",
    tp: int = 1,
    shards: int = 1,
    lora: LoRA | None = None,
    moment_bytes: int = _FLOAT,
) -> StepMemory:
    """The memory of an optimizer step of several micro-batches. Activations of a family that transformers computes are
    those of a dense decoder of about its active size.

    Args:
        longest: tokens of the longest sequence.
        device: "cpu" or "cuda", as their attention differs; the device need not exist.
        tp, shards: processes that split each layer, and processes over which FSDP shards the weights.
        lora: of an adapter, beside a base in `compute_dtype`.
        moment_bytes: of each of AdamW's two moments of a number; 0: they are elsewhere.
    """
    dense = spec.dense() if isinstance(spec, FamilySpec) else spec
    own = replace(
        dense,
        num_heads=dense.num_heads // tp,
        num_kv_heads=dense.num_kv_heads // tp,
        intermediate_size=dense.intermediate_size // tp,
    )
    low = shards > 1 and not isinstance(spec, FamilySpec)  # computed with as they are gathered, see `Trainer`
    many = min(max(3, token_budget), _MOST_TOKENS)
    few = max(2, many // 4)

    def peak(tokens: int) -> int:
        settings = tokens, longest, compute_dtype, activation_checkpointing, device == "cuda", lora, low
        one, two = (_peak_bytes(own, layers, *settings) for layers in (1, 2))
        return one + (spec.num_layers - 1) * (two - one)

    full = peak(many)
    per_token = (full - peak(few)) / (many - few)
    sized = spec if isinstance(spec, FamilySpec) else own  # experts that no token meets have weights too
    trained = adapter_parameters(sized, lora.rank, lora.targets) if lora else sized.num_parameters
    weights, item = trained * _FLOAT, compute_dtype.itemsize if lora else _FLOAT
    base = sized.num_parameters * item if lora else 0
    layer = sized.num_layer_parameters
    root, whole = sized.num_parameters - sized.num_layers * layer, compute_dtype.itemsize if low else item
    gathered = whole * (root + 2 * layer) + (0 if lora else (whole + _FLOAT) * layer)
    return StepMemory(
        weights=(base + weights) // shards,
        gradients=weights // shards,
        moments=2 * moment_bytes * trained // shards,
        gathered=gathered if shards > 1 else 0,
        fixed=round(full - per_token * many),
        per_token=per_token,
        token_budget=token_budget,
    )


@cache
def _peak_bytes(
    spec: ModelSpec,
    layers: int,
    tokens: int,
    longest: int,
    dtype: torch.dtype,
    checkpointing: bool,
    cuda: bool,
    lora: LoRA | None,
    sharded: bool,
) -> int:
    """Peak of forward and backward, without weights, gradients and moments, of a model with this many layers.

    Sharded weights are computed with as FSDP gathers them, in `dtype`; others by autocast.
    """
    attention: Attention = _flash
    if not cuda or dtype == torch.float32:
        attention = PackedAttention([*range(0, tokens, longest), tokens])
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Decoder(replace(spec, num_layers=layers))
        if lora is not None:  # of names with a layer's number, their ends: the model has fewer layers
            ends = tuple(dict.fromkeys(target.rpartition(".")[2] for target in lora.targets))
            _cast(model, dtype)
            model.lora = add_lora(model, replace(lora, targets=ends), 0)
        if sharded:
            _cast(model, dtype)
        autocast = torch.float32 if sharded else dtype
        trainer = Trainer(
            model, OptimSection(), tokens, 1, compute_dtype=autocast, activation_checkpointing=checkpointing
        )
        numbers = torch.arange(tokens)
        tracker = MemTracker()
        handles: Any = vars(tracker)["_param_to_grad_hook_handles"]
        for parameter in model.parameters():  # it hooks all of them, and those without a gradient take no hook
            if not parameter.requires_grad:
                handles[parameter] = RemovableHandle(OrderedDict()), RemovableHandle(OrderedDict())
        tracker.track_external(model, trainer.optimizer)
        with tracker:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)  # of the micro-batches before
            trainer.forward(model, numbers, numbers, attention, numbers[:-1], numbers[1:])[0].sum().backward()
        peak = sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
        state = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
    return peak - state


def _cast(model: Decoder, dtype: torch.dtype) -> None:
    """As `Module.to`, which fake tensors do not take."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            cast = torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
            setattr(module, name, cast)


def _flash(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores | None = None) -> Tensor:
    """Saves the same for backward as torch's variable-length kernel on a GPU, and pads nothing."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
