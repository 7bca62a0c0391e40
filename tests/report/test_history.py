"""What the report reads of a run directory, and how much of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from pekoe.core.errors import UserError
from pekoe.report.history import read_history
from tests.report.conftest import response, step_event, write_run


def test_a_run_is_read_with_its_ledger_and_its_responses_by_token(run_dir: Path):
    history = read_history(run_dir, decode=lambda tokens: f"<{tokens[0]}>")
    assert [step["step"] for step in history.steps] == [1, 2]
    assert history.ledger == {"trained": 1, "dropped: all right": 2}
    assert [(line["step"], line["group"], line["sample"]) for line in history.responses] == [
        *((1, 0, i) for i in range(4)),
        (2, 1, 0),  # of two files, as nodes of a cluster write
        (2, 1, 1),
    ]
    assert history.pieces == {2: "<2>", 3: "<3>"}
    assert history.responses[0]["logprobs"] == [-0.25, -1.5]
    assert history.left_out == ""


def test_without_a_tokenizer_there_is_text(run_dir: Path):
    history = read_history(run_dir)
    assert history.pieces is None
    assert history.responses[0]["text"] == "ab"
    assert "tokens" not in history.responses[0]


def test_of_many_steps_whole_groups_are_kept_the_first_and_the_last_among_them(tmp_path: Path):
    rollouts = {f"{step:06d}": [response(g, i) for g in range(5) for i in range(2)] for step in range(1, 41)}
    run = write_run(tmp_path / "run", [step_event(step) for step in range(1, 41)], rollouts)
    history = read_history(run, max_bytes=20_000)
    steps = sorted({line["step"] for line in history.responses})
    assert steps[0] == 1
    assert steps[-1] == 40
    assert 10 < len(steps) < 41
    assert max(b - a for a, b in pairwise(steps)) <= 4
    groups = {(line["step"], line["group"]) for line in history.responses}
    assert len(history.responses) == 2 * len(groups)
    assert "of 40 steps are here" in history.left_out


def test_of_a_long_response_the_beginning_and_the_end_are_shown(tmp_path: Path):
    long = response(0, 0, tokens=list(range(5000)), logprobs=[-1.0] * 5000)
    run = write_run(tmp_path / "run", [step_event(1)], {"000001": [long]})
    (line,) = read_history(run, decode=str).responses
    assert line["length"] == 5000
    assert line["cut"] == 3500
    assert line["tokens"][:2] == [0, 1]
    assert line["tokens"][-1] == 4999
    assert len(line["logprobs"]) == len(line["tokens"]) == 1500


def test_a_path_that_is_no_run_directory_is_refused_with_the_runs_below_it(run_dir: Path):
    with pytest.raises(UserError, match=r"got the runs run below it"):
        read_history(run_dir.parent)
    with pytest.raises(UserError, match=r"got nothing there"):
        read_history(run_dir / "not")


def test_of_an_agent_what_stands_between_answers_is_shown_and_which_branch_it_is(tmp_path: Path):
    turns = [["1+6=", "?1+6"], ["<tool>7", "7"], ["<tool>again", ""]]
    line = response(0, 1, spans=[[1, 2], [3, 1], [2, 1]], turns=turns, text="?1+6", branch=1)
    run = write_run(tmp_path / "run", [step_event(1)], {"000001": [response(0, 0), line]})
    first, second = read_history(run, decode=str).responses
    assert "between" not in first
    assert second["between"] == [[2, "<tool>7"], [3, "<tool>again"]]
    assert second["branch"] == 1
    assert read_history(run).responses[1]["text"] == "?1+6<tool>77<tool>again"
