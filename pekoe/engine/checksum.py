"""A checksum of a tensor's bits that does not depend on the order of summation, for trainer and engines alike."""

from __future__ import annotations

import torch
from torch import Tensor

PART_NUMBERS = 2**24  # summed at once: bounds the memory that it takes


def checksum(tensor: Tensor) -> int:
    """The sum of bits(x_i) * (2 i + 1) modulo 2^64: exact, whatever the order of summation. -0 counts as 0.

    Takes elements of 2, 4 or 8 bytes. `pekoe_vllm_gloo.checksum`, in vLLM's workers, is the same function.
    """
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    total, place = 0, 0
    for part in tensor.detach().flatten().split(PART_NUMBERS):
        bits = (part + 0.0).view(integer).to(torch.int64)
        places = torch.arange(place, place + len(bits), device=bits.device, dtype=torch.int64)
        total += int((bits * (2 * places + 1)).sum())
        place += len(bits)
    return total % 2**64
