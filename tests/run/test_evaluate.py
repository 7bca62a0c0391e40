"""pass@1 and its interval; the engine's evaluation stream is not the training one."""

import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from pekoe.config import EvalConfig, load_config
from pekoe.core import UserError
from pekoe.core.progress import NoProgress
from pekoe.core.statistics import interval, paired
from pekoe.core.types import Branch, Completion, Label, Record, Request, Trajectory
from pekoe.run.eval_metrics import majority_at_k, pass_at_1, pass_at_k, powers_up_to
from pekoe.run.evaluate import EvalResult, compare, comparison_tables, run_eval, table_of
from pekoe.run.sample_store import ProblemResult
from pekoe.verify.cases import read_cases
from tests.run.killed import killed_command


def row(*labels: Label, answers: tuple[str | None, ...] = ()) -> ProblemResult:
    size = len(labels)
    return ProblemResult("p", list(labels), list(answers or (None,) * size), [1] * size, ["stop"] * size)


def test_the_interval_is_over_problems():
    verdicts = [row("correct", "wrong"), row("correct", "correct"), row("unparsed", "wrong"), row("correct", "wrong")]
    mean, (low, high) = pass_at_1(verdicts)
    n = 0.25 / (np.var([0.5, 1.0, 0.0, 0.5], ddof=1) / 4)  # 6 responses that are independent tell as much
    half = 1.96 * np.sqrt(0.25 / n + 1.96**2 / (4 * n * n)) / (1 + 1.96**2 / n)
    assert mean == pytest.approx(0.5)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))


def test_the_interval_is_honest_at_0_and_at_1():
    nothing, everything = pass_at_1([row(*["wrong"] * 32)] * 48), pass_at_1([row(*["correct"] * 32)] * 48)
    assert nothing == (0, (0, pytest.approx(1.96**2 / (48 + 1.96**2))))  # 0 % to 7.4 %, however many samples
    assert everything == (1, (pytest.approx(48 / (48 + 1.96**2)), 1))
    assert pass_at_1([row("wrong")])[1][1] > 0.7  # of one problem
    low, high = pass_at_1([row("correct", *["wrong"] * 31), *[row(*["wrong"] * 32)] * 47])[1]
    assert 0 < low < high < 0.01


def test_with_many_problems_it_is_the_normal_one():
    rates = np.random.default_rng(0).beta(2, 3, 1000)
    error = rates.std(ddof=1) / np.sqrt(1000)
    assert interval(rates.tolist()) == pytest.approx(
        (rates.mean() - 1.96 * error, rates.mean() + 1.96 * error), abs=5e-4
    )


def test_more_samples_of_the_same_problems_do_not_narrow_it():
    few = pass_at_1([row("correct"), row("wrong"), row("correct")])
    many = pass_at_1([row(*["correct"] * 50), row(*["wrong"] * 50), row(*["correct"] * 50)])
    assert few == many


def test_faults_are_left_out():
    assert pass_at_1([row("correct", "fault"), row("wrong", "fault")])[0] == 0.5
    assert pass_at_1([row("correct"), row("fault", "fault")])[0] == 1.0
    assert math.isnan(pass_at_1([row("fault")])[0])


def test_pass_at_k_is_the_mean_over_all_subsets():
    labels: list[Label] = ["correct", "wrong", "wrong", "fault", "correct", "wrong"]
    judged = [label for label in labels if label != "fault"]
    for k in range(1, 6):
        subsets = list(itertools.combinations(judged, k))
        expected = sum("correct" in subset for subset in subsets) / len(subsets)
        assert pass_at_k([row(*labels)], k) == pytest.approx(expected)
    assert math.isnan(pass_at_k([row(*labels)], 6))  # one is a fault
    assert powers_up_to(6) == [1, 2, 4, 6]
    assert powers_up_to(8) == [1, 2, 4, 8]


def test_majority_at_k():
    votes = row("wrong", "correct", "correct", "unparsed", "fault", answers=("1", "7", " 7", None, "1"))
    assert majority_at_k([votes], 4) == 1
    assert majority_at_k([row("wrong", "correct", answers=("1", "7"))], 2) == 0.5  # a tie
    assert majority_at_k([row("unparsed", "unparsed")], 2) == 0
    assert majority_at_k([votes], 1) == 0.5  # two of four: of one response it is pass@1
    assert majority_at_k([votes], 2) == majority_at_k([votes], 2)


