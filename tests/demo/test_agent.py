"""The demo of agents: its calculator, its data and its recipe."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pekoe.agents.episodes import check_episode
from pekoe.config.recipes import RLConfig, load_config
from pekoe.core.errors import UserError
from pekoe.core.types import Problem
from pekoe.data.problems import read_demonstrations, read_problems
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.agent import episode, main, make_data, recipe


class Scripted:
    """Answers in an order that is given."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[Any]()

    async def complete(self, messages: Any) -> Any:
        self.asked.append(list(messages))
        content = self.answers.pop(0)
        return SimpleNamespace(content=content, message={"role": "assistant", "content": content})


def test_the_calculator_answers_what_is_asked_and_an_answer_ends_the_episode():
    client: Any = Scripted("?37*84", "\\boxed{3108}")
    asyncio.run(episode(Problem("37*84", ({"role": "user", "content": "37*84="},), "3108"), client))
    assert client.asked[1][-1] == {"role": "tool", "content": "3108"}
    assert client.answers == []
    guess: Any = Scripted("\\boxed{1}", "never")
    asyncio.run(episode(Problem("37*84", ({"role": "user", "content": "37*84="},), "3108"), guess))
    assert guess.answers == ["never"]


def test_the_demo_s_sets_are_disjoint_and_its_recipe_loads(tmp_path: Path):
    make_data(tmp_path, 0)
    held_out, train = (read_problems(tmp_path / "data" / f"{n}.jsonl").problems for n in ("held_out", "train"))
    shown = read_demonstrations(tmp_path / "data" / "demonstrations.jsonl").demonstrations
    sets = [{p.uid for p in held_out}, {p.uid for p in train}, {d.messages[0]["content"][:-1] for d in shown}]
    assert sum(map(len, sets)) == len(set.union(*sets))
    config = load_config(recipe(tmp_path, "rl", "start", 0), kind=RLConfig)
    check_episode(config.rollout.episode or "")
    longest = [*shown[0].messages, *shown[1].messages[1:]]
    assert len(Tokenizer.load(tmp_path / "start").encode_prompt(longest)) < 48


def test_a_directory_of_something_else_is_not_removed(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="expected a new directory or one of an earlier demo"):
        main(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
