"""Properties of costs: no time is negative, a faster device is never slower, work is conserved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pekoe.core.hardware import DEVICES, recognise
from pekoe.plan.costs import LOCAL, Constants, Engine, Training, fitted, publish
from pekoe.plan.rollout import EngineModel, Lengths
from pekoe.plan.shapes import SHAPES, recognise_model
from pekoe.plan.step import Setup, proof_s, step_time
from pekoe.weights.proof import CANARY_TOKENS

devices = st.sampled_from(sorted(DEVICES))
shapes = st.sampled_from(sorted(SHAPES))
batches = st.integers(1, 2048)


@given(shapes, devices, st.sampled_from([1, 2, 4, 8]), batches, st.floats(0, 1e5))
def test_decoding_takes_time_and_bandwidth_never_hurts(shape: str, device: str, tp: int, batch: int, context: float):
    slow = DEVICES[device]
    fast = replace(slow, byte_s=2 * slow.byte_s, flop_s=2 * slow.flop_s, link_byte_s=2 * slow.link_byte_s)
    one, two = (Engine(SHAPES[shape], each, tp, constants=fitted()).decode(batch, context) for each in (slow, fast))
    assert 0 < two <= one


@given(shapes, devices, st.integers(1, 64), st.floats(100, 1e6), st.floats(10, 1e5))
def test_training_takes_longer_than_a_forward(shape: str, device: str, count: int, tokens: float, context: float):
    one = Training(SHAPES[shape], DEVICES[device], count, constants=fitted())
    assert one.step(tokens, context, 1) > one.logprobs(tokens, context, 1) > 0
    assert one.flops(tokens, context) > 0


@given(st.floats(1e6, 1e12), st.sampled_from(["tensors", "buckets", "peers", "disk"]))
def test_more_bytes_take_longer_to_publish(size: float, route: str):
    seconds = [publish(each, 500, route, 8, DEVICES["h100"], fitted()) for each in (size, 2 * size)]  # type: ignore[arg-type]
    assert 0 < seconds[0] < seconds[1]


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60), st.integers(1, 16))
def test_every_response_ends_once_and_longer_ones_never_before_shorter(lengths: list[int], most: int):
    model = EngineModel(Engine(SHAPES["qwen2.5-7b"], DEVICES["h100"], constants=fitted()), most)
    for number, length in enumerate(lengths):
        model.submit(number, 100.0, length, 0.0)
    ends: list[tuple[float, int]] = []
    while not model.idle:
        now, key = model.next_end()
        ends.append((now, key))
    assert sorted(key for _, key in ends) == list(range(len(lengths)))
    assert [now for now, _ in ends] == sorted(now for now, _ in ends)
    if most >= len(lengths):
        assert [lengths[key] for _, key in ends] == sorted(lengths)


@pytest.mark.parametrize("mean", [200, 2000, 7000])
def test_lengths_have_the_mean_that_was_asked_for(mean: int):
    lengths = Lengths.of_mean(mean, 8192)
    drawn = lengths.draw(4096, np.random.default_rng(0))
    assert lengths.mean == pytest.approx(mean, rel=1e-3)
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert drawn.max() <= 8192


def test_lag_never_makes_a_step_longer():
    k = fitted()
    h100, shape = DEVICES["h100"], SHAPES["qwen2.5-7b"]
    setup = Setup(
        Engine(shape, h100, constants=k), 8, Training(shape, h100, 8, constants=k), 64, 8, 100.0,
        Lengths.of_mean(1000, 8192),
    )  # fmt: skip
    steps = [step_time(replace(setup, lag=lag)).step_s for lag in (0, 1, 4)]
    assert steps == sorted(steps, reverse=True)


def test_names_of_devices_and_models():
    found = recognise("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert found.name == "h100"
    assert recognise("x200") is None
    shape = recognise_model("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    assert shape is not None
    assert shape.num_parameters == pytest.approx(7.6e9, rel=0.01)


def test_what_a_publish_is_proven_with_is_counted_where_it_is_measured():
    h100, shape = DEVICES["h100"], SHAPES["qwen2.5-7b"]
    published, local = fitted(), replace(fitted(), **LOCAL)

    def seconds(k: Constants, **changes: Any) -> float:
        two = Training(shape, h100, 2, constants=k)
        lengths = Lengths.of_mean(1000, 8192)
        return proof_s(replace(Setup(Engine(shape, h100, constants=k), 1, two, 64, 8, 100.0, lengths), **changes))

    assert LOCAL["canary"] == CANARY_TOKENS
    assert seconds(published) == 0  # it is in what publishes took
    alone = 8 * Engine(shape, h100, constants=local).decode(1, 104)
    assert alone < seconds(local) < 2 * alone
    assert seconds(local, lag=1) == 0  # nobody waits for it


def test_messages_of_shards_are_counted_for_each_micro_batch():
    shape, k = SHAPES["qwen2.5-7b"], replace(fitted(), shard_layer_s=1e-3, update_layer_s=1e-2)
    plain, two = (Training(shape, DEVICES["h100"], 2, constants=each) for each in (fitted(), k))
    pieces = shape.num_layers + 1
    more = [two.step(1e5, 1000, n, 3) - plain.step(1e5, 1000, n, 3) for n in (4, 8)]
    assert more == pytest.approx([pieces * (3 * n * 1e-3 + 3 * 1e-2) for n in (4, 8)])
    assert two.logprobs(1e5, 1000, 4) - plain.logprobs(1e5, 1000, 4) == pytest.approx(4e-3 * pieces)
    assert sum(two.step_parts(1e5, 1000, 4, 3).values()) == pytest.approx(two.step(1e5, 1000, 4, 3))
    whole = replace(two, sharded=False)
    assert whole.step(1e5, 1000, 4) == replace(whole, constants=fitted()).step(1e5, 1000, 4)


def test_gathering_tensors_is_of_sharded_weights_alone():
    k = replace(fitted(), gather_tensor_s=1e-3)
    one, two = (publish(1e9, 100, "buckets", ranks, DEVICES["h100"], k) for ranks in (1, 2))
    assert two - one == pytest.approx(0.1)
    assert one == publish(1e9, 100, "buckets", 2, DEVICES["h100"], fitted())
