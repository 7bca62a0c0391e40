"""Turns are laid out as sequences; records on disk keep them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pekoe.agents.turns import branches_of, cut
from pekoe.core.records import read_groups, read_records, record_of, spans_of, write_groups, write_records
from pekoe.core.types import Completion, EpisodeStats, JudgedGroup, Problem, Record, Trajectory, Turn, Verdict


def turn(context: list[int], own: list[int], version: int = 0, expert: int | None = None) -> Turn:
    """`expert`: of every token that the engine computed, the last left out."""
    tokens, logprobs = np.array(own), -np.arange(1, len(own) + 1, dtype=np.float32)
    routing = None if expert is None else np.full((len(context) + len(own) - 1, 1, 2), expert, np.uint8)
    record = Record.of(np.array(context), tokens, logprobs, routing)
    return Turn(np.array(context), Completion(len(own), "stop", ((version, 0),), record))


def test_turns_extend_what_they_begin_with_and_branch_elsewhere():
    turns = [turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5], [6], 1), turn([1, 2, 3, 4, 7], [8, 9], 2), turn([1, 9], [3])]
    branches = branches_of(turns)
    records = [branch.handle.resolve() for branch in branches]
    assert [record.tokens.tolist() for record in records] == [[1, 2, 3, 4, 5, 6], [1, 9, 3], [1, 2, 3, 4, 7, 8, 9]]
    assert [spans_of(record) for record in records] == [[(2, 2), (1, 1)], [(2, 1)], [(5, 2)]]
    assert [branch.versions for branch in branches] == [((0, 0), (1, 2)), ((0, 0),), ((2, 0),)]
    assert records[0].logprobs.tolist() == [0, 0, -1, -2, 0, -1]
    again = branches_of(turns[::-1])
    assert [b.handle.resolve().tokens.tolist() for b in again] == [r.tokens.tolist() for r in records]


def test_a_turn_that_is_cut_keeps_what_was_sampled_first():
    both = Turn(np.arange(2), Completion(3, "length", ((0, 0), (1, 2)), turn([0, 1], [4, 5, 6]).completion.handle))
    short = cut(both, 2, "stop").completion
    assert (short.tokens.tolist(), short.logprobs.tolist(), short.versions) == ([4, 5], [-1, -2], ((0, 0),))


def test_tokens_keep_the_experts_with_which_they_were_sampled():
    """The last token of an answer, which no engine had computed by then, has those of the next turn's context."""
    turns = [turn([1, 2], [3, 4], expert=7), turn([1, 2, 3, 4, 5], [6, 9], 1, 8), turn([9], [3], expert=6)]
    found = [branch.handle.resolve().routing for branch in branches_of(turns)]
    expected = [[6, 255], [7, 7, 7, 8, 8, 8, 255]]
    assert sorted(r[:, 0, 1].tolist() for r in found if r is not None) == expected
    mixed = branches_of([turns[0], turn([1, 2, 3, 4, 5], [6])])
    assert mixed[0].handle.resolve().routing is None
    short = cut(turns[1], 1, "stop").completion.handle.resolve()
    assert short.routing is not None
    assert len(short.routing) == len(short.tokens) == 6


def test_records_of_several_turns_come_back_from_disk(tmp_path: Path):
    branches = branches_of([turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5], [6], 1), turn([9], [3])])
    records = [branch.handle.resolve() for branch in branches]
    common = {"uid": "a", "group": 0, "sample": 0}
    write_records(tmp_path / "rollouts" / "step-000001", [common | {"branch": i} for i in range(2)], records)
    lines = read_records(tmp_path, 1)
    assert ["spans" in line for line in lines] == [len(spans_of(record)) > 1 for record in records]
    for line, record in zip(lines, records, strict=True):
        again = record_of(line)
        assert np.array_equal(again.tokens, record.tokens)
        assert np.array_equal(again.loss_mask, record.loss_mask)
        assert np.array_equal(again.logprobs, record.logprobs)
    stats = EpisodeStats(3, 1, 0, 0.5, 0.25)
    trajectories = tuple(Trajectory("a", 0, i, "stop", branches, stats) for i in range(2))
    problem = Problem("a", ({"role": "user", "content": "?"},), "1")
    group = JudgedGroup(problem, 0, trajectories, (Verdict("correct"), Verdict("wrong", score=0.25)))
    write_groups(tmp_path / "in-flight", [group])
    (back,) = read_groups(tmp_path / "in-flight", {"a": problem})
    assert back.verdicts == group.verdicts
    for mine, other in zip(back.trajectories, group.trajectories, strict=True):
        assert (mine.sample, mine.finish, mine.episode) == (other.sample, other.finish, other.episode)
        assert [(b.num_prompt_tokens, b.num_tokens, b.versions) for b in mine.branches] == [
            (b.num_prompt_tokens, b.num_tokens, b.versions) for b in other.branches
        ]
        assert [b.handle.resolve().loss_mask.tolist() for b in mine.branches] == [r.loss_mask.tolist() for r in records]
