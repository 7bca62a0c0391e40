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
               train_layer_s=2e-3, batch_s=5e-3, weight_share=0.4, kv_share=0.1, prefill_flops=0.2)  # fmt: skip
SPECS = [ModelSpec("qwen2", 512, w, n, w // 32, w // 64, 32, 3 * w, 512) for n, w in ((2, 128), (6, 128), (4, 384))]


def timings(size: float = 4.0) -> list[Timing]:
    asked = [Timing("sample", spec, n, 32, 32, 1.0) for spec in SPECS for n in (8, 64, 256)]
    asked += [Timing("train", spec, n, 32, 32, 1.0) for spec in SPECS for n in (32, 128)]
    return [replace(timing, seconds=predicted(timing, HERE, TRUE, size)) for timing in asked]


@pytest.mark.parametrize("size", [4.0, 2.0])
def test_what_was_timed_is_predicted(size: float):
    constants, error = calibrate(HERE, timings(size), size)
    assert error < 0.03
    other = ModelSpec("qwen2", 512, 256, 4, 8, 4, 32, 768, 512)  # that was not measured
    for timing in (Timing("sample", other, 128, 32, 32, 0), Timing("train", other, 64, 32, 32, 0)):
        assert predicted(timing, HERE, constants, size) == pytest.approx(predicted(timing, HERE, TRUE, size), rel=0.15)


def test_a_profile_is_a_device_of_a_plan(tmp_path: Path):
    sentence = write_profile(tmp_path / "here.toml", HERE, timings(), 4.0)
    assert "15 measurements" in sentence
    assert "a test" in sentence  # where links are from
    own = tomllib.loads((tmp_path / "here.toml").read_text())
    assert set(own["constants"]) == {*FITTED["sample"], *FITTED["train"], *LOCAL}  # nothing that was not measured
    device, constants, measured = read_device(str(tmp_path / "here.toml"))
    assert measured
    assert (device.name, device.byte_s, device.flop_s) == ("here", 20e9, 3e11)
    assert constants.layer_s == pytest.approx(calibrate(HERE, timings(), 4.0)[0].layer_s, rel=1e-3)