def test_a_problem_that_is_not_judged_by_its_answer_has_no_majority():
    assert math.isnan(majority_at_k([row("correct", "wrong", answers=(None, "2"))], 2))
    assert majority_at_k([row("wrong", "wrong", answers=(None, "2"))], 2) == 0
    assert majority_at_k([row("correct", "correct", "wrong", answers=("a", "a", "b"))], 3) == 1


def test_a_paired_test_tells_chance_from_change():
    rng = np.random.default_rng(0)
    before = rng.random(200)
    same = paired(before.tolist(), (before + rng.normal(0, 0.1, 200)).tolist())
    better = paired(before.tolist(), (before + rng.normal(0.05, 0.1, 200)).tolist())
    assert same["p_value"] > 0.05 > better["p_value"]
    assert better["ci95"][0] > 0 > same["ci95"][0]
    error = 0.1 / np.sqrt(200)
    assert better["ci95"][1] - better["ci95"][0] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert paired([0.5, 1.0], [0.5, 1.0])["p_value"] == 1
    low, high = paired([0.0] * 20, [0.0] * 20)["ci95"]  # nothing right before and after: not equal for certain
    assert low == -high
    assert 0.1 < high < 0.2


def tree_of(tiny_dir: Path, out: Path | None = None, samples: int = 3) -> dict[str, Any]:
    return {
        "run": {"threads": 1},
        "model": {"path": str(tiny_dir / "model"), "device": "cpu"},
        "eval": {"data": str(tiny_dir / "held_out.jsonl"), "samples": samples, "max_new_tokens": 10},
        "max_prompt_tokens": 8,
        "verify": {"workers": 1},
    } | ({"out": str(out)} if out else {})


def test_secrets_reach_no_results(tiny_dir: Path, tmp_path: Path):
    tree = tree_of(tiny_dir, tmp_path / "out", samples=1)
    tree["engine"] = {"server": {"env": {"HF_TOKEN": "s3cret", "HF_HOME": "seen"}}}
    run_eval(load_config(tree, kind=EvalConfig), NoProgress())
    results = (tmp_path / "out/results.json").read_text()
    assert "seen" in results
    assert "s3cret" not in results


