"""What holds of any plan: no time is negative, more of anything is never slower, work is conserved."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pekoe.core.hardware import DEVICES, Device
from pekoe.plan.costs import Engine, Training, fitted, publish
from pekoe.plan.rollout import Lengths
from pekoe.plan.schedule import simulate
from pekoe.plan.shapes import SHAPES
from pekoe.plan.step import Setup

K = fitted()
DENSE = [shape for shape in SHAPES.values() if not shape.num_experts and shape.num_parameters < 4e10]
RATES = ("byte_s", "flop_s", "link_byte_s", "network_byte_s")


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    shape, device = draw(st.sampled_from(DENSE)), draw(st.sampled_from([*DEVICES.values()]))
    tp = next(n for n in (1, 2, 4, 8, 16) if Engine(shape, device, n).kv_tokens() > 20_000)
    lag = draw(st.integers(0, 2))
    return Setup(
        Engine(shape, device, tp, constants=K), draw(st.integers(1, 6)),
        Training(shape, device, draw(st.integers(1, 16)), recompute=draw(st.sampled_from([0.0, 1.0])), constants=K),
        draw(st.integers(1, 12)), draw(st.integers(1, 6)), draw(st.floats(1, 500)),
        Lengths.of_mean(draw(st.floats(50, 2000)), 4096), draw(st.integers(1, 4)), judge_s=draw(st.floats(0, 5)),
        lag=lag, goes_on=draw(st.booleans()) and lag > 0, seed=draw(st.integers(0, 9)),
    )  # fmt: skip


def on(setup: Setup, device: Device) -> Setup:
    engine, training = replace(setup.engine, device=device), replace(setup.training, device=device)
    return replace(setup, engine=engine, training=training)


@settings(deadline=None, max_examples=40)
@given(setups())
def test_no_time_is_negative_and_nobody_works_more_than_always(setup: Setup):
    simulated = simulate(setup)
    time = simulated.time
    parts = (time.sampling_s, time.judging_s, time.logprobs_s, time.training_s, time.publish_s, time.overhead_s)
    assert min(*parts, time.wait_s, simulated.last_tenth_s) >= 0
    assert time.step_s > 0
    assert 0 <= time.engines_busy <= 1
    assert 0 <= time.trainer_busy <= 1
    assert 0 < simulated.running <= min(setup.most, (setup.lag + 1) * setup.responses)


@settings(deadline=None, max_examples=40)
@given(setups(), st.sampled_from(RATES), st.floats(1, 8))
def test_more_bandwidth_or_arithmetic_is_never_slower(setup: Setup, rate: str, factor: float):
    """Lag 0: with lag, who gets which group depends on when, and a faster engine may get the longer ones."""
    setup, device = replace(setup, lag=0, goes_on=False), setup.engine.device
    faster = replace(device, **{rate: getattr(device, rate) * factor})
    assert simulate(on(setup, faster)).time.step_s <= simulate(setup).time.step_s * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(setups())
def test_work_is_conserved(setup: Setup):
    """Each response that is trained on was decoded once: where a decoding step takes always the same, sequences that
    run, times how long, are as many steps as there are tokens."""
    always = replace(
        K, kv_share=1e12, decode_flops=1e12, prefill_flops=1e12, link_share=1e12, sequence_s=0, prefill_s=0
    )
    engine = replace(setup.engine, constants=always)
    setup = replace(setup, engine=engine, lag=0, goes_on=False)
    simulated, step = simulate(setup, 1), engine.decode(1, 0.0) / K.rollout_share
    assert simulated.time.sampling_s >= setup.drawn.max() * step * (1 - 1e-6)  # the longest response alone
    decoded = simulated.running * simulated.time.engines_busy * setup.num_engines * simulated.time.step_s
    assert decoded == pytest.approx(setup.drawn.sum() * step, rel=1e-6)


@given(st.floats(1e6, 1e12), st.floats(1, 1e4), st.sampled_from(["tensors", "buckets", "disk"]), st.floats(1, 4))
def test_more_bytes_are_never_published_sooner(size: float, tensors: float, route: str, factor: float):
    h100 = DEVICES["h100"]
    less, more = (publish(n, tensors, route, 8, h100, K) for n in (size, size * factor))  # type: ignore[arg-type]
    assert 0 < less <= more
