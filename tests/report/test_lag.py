"""What another lag would give, from a run's own measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pekoe.report.findings import findings
from pekoe.report.history import History, read_history
from pekoe.report.lag import gain, overlap, step_s, versions_served
from pekoe.report.page import render
from tests.report.conftest import response, step_event, write_run
from tests.report.test_page import data_of

LAG = {"lag_mean": 0.8, "lag_max": 2, "lag_tokens": {"0": 2, "1": 8, "2": 1}, "sync_canary_diff": 3e-6}


def history_of(*steps: dict[str, Any], **config: Any) -> History:
    return History(Path("run"), config, [step_event(i, **step) for i, step in enumerate(steps, 1)], {})


def seconds(**phases: float) -> dict[str, Any]:
    return {"seconds": phases, "step_s": sum(phases.values())}


@pytest.mark.parametrize("times", [(6.0, 3.0, 1.0), (3.0, 6.0, 1.0), (4.0, 4.0, 0.0)])
def test_with_equal_steps_a_lag_gives_the_larger_of_both_and_the_sync(times: tuple[float, float, float]):
    assert step_s([times] * 5, 0) == sum(times)
    assert step_s([times] * 5, 1) == step_s([times] * 5, 2) == max(times[:2]) + times[2]


def test_a_larger_lag_evens_out_unequal_steps():
    times = [(9.0, 4.0, 0.0), (1.0, 4.0, 0.0)] * 4
    assert step_s(times, 0) == 9.0
    assert step_s(times, 1) > step_s(times, 2) == 5.0


def test_training_waits_for_a_sample_of_the_version_it_may_have():
    """A step whose sampling is long delays its own training, and nothing before it."""
    assert step_s([(1.0, 1.0, 0.0)] * 3 + [(10.0, 1.0, 0.0)], 1) == (1 + 1 + 1 + 10) / 4


def test_devices_of_their_own_are_no_condition_where_they_have_them():
    steps = seconds(rollout=4.0, verify=1.0, recompute=1.0, train=4.0, sync=0.0)
    alone = overlap(history_of(steps))
    assert alone.startswith("Sampling (5 s a step) and training (5 s) take turns: the engines are idle for 50%")
    assert "with rollout.max_lag = 1 it would take about 5 s (2.00 times as fast)" in alone
    assert alone.endswith(", if they did not share cores or a GPU as they do here.")
    assert overlap(history_of(steps, cluster={})).endswith("with 2 about 5 s (2.00).")
    assert overlap(history_of(steps, engine={"backend": "vllm"})).endswith("with 2 about 5 s (2.00).")


def test_nothing_is_proposed_that_is_refused():
    assert overlap(history_of({}, cluster={"colocate": True})) == ""
    assert overlap(history_of(seconds(train=3.0))) == "", "SFT"


def test_a_run_with_lag_says_who_waits_and_what_turns_would_take():
    waits = overlap(history_of(seconds(rollout=4.0, train=5.0, sync=1.0) | LAG | {"idle_engines": 0.1}, cluster={}))
    assert waits == (
        "Sampling runs ahead of training by 0.8 versions on average, 2 at most. A step takes 10 s, of which training "
        "waits 4 s for samples: sampling bounds it. In turns (lag 0) the same work would take about 14 s (1.40 times "
        "as long), and more where the longest responses would hold up the others."
    )
    unmeasured = overlap(history_of(seconds(rollout=4.0, train=5.0, sync=1.0) | LAG))
    assert unmeasured.endswith("training waits 4 s for samples: sampling bounds it.")
    trains = overlap(history_of(seconds(rollout=0.1, train=8.9, sync=1.0) | LAG))
    assert trains.endswith("training waits 0.1 s for samples: training bounds it, and a smaller lag might do.")


def test_the_page_of_a_run_with_lag_shows_it_by_step(tmp_path: Path):
    steps = [step_event(i, **LAG | {"lag_mean": i / 2, "lag_max": i}) for i in (1, 2)]
    history = read_history(write_run(tmp_path / "run", steps, {"000001": [response(0, 0)]}))
    page = render([history])
    found = {chart["layout"]["title"]["text"]: chart["data"][0]["y"] for chart in data_of(page)["charts"]}
    assert found["age of the weights that sampled, mean"] == [0.5, 1.0]
    assert found["age of the weights that sampled, oldest token"] == [1, 2]
    assert "Sampling runs ahead of training by 0.75 versions on average, 2 at most." in page
    assert findings(history)[-1] == "Of a test prompt, log-probs of engines and trainer differ by at most 3.0e-06."
    for step, largest in zip(history.steps, ({"0": 1e-6}, {"0": 2e-6, "1": 0.25}), strict=True):
        step["lag_logprob_diff_max"] = largest
    assert findings(history)[-1].endswith(
        "3.0e-06. Of samples, sampling and training log-probs differ by at most 2.0e-06 at lag 0, 2.5e-01 at lag 1."
    )
    synchronous = read_history(write_run(tmp_path / "other", [step_event(1)], {"000001": [response(0, 0)]}))
    titles = [chart["layout"]["title"]["text"] for chart in data_of(render([synchronous]))["charts"]]
    assert not any(title.startswith("age") for title in titles)


SYNC = {"event": "sync", "time": 1000.0, "step": 0, "sync_version": 0}


def served(*events: dict[str, Any]) -> list[tuple[int, float, float]]:
    return versions_served(History(Path("run"), {}, [*events], {}))


def test_a_version_is_served_from_its_publish_to_the_next():
    steps = [step_event(i, sync_version=i) for i in (1, 2)]
    evaluation = {"event": "eval", "time": 1025.0, "step": 2}
    assert served(SYNC, *steps, evaluation) == [(0, 1000.0, 1010.0), (1, 1010.0, 1020.0), (2, 1020.0, 1025.0)]
    assert served(step_event(1)) == [], "SFT, which publishes nothing"


def test_a_publish_that_nobody_waited_for_ends_when_it_was_proven():
    """The step's event has the report of the publish before: version 1 was proven 4 s after step 1."""
    steps = [step_event(1, sync_version=0), step_event(2, sync_version=1, sync_time=1014.0)]
    last = {"event": "sync", "time": 1023.0, "step": 2, "sync_version": 2, "sync_time": 1022.5}
    assert served(SYNC, *steps, last) == [(0, 1000.0, 1014.0), (1, 1014.0, 1022.5), (2, 1022.5, 1023.0)]


