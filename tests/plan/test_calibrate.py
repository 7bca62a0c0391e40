"""Profiles: constants are found again from times that they made, and what is written is what a plan reads."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from pekoe.core.hardware import Device, Timing
from pekoe.core.spec import ModelSpec
from pekoe.plan.calibrate import FITTED, calibrate, predicted, write_profile
from pekoe.plan.costs import LOCAL, fitted
from pekoe.plan.recipe import read_device

HERE = Device("here", 16e9, 20e9, 3e11, 0, 0, 5e9, 5e9, 1, "a test")
TRUE = replace(fitted(), **LOCAL, layer_s=3e-4, step_s=2e-3, sequence_s=4e-5, decode_flops=0.2, train_flops=0.15,
               train_layer_s=2e-3, batch_s=5e-3, weight_share=0.4, kv_share=0.1, prefill_flops=0.2,
               train_recompute=2.5, shard_layer_s=4e-3, update_layer_s=1e-3, train_link=0.2, gather_tensor_s=2e-3,
               overlap=0.0)  # fmt: skip
TWO = ("shard", "gather")  # what two processes measure together
SPECS = [ModelSpec("qwen2", 512, w, n, w // 32, w // 64, 32, 3 * w, 512) for n, w in ((2, 128), (6, 128), (4, 384))]


def timings(size: float = 4.0) -> list[Timing]:
    asked = [
        Timing("sample", spec, n, 32, 32, 1.0, tuple(1 + 7 * i % 64 for i in range(n)))
        for spec in SPECS
        for n in (8, 64, 256)
    ]
    for kind in ("train", "recompute"):
        asked += [Timing(kind, spec, n, 32, 32, 1.0) for spec in SPECS for n in (32, 128)]
    asked += [Timing("shard", spec, 32 * n, 32, 32, 1.0, micro_batches=n) for spec in SPECS for n in (1, 4)]
    asked += [Timing("gather", spec, 0, 0, 0, 1.0) for spec in SPECS]
    return [replace(timing, seconds=predicted(timing, HERE, TRUE, size)) for timing in asked]


@pytest.mark.parametrize("size", [4.0, 2.0])
def test_what_was_timed_is_predicted(size: float):
    constants, error = calibrate(HERE, timings(size), size)
    assert error < 0.03
    other = ModelSpec("qwen2", 512, 256, 4, 8, 4, 32, 768, 512)  # that was not measured
    ways = [Timing(kind, other, 64, 32, 32, 0) for kind in ("train", "recompute")]
    for timing in (*ways, Timing("sample", other, 128, 32, 32, 0), Timing("shard", other, 96, 32, 32, 0)):
        assert predicted(timing, HERE, constants, size) == pytest.approx(predicted(timing, HERE, TRUE, size), rel=0.15)


def test_responses_of_different_lengths_leave_room():
    spec = SPECS[0]
    same, spread = (
        Timing("sample", spec, 64, 32, 32, 1.0, lengths) for lengths in ((32,) * 64, (16,) * 32 + (48,) * 32)
    )
    even = predicted(same, HERE, TRUE, 4.0)
    assert even == pytest.approx(predicted(replace(same, lengths=()), HERE, TRUE, 4.0))
    assert predicted(spread, HERE, TRUE, 4.0) > even  # as many tokens, in more steps


def test_one_process_measures_nothing_that_two_share():
    alone = [timing for timing in timings() if timing.kind not in TWO]
    constants, _ = calibrate(HERE, alone, 4.0)
    assert constants.train_recompute == pytest.approx(2.5, rel=0.1)
    assert (constants.shard_layer_s, constants.gather_tensor_s) == (0, 0)
    assert constants.overlap == fitted().overlap


def test_a_profile_is_a_device_of_a_plan(tmp_path: Path):
    sentence = write_profile(tmp_path / "here.toml", HERE, timings(), 4.0)
    assert "30 measurements" in sentence
    assert "a test" in sentence  # where links are from
    own = tomllib.loads((tmp_path / "here.toml").read_text())
    names = {name for fitted_names in FITTED.values() for name in fitted_names}
    assert set(own["constants"]) == {*names, *LOCAL, "overlap"}  # nothing that was not measured
    device, constants, measured = read_device(str(tmp_path / "here.toml"))
    assert measured
    assert (device.name, device.byte_s, device.flop_s) == ("here", 20e9, 3e11)
    assert constants.layer_s == pytest.approx(calibrate(HERE, timings(), 4.0)[0].layer_s, rel=1e-3)
