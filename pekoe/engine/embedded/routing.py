"""Which experts the tokens in KV memory went to, kept by slot beside it: shared, copied and overwritten as KV is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pekoe.core.spec import ModelSpec
from pekoe.core.types import RoutingArray
from pekoe.engine.embedded.attention import ForwardBatch
from pekoe.model.routing import routing_shape


class RoutingMemory:
    """The experts of each slot. A slot's are those of the forward that wrote its keys and values."""

    def __init__(self, spec: ModelSpec, num_blocks: int, block_tokens: int, device: torch.device) -> None:
        layers, k, dtype = routing_shape(spec)
        self._experts = torch.zeros(layers, num_blocks * block_tokens, k, dtype=dtype, device=device)  # [layers, S, k]
        self._size = block_tokens

    def copy_block(self, source: int, target: int) -> None:
        size = self._size
        self._experts[:, target * size : (target + 1) * size] = self._experts[:, source * size : (source + 1) * size]

    def recorder(self, batch: ForwardBatch) -> _Recorder:
        """Records the routing of one forward."""
        slots = batch.tables[batch.table_of, batch.positions // self._size] * self._size + batch.positions % self._size
        return _Recorder(self._experts, torch.from_numpy(slots).to(self._experts.device))

    def read(self, blocks: list[int], num_tokens: int) -> RoutingArray:
        """[num_tokens, layers, k] of the first tokens of a sequence that has these blocks."""
        slots = (np.array(blocks)[:, None] * self._size + np.arange(self._size)).flatten()[:num_tokens]
        chosen = self._experts.index_select(1, torch.from_numpy(slots).to(self._experts.device))
        return chosen.transpose(0, 1).contiguous().cpu().numpy()


class _Recorder:
    def __init__(self, experts: Tensor, slots: Tensor) -> None:
        self._experts, self._slots = experts, slots

    def choose(self, layer: int, chosen: Tensor) -> Tensor:
        self._experts[layer].index_copy_(0, self._slots, chosen.to(self._experts.dtype))
        return chosen

    def routed(self, layer: int, logits: Tensor | None, experts: Tensor) -> None:
        """Recorded before."""
