"""A function of the user's own, found by its import path."""

from __future__ import annotations

from pathlib import Path

import pytest

from pekoe.core.errors import RunError, UserError
from pekoe.verify import JudgePool
from pekoe.verify.kinds import find_kind

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
    with JudgePool(num_workers=1, time_limit_s=2) as pool:
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
    with JudgePool(num_workers=1) as pool, pytest.raises(RunError, match=r"cannot start: .*no_such_module"):
        pool.submit("x", 1, "function:no_such_module:f").result()


@pytest.mark.parametrize("name", ["function:no_colon", "function:a b:c", "function:os.path:join()"])
def test_a_malformed_path_is_refused_and_nothing_imported(name: str):
    with pytest.raises(UserError, match=r"expected a kind function:PACKAGE\.MODULE:NAME"):
        find_kind(name)
