"""A checksum of a tensor's bits."""

import pytest
import torch

from pekoe.engine import checksum as module
from pekoe.engine.checksum import checksum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_and_every_place_counts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(17, 31, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksum(tensor)
    assert 0 <= before < 2**64
    monkeypatch.setattr(module, "PART_NUMBERS", 100)
    assert checksum(tensor) == before  # the parts make no difference
    swapped = tensor.clone()
    swapped[0, 0], swapped[0, 1] = tensor[0, 1], tensor[0, 0]
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    nudged = tensor.clone()
    nudged.view(integer)[3, 5] ^= 1
    assert len({before, checksum(swapped), checksum(nudged)}) == 3


def test_minus_zero_is_zero():
    assert checksum(torch.tensor([-0.0, 1.0])) == checksum(torch.tensor([0.0, 1.0])) != checksum(torch.zeros(2))
