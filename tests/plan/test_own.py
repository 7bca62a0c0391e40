"""A run's own model: it gives back what the run took, and what a change gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pekoe.config.recipes import RLConfig, load_config
from pekoe.core.errors import UserError
from pekoe.core.hardware import DEVICES
from pekoe.plan.own import AFTER, LEAST, calibrated, check_forecast, forecast_sentence, ratio, sentences
from pekoe.plan.recipe import Asked, Own, read_plan
from pekoe.plan.schedule import simulate
from pekoe.plan.step import Pace

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CLUSTER = ("rollout.prompts_per_step=24", "rollout.samples_per_prompt=4", "cluster.generation.engines=4",
           "cluster.training.ranks=4", "rollout.max_new_tokens=8192", "engine.server.during_update=keep")  # fmt: skip
TRUE = Own(DEVICES["h800"], 0.7, 2.5, 3.0, Pace(1.7, 4.0))
MACHINE = {"event": "machine", "time": 1.0, "device": "cuda (NVIDIA H800)", "flop_s": 7e14, "byte_s": 3e12}
NOWHERE = Path("nowhere")


def truth(*keys: str, recipe: str = "boba-7b-cluster.toml", own: Own = TRUE) -> Asked:
    tree = load_config(str(RECIPES / recipe), keys, RLConfig).model_dump(mode="json", exclude_none=True)
    return Asked(tree, mean_response=900.0, mean_prompt=20.0, own=own)


def journal_of(asked: Asked, number: int = 6, first: int = 1) -> list[dict[str, Any]]:
    """Steps as a run journals them that takes what the plan says."""
    plan = read_plan(asked)
    setup, time = plan.setup, simulate(plan.setup).time
    ahead = setup.lag and not setup.colocated
    seconds = {"rollout": time.wait_s if ahead else time.sampling_s, "verify": time.judging_s, "sync": time.publish_s}
    seconds |= {"recompute": time.logprobs_s, "train": time.training_s}
    step = {
        "event": "step", "num_rollouts": setup.responses, "num_prompt_tokens": 20 * setup.responses,
        "response_tokens": float(setup.drawn.mean()), "response_tokens_max": int(setup.drawn.max()),
        "truncation_rate": float((setup.drawn == setup.lengths.maximum).mean()), "seconds": seconds,
        "step_s": time.step_s,
    }  # fmt: skip
    if plan.layout.cluster:
        step |= {"num_engines": setup.num_engines, "idle_ranks": 1 - time.trainer_busy}
        step["idle_engines"] = 1 - time.engines_busy - ahead * time.publish_s / time.step_s
    if setup.lag:
        step |= {"lag_mean": 0.8, "lag_max": 1}
    return [step | {"step": i, "time": 10.0 * i} for i in range(first, first + number)]


def step_of(asked: Asked) -> float:
    return simulate(read_plan(asked).setup).time.step_s


def told_of(asked: Asked) -> tuple[Any, list[dict[str, Any]]]:
    return asked.recipe, [MACHINE, *journal_of(asked)]


@pytest.mark.parametrize("way", [(0, "wait"), (1, "wait"), (2, "go_on")])
def test_a_run_is_given_back_and_what_a_change_gives(way: tuple[int, str]):
    asked = truth(*CLUSTER, f"rollout.max_lag={way[0]}", f"rollout.during_update={way[1]}")
    known = calibrated(*told_of(asked), NOWHERE)
    assert known.own is not None
    assert known.own.sampling == pytest.approx(TRUE.sampling, rel=0.15)
    assert known.own.pace.training == pytest.approx(TRUE.pace.training, rel=0.02)
    assert known.own.pace.publishing == pytest.approx(TRUE.pace.publishing)
    for change in ("cluster.generation.engines=4", "cluster.generation.engines=2", "rollout.max_lag=1"):
        now, then = (step_of(one.changed([change])) for one in (known, asked))
        assert now == pytest.approx(then, rel=0.05)


def test_one_process_takes_turns_whatever_its_lag():
    own = replace(TRUE, device=DEVICES["h100"])
    asked = truth(
        "model.path=Qwen2.5-0.5B", "rollout.max_lag=1", "rollout.max_new_tokens=2048", recipe="laptop.toml", own=own
    )
    tree, events = told_of(asked)
    events[0] = MACHINE | {"device": "cpu (AVX512)", "flop_s": 2e11, "byte_s": 1e10}
    known = calibrated(tree, events, NOWHERE)
    assert step_of(known) == pytest.approx(events[1]["step_s"], rel=0.02)
    assert ratio(tree, events, NOWHERE, ["rollout.max_lag=0"]) == pytest.approx(1)
    assert "runs ahead of training by 0.8 versions" in sentences(tree, events, NOWHERE)[0]


def test_the_sentences_say_who_waits_and_what_would_help():
    said = sentences(*told_of(truth(*CLUSTER)), NOWHERE)
    assert len(said) == 2
    assert said[0].startswith("Sampling (")
    assert "take turns: the engines are idle for" in said[0]
    assert "the last tenth of a step's responses takes" in said[0]
    assert said[1].startswith("The model of pekoe plan, calibrated on the last 5 steps: the one change that gives most")
    ahead = sentences(*told_of(truth(*CLUSTER, "rollout.max_lag=1", "cluster.training.ranks=8")), NOWHERE)
    assert "sampling bounds it. In turns (lag 0) a step would take about" in ahead[0]
    slow = replace(TRUE, pace=Pace(40.0, 4.0))
    behind = sentences(*told_of(truth(*CLUSTER, "rollout.max_lag=1", own=slow)), NOWHERE)
    assert "training bounds it, and a smaller lag might do;" in behind[0]


def test_a_cluster_of_cpus_is_not_told_to_take_gpus():
    cpus = "cluster.generation.gpus_per_engine=0", "cluster.training.gpus_per_rank=0"
    tree, events = told_of(truth(*CLUSTER, *cpus, "rollout.max_lag=2", "rollout.during_update=go_on"))
    events[0] = MACHINE | {"device": "4 x cpu (AVX512)", "flop_s": 4e14, "byte_s": 4e12}
    assert "gpus_per" not in " ".join(sentences(tree, events, NOWHERE))
    assert "cluster.training.ranks=" in " ".join(sentences(tree, events, NOWHERE))


def test_what_cannot_be_calibrated_says_nothing():
    tree, events = told_of(truth(*CLUSTER))
    with pytest.raises(UserError, match=f"expected {LEAST + 1} steps or more"):
        calibrated(tree, events[: LEAST + 1], NOWHERE)
    assert sentences(tree, events[1:], NOWHERE) == [], "no machine"
    assert sentences({}, events, NOWHERE) == [], "no recipe"
    assert sentences(tree | {"model": {"path": "unknown"}}, events, NOWHERE) == []
    assert sentences(tree, [MACHINE, *({**e, "seconds": {"train": 3.0}} for e in events[1:])], NOWHERE) == [], "SFT"


def test_lost_engines_are_foretold():
    asked = truth(*CLUSTER)
    fewer = journal_of(asked.changed(["cluster.generation.engines=2"]), AFTER + 1, 7)
    tree, events = told_of(asked)
    assert check_forecast(tree, events, NOWHERE) is None
    assert check_forecast(tree, [*events, *fewer[:-1]], NOWHERE) is None, "too few steps"
    found = check_forecast(tree, [*events, *fewer], NOWHERE)
    assert found is not None
    assert (found["since"], found["changed"]) == (7, {"engines": [4, 2]})
    assert found["measured_s"] == pytest.approx(fewer[0]["step_s"], abs=1e-3)
    assert found["before_s"] == pytest.approx(events[1]["step_s"], abs=1e-3)
    assert found["predicted_s"] == pytest.approx(found["measured_s"], rel=0.03)
    assert found["predicted_s"] > found["before_s"]
    assert forecast_sentence(found).startswith("Since step 7 (engines 4 → 2) a step takes ")


@pytest.mark.parametrize(
    ("key", "was", "now"),
    [("train.token_budget", 30720, 10240), ("cluster.training.ranks", 4, 8), ("train.compile", False, True)],
)
def test_a_changed_setting_is_foretold(key: str, was: Any, now: Any):
    before = truth(*CLUSTER, f"{key}={str(was).lower()}")
    after = truth(*CLUSTER, f"{key}={str(now).lower()}")
    resumed = {"event": "resumed", "time": 70.0, "step": 6, "changed": {key: [was, now], "num_steps": [6, 20]}}
    events = [MACHINE, *journal_of(before), resumed, *journal_of(after, AFTER + 1, 7)]
    found = check_forecast(_tree(after), events, NOWHERE)
    assert found is not None
    assert found["changed"] == {key: [was, now]}
    assert found["predicted_s"] == pytest.approx(found["measured_s"], rel=0.03)
    nothing = resumed | {"changed": {"num_steps": [6, 20]}}
    assert check_forecast(_tree(after), [*events[:7], nothing, *events[8:]], NOWHERE) is None


def _tree(asked: Asked) -> dict[str, Any]:
    assert not isinstance(asked.recipe, str)
    return dict(asked.recipe)
