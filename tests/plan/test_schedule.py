"""The simulated loop: as the formula without lag, in the order of the real loop with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pekoe.core.hardware import DEVICES
from pekoe.plan.costs import Engine, Training, fitted
from pekoe.plan.rollout import EngineModel, Lengths
from pekoe.plan.schedule import simulate
from pekoe.plan.shapes import SHAPES
from pekoe.plan.step import Setup, step_time, times_beside

K = replace(fitted(), step_overhead=0.0)  # it would hide what engines do
H100, SHAPE = DEVICES["h100"], SHAPES["qwen2.5-7b"]
SETUP = Setup(
    Engine(SHAPE, H100, constants=K), 4, Training(SHAPE, H100, 4, constants=K), 32, 8, 100.0,
    Lengths.of_mean(1000, 8192), judge_s=1.0,
)  # fmt: skip
LONG_TRAINING = replace(SETUP, forwards=30)


@pytest.mark.parametrize("engines", [1, 4, 30])
def test_without_lag_it_is_the_formula(engines: int):
    setup = replace(SETUP, num_engines=engines)
    simulated, formula = simulate(setup).time, step_time(setup)
    assert simulated.step_s == pytest.approx(formula.step_s)
    assert simulated.sampling_s == pytest.approx(formula.sampling_s)
    assert simulated.engines_busy == pytest.approx(formula.engines_busy)


@pytest.mark.parametrize("goes_on", [False, True])
def test_who_takes_turns_is_never_ahead(goes_on: bool):
    setup = replace(SETUP, colocated=True)
    simulated = simulate(replace(setup, lag=2, goes_on=goes_on)).time
    assert simulated == simulate(setup).time
    assert simulated.engines_busy + simulated.trainer_busy <= 1  # of one device


def test_lag_hides_sampling_behind_training():
    beside = sum(times_beside(LONG_TRAINING)) + LONG_TRAINING.judge_s
    for goes_on in (False, True):
        simulated = simulate(replace(LONG_TRAINING, lag=1, goes_on=goes_on)).time
        assert simulated.step_s == pytest.approx(beside)
        assert simulated.wait_s == pytest.approx(0)


def test_waiting_publishes_gain_from_the_first_lag_alone_and_going_on_gains_more():
    """`during_update = "wait"` samples a batch wholly before each publish, however far sampling is ahead."""
    steps = [simulate(replace(SETUP, lag=lag), 8).time.step_s for lag in (0, 1, 2)]
    assert steps[1] < 0.9 * steps[0]
    assert steps[2] == pytest.approx(steps[1], rel=0.05)
    going_on = [simulate(replace(SETUP, lag=lag, goes_on=True), 8).time.step_s for lag in (1, 2, 4)]
    assert going_on == sorted(going_on, reverse=True)
    assert going_on[0] < steps[1]


def test_a_window_waits_less_for_the_longest():
    setup = replace(SETUP, lag=2, goes_on=True)
    assert simulate(replace(setup, window=32), 6).time.step_s < simulate(setup, 6).time.step_s


def test_work_is_conserved():
    """Engines cannot be quicker than busy all the time: the same tokens take the same time, whoever waits for whom."""
    busy = [(t := simulate(replace(SETUP, lag=lag), 8).time).engines_busy * t.step_s for lag in (0, 1)]
    assert busy[1] == pytest.approx(busy[0], rel=0.05)


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), st.lists(st.floats(0, 5), max_size=8))
def test_time_that_passes_in_pieces_changes_no_end(lengths: list[int], cuts: list[float]):
    def ends(cuts: list[float]) -> list[float]:
        model = EngineModel(Engine(SHAPE, H100, constants=K), 8)
        for length in lengths:
            model.submit(None, 100.0, length, 0.01)
        found = list[float]()
        for cut in [*sorted(cuts), np.inf]:
            while not model.idle and model.peek() <= cut:
                found.append(model.next_end()[0])
            if cut < np.inf:
                model.run_until(cut)
        return found

    whole = ends([])
    assert len(whole) == len(lengths)
    kept = [cut for cut in cuts if cut < whole[-1]]  # later, it would be idle
    assert ends(kept) == pytest.approx(whole, rel=1e-6)
