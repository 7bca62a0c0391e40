"""Memory of one device, by part: an engine's and a training rank's. Formulas, checked against `pekoe doctor`.

The trainer's parts are those that `pekoe.train.memory_estimate` gets from the trainer's own code on tensors without
numbers; the coefficients below were read off it (bytes a token, of dense models), and tests/plan/test_memory.py holds
them to it. What a GPU then really takes was measured on none. Of a mixture all experts' weights are held, and a token's
activations are those of the experts that it uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pekoe.core.hardware import PROCESS, USABLE
from pekoe.plan.costs import Engine, Training

LOGIT_VALUES = (
    1 << 26
)  # logits that the trainer holds at once on a GPU (`pekoe.algo.loss`), 16 bytes each with gradients


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one device at the peak, and those that it has."""

    parts: dict[str, float]
    room: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.room


def engine_memory(engine: Engine, longest: int) -> Memory:
    """Of one of an engine's devices: weights, KV cache, workspace. The KV cache takes what is left, and must hold the
    longest sequence; where it does not, what that would need is counted."""
    device = engine.device.memory_bytes
    tokens = max(engine.kv_tokens(USABLE), longest)
    parts = {
        "weights": engine.weights / engine.tp,
        "KV cache": tokens * engine.shape.kv_per_token * engine.kv_bytes / engine.kv_shards,
        "workspace": (1 - USABLE) * device,
    }
    return Memory(parts, device * 1.000001)  # the KV cache fills it: rounding must not make it too small


def trainer_memory(
    training: Training,
    budget: int,
    shards: int,
    half: bool,
    reference: bool = False,
    beside: Mapping[str, float] | None = None,
) -> Memory:
    """Of a training rank.

    Args:
        budget: tokens of a micro-batch at one rank.
        shards: ranks over which FSDP shards the weights.
        half: whether products are in bfloat16; weights and optimizer state are float32 always.
        reference: whether a model that is not trained is held too.
        beside: bytes that other things hold on this device, by name.
    """
    shape, tp, layers = training.shape, training.tp, training.shape.num_layers
    width, head = shape.hidden, shape.vocab * shape.hidden
    inner = (shape.top_k * shape.expert_width + shape.shared_width if shape.num_experts else shape.dense_width) / tp
    queries, keys = (n * shape.head_dim / tp for n in (shape.num_heads, shape.num_kv_heads))
    one_layer = (shape.num_parameters - head * (1 if shape.tied else 2)) / layers / tp
    own = layers * one_layer + head * (1 if shape.tied else 2)  # tensor parallelism leaves embeddings whole
    root = own - layers * one_layer
    low = half and shards > 1  # as FSDP gathers weights, in bfloat16; in one process by autocast
    if low:
        layer, again = 16 * width + 8 * inner + 4 * (queries + keys + shape.num_heads / tp), 4 * inner
    elif half:
        layer, again = 26 * width + 8 * inner + 4 * (queries + keys + shape.num_heads / tp), 4 * inner
    else:
        layer, again = 24 * width + 16 * (inner + queries + keys), 8 * inner
    ends = 10 * width + 4 * shape.head_dim if low else 16 * width + 8 * shape.head_dim
    kept, item = 2 if low else 4, 2 if half else 4  # bytes of the residual stream and of gradients; of gathered weights
    copies = 2 * one_layer if half and not low else 0.0  # of a layer's weights, by autocast, while they are needed
    values, many = min(LOGIT_VALUES, budget * shape.vocab), budget * shape.vocab > LOGIT_VALUES
    # Of several chunks of logits each has a gradient of the head: the sum, the new one and their sum.
    logits = max(16 * values + kept * head + (2 * head if half and not low else 0), many * 3 * kept * head)
    if training.recompute:
        stored, backward = budget * layers * kept * width, budget * (layer + again) + copies
    else:
        stored, backward = layers * (budget * layer + copies), budget * again
    # The peak is in one of these phases, as in `train.memory_estimate`: what is gathered, activations, logits.
    phases = (
        (2 * item * (root + one_layer), 2 * kept * width * budget, 0.0),
        (item * (root + 3 * one_layer), stored + budget * again, 0.0),
        (item * root, stored + budget * ends, logits),
        (item * (root + 2 * one_layer + head) + (item + 4) * one_layer, stored + backward, 0.0),
        ((item + 4) * root, 0.0, 0.0) if shards > 1 else (0.0, 4.0 * head, 0.0),
    )
    peaks = [(gathered if shards > 1 else 0.0, activations, logits) for gathered, activations, logits in phases]
    gathered, activations, logits = max(peaks, key=sum)
    parts = {
        "parameters": 4 * own / shards,
        "gradients": 4 * own / shards,
        "Adam's moments": 8 * own / shards,
        "gathered by FSDP": gathered,
        "activations of a micro-batch": activations,
        "logits and the head's gradients": logits,
        "the reference model": reference * (2 if half else 4) * own / shards,
        "torch": PROCESS,
        **(beside or {}),
    }
    return Memory({name: size for name, size in parts.items() if size}, USABLE * training.device.memory_bytes)
