"""A function of the user's own, found by its import path."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Verdict
from pekoe.verify import JudgePool
from pekoe.verify.kinds import find_verifier
from pekoe.verify.kinds.function import Options, make_verifier

SOURCE = """
from pekoe.core.types import Verdict

def length(response, gold):
    return len(response) == gold

def share(response, gold):
    return response.count("a") / gold

def verdict(response, gold):
    return Verdict("unparsed", None, "never mind")

def loose(response, gold):
    import numpy
    return Verdict("correct", 42, "", numpy.float32(0.5))

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
    names = ["length", "share", "verdict", "broken", "odd", "bomb", "loose"]
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
            ("x", 1, "loose", "correct"),  # its types are not JSON's
        ]
        futures = [pool.submit(response, gold, f"function:my_rewards:{name}") for response, gold, name, _ in cases]
        assert [future.result().label for future in futures] == [label for *_, label in cases]
        assert futures[3].result() == Verdict("wrong", None, "score 0.5", 0.5)
        assert f"{tmp_path / 'my_rewards.py'}:18: AttributeError" in futures[5].result().why
        assert "expected bool, float or Verdict, got str" in futures[6].result().why
        assert futures[9].result() == Verdict("correct", "42", "", 0.5)
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
    with pytest.raises(UserError, match=r"expected a module, not its file: rewards:f, got 'rewards\.py:f'"):
        JudgePool(functions=["rewards.py:f"])


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


CALLS = r"""
import numpy

def by_name(response, gold, *, prompt, row, difficulty, limit=3):
    return [response, gold, prompt, row["difficulty"], difficulty, limit] == ["r", "g", "2+3=", 7, 7, 9]

def own_names(text, target):
    return (text, target) == ("r", "g")

def no_gold(text, prompt):
    return (text, prompt) == ("r", "2+3=")

def everything(response, gold, **columns):
    return columns["difficulty"] == 7 and columns["limit"] == 9

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    right = (data_source, solution_str, ground_truth, extra_info) == ("gsm8k", "r", "g", {"index": 1})
    return {"score": 0.25, "acc": right, "pred": "12"}

def trl(prompts, completions, difficulty, **kwargs):
    assert prompts == ["2+3="] and kwargs["gold"] == ["g"]
    return [0.5 * (c == "r") * (d == 7) for c, d in zip(completions, difficulty)]

def trl_chat(completions, **kwargs):
    return [float(c[0]["content"] == "r") for c in completions]

def needs(response, gold, level):
    return True

def number(response, gold):
    return numpy.float32(0.5)

def signed(response, gold):
    return float(response)

def quits(response, gold):
    raise SystemExit("enough")

def helper(x):
    return 1 / x

def divides(response, gold):
    return helper(0)

def cancelled(response, gold):
    import asyncio
    raise asyncio.CancelledError

def half(response, gold):
    return {"score": 1.0, "pred": "\ud800"}

def odd_label(response, gold):
    from pekoe.core.types import Verdict
    return Verdict("right")
"""
CONTEXT = {
    "messages": ({"role": "prompt", "content": "2+3="},),
    "row": {"difficulty": 7, "data_source": "gsm8k", "extra_info": {"index": 1}, "gold": "g", "response": "other"},
}


