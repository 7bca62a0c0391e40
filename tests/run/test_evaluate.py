"""pass@1 and its interval; the engine's evaluation stream is not the training one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pekoe.core import EvalConfig, UserError, load_config
from pekoe.core.types import Label, Verdict
from pekoe.core.view import NoView
from pekoe.run.evaluate import pass_at_1, run_eval


def row(*labels: Label) -> list[Verdict]:
    return [Verdict(label) for label in labels]


def test_the_interval_is_over_problems():
    verdicts = [row("correct", "wrong"), row("correct", "correct"), row("unparsed", "wrong"), row("correct", "wrong")]
    mean, (low, high) = pass_at_1(verdicts)
    rates = [0.5, 1.0, 0.0, 0.5]
    error = np.std(rates, ddof=1) / 2
    assert mean == pytest.approx(0.5)
    assert (low, high) == pytest.approx((0.5 - 1.96 * error, 0.5 + 1.96 * error))


def test_more_samples_of_the_same_problems_do_not_narrow_it():
    few = pass_at_1([row("correct"), row("wrong"), row("correct")])
    many = pass_at_1([row("correct") * 50, row("wrong") * 50, row("correct") * 50])
    assert few == many


def test_faults_are_left_out():
    assert pass_at_1([row("correct", "fault"), row("wrong", "fault")])[0] == 0.5
    assert pass_at_1([row("correct"), row("fault", "fault")])[0] == 1.0
    assert math.isnan(pass_at_1([row("fault")])[0])


def test_run_eval(tiny_dir: Path):
    tree: dict[str, Any] = {
        "run": {"threads": 1},
        "model": {"path": str(tiny_dir / "model"), "device": "cpu"},
        "eval": {"data": str(tiny_dir / "held_out.jsonl"), "samples": 3, "max_new_tokens": 10},
        "max_prompt_tokens": 8,
        "verify": {"workers": 1},
    }
    config = load_config(tree, kind=EvalConfig)
    result = run_eval(config, NoView())
    assert result == run_eval(config, NoView())
    assert (result.num_problems, result.samples_per_problem) == (7, 3)
    assert result.pass_at_1 == 0  # random weights
    assert result.fault_rate == 0
    assert len(result.examples) == 7
    other = run_eval(load_config(tree, ["run.seed=1"], EvalConfig), NoView())
    assert other.examples != result.examples
    with pytest.raises(UserError, match=r"context: expected prompt and response to fit the model's 64 positions"):
        run_eval(load_config(tree, ["eval.max_new_tokens=60"], EvalConfig), NoView())
    with pytest.raises(UserError, match=r"expected a prompt of at most 3 tokens"):
        run_eval(load_config(tree, ["max_prompt_tokens=3"], EvalConfig), NoView())


def test_a_judged_evaluation_sees_right_answers(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Any]
):
    """The whole path from tokens to verdict, with an engine that is made to answer right every second time."""
    from pekoe.data.tokenizer import Tokenizer
    from pekoe.engine import EmbeddedEngine

    tokenizer = Tokenizer.load(tiny_dir / "model")
    generate = EmbeddedEngine.generate

    def answer(self: EmbeddedEngine, prompts: Any, params: Any):
        from dataclasses import replace

        for rollout in generate(self, prompts, params):
            a, b = rollout.uid.split("+")
            value = int(a) + int(b) + rollout.sample_index % 2
            tokens = tokenizer.encode_response(f"\\boxed{{{value}}}")
            yield replace(rollout, payload=replace(rollout.payload.resolve(), tokens=tokens))

    monkeypatch.setattr(EmbeddedEngine, "generate", answer)
    tree: dict[str, Any] = {
        "run": {"threads": 1},
        "model": {"path": str(tiny_dir / "model"), "device": "cpu"},
        "eval": {"data": str(tiny_dir / "held_out.jsonl"), "samples": 4, "max_new_tokens": 10},
        "max_prompt_tokens": 8,
        "verify": {"workers": 1},
    }
    result = run_eval(load_config(tree, kind=EvalConfig), NoView())
    assert result.pass_at_1 == 0.5
    assert result.ci95 == (0.5, 0.5)
