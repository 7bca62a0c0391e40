"""What another lag gave, which version served when, and what was predicted beside what came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pekoe.report import lag
from pekoe.report.findings import findings
from pekoe.report.history import History, read_history
from pekoe.report.lag import gain, versions_served
from pekoe.report.page import render
from tests.report.conftest import response, step_event, write_run
from tests.report.test_page import data_of

LAG = {"lag_mean": 0.8, "lag_max": 2, "lag_tokens": {"0": 2, "1": 8, "2": 1}, "sync_canary_diff": 3e-6}


def history_of(*steps: dict[str, Any], **config: Any) -> History:
    return History(Path("run"), config, [step_event(i, **step) for i, step in enumerate(steps, 1)], {})


def seconds(**phases: float) -> dict[str, Any]:
    return {"seconds": phases, "step_s": sum(phases.values())}


def test_the_page_of_a_run_with_lag_shows_it_by_step(tmp_path: Path):
    steps = [step_event(i, **LAG | {"lag_mean": i / 2, "lag_max": i}) for i in (1, 2)]
    history = read_history(write_run(tmp_path / "run", steps, {"000001": [response(0, 0)]}))
    page = render([history])
    found = {chart["layout"]["title"]["text"]: chart["data"][0]["y"] for chart in data_of(page)["charts"]}
    assert found["age of the weights that sampled, mean"] == [0.5, 1.0]
    assert found["age of the weights that sampled, oldest token"] == [1, 2]
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


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/plan/test_own.py has what it says of runs that can be planned."""
    monkeypatch.setattr(lag.own, "ratio", lambda *_: 1.43)


@pytest.mark.usefixtures("model")
def test_what_a_lag_gave_stands_beside_what_was_predicted():
    turns, ahead = run_of("turns", TURNS, 0, **APART), run_of("ahead", AHEAD, 1, **APART)
    assert gain(turns, ahead) == gain(ahead, turns) == GAVE
    assert gain(turns, turns) == "", "no change"


def test_where_no_model_can_be_made_nothing_is_predicted():
    assert gain(run_of("turns", TURNS, 0), run_of("ahead", AHEAD, 1)) == f"{MEASURED})."


@pytest.mark.usefixtures("model")
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


@pytest.mark.usefixtures("model")
def test_the_page_of_two_runs_says_what_the_lag_gave():
    turns, ahead = run_of("turns", TURNS, 0, **APART), run_of("ahead", AHEAD, 1, **APART)
    page = render([turns, ahead])
    assert page.count(GAVE) == 1
    assert page.index("<h2>ahead</h2>") < page.index(GAVE), "with the run that it is about"