@pytest.fixture
def decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verdict]:
    """decide(name, response, context, **options): the verdict of a function of CALLS, in this process."""
    (tmp_path / "calls.py").write_text(CALLS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "calls", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(name: str, response: str = "r", context: Any = CONTEXT, **options: Any) -> Verdict:
        verifier = make_verifier(f"calls:{name}", Options(**options))
        assert verifier.decide is not None
        return verifier.decide(response, "g", context)

    return run


LIMIT = {"arguments": {"limit": 9}}
CHAT = CONTEXT | {"messages": ({"role": "user", "content": "2+3="},)}


@pytest.mark.parametrize(
    ("name", "context", "options", "expected"),
    [
        ("by_name", CONTEXT, LIMIT, Verdict("correct")),
        ("own_names", CONTEXT, {}, Verdict("correct")),
        ("own_names", None, {}, Verdict("correct")),
        ("no_gold", CONTEXT, {}, Verdict("correct")),
        ("everything", CONTEXT, LIMIT, Verdict("correct")),
        ("compute_score", CONTEXT, {}, Verdict("correct", "12", "score 0.25", 0.25)),
        ("trl", CONTEXT, {}, Verdict("wrong", None, "score 0.5", 0.5)),
        ("trl_chat", CHAT, {}, Verdict("correct", None, "score 1", 1.0)),
        ("number", CONTEXT, {"correct_from": 0.5}, Verdict("correct", None, "score 0.5", 0.5)),
    ],
)
def test_a_function_is_given_what_its_parameters_are_called(
    decide: Callable[..., Verdict], name: str, context: Any, options: Any, expected: Verdict
):
    assert decide(name, "r", context, **options) == expected


@pytest.mark.parametrize(("response", "score"), [("-2", 0.0), ("0", 0.5), ("2", 1.0)])
def test_a_number_is_a_score_by_the_range_that_the_recipe_says(
    decide: Callable[..., Verdict], response: str, score: float
):
    assert decide("signed", response, low=-2.0, high=2.0).score == score


@pytest.mark.parametrize(
    ("name", "response", "why"),
    [
        (
            "signed",
            "1.5",
            r"ValueError: function:calls:signed: expected a score in \[0, 1\] \(verify.score_range\), got 1.5",
        ),
        ("signed", "nan", r"score in \[0, 1\] .*, got nan"),
        ("needs", "r", r"argument in verify.arguments for its parameter 'level', got none. Valid|Did you mean"),
        ("divides", "r", r"^the reward failed: calls.py:\d+: ZeroDivisionError: division by zero"),
        ("quits", "r", r"^the reward failed: calls.py:\d+: SystemExit: enough"),
        ("cancelled", "r", r"^the reward failed: calls.py:\d+: CancelledError: "),
        ("odd_label", "r", r"expected a label of .*, got 'right'"),
    ],
)
def test_what_a_function_does_wrong_is_a_fault_with_its_place(
    decide: Callable[..., Verdict], name: str, response: str, why: str
):
    verdict = decide(name, response)
    assert verdict.label == "fault"
    assert re.search(why, verdict.why)


def test_an_argument_that_the_function_does_not_take_is_refused_before_anything_is_judged(decide: Any):
    with pytest.raises(
        TypeError, match=r"verify\.arguments: expected arguments that calls:by_name takes, got 'limmit'"
    ):
        decide("by_name", arguments={"limmit": 9})


def test_a_name_that_the_module_lacks_is_said_with_the_nearest(decide: Any):
    with pytest.raises(AttributeError, match=r"expected a function of calls, got 'sined'\. Did you mean 'signed'"):
        decide("sined")


def test_a_module_that_is_not_there_is_said_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near_rewards.py").write_text("import no_such_module\n")
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the function's own worker extends
    decide, importing = (make_verifier(f"{name}:f").decide for name in ("near_reward", "near_rewards"))
    assert decide is not None
    assert importing is not None
    with pytest.raises(ModuleNotFoundError, match=r"or a file in .*, got 'near_reward'\. Did you mean 'near_rewards'"):
        decide("x", 1, None)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'"):  # what it imports
        importing("x", 1, None)


def test_what_was_read_reaches_the_verdict(decide: Callable[..., Verdict]):
    assert decide("own_names", r"so \boxed{12}").extracted == "12"
    assert decide("own_names", "no answer").extracted is None
    assert decide("half").extracted == "?"  # what no file could hold


PRINTS = """
from pekoe.core.types import Verdict
print("imported")

def loud(response, gold, row):
    print("judging", response)
    return Verdict("wrong", "seen " + row["x"], "", 0.4)
"""


def test_the_pool_hands_over_rows_and_keeps_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "loud_rewards.py").write_text(PRINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    functions, kind = ["loud_rewards:loud"], "function:loud_rewards:loud"
    with JudgePool(num_workers=1, functions=functions, log_dir=tmp_path / "logs") as pool:
        rows = [{"x": "1"}, {"x": "2"}, {"x": "1"}]  # another row is another item; the third is known
        verdicts = [pool.submit("abc", 1, kind, {"messages": (), "row": row}).result() for row in rows]
        assert [verdict.extracted for verdict in verdicts] == ["seen 1", "seen 2", "seen 1"]
        assert {verdict.score for verdict in verdicts} == {0.4}
        assert pool.stats().num_memo_hits == 1
    printed = (tmp_path / "logs" / "function-loud_rewards-loud.log").read_text()
    assert printed == "imported\njudging abc\njudging abc\n"
