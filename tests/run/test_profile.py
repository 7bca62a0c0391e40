"""The measurements behind `pekoe doctor --measure`, of the smallest sizes."""

from __future__ import annotations

from pekoe.run.profile import measure_machine


def test_what_is_measured():
    machine, timings = measure_machine(shapes=((1, 64),), sequences=(8,), tokens=(128,))
    assert machine.flop_s > machine.byte_s > 1e6
    assert machine.memory_bytes > 1e8
    assert [(timing.kind, timing.sequences) for timing in timings] == [("sample", 8), ("train", 2)]
    assert all(timing.seconds > 0 for timing in timings)
