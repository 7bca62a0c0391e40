"""The asynchronous benchmark still runs, and its engines take the time of the forwards that they stand for."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pekoe.core.types import SamplingParams
from pekoe.engine.base import requests_of

SCHEDULES = {"lag 0", "pinned 1", "in flight 1", "in flight 2"}


@pytest.fixture
def engines(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("ray")
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("async_engines")


@pytest.fixture
def clock(engines: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that goes on when a test says so, and lengths of 100, 200, 300 and 300 tokens."""
    lengths = {0: 100, 1: 200, 2: 300, 3: 300}
    monkeypatch.setattr(engines, "length_of", lambda uid, draw, sample: lengths.get(sample, 1000))
    ticking = SimpleNamespace(
        gpu=engines.Gpu(),
        scale=1.0,
        passed=engines.ByteCount(),
        simulated=engines.Simulated(),
        changed=engines.threading.Condition(),
        engines=[],
        time=0.0,
    )
    ticking.now = lambda: ticking.time
    ticking.sleep = lambda seconds: setattr(ticking, "time", ticking.time + seconds)
    return ticking


def run_until(engine: Any, clock: Any, end: float) -> list[tuple[float, Any]]:
    """(when, completion) of what ends until then."""
    ended: list[tuple[float, Any]] = []
    while engine.due <= end:
        clock.time = engine.due
        for future, answer in engine.advance(clock.time):
            future.set_result(clock.passed.unpack(answer))
            ended.append((clock.time, future.result()))
    clock.time = end
    engine.advance(end)
    return ended


def forward_by_forward(gpu: Any, prompt: int, lengths: list[int]) -> list[Any]:
    """When each response ends, if they begin together at 0 and each forward gives all that run a token."""
    ends: dict[int, float] = dict.fromkeys(range(len(lengths)), 0.0)
    now = float(gpu.prefill_s([prompt]))
    for done in count():
        running = [i for i, length in enumerate(lengths) if length > done]
        if not running:
            return list(ends.values())
        now += float(gpu.decode_s(len(running), len(running) * (prompt + done)))
        for i in running:
            ends[i] = now
    raise AssertionError


def test_responses_end_as_if_each_forward_had_been_made(engines: ModuleType, clock: Any):
    engine = engines.GpuEngine(clock, 0, 4)
    prompt = np.arange(engines.PROMPT_TOKENS)
    futures = engine.submit(requests_of("p", 0, prompt, SamplingParams(n=4)))
    ended = run_until(engine, clock, 1e4)
    assert all(future.done() for future in futures)
    assert [answer.num_tokens for _, answer in ended] == [100, 200, 300, 300]
    expected = forward_by_forward(clock.gpu, len(prompt), [100, 200, 300, 300])
    assert [when for when, _ in ended] == pytest.approx(expected, rel=1e-6)
    assert engine.stats().num_decode_tokens == pytest.approx(900, abs=3)


def test_time_that_goes_by_in_pieces_is_the_same_time(engines: ModuleType, clock: Any):
    engine = engines.GpuEngine(clock, 0, 4)
    engine.submit(requests_of("p", 0, np.arange(engines.PROMPT_TOKENS), SamplingParams(n=4)))
    ended = [each for i in range(1, 4001) for each in run_until(engine, clock, i / 1000)]
    expected = forward_by_forward(clock.gpu, engines.PROMPT_TOKENS, [100, 200, 300, 300])
    assert [when for when, _ in ended] == pytest.approx(expected, rel=1e-3)


def test_new_weights_cost_their_loading_and_the_kv_of_what_runs(engines: ModuleType, clock: Any):
    engine, gpu = engines.GpuEngine(clock, 0, 4), clock.gpu
    engine.submit(requests_of("p", 0, np.arange(engines.PROMPT_TOKENS), SamplingParams(n=4)))
    plain = forward_by_forward(gpu, engines.PROMPT_TOKENS, [100, 200, 300, 300])
    run_until(engine, clock, plain[0] + 0.5)
    engine.update_weights(None, 1)
    ended = run_until(engine, clock, 1e4)
    ((first, at),) = ended[0][1].versions[1:]
    assert (ended[0][1].versions[0], first) == ((0, 0), 1)
    assert 100 < at < 200
    recomputed = gpu.prefill_s([engines.PROMPT_TOKENS + at] * 3)
    assert ended[-1][0] == pytest.approx(plain[-1] + gpu.load_s + recomputed, rel=1e-3)


def test_no_more_run_than_there_is_room_for(engines: ModuleType, clock: Any):
    engine = engines.GpuEngine(clock, 0, 4)
    room = clock.gpu.max_running
    engine.submit(requests_of("p", 0, np.arange(engines.PROMPT_TOKENS), SamplingParams(n=room + 4)))
    first = run_until(engine, clock, 1e5)
    assert len(first) == room + 4
    assert engine.due == math.inf


@pytest.mark.long
def test_it_measures_each_schedule(repository: Path, tmp_path: Path):
    script, out = str(repository / "benchmarks/bench_async.py"), tmp_path / "out.json"
    words = [sys.executable, script, "--quick", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    gpu, (scale,) = result["gpu"]["schedules"], result["scale"]
    assert set(gpu) == SCHEDULES
    assert scale["num_engines"] == 4
    for row in (*gpu.values(), *scale["schedules"].values()):
        assert row["step_s"] > row["bound_s"] > 0
        assert 0 < row["controller"]["bytes_per_rollout"] <= 1024
        assert row["controller"]["loop_thread_s_per_step"] <= row["controller"]["all_threads_s_per_step"]
    assert [gpu[name]["lag_max"] for name in gpu] == [0, 1, 1, 2]
    assert gpu["in flight 1"]["to_lag_0"] > 1
    assert done.stdout.count("x lag 0") == len(gpu) + len(scale["schedules"])
