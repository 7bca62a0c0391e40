"""`pekoe plan`: layouts, what fits, figures with their sources, mistakes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pekoe.core.errors import UserError
from pekoe.core.records import write_records
from pekoe.core.types import Record
from pekoe.plan.command import run_plan
from pekoe.plan.costs import NAMES, Engine, Training, fitted
from pekoe.plan.forecast import FIGURES, errors, forecast, interval, rank_memory
from pekoe.plan.recipe import Asked, Plan, read_device, read_plan
from pekoe.plan.search import best_layouts, front
from pekoe.plan.step import times_beside

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
OWN = """
name = "mine"
memory_gb = 8
memory_gb_s = 12
tflop_s = 0.05
link_gb_s = 5
network_gb_s = 1
[constants]
step_overhead = 0.1
"""


def plan_of(recipe: str, *overrides: str, hardware: str = "h800", gpus: int | None = None) -> Plan:
    return read_plan(asked(recipe, *overrides, hardware=hardware, gpus=gpus))


def asked(recipe: str, *overrides: str, **options: Any) -> Asked:
    return Asked(str(RECIPES / recipe), overrides, **({"hardware": "h800"} | options))


def printed(capsys: pytest.CaptureFixture[str], question: Asked, **options: Any) -> str:
    run_plan(Console(width=200), question, **options)
    return capsys.readouterr().out


def test_a_recipe_on_its_own_gpus(capsys: pytest.CaptureFixture[str]):
    out = printed(capsys, asked("boba-7b-cluster.toml", price=2.5), explained=True)
    assert "on 128 x h800: 64 engines, 64 training ranks" in out
    for word in ("KV cache", "Adam's moments", "sampling", "publishing", "GPU-hours", "price", "lag 0", "lag 1"):
        assert word in out
    assert "the shape is qwen2.5-7b's, by its name" in out
    assert f"within {errors()['step'].median:.0%}" in out
    assert "memory 1" not in out  # whose errors are of another formula
    assert "train_flops" in out


def test_json_has_the_same_figures(capsys: pytest.CaptureFixture[str]):
    found = json.loads(printed(capsys, asked("boba-7b-cluster.toml", price=2.0), as_json=True))
    first = found["steps"][0]
    assert first["price"] == pytest.approx(2 * first["gpu_hours"])
    assert first["gpu_hours"] == pytest.approx(128 * 250 * first["step_s"] / 3600)
    stages = first["stages"]
    assert first["step_s"] == pytest.approx(sum(stages.values()))
    assert first["tokens_s_gpu"] * 128 == pytest.approx(first["tokens_s"])


@pytest.mark.parametrize(("gpus", "engines", "ranks"), [(128, 64, 64), (16, 8, 8), (3, 1, 2)])
def test_layouts_keep_the_recipes_proportion(gpus: int, engines: int, ranks: int):
    layout = plan_of("boba-7b-cluster.toml", gpus=gpus).layout
    assert (layout.engines, layout.ranks, layout.gpus) == (engines, ranks, gpus)


def test_the_keys_that_are_printed_are_a_recipe():
    plan = plan_of("boba-32b.toml", gpus=64)
    assert plan.setup.engine.tp == 2
    again = plan_of("boba-32b.toml", *plan.changes)
    assert again.layout == plan.layout
    assert not again.changes


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]):
    large = "train.token_budget=131072"
    with pytest.raises(UserError, match=r"memory of a training rank: expected .* nearest: .*train.token_budget="):
        printed(capsys, asked("boba-32b.toml", large, gpus=64))
    assert "together, of what there is" in capsys.readouterr().out
    plan = plan_of("boba-32b.toml", large, gpus=64)
    changed = plan_of("boba-32b.toml", large, *plan.changes, *forecast(asked("boba-32b.toml", large, gpus=64)).changes)
    assert rank_memory(changed).fits


@pytest.mark.parametrize(
    ("recipe", "overrides", "options"),
    [
        ("boba-7b.toml", (), {}),
        ("boba-7b-cluster.toml", (), {"gpus": 2}),
        ("boba-7b-cluster.toml", ("cluster.training.ranks=8", "cluster.training.replicas=8"), {}),
        ("boba-7b-cluster.toml", ("cluster.colocate=true",), {"hardware": "rtx-4090"}),
        ("boba-7b-cluster.toml", ("model.path=Qwen2.5-32B",), {}),
        ("boba-32b.toml", (), {}),
        ("boba-32b.toml", ("train.token_budget=131072",), {"gpus": 64}),
        ("laptop.toml", ("model.path=Qwen2.5-7B",), {"hardware": "a6000"}),
    ],
)
def test_the_nearest_change_is_a_recipe_that_fits(recipe: str, overrides: tuple[str, ...], options: dict[str, Any]):
    question = asked(recipe, *overrides, **({"hardware": "h100"} | options))
    with pytest.raises(UserError, match="nearest: ") as mistake:
        run_plan(Console(width=200), question)
    changes, without, _ = str(mistake.value).partition("nearest: ")[2].partition(" without --gpus")
    if without:
        question = replace(question, gpus=None)
    assert forecast(question.changed(changes.split()), alone=True).fits


def test_copies_of_the_weights_are_counted_as_doctor_counts_them():
    lagging = "rollout.max_lag=1", "engine.server.during_update=keep"
    plans = (plan_of("boba-7b.toml", *lagging), plan_of("laptop.toml", "model.path=Qwen2.5-0.5B", lagging[0]))
    for plan, copies in zip(plans, (1, 2), strict=True):
        held = copies * 4 * plan.setup.engine.shape.num_parameters
        assert rank_memory(plan).parts["copies of the weights"] == held
    assert "copies of the weights" not in rank_memory(plan_of("boba-7b.toml")).parts
    assert "copies of the weights" not in rank_memory(plan_of("boba-7b-cluster.toml", *lagging)).parts


def test_one_process_has_no_controllers_overhead(tmp_path: Path):
    overrides = "model.path=Qwen2.5-0.5B", "rollout.max_lag=1"
    found = forecast(asked("laptop.toml", *overrides, hardware="h100"), alone=True)
    assert found.schedules[0].stages["overhead"] == 0
    assert found.schedules[0].engines_idle + found.schedules[0].trainer_idle >= 1
    assert "one process: no controller" in " ".join(found.plan.assumed)
    (tmp_path / "own.toml").write_text(OWN)
    constants = plan_of("laptop.toml", *overrides, hardware=str(tmp_path / "own.toml")).setup.constants
    assert (constants.step_overhead, constants.rollout_share) == (0.1, 1.0)
    assert plan_of("boba-7b-cluster.toml").setup.constants == fitted()


def test_one_process_holds_engine_and_trainer(tmp_path: Path):
    (tmp_path / "own.toml").write_text(OWN)
    plan = plan_of("laptop.toml", "model.path=Qwen2.5-0.5B", hardware=str(tmp_path / "own.toml"))
    found = forecast(asked("laptop.toml", "model.path=Qwen2.5-0.5B", hardware=str(tmp_path / "own.toml")))
    assert plan.layout.gpus == 1
    assert plan.setup.constants.step_overhead == 0.1
    assert "the engine beside it" in found.trainer.parts
    assert not found.fits


def test_a_config_json_is_read(tmp_path: Path):
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    sizes |= {"intermediate_size": 384, "vocab_size": 64, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    plan = plan_of("laptop.toml", f"model.path={tmp_path}")
    assert plan.setup.engine.shape.num_parameters == 4 * (128 * 32 * 12 + 3 * 128 * 384) + 64 * 128
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="hidden_size"):
        plan_of("laptop.toml", f"model.path={tmp_path}")


@pytest.mark.parametrize(
    ("experts", "active", "all_of"),
    [
        ({"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}, 2 * 64, 8 * 64),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, 2 * 384, 8 * 384),
        (
            {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1},
            3 * 64,
            9 * 64,
        ),
    ],
)
def test_experts_of_a_config_json(tmp_path: Path, experts: dict[str, int], active: int, all_of: int):
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    sizes |= {"intermediate_size": 384, "vocab_size": 64, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(sizes | experts))
    plan = plan_of("laptop.toml", f"model.path={tmp_path}")
    shape = plan.setup.engine.shape
    assert shape.layer_active == 4 * (128 * 32 * 12 + 3 * 128 * active)
    assert shape.num_parameters == 4 * (128 * 32 * 12 + 3 * 128 * all_of) + 64 * 128
    assert rank_memory(plan).parts["parameters"] == 4 * shape.num_parameters
    assert "a mixture of experts" in " ".join(plan.assumed)
    (tmp_path / "config.json").write_text(json.dumps(sizes | experts | {"num_experts_per_tok": None}))
    with pytest.raises(UserError, match="expected the config"):
        plan_of("laptop.toml", f"model.path={tmp_path}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardware": "x100"}, "Did you mean 'h100'"),
        ({"hardware": "nothing.toml"}, "expected a TOML file"),
        ({"gpus": 1}, "nearest: 2"),
        ({"mean_response": 1e6}, "below rollout.max_new_tokens"),
        ({"mean_prompt": 1e6}, "at most data.max_prompt_tokens"),
        ({"lengths": "runs/one", "mean_response": 100.0}, "--mean-response: expected no mean beside --lengths"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        read_plan(asked("boba-7b-cluster.toml", **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("memory_gb_s", "memory_gbs"), "Did you mean 'memory_gb_s'"),
        (("step_overhead", "step_overhaed"), "Did you mean 'step_overhead'"),
        (("= 8", "= ["), "expected a TOML file"),
        (("step_overhead = 0.1", "weight_share = 0"), "constants.weight_share: expected from 1e-06"),
        (("step_overhead = 0.1", "weight_share = -1"), "constants.weight_share: expected from 1e-06"),
        (("step_overhead = 0.1", "disk_byte_s = 0"), "constants.disk_byte_s: expected from 1e-06"),
        (("step_overhead = 0.1", "step_overhead = -1"), "constants.step_overhead: expected from 0"),
    ],
)
def test_mistakes_in_an_own_device(tmp_path: Path, change: tuple[str, str], message: str):
    (tmp_path / "own.toml").write_text(OWN.replace(*change))
    with pytest.raises(UserError, match=message):
        read_device(str(tmp_path / "own.toml"))


def test_an_own_device_is_not_its_namesake(tmp_path: Path):
    (tmp_path / "own.toml").write_text(OWN.replace("mine", "h100"))
    assert not plan_of("boba-7b-cluster.toml", hardware=str(tmp_path / "own.toml")).published
    assert plan_of("boba-7b-cluster.toml", hardware="h100").published


def test_a_mixture_is_planned_by_its_active_parameters(capsys: pytest.CaptureFixture[str]):
    changes = "model.path=Qwen3-30B-A3B", "cluster.training.tp=2"
    out = printed(capsys, asked("boba-7b-cluster.toml", *changes, gpus=64))
    assert "30.5" in out.partition("B parameters")[0]
    assert "a mixture of experts, 3.0" in out
    plans = (plan_of("boba-7b-cluster.toml", f"model.path={name}") for name in ("Qwen3-30B-A3B", "Qwen2.5-32B"))
    mixture, dense = (times_beside(plan.setup)[1] for plan in plans)
    assert mixture < dense / 2  # seconds of training


def test_what_if_and_the_one_change(capsys: pytest.CaptureFixture[str]):
    question = asked("boba-7b-cluster.toml", gpus=32, price=1.0)
    out = printed(capsys, question, what_if=["rollout.max_lag=1", "gpus=64 hardware=h200", "model.path=Qwen2.5-72B"])
    assert "what if (projected)" in out
    assert re.search(r"gpus=64 hardware=h200 +│ +[\d,.]+ │", out)
    assert re.search(r"model.path=Qwen2.5-72B +│ +does not fit: ", out)
    assert re.search(r"the one change that gives most steps a second: rollout.max_lag=\d", out)
    with pytest.raises(UserError, match="gpus: expected a number"):
        question.changed(["gpus=many"])


def test_the_best_layouts_are_recipes_and_a_front():
    small = asked("boba-7b-cluster.toml", "rollout.prompts_per_step=16", gpus=16, price=2.0)
    options = best_layouts(forecast(small, alone=True))
    assert [option.gpus for option in options] == [4, 8, 16, 32, 64]
    assert max(option.gain or 0 for option in options) > 1.5
    for option in options:
        again = forecast(replace(small, gpus=None).changed(option.changes), alone=True)
        assert again.plan.layout.gpus == option.gpus
        assert again.schedules[0].step_s == option.schedule.step_s  # all engines are simulated, not a few
    kept = front(options)
    assert kept
    for one in options:
        better = [
            o for o in kept if o.schedule.hours < one.schedule.hours and o.schedule.gpu_hours < one.schedule.gpu_hours
        ]
        assert bool(better) is (one not in kept)
    with pytest.raises(UserError, match="--best: expected a recipe with a section cluster"):
        best_layouts(forecast(asked("laptop.toml", "model.path=Qwen2.5-0.5B"), alone=True))


def test_a_page_has_the_timeline_and_the_front(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = asked("boba-7b-cluster.toml", "rollout.prompts_per_step=16", gpus=16)
    out = printed(capsys, small, best=True, page=str(tmp_path / "plan.html"))
    text = (tmp_path / "plan.html").read_text()
    assert text.count("<rect") == 3 * 4  # four steps of three stages
    assert text.count("<circle") == out.count(" GPUs: ")
    assert "bound by" in text
    found = json.loads(printed(capsys, small, as_json=True, page=str(tmp_path / "beside.html")))
    assert found["fits"]
    assert "Timeline" in (tmp_path / "beside.html").read_text()
    with pytest.raises(UserError, match="--page: expected a file that can be written"):
        printed(capsys, small, page=str(tmp_path / "none" / "plan.html"))


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]):
    small = asked("boba-7b-cluster.toml", "rollout.prompts_per_step=16", gpus=2)  # which does not fit
    found = json.loads(printed(capsys, small, best=True, as_json=True))
    assert found["layouts"]
    assert {one["gain"] for one in found["layouts"]} == {None}


def test_lengths_are_those_of_a_run(tmp_path: Path):
    def record(prompt: int, response: int) -> Record:
        tokens = np.zeros(prompt, np.int32), np.zeros(response, np.int32)
        return Record.of(*tokens, np.zeros(response, np.float32))

    for step, length in ((1, 500), (2, 1000)):
        lines = [{"group": i, "sample": 0} for i in range(8)]
        write_records(tmp_path / "rollouts" / f"step-{step:06d}", lines, [record(50, length)] * 8)
    plan = read_plan(asked("boba-7b-cluster.toml", lengths=str(tmp_path)))
    assert plan.setup.lengths.mean == 750
    assert plan.setup.prompt == 50
    assert "(measured)" in plan.assumed[1]
    with pytest.raises(UserError, match="--lengths: expected a run directory"):
        read_plan(asked("boba-7b-cluster.toml", lengths=str(tmp_path / "other")))


def test_failures_cost_time_and_frequent_checkpoints_less():
    def lost(*overrides: str, failures: float = 0.1) -> float:
        found = forecast(asked("boba-7b-cluster.toml", *overrides, gpus=16, failures=failures), alone=True)
        own = found.schedules[0]
        assert own.hours == pytest.approx(own.step_s * 250 / 3600 / (1 - own.lost))
        return own.lost

    assert lost(failures=0) == 0
    assert 0 < lost() < lost(failures=1) < 1
    assert lost("train.save_every=1") < lost()


def test_every_figure_has_an_interval_and_a_mark():
    found = forecast(asked("boba-7b-cluster.toml", gpus=16, price=1.0), alone=True)
    own, ranges = found.schedules[0], found.schedules[0].intervals()
    for name in ("step_s", "hours", "gpu_hours", "price", "tokens_s_gpu", "engines_idle", "trainer_idle"):
        low, high = ranges[name]
        assert low < getattr(own, name) < high
    assert found.marks == {"device": "published", "lengths": "assumed", "memory": "projected", "steps": "projected",
                           "errors": "published"}  # fmt: skip


def test_names_of_devices():
    assert read_device("H100-SXM")[0].name == "h100"
    with pytest.raises(UserError):  # not the h100 that it begins with
        read_device("h1000")


def test_every_figure_has_its_source():
    for figure in FIGURES.values():
        assert set(figure.constants) <= set(NAMES)
        assert not figure.family or figure.family in errors()


def test_parts_add_up():
    engine, training = (
        make(plan_of("boba-7b-cluster.toml").setup.engine.shape, read_device("h100")[0], 8, constants=fitted())
        for make in (Engine, Training)
    )
    assert sum(engine.decode_parts(64, 2000).values()) == pytest.approx(engine.decode(64, 2000))
    assert sum(training.step_parts(1e6, 8000, 5, 4).values()) == pytest.approx(training.step(1e6, 8000, 5, 4))
    piped = Training(engine.shape, engine.device, 8, tp=2, pp=2, constants=fitted())
    assert sum(piped.step_parts(1e6, 8000, 5, 4).values()) == pytest.approx(piped.step(1e6, 8000, 5, 4))


def test_an_interval_is_what_an_error_means():
    low, high = interval(100, 0.25)
    assert abs(100 / low - 1) == pytest.approx(0.25)
    assert abs(100 / high - 1) == pytest.approx(0.25)
