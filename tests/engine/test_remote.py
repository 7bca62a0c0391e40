"""An engine of servers, against servers that fail in every way: routing, retries, death, weights, the end."""

import asyncio
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pekoe.config.engine import EngineSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Prompt, Rollout, SamplingParams
from pekoe.engine.async_thread import AsyncThread
from pekoe.engine.servers.batch import Batch
from pekoe.engine.servers.process import check_open_files
from pekoe.engine.servers.sglang import SGLangEngine
from pekoe.model import Decoder

FAKE = Path(__file__).with_name("fake_sglang.py")
_spec = importlib.util.spec_from_file_location("fake_sglang", FAKE)
assert _spec is not None
assert _spec.loader is not None
fake_sglang = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_sglang)
FakeSGLang = fake_sglang.FakeSGLang

MakePrompt = Callable[..., Prompt]


class House:
    """Some fake servers and the engines on them, closed when the test ends."""

    def __init__(self, model: Decoder, tmp_path: Path) -> None:
        self.model, self.tmp_path = model, tmp_path
        self.servers: list[Any] = []
        self.engines: list[SGLangEngine] = []
        self.timers: list[threading.Timer] = []

    def later(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> None:
        self.timers.append(threading.Timer(seconds, call, arguments))
        self.timers[-1].start()

    def add(self, **kwargs: Any) -> Any:
        self.servers.append(FakeSGLang(**kwargs))
        return self.servers[-1]

    def engine(self, *servers: Any, **changes: Any) -> SGLangEngine:
        limits = {"start_limit_s": 10.0, "request_limit_s": 20.0, "update_limit_s": 10.0}
        server = limits | ({"urls": tuple(s.url for s in servers)} if servers else {}) | changes
        config = EngineSection.model_validate({"backend": "sglang", "server": server})
        self.engines.append(SGLangEngine(self.tmp_path, config, self.model.spec, 100, self.tmp_path / "logs"))
        return self.engines[-1]


@pytest.fixture
def house(make_model: Callable[..., Decoder], tmp_path: Path) -> Iterator[House]:
    house = House(make_model(), tmp_path)
    yield house
    for timer in house.timers:
        timer.join(30)
        assert not timer.is_alive()
    for engine in house.engines:
        engine.close()
    for server in house.servers:
        if not server.dead:
            server.die()
    deadline = time.monotonic() + 10  # our end of a group that nobody joined has a limit of its own
    while (
        left := [t.name for t in threading.enumerate() if t.name.startswith("pekoe ")]
    ) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def check(rollouts: list[Rollout], prompts: list[Prompt], params: SamplingParams) -> None:
    """Each sample once, with the tokens that the fake makes of its prompt."""
    keys = [(r.uid, r.sample_index) for r in rollouts]
    assert sorted(keys) == sorted((p.uid, i) for p in prompts for i in range(params.n))
    for rollout in rollouts:
        payload = rollout.payload.resolve()
        start = int(payload.prompt_tokens.sum())
        assert payload.tokens.tolist() == [(start + i) % 32 for i in range(rollout.num_tokens)]
        spans = [*[start for _, start in rollout.versions], rollout.num_tokens]
        for (version, first), stop in zip(rollout.versions, spans[1:], strict=True):
            assert np.allclose(payload.logprobs[first:stop], -1 - version / 16)


def generated(server: Any) -> list[dict[str, Any]]:
    return [b for path, b in server.requests if path == "/generate" and b["sampling_params"]["max_new_tokens"]]


def test_groups_stay_together_and_the_least_loaded_server_gets_the_next(house: House, make_prompt: MakePrompt):
    first, second = house.add(token_s=0.002), house.add(token_s=0.002)
    engine = house.engine(first, second)
    prompts = [make_prompt(f"p{i}", 5 + i) for i in range(8)]
    params = SamplingParams(n=4, max_new_tokens=10)
    rollouts = list(engine.generate(prompts, params))
    check(rollouts, prompts, params)
    assert {r.finish_reason for r in rollouts} == {"length"}
    assert not set(first.started) & set(second.started)
    assert len(first.started) + len(second.started) == 8
    assert min(len(first.started), len(second.started)) >= 2
    seeds = [body["sampling_params"]["sampling_seed"] for s in (first, second) for body in generated(s)]
    assert len(set(seeds)) == 32
    stats = engine.stats()
    assert stats.num_decode_tokens == 320
    assert stats.num_cached_tokens == 4 * sum(len(p.tokens) - 1 for p in prompts)
    assert stats.num_prefill_tokens == sum(len(p.tokens) for p in prompts) + 32


def test_no_more_in_flight_than_allowed_and_nobody_consuming_stops_the_sending(house: House, make_prompt: MakePrompt):
    server = house.add(token_s=0.001)
    engine = house.engine(server, max_requests=6)
    prompts = [make_prompt(f"p{i}", 5) for i in range(5)]
    params = SamplingParams(n=8, max_new_tokens=5)
    stream = engine.generate(prompts, params)
    rollouts = [next(stream)]
    time.sleep(0.5)
    assert len(generated(server)) <= 7
    rollouts += list(stream)
    check(rollouts, prompts, params)
    assert server.most_running <= 6


def test_stops_and_lengths(house: House):
    engine = house.engine(house.add())
    prompts = [Prompt("p", 0, np.array([1, 2]))]
    (rollout,) = engine.generate(prompts, SamplingParams(max_new_tokens=10, stop_token_ids=(6, 30)))
    assert (rollout.finish_reason, rollout.payload.resolve().tokens.tolist()) == ("stop", [3, 4, 5, 6])


def test_abort_of_one_and_of_all(house: House, make_prompt: MakePrompt):
    server = house.add(token_s=0.05)
    engine = house.engine(server, max_requests=8)
    prompts = [make_prompt(uid, 5) for uid in "abcd"]  # a and b are sent, c and d wait
    stream = engine.generate(prompts, SamplingParams(n=4, max_new_tokens=90))
    house.later(0.5, engine.abort, ["a", "d"])
    first = [next(stream) for _ in range(8)]
    assert {(r.uid, r.finish_reason) for r in first} == {("a", "abort"), ("d", "abort")}
    assert all((r.num_tokens > 0) == (r.uid == "a") for r in first)
    engine.abort()
    rest = list(stream)
    assert {(r.uid, r.finish_reason) for r in rest} == {("b", "abort"), ("c", "abort")}
    check([*first, *rest], prompts, SamplingParams(n=4))


def test_an_abort_ends_what_is_still_on_its_way_and_nothing_else(house: House, make_prompt: MakePrompt):
    server = house.add(token_s=0.02)
    server.late_s = 0.4
    engine = house.engine(server)
    prompts = [make_prompt(uid, 5) for uid in "abcd"]
    params = SamplingParams(n=4, max_new_tokens=60)
    house.later(0.2, engine.abort, ["a"])
    rollouts = list(engine.generate(prompts, params))
    check(rollouts, prompts, params)
    assert {r.uid for r in rollouts if r.finish_reason == "abort"} == {"a"}
    assert {r.finish_reason for r in rollouts if r.uid == "a"} == {"abort"}
    assert len({len(body["rid"]) for body in generated(server)}) == 1  # SGLang takes an id for a prefix of ids


def test_closing_the_iterator_early_ends_what_is_unfinished(house: House):
    server = house.add(token_s=0.02)
    engine = house.engine(server)
    prompts = [Prompt("short", 0, np.array([1])), Prompt("p", 0, np.array([2]))]  # stops at once; after 32 tokens
    for _ in range(2):
        stream = engine.generate(prompts, SamplingParams(n=2, max_new_tokens=90, stop_token_ids=(1,)))
        assert next(stream).uid == "short"
        with pytest.raises(RunError, match="generating already"):
            next(engine.generate(prompts, SamplingParams(max_new_tokens=4)))
        stream.close()
        assert not server.running
    check(list(engine.generate(prompts, SamplingParams(max_new_tokens=4))), prompts, SamplingParams())


def test_pause_and_resume(house: House, make_prompt: MakePrompt):
    server = house.add(token_s=0.01)
    engine = house.engine(server, update_limit_s=1.0)
    prompts, params = [make_prompt("p", 5)], SamplingParams(n=2, max_new_tokens=30)
    stream = engine.generate(prompts, params)
    engine.pause()
    assert server.paused
    assert engine.health()
    house.later(0.6, engine.resume)
    check(list(stream), prompts, params)
    engine.pause()
    with pytest.raises(RunError, match="paused"):
        next(engine.generate(prompts, params))
    engine.resume()
    check(list(engine.generate(prompts, params)), prompts, params)


def test_an_update_while_paused_loses_nothing(house: House, make_prompt: MakePrompt):
    """A paused server fails its health check, and is not dead for that."""
    server = house.add(token_s=0.02)
    engine = house.engine(server)
    prompts, params = [make_prompt("p", 5)], SamplingParams(n=3, max_new_tokens=60)

    def change() -> None:
        engine.pause()
        engine.pause()
        engine.update_weights(house.model, 1)
        assert server.paused
        engine.resume()

    house.later(0.4, change)
    rollouts = list(engine.generate(prompts, params))
    check(rollouts, prompts, params)
    assert {tuple(v for v, _ in r.versions) for r in rollouts} == {(0, 1)}
    assert engine.events == []
    assert len(generated(server)) == 3  # each was asked for once


def test_a_silent_request_does_not_condemn_a_server_that_is_paused_meanwhile(
    house: House, make_prompt: MakePrompt, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pekoe.engine.servers.client._HEALTH_LIMIT_S", 0.5)
    server = house.add()
    engine = house.engine(server, request_limit_s=0.5)
    server.faults = {"/generate": ["hang"], "/health": ["hang"]}  # silent at 0.5 s, asked after until 1 s
    house.later(0.75, engine.pause)
    with pytest.raises(RunError, match=r"an answer within 0\.5 s"):
        list(engine.generate([make_prompt("p", 5)], SamplingParams(max_new_tokens=5)))
    assert engine.servers[0].state == "serving"


def test_transport_errors_are_retried_and_answers_are_not(house: House, make_prompt: MakePrompt):
    server = house.add()
    engine = house.engine(server)
    prompts, params = [make_prompt("p", 5)], SamplingParams(max_new_tokens=4)
    server.faults["/generate"] = ["reset", "reset"]
    check(list(engine.generate(prompts, params)), prompts, params)
    assert engine.events == []
    for status in (400, 500):
        server.requests.clear()
        server.faults["/generate"] = [(status, {"error": {"message": "no, because"}})]
        with pytest.raises(RunError, match=f"expected status 200, got {status}: no, because"):
            list(engine.generate(prompts, params))
        assert len(generated(server)) == 1
    server.faults["/generate"] = [(200, {"output_ids": [1], "meta_info": {}})]
    with pytest.raises(RunError, match="not understood"):
        list(engine.generate(prompts, params))
    assert engine.servers[0].state == "serving"


def test_a_dead_servers_work_goes_to_the_others(house: House, make_prompt: MakePrompt):
    doomed, other = house.add(token_s=0.01), house.add(token_s=0.01)
    engine = house.engine(doomed, other)
    prompts, params = [make_prompt(f"p{i}", 5 + i) for i in range(6)], SamplingParams(n=2, max_new_tokens=60)
    house.later(0.3, doomed.die)
    check(list(engine.generate(prompts, params)), prompts, params)
    assert [s.state for s in engine.servers] == ["dead", "serving"]
    assert len(engine.events) == 1
    assert "is dead" in engine.events[0]
    assert engine.health()
    other.die()
    with pytest.raises(RunError, match=r"(?s)expected a server that serves.*is dead.*is dead"):
        list(engine.generate(prompts, params))
    assert not engine.health()
    with pytest.raises(RunError, match="serves at version 0, got none"):
        engine.update_weights(house.model, 1)


def test_a_server_that_hangs_is_found_out(house: House, make_prompt: MakePrompt, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pekoe.engine.servers.client._HEALTH_LIMIT_S", 0.5)
    hung, other = house.add(), house.add()
    engine = house.engine(hung, other, request_limit_s=1.0)
    hung.faults = {"/generate": ["hang"], "/health": ["hang"]}
    prompts, params = [make_prompt(f"p{i}", 5) for i in range(4)], SamplingParams(max_new_tokens=5)
    check(list(engine.generate(prompts, params)), prompts, params)
    assert [s.state for s in engine.servers] == ["dead", "serving"]
    assert "health check fails" in engine.events[0]
    other.faults = {"/generate": ["hang"]}  # slow, but alive: the limit was too low, and the run is told so
    with pytest.raises(RunError, match="an answer within 1 s"):
        list(engine.generate(prompts, params))
    assert engine.servers[1].state == "serving"


@pytest.mark.parametrize("sync", ["disk", "shm"])
def test_an_update_in_mid_flight_tags_versions_and_leaves_no_file(house: House, make_prompt: MakePrompt, sync: str):
    server = house.add(token_s=0.01)
    engine = house.engine(server, sync=sync)
    prompts, params = [make_prompt("p", 5)], SamplingParams(n=3, max_new_tokens=60)
    stream = engine.generate(prompts, params)
    house.later(0.3, engine.update_weights, house.model, 3)
    rollouts = list(stream)
    check(rollouts, prompts, params)
    assert {tuple(v for v, _ in r.versions) for r in rollouts} == {(0, 3)}
    assert engine.version == 3
    paths = [path for path, _ in server.requests]
    assert paths.index("/pause_generation") < paths.index("/update_weights_from_disk") < paths.index("/flush_cache")
    assert ("/pause_generation", {"mode": "retract"}) in server.requests
    assert not server.paused
    assert not list((house.tmp_path / "logs").glob("weights/*"))
    assert not list(Path("/dev/shm").glob(f"pekoe-weights-{os.getpid()}-*"))


def test_an_update_may_end_what_is_in_flight(house: House, make_prompt: MakePrompt):
    engine = house.engine(house.add(token_s=0.02), during_update="abort")
    stream = engine.generate([make_prompt("p", 5)], SamplingParams(n=2, max_new_tokens=90))
    house.later(0.4, engine.update_weights, house.model, 1)
    assert [(r.finish_reason, r.versions) for r in stream] == [("abort", ((0, 0),))] * 2


def test_a_server_that_does_not_take_weights_is_stale_until_it_does(house: House, make_prompt: MakePrompt):
    good, bad = house.add(), house.add()
    engine = house.engine(good, bad)
    prompts, params = [make_prompt(f"p{i}", 5 + i) for i in range(4)], SamplingParams(max_new_tokens=4)
    troubles: list[dict[str, Any]] = [
        {"faults": {"/update_weights_from_disk": [(400, {"success": False, "message": "no such file"})]}},
        {"faults": {"/update_weights_from_disk": [(200, {"success": False, "message": "no such file"})]}},
        {"lies_about_version": True},
    ]
    for version, trouble in enumerate(troubles, start=1):
        for name, value in trouble.items():
            setattr(bad, name, value)
        with pytest.raises(RunError, match=f"version {version} failed on 1 server.*(\n).*(no such file|a lie)"):
            engine.update_weights(house.model, version)
        assert [s.state for s in engine.servers] == ["serving", "stale"]
        bad.requests.clear()
        rollouts = list(engine.generate(prompts, params))
        check(rollouts, prompts, params)
        assert {r.versions for r in rollouts} == {((version, 0),)}
        assert generated(bad) == []
    bad.lies_about_version = False
    engine.update_weights(house.model, 9)
    list(engine.generate(prompts, params))
    assert generated(bad)
    assert [s.version for s in engine.servers] == [9, 9]


def test_a_group_that_a_server_refuses_is_waited_for_no_longer(house: House):
    server = house.add()
    engine = house.engine(server, sync="broadcast", update_limit_s=3.0)
    server.faults["/init_weights_update_group"] = [(400, {"success": False, "message": "no group"})]
    start = time.monotonic()
    with pytest.raises(RunError, match="no group"):
        engine.update_weights(house.model, 1)
    assert time.monotonic() - start < 2.5  # our end would wait for all of the limit
    assert engine.servers[0].state == "stale"


def test_a_server_that_died_unnoticed_does_not_stop_an_update(house: House, make_prompt: MakePrompt):
    lost, other = house.add(), house.add()
    engine = house.engine(lost, other)
    lost.die()
    engine.update_weights(house.model, 1)
    assert [(s.state, s.version) for s in engine.servers] == [("dead", 0), ("serving", 1)]
    assert "could not be reached" in engine.events[0]


def test_a_server_that_dies_during_an_update_does_not_stop_it(house: House):
    lost, other = house.add(), house.add()
    engine = house.engine(lost, other)
    lost.faults["/pause_generation"] = ["reset", "reset", "reset"]
    engine.update_weights(house.model, 1)
    assert [(s.state, s.version) for s in engine.servers] == [("dead", 0), ("serving", 1)]
    assert engine.version == 1
    assert "is dead" in engine.events[0]


def test_tokens_of_weights_that_were_not_brought_make_a_server_stale(house: House, make_prompt: MakePrompt):
    restarted, other = house.add(), house.add()
    engine = house.engine(restarted, other)
    engine.update_weights(house.model, 3)
    restarted.version = "0"  # somebody started it again, from what it began with
    prompts, params = [make_prompt(f"p{i}", 5 + i) for i in range(4)], SamplingParams(n=2, max_new_tokens=4)
    rollouts = list(engine.generate(prompts, params))
    check(rollouts, prompts, params)
    assert {version for rollout in rollouts for version, _ in rollout.versions} == {3}
    assert [s.state for s in engine.servers] == ["stale", "serving"]
    assert "expected tokens of versions 3 to 3, got [0]" in engine.events[0]
    engine.update_weights(house.model, 4)
    assert [s.state for s in engine.servers] == ["serving", "serving"]


def test_a_response_whose_server_is_lost_before_it_was_sent_goes_elsewhere(house: House, make_prompt: MakePrompt):
    engine = house.engine(house.add(), house.add())
    first, second = engine.servers
    prompt, params = make_prompt("p", 5), SamplingParams(n=4, max_new_tokens=4)

    async def send_and_lose() -> tuple[Any, int]:
        batch = Batch(engine._backend, [first, second], [prompt], params, print, lambda: False, lambda: "nobody")
        batch._pending.clear()
        batch._send(prompt, (0, 1, 2, 3), first)
        batch.leave(first)  # its tasks are cancelled before they begin
        await asyncio.sleep(0.05)
        return list(batch._pending), first.held

    pending, held = engine._loop.run(send_and_lose())
    assert pending == [(prompt, (0, 1, 2, 3))]
    assert held == 0


def test_a_server_that_was_left_paused_is_resumed(house: House, make_prompt: MakePrompt):
    server = house.add()
    server.paused = True
    prompts, params = [make_prompt("p", 5)], SamplingParams(max_new_tokens=4)
    check(list(house.engine(server).generate(prompts, params)), prompts, params)


def test_a_server_that_comes_back_serves_after_its_next_update_only(house: House, make_prompt: MakePrompt):
    lost, other = house.add(), house.add()
    engine = house.engine(lost, other)
    prompts, params = [make_prompt(f"p{i}", 5 + i) for i in range(4)], SamplingParams(max_new_tokens=4)
    lost.die()
    list(engine.generate(prompts, params))
    back = house.add(port=lost.server_address[1])
    list(engine.generate(prompts, params))
    assert generated(back) == []
    engine.update_weights(house.model, 1)
    list(engine.generate(prompts, params))
    assert generated(back)
    assert [s.state for s in engine.servers] == ["serving", "serving"]


def test_a_prompt_that_cannot_be_sampled_is_refused_before_anything_is_sent(house: House, make_prompt: MakePrompt):
    server = house.add()
    engine = house.engine(server)
    cases = [
        (Prompt("p", 0, np.array([], np.int64)), {}, "at least one token"),
        (Prompt("p", 0, np.array([1, 32])), {}, r"ids in \[0, 32\), got 32"),
        (make_prompt("p", 95), {}, "most new tokens that fit: 5"),
        (make_prompt("p", 4), {"stop_token_ids": (99,)}, "stop token"),
        (make_prompt("p", 4), {"min_new_tokens": 2}, "min_new_tokens: expected 0 with SGLang"),
        (make_prompt("p", 4), {"top_k": 5, "top_p": 0.9}, "expected one of them with SGLang .*, got 0.9 with 5"),
    ]
    for prompt, more, message in cases:
        with pytest.raises(UserError, match=message):
            engine.generate([prompt], SamplingParams(max_new_tokens=9, **more))
    assert generated(server) == []


def test_mistakes_in_the_config(house: House, make_model: Callable[..., Decoder]):
    with pytest.raises(UserError, match="servers on this host"):
        house.engine(type("Far", (), {"url": "http://10.1.2.3:1"}), sync="shm")
    with pytest.raises(UserError, match="with SGLang in it, got '/no/python'"):
        house.engine(python="/no/python")
    engine = house.engine(house.add())
    with pytest.raises(UserError, match="expected a model of shape"):
        engine.update_weights(make_model(num_layers=1), 1)
    with pytest.raises(UserError, match="expected a Hugging Face model directory"):
        engine.update_weights(Path("/no/model"), 1)


def test_more_requests_than_files_may_be_open_are_refused(monkeypatch: pytest.MonkeyPatch):
    allowed: list[Any] = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: allowed.append(limits))
    check_open_files(2, 256)
    check_open_files(4, 512)
    assert allowed == [(2304, 4096)]
    with pytest.raises(UserError, match=r"max_requests: expected at most 480 for each of 8 servers.*got 512"):
        check_open_files(8, 512)


def test_a_server_that_nobody_answers_at(house: House):
    gone = house.add()
    gone.die()
    with pytest.raises(RunError, match="health check to pass within 1 s"):
        house.engine(gone, start_limit_s=1.0)


def test_after_the_end(house: House, make_prompt: MakePrompt):
    engine = house.engine(house.add(token_s=0.05))
    stream = engine.generate([make_prompt("p", 5)], SamplingParams(max_new_tokens=90))
    house.later(0.5, engine.close)
    with pytest.raises(RunError, match="closed"):
        next(stream)
    engine.close()
    assert not engine.health()
    for call in (lambda: engine.generate([], SamplingParams()), lambda: engine.update_weights(house.model, 1)):
        with pytest.raises(RunError, match="closed"):
            call()


def test_an_iterator_left_open_at_the_end_says_so(house: House, make_prompt: MakePrompt):
    """Though all was sampled, and waits to be taken."""
    engine = house.engine(house.add())
    stream = engine.generate([make_prompt("p", 5)], SamplingParams(n=3, max_new_tokens=4))
    next(stream)
    time.sleep(0.3)
    engine.close()
    with pytest.raises(RunError, match="closed"):
        next(stream)


def test_a_stopped_loop_takes_no_more_work():
    async def work() -> None: ...

    loop = AsyncThread("pekoe loop")
    loop.stop()
    with pytest.raises(RunError, match="closed"):
        loop.run(work())
    with pytest.raises(RunError, match="closed"):
        loop.soon(print)


@pytest.fixture
def python(tmp_path: Path) -> str:
    """Takes the place of the Python that has SGLang: whatever is asked for, it runs the fake."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {FAKE} "$@"\n')
    path.chmod(0o755)
    return str(path)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_launched_servers_are_relaunched_when_dead_and_leave_nothing(
    house: House, make_prompt: MakePrompt, python: str
):
    engine = house.engine(python=python, count=2)
    prompts, params = [make_prompt(f"p{i}", 5 + i) for i in range(4)], SamplingParams(n=2, max_new_tokens=40)
    stream = engine.generate(prompts, params)
    rollouts = [next(stream)]
    process = engine.servers[0].process
    assert process is not None
    os.killpg(process.pid, signal.SIGKILL)
    check([*rollouts, *stream], prompts, params)
    list(engine.generate(prompts, params))
    assert "is dead" in engine.events[0]
    assert [s.state for s in engine.servers] == ["dead", "serving"]
    deadline = time.monotonic() + 20
    version = 0
    while engine.servers[0].state == "dead" and time.monotonic() < deadline:
        version += 1
        engine.update_weights(house.model, version)
        time.sleep(0.2)
    engine.update_weights(house.model, version + 1)
    assert [(s.state, s.version) for s in engine.servers] == [("serving", version + 1)] * 2
    check(list(engine.generate(prompts, params)), prompts, params)
    pids = [s.process.pid for s in engine.servers if s.process is not None]
    assert len(set(pids)) == 2
    assert all(alive(pid) for pid in pids)
    engine.close()
    assert not any(alive(pid) for pid in pids)
    assert "the fake serves" in (house.tmp_path / "logs" / "sglang-server-0.log").read_text()


def test_when_the_only_server_dies_the_next_update_waits_for_its_return(
    house: House, make_prompt: MakePrompt, python: str
):
    engine = house.engine(python=python)
    prompts, params = [make_prompt("p", 5)], SamplingParams(n=2, max_new_tokens=90)
    process = engine.servers[0].process
    assert process is not None
    house.later(0.3, os.killpg, process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"(?s)exited with status 137.*the fake serves"):
        list(engine.generate(prompts, params))
    engine.update_weights(house.model, 1)
    check(list(engine.generate(prompts, params)), prompts, params)


def test_a_launch_that_fails_shows_the_log(house: House, tmp_path: Path):
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\necho no module named sglang\nexit 3\n")
    path.chmod(0o755)
    with pytest.raises(RunError, match=r"(?s)exited with status 3.*no module named sglang"):
        house.engine(python=str(path))
