"""The proof tells the version before from this one where that can be told, and never accuses an engine that moved."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pekoe.weights.proof import Canary, History, kept_weights

Floats = NDArray[np.float64]


def canary(engine: Floats, trainer: Floats, num_sequences: int = 8, other: int = 0) -> Canary:
    """`other`: how many of its first tokens no other canary has."""
    keys = [bytes([i, i < other, num_sequences if i < other else 0]) for i in range(len(engine))]
    gap = engine - trainer
    pairs = zip(engine.tolist(), trainer.tolist(), strict=True)
    return Canary(
        dict(zip(keys, pairs, strict=True)), float(np.abs(gap).max()), float(np.sqrt((gap**2).mean())), num_sequences
    )


def draw(seed: int, step: float, engine_noise: float, trainer_noise: float, stays: bool, busy: float = 0.0):
    """A canary before and after a step that moves each of 64 log-probs by about `step`. `busy`: the size of rounding
    that differs at an engine with other requests beside the canary."""
    rng = np.random.default_rng(seed)
    noise = lambda size: size * rng.standard_normal(64)  # noqa: E731
    old = -rng.exponential(1.0, 64)
    new = old + noise(step)
    first = canary(old + noise(engine_noise), old + noise(trainer_noise))
    before = np.array(list(first.logprobs.values()))[:, 0]
    engine = before + noise(busy) if stays else new + noise(engine_noise)
    return first, canary(engine, new + noise(trainer_noise))


@pytest.mark.parametrize("noises", [(0.02, 0.0), (0.0, 0.02), (0.014, 0.014)])
@pytest.mark.parametrize("step", [0.0, 1e-3, 1e-2, 3e-2, 6e-2, 0.1, 0.3])
def test_an_engine_that_moved_is_never_accused(noises: tuple[float, float], step: float):
    for seed in range(200):
        if noises[0] or step:  # else the engine has no reason to move
            assert not kept_weights(*draw(seed, step, *noises, stays=False))


@pytest.mark.parametrize("step", [0.0, 1e-3, 1e-2, 0.1])
def test_an_idle_engine_that_stays_is_found_by_its_bits(step: float):
    for seed in range(50):
        assert kept_weights(*draw(seed, step, 0.014, 0.014, stays=True)) is True


def test_a_busy_engine_that_stays_is_found_where_the_trainer_moved_enough():
    for seed in range(200):
        assert kept_weights(*draw(seed, 0.15, 0.014, 0.014, stays=True, busy=0.014)) is True
        assert kept_weights(*draw(seed, 0.15, 0.014, 0.014, stays=False)) is False
        assert kept_weights(*draw(seed, 0.005, 0.014, 0.014, stays=True, busy=0.014)) is None


def test_a_trainer_that_did_not_move_accuses_nobody():
    first, _ = draw(0, 0.1, 0.014, 0.014, stays=True)
    assert kept_weights(first, first) is None


def test_another_batch_of_the_trainers_is_no_movement():
    """Weights are the same after a step without an update, and the trainer rounds otherwise with other sequences."""
    first, second = draw(0, 0.0, 0.014, 0.014, stays=True)
    other = Canary(second.logprobs, second.difference, second.noise, num_sequences=16)
    assert kept_weights(first, second) is True
    assert kept_weights(first, other) is None


def test_few_tokens_in_common_tell_nothing():
    first, second = draw(0, 0.3, 0.014, 0.014, stays=True)
    few = Canary(dict(list(second.logprobs.items())[:3]), second.difference, second.noise, 8)
    assert kept_weights(first, few) is None


def test_small_steps_add_up():
    """Of a busy engine one step tells nothing, thirty do."""
    rng = np.random.default_rng(0)
    noise = lambda: 0.014 * rng.standard_normal(64)  # noqa: E731
    for stays in (False, True):
        history, truth = History(), -rng.exponential(1.0, 64)
        start, found = truth, list[bool]()
        for _ in range(60):
            found.append(history.stayed(canary((start if stays else truth) + noise(), truth + noise())))
            truth = truth + 0.015 * rng.standard_normal(64)
        assert not any(found[:5])
        assert any(found) == stays
