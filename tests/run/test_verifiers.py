"""Environments of the `verifiers` library are trained on as they are. `make test-verifiers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pekoe.agents import verifiers_env
from pekoe.agents.episodes import check_episode
from pekoe.config import RLConfig
from pekoe.core.errors import RunError, UserError
from pekoe.core.journal import read_lines
from pekoe.core.records import read_records, record_of
from tests.agents import environments_of_verifiers as sources

pytest.importorskip("verifiers.v1", reason="the extra `verifiers` is absent (make test-verifiers has it)")


@pytest.fixture
def environment(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The config of a run on an environment of this name and source; its modules are found in the current directory."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, source: str, *more: str) -> RLConfig:
        (tmp_path / f"{name}.py").write_text(source)
        assert verifiers_env.main([name, "tasks.jsonl", "--limit", "12"]) == 0
        rows = [json.loads(line) for line in Path("tasks.jsonl").read_text().splitlines()]
        assert [row["uid"] for row in rows] == [f"{name}/{number}" for number in range(12)]
        given = f"rollout.episode=verifiers:{name}", "data.train=tasks.jsonl", "verify.random=false"
        return build(*given, "verify.correct_from=0.9", "rollout.max_new_tokens=40", "rollout.turn_tokens=6", *more)

    return make


def steps(config: RLConfig) -> list[dict[str, Any]]:
    return [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step"]


def test_one_turn_is_trained_on(environment, train):
    config = environment("sevens_of_one_turn", sources.SEVENS)
    train(config)
    assert [step["step"] for step in steps(config)] == [1, 2, 3]
    lines = [line for number in (1, 2, 3) for line in read_records(Path(config.run.dir), number)]
    assert len(lines) == 48
    assert {line["episode"]["num_turns"] for line in lines} == {1}
    scores = {line["score"] for line in lines}
    assert len(scores) > 2
    assert all(0 <= score <= 1 for score in scores)
    assert any(step["grad_norm"] > 0 for step in steps(config))


def test_several_turns_are_one_sequence_each(environment, train):
    config = environment("guess_of_several_turns", sources.HIGHER)
    train(config)
    assert all(1 < step["turns"] <= 3 for step in steps(config))
    assert all(step["branches"] == 1 for step in steps(config))
    assert max(step["logprob_diff_max"] for step in steps(config)) <= 1e-4
    lines = read_records(Path(config.run.dir), 1)
    assert {line["episode"]["num_turns"] for line in lines} <= {1, 2, 3}
    assert max(len(line.get("spans", [0])) for line in lines) > 1
    assert all(np.count_nonzero(record_of(line).loss_mask) == len(line["tokens"]) for line in lines)


def test_what_fails_in_the_environment_is_fault(environment, train):
    config = environment("sevens_without_power", sources.BROKEN)
    with pytest.raises(RunError, match="no power"):
        train(config)


def test_what_is_no_environment(environment, tmp_path):
    with pytest.raises(UserError, match="no_such_taskset"):
        check_episode("verifiers:no_such_taskset")
    (tmp_path / "guess_of_two.py").write_text(sources.TWO)
    with pytest.raises(UserError, match="of one agent, got 2"):
        verifiers_env.write_tasks("guess_of_two", "tasks.jsonl")
    assert verifiers_env.main(["guess_of_two", "tasks.jsonl"]) == 2


def test_tasks_that_are_others_by_now(environment, train, tmp_path):
    config = environment("sevens_that_change", sources.SEVENS)
    rows = [json.loads(line) for line in Path("tasks.jsonl").read_text().splitlines()]
    Path("tasks.jsonl").write_text("".join(f"{json.dumps(row | {'task_key': 'x'})}\n" for row in rows))
    with pytest.raises(RunError, match="as it was written, got another"):
        train(config)