def test_nothing_is_served_while_a_run_stands_still():
    resumed = {"event": "resumed", "time": 5000.0, "step": 1}
    again = {"event": "sync", "time": 5003.0, "step": 1, "sync_version": 1}
    steps = [step_event(1, sync_version=1), {"event": "checkpoint", "time": 1011.0, "step": 1}]
    later = [step_event(2, time=5010.0, sync_version=1), step_event(3, time=5020.0, sync_version=2, sync_time=5012.0)]
    assert served(SYNC, *steps, resumed, again, *later) == [
        (0, 1000.0, 1010.0),
        (1, 1010.0, 1011.0),
        (1, 5003.0, 5012.0),
        (2, 5012.0, 5020.0),
    ]


def run_of(name: str, times: list[tuple[float, float, float]], max_lag: int, **config: Any) -> History:
    """A run whose steps took these seconds of rollout, training and sync."""
    steps = [seconds(rollout=a, train=b, sync=c) for a, b, c in times]
    history = history_of(*steps, **{"rollout": {"max_lag": max_lag}, **config})
    return History(Path(name), history.config, history.events, {})


TURNS = [(90.0, 3.0, 1.0), *[(6.0, 3.0, 1.0)] * 5, (0.5, 3.0, 1.0)]  # the first and the last step are of no account
AHEAD = [(9.0, 3.0, 1.0), *[(4.0, 3.0, 1.0)] * 2, (40.0, 3.0, 1.0), (9.0, 3.0, 1.0)]  # one long step neither
APART: dict[str, Any] = {"engine": {"backend": "vllm"}}
MEASURED = "rollout.max_lag 0 → 1 gave 1.25x steps per second (10 s a step in turns, 8 s in ahead"
GAVE = f"{MEASURED}; predicted from turns: 1.43x)."


def test_what_a_lag_gave_stands_beside_what_was_predicted():
    turns, ahead = run_of("turns", TURNS, 0, **APART), run_of("ahead", AHEAD, 1, **APART)
    assert gain(turns, ahead) == gain(ahead, turns) == GAVE
    assert gain(turns, turns) == "", "no change"
    assert step_s([(6.0, 3.0, 1.0)] * 5, 0) / step_s([(6.0, 3.0, 1.0)] * 5, 1) == pytest.approx(1.43, abs=0.002)
    one_process = gain(run_of("turns", TURNS, 0), run_of("ahead", AHEAD, 1))
    assert one_process.endswith("1.43x, if sampling and training did not share cores or a GPU as they do here).")


def test_between_two_lags_nothing_is_predicted():
    """A run that samples ahead says how long training waits for samples, not how long sampling takes."""
    one = run_of("pinned", AHEAD, 1)
    two = run_of("ahead", [(2.0, 3.0, 1.0)] * 4, 2, rollout={"max_lag": 2, "during_update": "go_on"})
    assert gain(one, two) == (
        "rollout.max_lag 1 → 2, rollout.during_update wait → go_on gave 1.33x steps per second (8 s a step in "
        "pinned, 6 s in ahead)."
    )


@pytest.mark.parametrize(
    ("config", "compared"),
    [
        ({"run": {"dir": "b", "seed": 2}, "num_steps": 9, "eval": {"every": 5}, "track": {"wandb": "p"}}, True),
        ({"algo": {"proximal": "recompute", "correction": "truncate", "minibatches": 4}}, True),
        ({"algo": {"minibatches": 2}}, False),
        ({"run": {"dir": "b", "threads": 2}}, False),
        ({"rollout": {"max_lag": 1, "prompts_per_step": 8}}, False),
        ({"engine": {"backend": "sglang"}}, False),
    ],
)
def test_only_runs_that_differ_in_the_schedule_are_compared(config: dict[str, Any], compared: bool):
    turns = run_of("turns", TURNS, 0, **APART, run={"dir": "a"}, algo={"minibatches": 4})
    other = run_of("ahead", AHEAD, 1, **{**APART, "run": {"dir": "b"}, "algo": {"minibatches": 4}, **config})
    assert bool(gain(turns, other)) is compared


def test_runs_of_two_machines_or_too_short_ones_are_not_compared():
    turns, ahead = run_of("turns", TURNS, 0), run_of("ahead", AHEAD, 1)
    assert gain(turns, run_of("ahead", AHEAD[:2], 1)) == ""
    assert gain(turns, run_of("ahead", [], 1)) == ""
    ahead.events.insert(0, {"event": "machine", "time": 1.0, "device": "NVIDIA H100", "cores": 16})
    assert gain(turns, ahead) == ""
    turns.events.insert(0, {"event": "machine", "time": 1.0, "device": "NVIDIA H100", "cores": 16, "host": "b"})
    assert gain(turns, ahead)


def test_the_page_of_two_runs_says_what_the_lag_gave():
    turns, ahead = run_of("turns", TURNS, 0, **APART), run_of("ahead", AHEAD, 1, **APART)
    page = render([turns, ahead])
    assert page.count(GAVE) == 1
    assert page.index("<h2>ahead</h2>") < page.index(GAVE), "with the run that it is about"
