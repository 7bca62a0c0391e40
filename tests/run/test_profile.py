"""The measurements behind `pekoe doctor --measure`, of the smallest sizes."""

from __future__ import annotations

import torch

from pekoe.run.profile import _links, measure_machine


def test_what_is_measured():
    machine, timings, size = measure_machine(shapes=((1, 64),), sequences=(8,), tokens=(128,))
    assert machine.flop_s > machine.byte_s > 1e6
    assert size == (2 if torch.cuda.is_available() else 4)  # bytes of bfloat16, of float32
    assert machine.memory_bytes > 1e8
    assert [(timing.kind, timing.sequences) for timing in timings] == [("sample", 8), ("train", 2)]
    assert all(timing.seconds > 0 for timing in timings)


def test_links_are_said_not_to_be_measured():
    assert _links("NVIDIA H100 80GB HBM3", 3e12) == (450e9, 50e9, "published: those of h100")
    assert _links("another", 3e12)[2].startswith("assumed")
    assert _links(None, 20e9)[2].startswith("assumed")
