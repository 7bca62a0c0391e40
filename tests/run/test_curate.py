"""Curation: problems kept by their pass rate, from sampled and judged responses."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pekoe.config import load_config
from pekoe.config.recipes import CurateConfig, RLConfig
from pekoe.core import UserError
from pekoe.core.errors import RunError
from pekoe.core.progress import NoProgress
from pekoe.core.types import Problem
from pekoe.data import read_problems
from pekoe.data.mix import DataReport, gather_problems
from pekoe.engine import EmbeddedEngine
from pekoe.run.curate import run_curate, sort_out
from pekoe.run.sample_store import ProblemResult
from tests.run.killed import killed_command


@pytest.fixture
def tree(tiny_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "out": str(tmp_path / "out"),
        "run": {"threads": 1},
        "model": {"path": str(tiny_dir / "model"), "device": "cpu"},
        "data": {"train": str(tiny_dir / "train.jsonl"), "max_prompt_tokens": 8},
        "curate": {"samples": 4, "max_new_tokens": 8},
        "verify": {"workers": 1, "random": True},
    }


def test_problems_are_kept_by_their_pass_rate(tree: dict[str, Any], tmp_path: Path):
    curated = run_curate(load_config(tree, kind=CurateConfig), NoProgress())
    kept = {problem.uid: problem for problem in read_problems(tmp_path / "out/problems.jsonl").problems}
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()[1:]]
    assert len(samples) == 18
    for sample in samples:
        rate = sample["labels"].count("correct") / 4
        assert (sample["uid"] in kept) == (rate < 1)
        assert rate == 1 or kept[sample["uid"]].pass_rate == rate
    counts = Counter(f"{sample['labels'].count('correct')}/4" for sample in samples)
    assert {name: number for name, number in curated.histogram.items() if number} == counts
    assert 0 < counts["4/4"] < 18  # coins: some problem fell four times on heads
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert {(line["reason"], line["detail"]) for line in dropped} == {("all right", "4 of 4")}
    again = run_curate(load_config(tree, ["curate.drop_all_wrong=true"], CurateConfig), NoProgress())
    assert {p.uid for p in again.problems} == {uid for uid, p in kept.items() if p.pass_rate}
    assert len((tmp_path / "out/samples.jsonl").read_text().splitlines()) == 19  # nothing sampled again


def test_what_is_curated_can_be_drawn_by_difficulty(tree: dict[str, Any], tmp_path: Path):
    run_curate(load_config(tree, kind=CurateConfig), NoProgress())
    data = {"train": str(tmp_path / "out/problems.jsonl"), "pass_rate": [0.25, 0.5]}
    rl = {"num_steps": 1, "run": {"dir": "x"}, "model": tree["model"], "data": data, "train": {"token_budget": 4096}}
    section = load_config(rl, kind=RLConfig).data
    problems, report = gather_problems(section, 0, None)
    assert {problem.pass_rate for problem in problems} == {0.25, 0.5}
    assert {drop.reason for drop in report.dropped} == {"pass rate"}
    data["train"] = tree["data"]["train"]
    with pytest.raises(UserError, match=r"data.pass_rate: expected problems that `pekoe curate` measured"):
        gather_problems(load_config(rl, kind=RLConfig).data, 0, None)


def test_nothing_is_sampled_where_none_is_asked_for(tree: dict[str, Any], tmp_path: Path):
    curated = run_curate(load_config(tree, ["curate.samples=0"], CurateConfig), NoProgress())
    assert len(curated.problems) == 18
    assert not (tmp_path / "out/samples.jsonl").exists()


def test_the_data_are_not_replaced(tree: dict[str, Any], tmp_path: Path):
    (tmp_path / "out").mkdir()
    rows = Path(tree["data"]["train"]).read_text()
    (tmp_path / "out/problems.jsonl").write_text(rows)
    tree["data"]["train"] = f"{tmp_path}/out/../out/problems.jsonl"
    with pytest.raises(UserError, match=r"out: expected another directory than that of the data"):
        run_curate(load_config(tree, ["curate.samples=0"], CurateConfig), NoProgress())
    assert (tmp_path / "out/problems.jsonl").read_text() == rows


@pytest.mark.parametrize(("kind", "nearest"), [("function:builtins:exec", ""), ("function:tests:shows", "tests:show")])
def test_a_row_that_names_a_function_is_refused_before_anything_is_sampled(
    tree: dict[str, Any], tiny_dir: Path, tmp_path: Path, kind: str, nearest: str
):
    rows = [json.loads(line) for line in (tiny_dir / "train.jsonl").read_text().splitlines()]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row | {"kind": kind} if row is rows[-1] else row) + "\n" for row in rows))
    tree["data"]["train"] = str(data)
    tree["verify"]["functions"] = ["tests:show"]
    uid = re.escape(rows[-1]["uid"])
    with pytest.raises(UserError, match=rf"{data}:18: problem '{uid}': .*listed in verify.functions.*{nearest}"):
        run_curate(load_config(tree, kind=CurateConfig), NoProgress())
    assert not (tmp_path / "out/samples.jsonl").exists()


def test_nothing_left_is_an_error_and_faults_have_no_rate(tree: dict[str, Any], tmp_path: Path):
    problems = [Problem(uid, ({"role": "user", "content": "x"},), "1") for uid in "ab"]
    rows = [
        ProblemResult("a", ["fault", "correct"], ["1", "1"], [1, 1], ["stop", "length"]),
        ProblemResult("b", ["fault", "fault"], ["1", "1"], [1, 1], ["stop", "stop"]),
    ]
    config = load_config(tree, ["curate.drop_all_right=false"], CurateConfig)
    curated = sort_out(problems, rows, config, DataReport())
    assert [(p.uid, p.pass_rate) for p in curated.problems] == [("a", 1.0)]
    assert [drop.reason for drop in curated.report.dropped] == ["no verdict"]
    assert curated.truncation_rate == 0.25
    with pytest.raises(RunError, match="expected problems to keep, got none of 18"):
        run_curate(load_config(tree, ["verify.random=false", "curate.drop_all_wrong=true"], CurateConfig), NoProgress())
    assert len((tmp_path / "out/dropped.jsonl").read_text().splitlines()) == 18
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: expected a directory that can be written"):
        run_curate(load_config(tree, [f"out={tmp_path}/file"], CurateConfig), NoProgress())


@pytest.mark.parametrize("act", ["after", "torn_line"])
def test_killed_and_resumed_is_never_killed(tree: dict[str, Any], tmp_path: Path, act: str):
    whole = run_curate(load_config(tree, kind=CurateConfig), NoProgress())
    tree["out"] = str(tmp_path / "part")
    killed_command("curate", tree, act)
    before = (tmp_path / "part/samples.jsonl").read_bytes()
    assert before.count(b"\n") == (4 if act == "after" else 3)
    assert not (tmp_path / "part/problems.jsonl").exists()
    assert run_curate(load_config(tree, kind=CurateConfig), NoProgress()) == whole
    for name in ("problems.jsonl", "dropped.jsonl"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    samples = (tmp_path / "part/samples.jsonl").read_bytes()
    assert samples.startswith(before[: before.rfind(b"\n") + 1])
    assert sorted(samples.splitlines()) == sorted((tmp_path / "out/samples.jsonl").read_bytes().splitlines())


def test_the_engine_must_hold_the_model(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(EmbeddedEngine, "holds", lambda *_: False)
    with pytest.raises(RunError, match="expected the embedded engine at version 0 to hold the trainer's parameters"):
        run_curate(load_config(tree, kind=CurateConfig), NoProgress())
