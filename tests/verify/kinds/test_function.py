"""A function of the user's own, found by its import path."""

from __future__ import annotations

from pathlib import Path

import pytest

from pekoe.core.errors import RunError, UserError
from pekoe.verify import JudgePool
from pekoe.verify.kinds import find_verifier

SOURCE = """
from pekoe.core.types import Verdict

def length(response, gold):
    return len(response) == gold

def share(response, gold):
    return response.count("a") / gold

def verdict(response, gold):
    return Verdict("unparsed", None, "never mind")

def broken(response, gold):
    return response.undefined

def odd(response, gold):
    return "yes"

def bomb(response, gold):
    while response == "bomb":
        pass
    return True
"""


def test_what_it_returns_is_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["length", "share", "verdict", "broken", "odd", "bomb"]
    functions = [f"my_rewards:{name}" for name in names]
    with JudgePool(num_workers=1, time_limit_s=1, functions=functions) as pool:
        cases = [
            ("abc", 3, "length", "correct"),
            ("abc", 4, "length", "wrong"),
            ("aab", 2, "share", "correct"),
            ("aab", 4, "share", "wrong"),
            ("x", 1, "verdict", "unparsed"),
            ("x", 1, "broken", "fault"),
            ("x", 1, "odd", "fault"),
            ("bomb", 1, "bomb", "unparsed"),
            ("fine", 1, "bomb", "correct"),
        ]
        futures = [pool.submit(response, gold, f"function:my_rewards:{name}") for response, gold, name, _ in cases]
        assert [future.result().label for future in futures] == [label for *_, label in cases]
        assert "AttributeError" in futures[5].result().why
        assert "expected bool, float or Verdict, got str" in futures[6].result().why
    missing = JudgePool(num_workers=1, functions=["no_such_module:f"])
    with missing as pool, pytest.raises(RunError, match=r"cannot start: .*no_such_module"):
        pool.submit("x", 1, "function:no_such_module:f").result()


@pytest.mark.parametrize("name", ["function:no_colon", "function:a b:c", "function:os.path:join()"])
def test_a_malformed_path_is_refused_and_nothing_imported(name: str):
    with pytest.raises(UserError, match=r"expected a kind function:PACKAGE\.MODULE:NAME"):
        find_verifier(name)


def test_a_row_cannot_run_a_function_that_the_recipe_does_not_list(tmp_path: Path):
    """The response is the model's text: `builtins.exec` as its judge would run it."""
    target = tmp_path / "written"
    response = f"open({str(target)!r}, 'w')"
    with JudgePool(num_workers=1, functions=["rewards:shows_work"]) as pool:
        with pytest.raises(
            UserError, match=r"listed in verify\.functions .*\(rewards:shows_work\), got 'function:builtins:exec'"
        ):
            pool.submit(response, {}, "function:builtins:exec")
        with pytest.raises(UserError, match="Did you mean 'rewards:shows_work'"):
            pool.submit(response, {}, "function:rewards:show_work")
    assert not target.exists()
    with pytest.raises(UserError, match=r"verify\.functions: expected PACKAGE\.MODULE:NAME, got 'rewards'"):
        JudgePool(functions=["rewards"])


BIG = """
import numpy

def reserves(response, gold):
    return numpy.empty(gold, numpy.uint8).size > 0  # reserved, not touched
"""


def test_a_reward_may_be_given_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "big_rewards.py").write_text(BIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    functions, size = ["big_rewards:reserves"], 1200 << 20
    for memory_gib, label in ((1, "unparsed"), (2, "correct")):
        with JudgePool(num_workers=1, memory_limit_bytes=memory_gib << 30, functions=functions) as pool:
            assert pool.submit("x", size, "function:big_rewards:reserves").result().label == label
