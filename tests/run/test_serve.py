"""`pekoe serve`: the command as a user starts it, and the sessions of its keys."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from pekoe.core.errors import UserError
from pekoe.core.progress import NoProgress
from pekoe.run import serve
from pekoe.run.interrupt import Stop
from pekoe.run.serve import KEY, key_of_environment, run_serve, serving
from tests.run.test_sample import config_of

KEY_OF_TESTS = "key-of-the-tests"
QUESTION: Any = {"role": "user", "content": "1+2="}


def test_a_model_directory_is_served(tiny_dir: Path):
    config = config_of(tiny_dir)
    with (
        serving(config, "127.0.0.1", 0, KEY_OF_TESTS, NoProgress(), Stop()) as (url, name),
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY_OF_TESTS, max_retries=0) as client,
    ):
        answer = client.chat.completions.create(model=name, messages=[QUESTION])
        assert name == "model"
        assert 1 <= answer.usage.completion_tokens <= 6  # eval.max_new_tokens, where the client says nothing
        more = client.chat.completions.create(model=name, messages=[QUESTION], max_tokens=40, n=8)
        assert more.usage.completion_tokens > 8 * 6
        most = client.chat.completions.create(model=name, messages=[QUESTION], max_tokens=4000, temperature=0)
        assert most.usage.total_tokens <= 64
        with pytest.raises(openai.BadRequestError, match="leaves no room below 64"):
            client.chat.completions.create(model=name, messages=[{"role": "user", "content": "1" * 70}])


def test_the_command_until_ctrl_c(tiny_dir: Path):
    words = [str(tiny_dir / "model"), "--port", "0", "model.device=cpu", "run.threads=1", "eval.max_new_tokens=4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pekoe.cli", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, KEY: ""},
    )
    try:
        assert process.stdout is not None
        head = "".join(process.stdout.readline() for _ in range(4))
        found = re.search(r"base URL  (\S+)\s+key +(\S+)", head)
        assert found is not None, head
        with openai.OpenAI(base_url=found[1], api_key=found[2]) as client:
            assert client.chat.completions.create(model="m", messages=[QUESTION]).choices[0].finish_reason
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, "Traceback" in errors) == (0, False), errors
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("key", ["short", "with a space", "with.a.dot", "schlüssel-und-so"])
def test_a_key_that_cannot_be_one(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(UserError, match=f"{KEY}: expected at least 8"):
        key_of_environment()


def test_keys_are_new_each_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(KEY, raising=False)
    assert key_of_environment() != key_of_environment()
    monkeypatch.setenv(KEY, KEY_OF_TESTS)
    assert key_of_environment() == KEY_OF_TESTS


def test_without_the_extra_it_says_what_to_install(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pekoe.agents.endpoint", None)
    with pytest.raises(UserError, match=r"pip install 'pekoe\[serve\]'"):
        run_serve(config_of(tiny_dir), "127.0.0.1", 0, NoProgress(), print)


def test_sessions_and_turns_are_bounded(monkeypatch: pytest.MonkeyPatch):
    import asyncio

    from pekoe.core.types import SamplingParams
    from tests.agents.sampling import text_tokenizer
    from tests.agents.scripted import ScriptedSampler

    monkeypatch.setattr(serve, "MAX_SESSIONS", 2)
    monkeypatch.setattr(serve, "MAX_TURNS", 3)
    tokenizer = text_tokenizer()
    sampler = ScriptedSampler(tokenizer, "3")
    sessions = serve.KeyedSessions(sampler, tokenizer, SamplingParams(max_new_tokens=9), KEY_OF_TESTS)
    first = sessions(KEY_OF_TESTS)
    assert first is not None
    assert sessions(f"{KEY_OF_TESTS}.a") is not sessions(f"{KEY_OF_TESTS}.b")
    assert sessions(KEY_OF_TESTS) is not first

    async def ask() -> None:
        for number in range(6):
            await first.complete([{"role": "user", "content": str(number % 4)}])

    asyncio.run(ask())
    assert len(first.turns) == 3
    assert [tokenizer.decode(turn.context)[9] for turn in first.turns] == ["3", "0", "1"]
    assert sum(len(same) for same in first._answers.values()) == 3
    assert len({request.turn for request in sampler.asked}) == 6  # the same question again is another sample
    assert np.array_equal(sampler.asked[0].tokens, sampler.asked[4].tokens)
