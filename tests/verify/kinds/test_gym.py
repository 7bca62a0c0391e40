"""reasoning-gym's own scorers, in workers that act on nothing."""

from __future__ import annotations

from typing import Any

import pytest

from pekoe.core.errors import UserError
from pekoe.verify import JudgePool
from pekoe.verify.kinds import find_kind

gym = pytest.importorskip("reasoning_gym", reason="pip install 'pekoe[demo]'")


def entry_of(task: str) -> dict[str, Any]:
    return dict(gym.create_dataset(task, size=1, seed=1)[0])


def test_right_and_wrong_answers_by_the_tasks_own_scorer():
    with JudgePool(num_workers=1, time_limit_s=30) as pool:
        assert len(pool._rooms) == 1  # gym's workers are started when they are asked for
        for task in ("chain_sum", "gcd", "knights_knaves"):
            entry = entry_of(task)
            right, tagged, wrong = (
                f"\\boxed{{{entry['answer']}}}",
                f"<answer>{entry['answer']}</answer>",
                "\\boxed{no}",
            )
            items = [(answer, entry, f"gym:{task}") for answer in (right, tagged, wrong, entry["answer"])]
            labels = [verdict.label for verdict in pool.judge_many(items)]
            assert labels == ["correct", "correct", "wrong", "unparsed"], task
        assert len(pool._rooms) == 2
        assert pool.submit("\\boxed{1}", {"question": "?"}, "gym:gcd").result().label == "fault"
        assert pool.submit("\\boxed{1}", entry_of("gcd"), "gym:no_such_task").result().label == "fault"
        # A scorer that errs is named, and nobody is punished for it.
        verdict = pool.submit("\\boxed{1}", entry_of("game_of_life_halting"), "gym:game_of_life_halting").result()
        assert (verdict.label, "accepts nonsense" in verdict.why) == ("fault", True)
        entry = entry_of("countdown") | {"answer": "1 + 1"}  # which does not make the target
        assert "refuses its own answer" in pool.submit("\\boxed{1}", entry, "gym:countdown").result().why


def test_what_a_scorer_executes_acts_on_nothing(tmp_path: Any):
    """countdown's scorer evaluates the answer: here one that would write a file."""
    entry = entry_of("countdown")
    victim = tmp_path / "written"
    attack = f"[open({str(victim)!r}, 'w')]"
    with JudgePool(num_workers=1, time_limit_s=30) as pool:
        assert pool.submit(f"\\boxed{{{attack}}}", entry, "gym:countdown").result().label in (
            "wrong",
            "unparsed",
            "fault",
        )
        assert pool.submit(f"\\boxed{{{entry['answer']}}}", entry, "gym:countdown").result().label == "correct"
    assert not victim.exists()


def test_a_malformed_name_is_the_users_mistake():
    with pytest.raises(UserError, match="expected a kind gym:TASK"):
        find_kind("gym:a/b")
    with pytest.raises(UserError, match=r"unknown kind 'maths'. Did you mean 'math'"):
        find_kind("maths")
