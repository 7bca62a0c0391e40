"""Episodes of many turns are trained on as single answers are, and what fails in them is FAULT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pekoe.config import RLConfig
from pekoe.core.errors import RunError, UserError
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.core.records import read_records, record_of, spans_of
from pekoe.run.replay import replay_run

PROGRAM = """
import asyncio, random
from pekoe.agents.session import EpisodeLimit

async def delayed(problem, client):
    messages = list(problem.messages)
    for _ in range(3):
        reply = await client.complete(messages, max_tokens=3)
        await asyncio.sleep(random.random() / 50)
        messages += [reply.message, {"role": "user", "content": "1"}]
    return len(set(reply.text)) % 4 / 3

async def single(problem, client):
    await client.complete(problem.messages)

async def judged(problem, client):
    reply = await client.complete(problem.messages, max_tokens=3)
    await client.complete([*problem.messages, reply.message, {"role": "user", "content": "1"}], max_tokens=3)

async def raises(problem, client):
    await client.complete(problem.messages)
    raise ValueError("the tool broke")

async def hangs(problem, client):
    await client.complete(problem.messages)
    await asyncio.sleep(1000)

async def nonsense(problem, client):
    await client.complete(problem.messages)
    return "yes"

async def beyond(problem, client):
    await client.complete(problem.messages)
    return 7.0

async def forgets(problem, client):
    return None

async def endless(problem, client):
    while True:
        await client.complete(problem.messages, max_tokens=1)

def blocking(problem, client):
    return 1.0
"""


@pytest.fixture
def episode(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The config of a run whose episodes are this function's, by its name."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "program", raising=False)
    from pekoe.core.functions import load_function

    load_function.cache_clear()
    return lambda name, *more: build(f"rollout.episode=program:{name}", *more)


def steps(config: RLConfig) -> list[dict[str, Any]]:
    return [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step"]


def bits(config: RLConfig) -> list[Any]:
    lines = [line for step in steps(config) for line in read_records(Path(config.run.dir), step["step"])]
    kept = ("uid", "sample", "branch", "reward", "advantage", "spans", "label")
    return [
        (
            [line.get(k) for k in kept],
            line["tokens"].tolist(),
            line["logprobs"].tolist(),
            line["prompt_tokens"].tolist(),
        )
        for line in lines
    ]


def test_a_tool_of_random_delay_changes_no_bit_with_pinned_lag(episode, train, tmp_path):
    lag = "rollout.max_lag=1", "verify.random=false", "rollout.max_new_tokens=30", "rollout.lockstep=true"
    configs = [episode("delayed", *lag, f"run.dir={tmp_path / name}") for name in ("one", "two")]
    for config in configs:
        train(config)
    first, second = map(bits, configs)
    assert first == second
    weights = [(Path(c.run.dir) / "model" / "model.safetensors").read_bytes() for c in configs]
    assert weights[0] == weights[1]
    assert [step["lag_max"] for step in steps(configs[0])] == [0, 1, 1]
    for step in steps(configs[0]):
        assert (step["turns"], step["tool_calls"]) == (3, 0)
        assert step["episode_tool_s"] > 0
    lines = read_records(Path(configs[0].run.dir), 1)
    assert any("spans" in line for line in lines)
    for line in lines:
        record = record_of(line)
        assert len(spans_of(record)) == len(line.get("spans", [0]))
    again = replay_run(Path(configs[0].run.dir), NoProgress())
    assert again.same
    assert max(again.logprob_diffs.values()) <= 1e-4


def test_an_episode_of_one_answer_has_the_bits_of_a_run_without(episode, build, train, tmp_path):
    configs = [build(f"run.dir={tmp_path / 'a'}"), episode("single", f"run.dir={tmp_path / 'b'}")]
    for config in configs:
        train(config)
    one, two = ([(tokens, logprobs) for _, tokens, logprobs, _ in bits(config)] for config in configs)
    assert one == two
    weights = [(Path(c.run.dir) / "model" / "model.safetensors").read_bytes() for c in configs]
    assert weights[0] == weights[1]


def test_without_a_verdict_the_problem_s_judge_reads_the_last_turn(episode, train):
    config = episode("judged", "verify.random=false", "num_steps=1")
    train(config)
    lines = read_records(Path(config.run.dir), 1)
    assert {line["label"] for line in lines} <= {"correct", "wrong", "unparsed"}
    assert {line["episode"]["num_turns"] for line in lines} == {2}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("raises", "program.py:22: ValueError: the tool broke"),
        ("hangs", r"rollout\.episode_limit_s = 0\.2"),
        ("nonsense", "expected bool, float or Verdict, got str"),
        ("beyond", "expected a score in"),
        ("forgets", "asked the model for nothing"),
    ],
)
def test_what_fails_in_the_harness_is_fault_and_stops_the_run(episode, train, name, why):
    config = episode(name, "rollout.episode_limit_s=0.2", "num_steps=1")
    with pytest.raises(RunError, match=why):
        train(config)


def test_asking_without_end_meets_a_limit_that_is_the_model_s(episode, train):
    config = episode("endless", "rollout.max_turns=3", "verify.random=false", "num_steps=1")
    train(config)
    lines = read_records(Path(config.run.dir), 1)
    assert {(line["label"], line["finish_reason"]) for line in lines} == {("unparsed", "length")}
    assert "rollout.max_turns = 3" in lines[0]["why"]
    assert {line["episode"]["num_turns"] for line in lines} == {3}


@pytest.mark.parametrize("name", ["blocking", "missing"])
def test_a_program_that_cannot_be_run_is_refused_before_anything_is_sampled(episode, train, name):
    with pytest.raises(UserError, match=r"rollout\.episode"):
        train(episode(name))


def test_stopped_and_started_again_reaches_the_same_bits(episode, train, tmp_path):
    from pekoe.core.errors import Interrupted
    from tests.run.conftest import stop_after_responses

    lag = "rollout.max_lag=1", "rollout.max_new_tokens=30", "num_steps=4", "rollout.lockstep=true"
    whole, parts = (episode("delayed", *lag, f"run.dir={tmp_path / name}") for name in ("whole", "parts"))
    train(whole)
    with pytest.raises(Interrupted):
        train(parts, stop_after_responses(20))
    train(parts)
    assert bits(whole) == bits(parts)
    assert np.array_equal(*((Path(c.run.dir) / "model" / "model.safetensors").read_bytes() for c in (whole, parts)))
