"""Predicts the memory that a training step takes.

It runs the trainer's own code under torch's memory tracker on fake tensors, which have no data. Memory is linear in
layers and in tokens, so models of one and of two layers suffice.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from pekoe.algo.loss import GPU_CHUNK_VALUES
from pekoe.config.recipes import OptimSection
from pekoe.core.roofline import adapter_parameters
from pekoe.core.spec import FamilySpec, ModelSpec
from pekoe.model import Attention, Decoder, LoRA, PackedAttention, Scores
from pekoe.model.lora import add_lora
from pekoe.train.trainer import Trainer

_FLOAT = 4  # bytes of a weight, a gradient, each of Adam's moments
_MOST_TOKENS = 1 << 14  # that are tracked; memory is linear beyond


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes at the most, beside weights, gradients and moments, of one part of a micro-batch's forward and backward."""

    gathered: int
    fixed: int
    per_token: float

    def bytes(self, tokens: int) -> int:
        return self.gathered + self.fixed + round(self.per_token * tokens)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of one process at the peak of a training step."""

    weights: int
    gradients: int
    moments: int
    phases: tuple[Phase, ...]
    """Of the layers' forward, of the head, of the layers' backward, and of what comes after it: the peak is in one."""
    token_budget: int

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes(self.token_budget))

    @property
    def gathered(self) -> int:
        """What FSDP holds whole at the peak, in the dtype of the products: weights of embeddings, head and two layers,
        and gradients, which are summed in float32."""
        return self.peak.gathered

    @property
    def activations(self) -> int:
        """Of forward and backward: activations, chunks of logits, low-precision copies of weights."""
        return self.peak.bytes(self.token_budget) - self.peak.gathered

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.gathered + self.activations

    def largest_budget(self, available: int) -> int:
        """The most tokens of a micro-batch within `available` bytes; 0 where none fit."""
        room = available - self.weights - self.gradients - self.moments
        return max(0, min(_tokens(phase, room) for phase in self.phases))


def _tokens(phase: Phase, room: int) -> int:
    left = room - phase.gathered - phase.fixed
    if phase.per_token > 0:
        return int(left / phase.per_token)
    return sys.maxsize if left >= 0 else 0


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

    def peaks(tokens: int) -> list[tuple[int, int]]:
        """Of each phase, with one layer and with all."""
        settings = tokens, longest, compute_dtype, activation_checkpointing, device == "cuda", lora, low
        one, two = (_peak_bytes(own, layers, *settings) for layers in (1, 2))
        return [(a, a + (spec.num_layers - 1) * (b - a)) for a, b in zip(one, two, strict=True)]

    full, part = peaks(many), peaks(few)
    sized = spec if isinstance(spec, FamilySpec) else own  # experts that no token meets have weights too
    trained = adapter_parameters(sized, lora.rank, lora.targets) if lora else sized.num_parameters
    weights, item = trained * _FLOAT, compute_dtype.itemsize if lora else _FLOAT
    base = sized.num_parameters * item if lora else 0

    def phase(gathered: int, place: int, layers: Literal["one", "all"] = "all") -> Phase:
        most, less = (values[place][layers == "all"] for values in (full, part))
        per_token = (most - less) / (many - few)
        return Phase(gathered if shards > 1 else 0, round(most - per_token * many), per_token)

    layer, whole = sized.num_layer_parameters, compute_dtype.itemsize if low else item
    root, grown = sized.num_parameters - sized.num_layers * layer, trained // sized.num_layers if lora else layer
    head = 0 if lora or dense.tied_embeddings else sized.vocab_size * sized.hidden_size  # gradients; tied: in `full`
    after = Phase((whole + _FLOAT) * root, 0, 0.0) if shards > 1 and lora is None else phase(0, 3)
    phases = (
        # Embeddings and head stay gathered; of what is gathered last the buffer that it came in is there, too.
        phase(2 * whole * (root + layer), 0, "one"),
        phase(whole * (root + 3 * layer), 0),
        phase(whole * root, 1),
        phase(whole * (root + 2 * layer + head) + (whole + _FLOAT) * grown, 2),
        after,  # gradients of embeddings and head are summed
    )
    state = (base + weights) // shards, weights // shards, 2 * moment_bytes * trained // shards
    return StepMemory(*state, phases, token_budget)


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
) -> tuple[int, int, int, int]:
    """The peaks of the layers' forward, of the head, of the layers' backward and of what comes after it, without
    weights, gradients and moments, of a model with this many layers.

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
        trainer.chunk_values = GPU_CHUNK_VALUES if cuda else None
        numbers = torch.arange(tokens)
        tracker = MemTracker()
        handles: Any = vars(tracker)["_param_to_grad_hook_handles"]
        for parameter in model.parameters():  # it hooks all of them, and those without a gradient take no hook
            if not parameter.requires_grad:
                handles[parameter] = RemovableHandle(OrderedDict()), RemovableHandle(OrderedDict())
        tracker.track_external(model, trainer.optimizer)
        peaks: list[int] = []

        def phase_ends(*_: Any) -> None:
            """A phase ends: the peak from now on is another one."""
            known: tuple[dict[Any, int], dict[Any, dict[str, int]]]
            known = vars(tracker)["_peak_mem"], vars(tracker)["_peak_mem_snap"]
            peaks.append(sum(known[0].values()))
            for values in known:
                values.clear()

        def follows(_module: Any, _given: Any, output: Tensor) -> None:
            if output.requires_grad:  # embeddings beside an adapter do not
                output.register_hook(phase_ends)

        model.register_forward_hook(phase_ends)
        model.register_forward_hook(follows)
        model.model.embed_tokens.register_forward_hook(follows)
        with tracker:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)  # of the micro-batches before
            trainer.forward(model, numbers, numbers, attention, numbers[:-1], numbers[1:])[0].sum().backward()
            phase_ends()
        state = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
    forward, head, backward, after = (max(0, peak - state) for peak in (*peaks, 0)[:4])
    return forward, head, backward, after


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
