"""Programs that exist, as episodes: they are given an address and a key, and what they say is recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pekoe.config import RLConfig
from pekoe.core.errors import RunError
from pekoe.core.journal import read_lines
from pekoe.core.records import read_records

PROGRAM = """
import asyncio, os, subprocess, sys
import anthropic, openai

async def chat(problem, client):
    async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0) as model:
        messages = list(problem.messages)
        for _ in range(3):
            answer = await model.chat.completions.create(model="gpt-4o", messages=messages, max_tokens=3)
            messages += [answer.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "1"}]
    return len(set(answer.choices[0].message.content)) % 4 / 3

def talk(url, key, question):
    with anthropic.Anthropic(base_url=url, api_key=key, max_retries=0) as model:
        for _ in range(2):
            model.messages.create(model="claude", max_tokens=3, messages=[{"role": "user", "content": question}])

async def in_a_thread(problem, client):
    await asyncio.to_thread(talk, client.base_url, client.api_key, problem.messages[0]["content"])
    return None

async def other_process(problem, client):
    code = "import os, httpx; u, k = os.environ['OPENAI_BASE_URL'], os.environ['OPENAI_API_KEY'];" \\
        "r = httpx.post(u + '/chat/completions', headers={'authorization': 'Bearer ' + k}," \\
        " json={'max_tokens': 3, 'messages': [{'role': 'user', 'content': '1+2='}]}); r.raise_for_status()"
    env = {**os.environ, "OPENAI_BASE_URL": client.base_url, "OPENAI_API_KEY": client.api_key}
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], env=env, check=True)
    return 1.0

async def endless(problem, client):
    async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0) as model:
        while True:
            await model.chat.completions.create(model="m", messages=list(problem.messages), max_tokens=1)

first = []
async def with_the_key_of_another(problem, client):
    first.append(client.api_key)
    async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0) as model:
        ask = lambda model: model.chat.completions.create(model="m", messages=list(problem.messages), max_tokens=1)
        await ask(model)
        if client.api_key == first[0]:
            return 0.0
        await asyncio.sleep(0.5)
        try:
            await ask(model.with_options(api_key=first[0]))
        except openai.AuthenticationError:
            return 1.0
"""


@pytest.fixture
def episode(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RLConfig]:
    """The config of a run whose episodes are this function's, by its name."""
    (tmp_path / "programs.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "programs", raising=False)
    from pekoe.core.functions import load_function

    load_function.cache_clear()
    return lambda name, *more: build(f"rollout.episode=programs:{name}", "verify.random=false", *more)


def records_of(config: RLConfig) -> list[dict[str, Any]]:
    steps = [e["step"] for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step"]
    return [line for step in steps for line in read_records(Path(config.run.dir), step)]


@pytest.mark.parametrize(("name", "turns", "branches"), [("chat", 3, {0}), ("in_a_thread", 2, {0, 1})])
def test_a_program_of_a_package_is_trained_on(episode, train, name, turns, branches):
    config = episode(name, "num_steps=2", "rollout.max_new_tokens=40")
    train(config)
    lines = records_of(config)
    assert {line["episode"]["num_turns"] for line in lines} == {turns}
    assert {line["branch"] for line in lines} == branches
    assert all(line["label"] != "fault" for line in lines)
    assert name != "chat" or all(len(line["spans"]) == turns for line in lines)


def test_a_program_in_a_process_of_its_own(episode, train):
    config = episode("other_process", "num_steps=1")
    train(config)
    assert {line["episode"]["num_turns"] for line in records_of(config)} == {1}


def test_a_limit_that_the_programs_client_raises_is_the_models(episode, train):
    config = episode("endless", "num_steps=1", "rollout.max_turns=4")
    train(config)
    lines = records_of(config)
    assert {line["label"] for line in lines} == {"unparsed"}
    assert all("rollout.max_turns = 4" in line["why"] for line in lines)


def test_the_key_of_an_episode_that_is_over_is_none(episode, train):
    config = episode("with_the_key_of_another", "num_steps=1")
    train(config)
    assert sorted(line["score"] for line in records_of(config))[:2] == [0.0, 1.0]


def test_without_the_extra_the_run_says_what_to_install(episode, train, monkeypatch):
    monkeypatch.setitem(sys.modules, "pekoe.agents.endpoint", None)
    with pytest.raises(RunError, match=r"pip install 'pekoe\[serve\]'"):
        train(episode("chat", "num_steps=1"))
