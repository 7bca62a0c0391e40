"""`pekoe plan`: layouts, what fits, figures with their sources, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pekoe.config.recipes import RLConfig, load_config
from pekoe.core.errors import UserError
from pekoe.plan.command import run_plan
from pekoe.plan.costs import NAMES, Engine, Training, fitted
from pekoe.plan.forecast import FIGURES, errors, forecast, rank_memory
from pekoe.plan.recipe import Plan, read_device, read_plan
from pekoe.plan.show import interval

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
    return read_plan(load_config(RECIPES / recipe, overrides, RLConfig), hardware, gpus, None, None)


def printed(capsys: pytest.CaptureFixture[str], recipe: str, *overrides: str, **options: Any) -> str:
    given = {"hardware": "h800", "gpus": None, "price": None, "mean_response": None, "mean_prompt": None}
    given |= {"explained": False, "as_json": False} | options
    run_plan(Console(width=160), load_config(RECIPES / recipe, overrides, RLConfig), **given)
    return capsys.readouterr().out


def test_a_recipe_on_its_own_gpus(capsys: pytest.CaptureFixture[str]):
    out = printed(capsys, "boba-7b-cluster.toml", price=2.5, explained=True)
    assert "on 128 x h800: 64 engines, 64 training ranks" in out
    for word in ("KV cache", "Adam's moments", "sampling", "publishing", "GPU-hours", "price", "lag 0", "lag 1"):
        assert word in out
    assert "the shape is qwen2.5-7b's, by its name" in out
    assert f"within {errors()['rl'].median:.0%}" in out
    assert "train_flops" in out


def test_json_has_the_same_figures(capsys: pytest.CaptureFixture[str]):
    found = json.loads(printed(capsys, "boba-7b-cluster.toml", price=2.0, as_json=True))
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
    with pytest.raises(UserError, match=r"memory of a training rank: expected .* nearest: .*train.token_budget="):
        printed(capsys, "boba-32b.toml", gpus=64)
    assert "together, of what there is" in capsys.readouterr().out
    plan = plan_of("boba-32b.toml", gpus=64)
    changed = plan_of("boba-32b.toml", *plan.changes, *forecast(plan).changes)
    assert rank_memory(changed).fits


def test_one_process_holds_engine_and_trainer(tmp_path: Path):
    (tmp_path / "own.toml").write_text(OWN)
    plan = plan_of("laptop.toml", "model.path=Qwen2.5-0.5B", hardware=str(tmp_path / "own.toml"))
    found = forecast(plan)
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
    ("options", "message"),
    [
        ({"hardware": "x100"}, "Did you mean 'h100'"),
        ({"hardware": "nothing.toml"}, "expected a TOML file"),
        ({"gpus": 1}, "nearest: 2"),
        ({"mean_response": 1e6}, "below rollout.max_new_tokens"),
        ({"mean_prompt": 1e6}, "at most data.max_prompt_tokens"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str):
    given = {"hardware": "h800", "gpus": None, "mean_response": None, "mean_prompt": None} | options
    with pytest.raises(UserError, match=message):
        read_plan(load_config(RECIPES / "boba-7b-cluster.toml", (), RLConfig), **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("memory_gb_s", "memory_gbs"), "Did you mean 'memory_gb_s'"),
        (("step_overhead", "step_overhaed"), "Did you mean 'step_overhead'"),
        (("= 8", "= ["), "expected a TOML file"),
    ],
)
def test_mistakes_in_an_own_device(tmp_path: Path, change: tuple[str, str], message: str):
    (tmp_path / "own.toml").write_text(OWN.replace(*change))
    with pytest.raises(UserError, match=message):
        read_device(str(tmp_path / "own.toml"))


def test_mixtures_are_refused():
    with pytest.raises(UserError, match="dense model"):
        plan_of("boba-7b-cluster.toml", "model.path=Qwen3-30B-A3B")


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
