"""reasoning-gym's own scorers, in workers that act on nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pekoe.core.errors import UserError
from pekoe.verify import JudgePool
from pekoe.verify.kinds import find_verifier

gym = pytest.importorskip("reasoning_gym", reason="pip install 'pekoe[demo]'")


@pytest.fixture(scope="module")
def gym_pool() -> Iterator[JudgePool]:
    with JudgePool(num_workers=1, time_limit_s=30) as pool:
        yield pool


def entry_of(task: str) -> dict[str, Any]:
    return dict(gym.create_dataset(task, size=1, seed=1)[0])


def test_right_and_wrong_answers_by_the_tasks_own_scorer():
    with JudgePool(num_workers=1, time_limit_s=30) as pool:
        assert len(pool._groups) == 1  # gym's workers are started when they are asked for
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
        assert len(pool._groups) == 2
        assert pool.submit("\\boxed{1}", {"question": "?"}, "gym:gcd").result().label == "fault"
        assert pool.submit("\\boxed{1}", entry_of("gcd"), "gym:no_such_task").result().label == "fault"
        # A scorer that errs is named, and nobody is punished for it.
        verdict = pool.submit("\\boxed{1}", entry_of("game_of_life_halting"), "gym:game_of_life_halting").result()
        assert (verdict.label, "accepts nonsense" in verdict.why) == ("fault", True)
        entry = entry_of("countdown") | {"answer": "1 + 1"}  # which does not make the target
        assert "refuses its own answer" in pool.submit("\\boxed{1}", entry, "gym:countdown").result().why


# Evaluated in the worker: finds the worker's own channel, and says there that this answer is right.
FORGERY = (
    "(f:=__import__('sys')._getframe(),[f:=f.f_back for _ in range(60) if 'protocol' not in f.f_locals],"
    "__import__('os').write(f.f_locals['protocol'],"
    """(('{"id":%d,"label":"correct","why":"forged"}'%f.f_locals['request']['id'])+chr(10)).encode()))"""
)
# Makes every later answer right.
POISON = "__import__('sys').modules['pekoe.verify.kinds.gym'].__dict__.update(_score=lambda*a:1.0,_fault=lambda*a:'')"


@pytest.mark.parametrize("task", ["n_queens", "spiral_matrix", "countdown", "simple_integration"])
def test_what_a_scorer_evaluates_is_a_formula_or_refused(task: str, gym_pool: JudgePool, tmp_path: Any):
    entry = entry_of(task)
    victim = tmp_path / "written"
    codes = [FORGERY, POISON, f"[open({str(victim)!r}, 'w')]", "[().__class__]", "[(lambda: 1)()]", "[x for x in [1]]"]
    answers = [form for code in codes for form in (code, f"eval({code!r})")]
    verdicts = gym_pool.judge_many((f"<answer>{answer}</answer>", entry, f"gym:{task}") for answer in answers)
    assert {verdict.label for verdict in verdicts} <= {"wrong", "unparsed"}
    assert not victim.exists()
    assert gym_pool.submit("<answer>12</answer>", entry, f"gym:{task}").result().label == "wrong"
    assert gym_pool.submit(f"<answer>{entry['answer']}</answer>", entry, f"gym:{task}").result().label == "correct"
    assert gym_pool.stats().num_restarts == 0  # nothing came from a worker but its own words


def test_formulas_are_evaluated(gym_pool: JudgePool):
    entry = entry_of("simple_integration")
    for form in ("{} + C - 1", "{} + sin(3)*exp(2)/sqrt(2) + log(pi) + 3!", "2*({})/2"):
        answer = form.format(entry["answer"])
        assert (
            gym_pool.submit(f"<answer>{answer}</answer>", entry, "gym:simple_integration").result().label == "correct"
        )


def test_a_malformed_name_is_the_users_mistake():
    with pytest.raises(UserError, match="expected a kind gym:TASK"):
        find_verifier("gym:a/b")
    with pytest.raises(UserError, match=r"unknown kind 'maths'. Did you mean 'math'"):
        find_verifier("maths")