def test_several_sets_and_a_comparison(tiny_dir: Path, tmp_path: Path):
    trees = [tree_of(tiny_dir, tmp_path / name) for name in ("a", "b")]
    for tree, seed in zip(trees, (0, 1), strict=True):
        tree["eval"]["data"] = [str(tiny_dir / "train.jsonl"), str(tiny_dir / "held_out.jsonl")]
        tree["run"]["seed"] = seed
    result, _ = (run_eval(load_config(tree, kind=EvalConfig), NoProgress()) for tree in trees)
    assert {name: one.num_problems for name, one in result.by_set.items()} == {"train": 18, "held_out": 7}
    assert result.num_problems == 25
    found = compare(tmp_path / "a", tmp_path / "b/results.json")
    assert found["num_problems"] == 25
    for table in (table_of(result), *comparison_tables(found)):
        assert max(map(len, printed(table))) <= 80
    results = json.loads((tmp_path / "a/results.json").read_text())
    results["problems"][0]["num_judged"] = 0  # FAULTs alone
    (tmp_path / "fault.json").write_text(json.dumps(results))
    for pair in (("a", "fault.json"), ("fault.json", "a")):
        found = compare(*(tmp_path / name for name in pair))
        assert (found["num_problems"], found["num_all_fault"]) == (24, 1)
    results["problems"].pop()
    (tmp_path / "c.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"expected results on the same problems, got 1 that only .*, such as 'train/"):
        compare(tmp_path / "a", tmp_path / "c.json")
    with pytest.raises(UserError, match=r"expected results of pekoe eval, got something else"):
        compare(tmp_path / "a", tmp_path / "a/samples.jsonl")
    for change in ({"num_judged": "3"}, {"num_correct": 99}, {"uid": [1]}, {"num_correct": None}):
        damaged = {"problems": [results["problems"][0] | change, *results["problems"][1:]]}
        (tmp_path / "damaged.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"damaged.json: expected results of pekoe eval, got something else"):
            compare(tmp_path / "damaged.json", tmp_path / "c.json")
    (tmp_path / "damaged.json").unlink()
    with pytest.raises(UserError, match=r"found none. Did you mean 'c.json'"):
        compare(tmp_path / "a", tmp_path / "d.json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(json.dumps(results))
    for given in ("othr", "othr/results.json"):
        with pytest.raises(UserError, match=r"found none. Did you mean 'other'"):
            compare(tmp_path / "a", tmp_path / given)


@pytest.fixture(scope="module")
def whole_eval(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvalResult, Path]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return run_eval(load_config(tree_of(tiny_dir, out), kind=EvalConfig), NoProgress()), out


# A problem is three responses, then a line in samples.jsonl: the twelfth line after the first is the third problem's.
@pytest.mark.parametrize(("act", "line", "kept"), [("after", 13, 4), ("torn_line", 13, 3), ("torn_line", 11, 3)])
def test_killed_and_resumed_is_never_killed(
    tiny_dir: Path, tmp_path: Path, whole_eval: tuple[EvalResult, Path], act: str, line: int, kept: int
):
    whole, whole_dir = whole_eval
    tree = tree_of(tiny_dir, tmp_path / "part")
    killed_command("eval", tree, act, line)
    lines = (tmp_path / "part/samples.jsonl").read_bytes()
    assert lines.count(b"\n") == kept
    assert run_eval(load_config(tree, kind=EvalConfig), NoProgress()).as_dict() == whole.as_dict()
    for name in ("samples.jsonl", "responses.jsonl"):
        files = [sorted((out / name).read_text().splitlines()) for out in (whole_dir, tmp_path / "part")]
        assert files[0] == files[1]
    before = (tmp_path / "part/samples.jsonl").read_bytes()
    assert run_eval(load_config(tree, kind=EvalConfig), NoProgress()).as_dict() == whole.as_dict()
    assert (tmp_path / "part/samples.jsonl").read_bytes() == before  # nothing sampled again
    with pytest.raises(UserError, match=r"expected responses sampled with eval.temperature = 0.5, got 1.0"):
        run_eval(load_config(tree, ["eval.temperature=0.5"], EvalConfig), NoProgress())


@pytest.mark.parametrize(
    ("number", "old", "new"),
    [
        (0, '"about":{', '"about":[],"x":{'),
        (1, '"labels":', '"lables":'),
        (1, '"labels":[', '"labels":["right",'),
        (1, '"labels":[', '"labels":3,"x":['),
        (1, '"labels":[', '"labels":[null,'),
        (1, '"uid":', '"uid":5,"content2":'),
    ],
)
def test_samples_that_are_damaged_are_one_message(
    tiny_dir: Path, tmp_path: Path, kept: Path, number: int, old: str, new: str
):
    tree = tree_of(tiny_dir, tmp_path / "part")
    shutil.copytree(kept, tmp_path / "part")
    lines = (kept / "samples.jsonl").read_text().splitlines(keepends=True)
    lines[number] = lines[number].replace(old, new, 1)
    (tmp_path / "part/samples.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match=r"samples.jsonl: expected the lines that this command writes, got others"):
        run_eval(load_config(tree, kind=EvalConfig), NoProgress())


@pytest.fixture(scope="module")
def kept(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an evaluation left."""
    out = tmp_path_factory.mktemp("kept") / "out"
    run_eval(load_config(tree_of(tiny_dir, out), kind=EvalConfig), NoProgress())
    return out


def test_run_eval(tiny_dir: Path):
    tree = tree_of(tiny_dir)
    config = load_config(tree, kind=EvalConfig)
    result = run_eval(config, NoProgress())
    assert result == run_eval(config, NoProgress())
    assert (result.num_problems, result.samples_per_problem) == (7, 3)
    assert result.pass_at_1 == 0  # random weights
    assert result.fault_rate == 0
    assert len(result.examples) == 7
    other = run_eval(load_config(tree, ["run.seed=1"], EvalConfig), NoProgress())
    assert other.examples != result.examples
    with pytest.raises(UserError, match=r"context: expected prompt and response to fit the model's 64 positions"):
        run_eval(load_config(tree, ["eval.max_new_tokens=60"], EvalConfig), NoProgress())
    with pytest.raises(UserError, match=r"expected a prompt of at most 3 tokens"):
        run_eval(load_config(tree, ["max_prompt_tokens=3"], EvalConfig), NoProgress())


def printed(table: Table) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=80).print(table)
    return text.getvalue().splitlines()


def test_wide_results_fit_80_columns():
    rates = {"1": 0.2, "32": 1.0}
    one = EvalResult(0.27, (0.196, 0.344), 12345, 32, rates, rates, 12345, 0.5, 0.1, 0.01)
    lines = printed(table_of(replace(one, by_set={"a_data_set_with_a_name_that_is_long": one, "aime": one})))
    assert max(map(len, lines)) <= 80
    assert all(name in "".join(lines[:3]) for name in ("pass@32", "maj@32", "tokens", "cut", "unparsed", "FAULT"))
    assert "27.0% [19.6, 34.4]" in lines[-1]
    assert "…" not in "".join(lines)
    assert "cut" not in "".join(printed(table_of(replace(one, truncation_rate=0.0))))  # 0 everywhere


def test_a_comparison_names_problems_by_their_text():
    moved = [{"uid": "3f9a", "prompt": "What is\n1 + [red]6[/red]? " + "x" * 100, "before": 0.0, "after": 1.0}]
    found = {"before": 0.25, "after": 0.5, "difference": 0.25, "ci95": (0.1, 0.4), "p_value": 1e-4}
    found |= {"num_problems": 4, "num_better": 1, "num_worse": 0, "num_all_fault": 1, "moved_most": moved}
    means, problems = map(printed, comparison_tables(found))
    assert max(map(len, means + problems)) <= 80
    assert re.search(r"25.0% +50.0% +\+25.0 \[\+10.0, \+40.0\] +1 +0 +< 0.001", "\n".join(means))
    assert "1 problem that one side could not judge" in means[-1]
    assert problems[-1].startswith("What is 1 + [red]6[/red]? xxx")
    assert re.search(r"0.0% +100.0%$", problems[-1].rstrip())


def test_every_response_is_kept(tiny_dir: Path, tmp_path: Path):
    run_eval(load_config(tree_of(tiny_dir, tmp_path / "out"), kind=EvalConfig), NoProgress())
    cases = read_cases(tmp_path / "out/responses.jsonl")  # as `pekoe verify` reads them
    assert len(cases) == 21
    assert {case["prompt"] for case in cases} >= {"3+3=", "4+4="}
    assert {case["sample"] for case in cases} == {0, 1, 2}
    assert {case["label"] for case in cases} <= {True, False}
    problems = json.loads((tmp_path / "out/results.json").read_text())["problems"]
    assert problems[-1]["prompt"] == "4+4="


def test_a_judged_evaluation_sees_right_answers(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Any]
):
    """The whole path from tokens to verdict, with an engine that is made to answer right every second time."""
    from pekoe.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tiny_dir / "model")
    boxes = ["boxed"]

    def right_every_second_time(request: Request, completion: Completion) -> Trajectory:
        a, b = request.uid.split("+")
        value = int(a) + int(b) + request.sample % 2
        tokens = tokenizer.encode_response(f"\\boxed{{{value}}}" if boxes else f"={value}")
        record = Record.of(request.tokens, tokens, np.zeros(len(tokens), np.float32))
        branch = Branch(len(request.tokens), len(tokens), (), record)
        return Trajectory(request.uid, request.draw, request.sample, "stop", (branch,))

    monkeypatch.setattr(Trajectory, "of", right_every_second_time)
    tree = tree_of(tiny_dir, samples=4)
    result = run_eval(load_config(tree, kind=EvalConfig), NoProgress())
    boxes.clear()
    assert run_eval(load_config(tree, kind=EvalConfig), NoProgress()).unparsed_rate == 1
    assert run_eval(load_config(tree, ["verify.unboxed=true"], EvalConfig), NoProgress()).pass_at_1 == 0.5
    assert result.pass_at_1 == 0.5
    assert result.ci95[0] < 0.5 < result.ci95[1]
    assert result.pass_at_k["4"] == 1
    assert result.majority_at_k["4"] == 0.5  # two and two
