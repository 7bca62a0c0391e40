"""What a run that goes on notices, and what it allows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pekoe.config import RLConfig, load_config
from pekoe.core import RunError, UserError
from pekoe.core.journal import read_lines
from pekoe.core.records import read_records
from pekoe.core.types import Problem
from pekoe.data import Tokenizer
from pekoe.data.mix import DataReport
from pekoe.data.problems import read_problems
from pekoe.run.build import Task, open_run
from tests.run.conftest import Messages, checkpoint_in_name

Build = Callable[..., RLConfig]
Train = Callable[..., None]
Begin = Callable[..., list[str]]

REWARD = "def graded(response, gold):\n    return len(response) / 64\n"


@pytest.fixture
def begin(recipe: dict[str, Any], tiny_dir: Path) -> Begin:
    """begin(problems, *overrides, files): opens the run of these problems, or goes on with it after a step; gives what
    it says."""
    files = Tokenizer.load(tiny_dir / "model").files

    def run(problems: Sequence[Problem], *overrides: str, template: str = "") -> list[str]:
        config, view = load_config(recipe, overrides), Messages()
        more = {"chat_template.jinja": template.encode()} if template else {}
        task = Task(list(problems), [], DataReport(), 20, [])
        with ExitStack() as stack:
            checkpoint_in_name(open_run(config, Tokenizer(files | more), task, view, stack).path, 2)
        return view.said

    return run


@pytest.fixture
def problems(tiny_dir: Path) -> list[Problem]:
    return list(read_problems(tiny_dir / "train.jsonl").problems)


def test_other_answers_under_the_same_uids_are_noticed(begin: Begin, problems: list[Problem]):
    begin(problems)
    begin(problems)
    changed = [*problems[:3], replace(problems[3], gold="17"), *problems[4:]]
    with pytest.raises(UserError, match=r"cannot go on as it began: 1 of its 18 problems .*uid, such as '0\+3'"):
        begin(changed)
    with pytest.raises(UserError, match=r"1 of its 18 problems are not in the data any more, such as '0\+0'"):
        begin(problems[1:])
    with pytest.raises(UserError, match=r"the data has 1 problems that it did not have, such as 'new'"):
        begin([*problems, replace(problems[0], uid="new")])
    with pytest.raises(UserError, match="another order"):
        begin(problems[::-1])


def test_another_template_is_noticed(begin: Begin, problems: list[Problem]):
    first = "{% for message in messages %}{{ message.content }}{% endfor %}="
    begin(problems, template=first)
    begin(problems, template=first + "{# a comment #}")
    with pytest.raises(UserError, match=r"other prompt tokens .*chat template"):
        begin(problems, template=first + "=")


def test_another_source_of_a_reward_is_noticed(
    begin: Begin, problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "resumed_rewards.py"
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    file.write_text(REWARD)
    own = ("verify.random=false", "verify.reward=resumed_rewards:graded")
    begin(problems, *own)
    file.write_text("# longer is better\n" + REWARD)
    begin(problems, *own)
    file.write_text(REWARD.replace("64", "32"))
    with pytest.raises(UserError, match=r"the source of resumed_rewards:graded has changed"):
        begin(problems, *own)
    with pytest.raises(UserError, match=r"holds a run with verify\.reward"):
        begin(problems, "verify.random=false")


def test_what_does_not_decide_may_change(begin: Begin, problems: list[Problem], tiny_dir: Path):
    begin(problems)
    said = begin(
        problems,
        "eval.data=held_out.jsonl",
        "eval.every=2",
        "eval.samples=4",
        f"data.train={tiny_dir}/../{tiny_dir.name}/train.jsonl",
        f"model.path={tiny_dir}/./model",
        "verify.time_limit_s=60.0",
        'verify.functions=["unused:reward"]',
        "data.max_prompt_tokens=9",
    )
    assert len(said) == 1
    assert "eval.samples = 4 (was 32)" in said[0]
    assert "data.train" not in said[0]
    assert "model.path" not in said[0]
    assert begin(problems, "eval.samples=4")[0].startswith("going on with ")


def test_a_schedule_with_more_steps_says_what_becomes_of_the_rate(begin: Begin, problems: list[Problem]):
    begin(problems, "optim.schedule=cosine", "num_steps=2")
    said = begin(problems, "optim.schedule=cosine", "num_steps=4")
    assert said[0] == "going on with num_steps = 4 (was 2)"
    assert said[1].startswith(
        "optim.schedule = 'cosine' now spans 4 steps in place of 2: the rate of step 3 begins at 0.0"
    )


def test_a_constant_rate_is_kept(begin: Begin, problems: list[Problem]):
    begin(problems, "num_steps=2")
    assert begin(problems, "num_steps=4") == ["going on with num_steps = 4 (was 2)"]


def test_a_graded_reward_trains_and_a_resumed_run_may_be_evaluated(
    build: Build, train: Train, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "graded_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ("verify.random=false", "verify.reward=graded_rewards:graded")
    config = build("num_steps=1", *own)
    train(config)
    (step,) = (e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step")
    assert 0 < step["score"] < 1
    assert step["reward"] == pytest.approx(10 * step["score"] - 5)
    assert step["pass_rate"] == 0
    assert step["loss"] != 0
    for line in read_records(Path(config.run.dir), 1):
        assert line["reward"] == 10 * line["score"] - 5 == -5 + line["score"] * 10
    later = build("num_steps=2", *own, f"eval.data={tiny_dir / 'held_out.jsonl'}", "eval.every=2", "eval.samples=2")
    train(later)
    (measured,) = (e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "eval")
    assert 0 < measured["score"] < 1
    train(build("num_steps=3", *own))


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_responses_of_the_step_that_stopped_the_run_are_written(
    build: Build, train: Train, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluates: bool
):
    (tmp_path / "failing_rewards.py").write_text("def f(response, gold):\n    print('seen', gold)\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    held_out = (f"eval.data={tiny_dir / 'held_out.jsonl'}", "eval.every=1", "eval.samples=2") if evaluates else ()
    config = build("num_steps=1", "verify.random=false", "verify.reward=failing_rewards:f", *held_out)
    with pytest.raises(
        RunError, match=r"(16 of 16|14 of 14) .*failing_rewards\.py:3: ZeroDivisionError.* pekoe report"
    ):
        train(config)
    lines = read_records(Path(config.run.dir), 1)
    assert len(lines) == (14 if evaluates else 16)
    assert {line["label"] for line in lines} == {"fault"}
    printed = (Path(config.run.dir) / "logs" / "function-failing_rewards-f.log").read_text()
    assert "seen" in printed
    assert "Traceback" in printed


def test_the_journal_says_what_changed_and_keeps_secrets(build: Build, train: Train):
    config = build("num_steps=1", 'engine.server.env={HF_TOKEN="s3cret"}')
    train(config)
    train(build("num_steps=2", 'engine.server.env={HF_TOKEN="0ther"}', "eval.samples=3"))
    (resumed,) = (e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "resumed")
    assert resumed["changed"] == {"num_steps": [1, 2], "eval.samples": [32, 3]}


def test_what_was_dropped_is_of_the_data_at_hand(begin: Begin, problems: list[Problem], tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.jsonl").write_text("of other data")
    begin(problems)
    assert not (tmp_path / "run" / "data.jsonl").exists()


def test_a_run_that_cannot_be_opened_after_all_frees_its_directory(
    begin: Begin, problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("pekoe.run.build.say_changes", raising(OSError("disk")))
        with pytest.raises(OSError, match="disk") as caught:
            begin(problems)
    begin(problems)  # while `caught` keeps what was open
    assert caught.value is not None


def raising(error: Exception) -> Callable[..., None]:
    def work(*_: object) -> None:
        raise error

    return work
