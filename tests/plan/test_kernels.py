"""Kernel times of AIConfigurator in place of fitted constants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pekoe.core.errors import UserError
from pekoe.core.hardware import DEVICES
from pekoe.plan import kernels
from pekoe.plan.costs import Engine, fitted
from pekoe.plan.kernels import PREFILLS, STEPS, Times, fit, kernel_constants
from pekoe.plan.recipe import Asked, read_plan
from pekoe.plan.shapes import SHAPES

RECIPE = str(Path(__file__).resolve().parents[2] / "recipes" / "boba-7b-cluster.toml")


def times_of(engine: Engine) -> Times:
    c = engine.constants
    steps = [(n, tokens, engine.decode(n, tokens) - c.sequence_s * n) for n, tokens in STEPS]
    return (*steps, *((0, tokens, engine.prefill(tokens) - c.prefill_s) for tokens in PREFILLS))


@pytest.mark.parametrize("tp", [1, 4])
def test_times_are_met(tp: int):
    true = replace(fitted(), weight_share=0.6, kv_share=0.9, layer_s=2e-5, prefill_flops=0.5, link_share=0.8)
    engine = Engine(SHAPES["qwen2.5-7b"], DEVICES["h200"], tp, constants=fitted())
    constants, error = fit(engine, times_of(replace(engine, constants=true)))
    assert error < 0.03
    assert constants.sequence_s == fitted().sequence_s
    found, wanted = replace(engine, constants=constants), replace(engine, constants=true)
    assert found.decode(100, 6000) == pytest.approx(wanted.decode(100, 6000), rel=0.05)


def test_a_plan_takes_them(monkeypatch: pytest.MonkeyPatch):
    kernel_constants.cache_clear()
    monkeypatch.setattr(kernels, "measured", lambda engine, backend: times_of(replace(engine, constants=fitted())))
    plan = read_plan(Asked(RECIPE, hardware="h200", kernels="vllm"))
    assert "engines: vllm's kernels on h200_sxm by AIConfigurator (8 times, met within 0%)" in plan.assumed
    kernel_constants.cache_clear()


@pytest.mark.parametrize(
    ("hardware", "kernels", "message"),
    [
        ("h200", "vlm", "--kernels: expected one of vllm, sglang, got 'vlm'.*'vllm'"),
        ("mi300x", "vllm", "on one of a100, .*got qwen2.5-7b in bfloat16 on mi300x"),
    ],
)
def test_mistakes(hardware: str, kernels: str, message: str):
    with pytest.raises(UserError, match=message):
        read_plan(Asked(RECIPE, hardware=hardware, kernels=kernels))


def test_what_it_is_when_it_is_installed():
    pytest.importorskip("aiconfigurator_core")
    engine = Engine(SHAPES["qwen2.5-7b"], DEVICES["h200"], 1, constants=fitted())
    constants, _ = kernel_constants(engine, "vllm")
    step = replace(engine, constants=constants).decode(64, 4096)
    assert step == pytest.approx(engine.decode(64, 4096), rel=0.3)


def test_without_it_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(kernels.importlib, "import_module", missing)
    engine = Engine(SHAPES["qwen2.5-7b"], DEVICES["h200"], 2, constants=fitted())
    with pytest.raises(UserError, match=r"pip install 'pekoe\[plan\]'"):
        kernel_constants(engine, "sglang")
