"""A class with `reset()` whose other methods are tools, as an episode."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import numpy as np
import pytest

from pekoe.agents.environments import episode_of, schema_of
from pekoe.agents.episodes import check_episode
from pekoe.agents.session import Dispatcher, Session
from pekoe.agents.tools import AnswerParser, check_tools
from pekoe.core.errors import UserError
from pekoe.core.types import Problem, SamplingParams
from tests.agents.sampling import text_tokenizer
from tests.agents.scripted import ScriptedSampler


class Counter:
    """Counts to the row's target."""

    reward: float | None = None

    def reset(self, target: int, **row: Any) -> str:
        self.count, self.target, self.reward = 0, target, 0.0
        return f" to {target}"

    def add(self, amount: int, how: Literal["up", "down"] = "up") -> int:
        """Add to the count.

        Args:
            amount (int): how much
            how: the direction

        Returns:
            The count.
        """
        if amount > 5:
            raise ValueError("at most 5")
        self.count += amount if how == "up" else -amount
        self.reward = float(self.count == self.target)
        return self.count

    async def look(self) -> dict[str, int]:
        """See the count."""
        return {"count": self.count}

    def break_down(self) -> None:
        raise OSError("no power")

    def _hidden(self) -> None: ...


PROBLEM = Problem("a", ({"role": "user", "content": "count"},), "x", row={"target": 3, "other": 1})
episode = episode_of(Counter)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def play(*texts: str, problem: Problem = PROBLEM, episode: Any = episode) -> tuple[Any, str]:
    """What the episode returns, and the text of its one sequence."""
    tokenizer = text_tokenizer()
    params = SamplingParams(max_new_tokens=2000)
    sampler = ScriptedSampler(tokenizer, *texts)
    session = Session(Dispatcher(sampler), tokenizer, params, "a", parser=AnswerParser.of(tokenizer))
    result = asyncio.run(episode(problem, session))
    (branch,) = session.trajectory().branches
    record = branch.handle.resolve()
    assert np.count_nonzero(record.loss_mask) == sum(len(text) + 1 for text in texts)
    return result, tokenizer.decode(record.tokens)


def test_tools_are_called_until_none_is():
    result, text = play(call("add", amount=2), f"{call('add', amount=1)}\n{call('look')}", "done")
    assert result == 1.0
    assert text.startswith("<|user|>addbreak_downlook<|user|>ucount to 3<|assistant|>")
    assert "<|user|>t2<|assistant|>" in text
    assert '<|user|>t3<|user|>t{"count": 3}<|assistant|>done<|end|>' in text


def test_what_the_model_does_wrong_it_is_told():
    bad = [call("fly"), call("add", amont=1), call("add", amount=9), call("add", amount=3, how="down"), "done"]
    result, text = play(*bad)
    assert result == 0.0
    for told in (
        "among add, break_down, look, got fly",
        "missing a required argument: 'amount'",
        "terror: at most 5",
        "t-3",
    ):
        assert told in text


def test_what_breaks_in_a_tool_is_raised():
    with pytest.raises(OSError, match="no power"):
        play(call("break_down"), "done")


def test_without_a_reward_the_judge_decides():
    class Silent:
        def reset(self) -> None: ...

        def look(self) -> str:
            return "nothing"

    assert play(call("look"), "done", episode=episode_of(Silent))[0] is None


def test_two_episodes_have_environments_of_their_own():
    assert [play(call("add", amount=3), "done")[0] for _ in range(2)] == [1.0, 1.0]


def test_a_schema_is_made_of_the_signature_and_the_docstring():
    schema = schema_of(Counter.add, "add")
    check_tools([schema])
    assert schema["function"] == {
        "name": "add",
        "description": "Add to the count.",
        "parameters": {
            "type": "object",
            "properties": {
                "amount": {"type": "integer", "description": "how much"},
                "how": {"enum": ["up", "down"], "description": "the direction"},
            },
            "required": ["amount"],
        },
    }

    class Typed:
        def tool(self, a: list[str], b: int | None, c: dict[str, int], d: Any = 1) -> None: ...

    assert schema_of(Typed.tool, "tool")["function"]["parameters"]["properties"] == {
        "a": {"type": "array", "items": {"type": "string"}},
        "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "c": {"type": "object"},
        "d": {},
    }


def test_it_can_be_named_in_a_recipe():
    assert check_episode(f"{__name__}:episode") is episode


def test_classes_that_are_no_environments():
    class Bare:
        def reset(self) -> None: ...

    class Untyped(Bare):
        def tool(self, a): ...

    class Strange(Bare):
        def tool(self, a: complex) -> None: ...

    for wrong, message in (
        (int, "with reset"),
        (Bare, "beside reset"),
        (Untyped, "a type hint"),
        (Strange, "among str"),
    ):
        with pytest.raises(UserError, match=message):
            episode_of(wrong)
