"""The measurements behind `pekoe doctor --measure`, of the smallest sizes."""

from __future__ import annotations

import pytest
import torch

from pekoe.core.errors import UserError
from pekoe.run.profile import RESPONSE, _links, measure_machine
from pekoe.run.profile_processes import measure_together


def test_what_is_measured():
    machine, timings, size = measure_machine(shapes=((1, 64),), sequences=(8,), tokens=(128,), recomputed=(64,))
    assert machine.flop_s > machine.byte_s > 1e6
    assert size == (2 if torch.cuda.is_available() else 4)  # bytes of bfloat16, of float32
    assert machine.memory_bytes > 1e8
    kinds = [(timing.kind, timing.sequences) for timing in timings]
    assert kinds == [("sample", 8), ("train", 2), ("recompute", 1)]
    assert all(timing.seconds > 0 for timing in timings)
    assert 1 < len(set(timings[0].lengths)) <= 8  # they end at steps of their own
    assert max(timings[0].lengths) <= 2 * RESPONSE


def test_links_are_said_not_to_be_measured():
    assert _links("NVIDIA H100 80GB HBM3", 3e12) == (450e9, 50e9, "published: those of h100")
    assert _links("another", 3e12)[2].startswith("assumed")
    assert _links(None, 20e9)[2].startswith("assumed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs a process has its own")
def test_two_processes_measure_what_they_share():
    found = measure_together(2, ((1, 64),), sequences=(8,), tokens=(128,), recomputed=(64,))
    machine, timings, _ = found
    assert "of one of 2 processes" in machine.source
    kinds = [(timing.kind, timing.micro_batches) for timing in timings]
    assert kinds == [("sample", 1), ("train", 1), ("recompute", 1), ("shard", 1), ("shard", 4), ("gather", 1)]
    one, four = (timing.seconds for timing in timings if timing.kind == "shard")
    assert 0 < one < four


def test_processes_are_measured_in_pairs():
    with pytest.raises(UserError, match="even number"):
        measure_together(3)
