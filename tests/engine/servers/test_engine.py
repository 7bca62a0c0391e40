"""An engine on one server, against a server that fails in every way: sampling, retries, loss, weights, the end."""

import gzip
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from pekoe.config.engine import EngineSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Completion, Request, SamplingParams
from pekoe.engine.async_thread import AsyncThread
from pekoe.engine.base import Broadcast, BroadcastGroup, EngineLost
from pekoe.engine.servers.process import allow_open_files
from pekoe.engine.servers.sglang import SGLangEngine
from pekoe.model import Decoder, save_model
from tests.engine.servers import fake_sglang
from tests.engine.servers.fake_sglang import FakeSGLang

MakeRequests = Callable[..., list[Request]]
GROUP = BroadcastGroup("g1", "127.0.0.1", 29500, 2, "gloo", 10.0)


def until(holds: Callable[[], object], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


class House:
    """Fake servers and the engines on them, closed when the test ends."""

    def __init__(self, model: Decoder, tmp_path: Path) -> None:
        self.model, self.tmp_path = model, tmp_path
        self.servers: list[FakeSGLang] = []
        self.engines: list[SGLangEngine] = []
        self.threads = ThreadPoolExecutor(4)

    def server(self, **kwargs: Any) -> FakeSGLang:
        self.servers.append(FakeSGLang(**kwargs))
        return self.servers[-1]

    def engine(self, url: str | None, **changes: Any) -> SGLangEngine:
        limits = {"start_limit_s": 10.0, "request_limit_s": 20.0, "update_limit_s": 10.0}
        server = limits | ({"urls": (url,)} if url else {}) | changes
        config = EngineSection.model_validate({"backend": "sglang", "server": server})
        logs = self.tmp_path / "logs"
        self.engines.append(SGLangEngine(self.tmp_path, config, self.model.spec, 100, logs, url=url))
        return self.engines[-1]

    def pair(self, server_changes: dict[str, Any] | None = None, **changes: Any) -> tuple[FakeSGLang, SGLangEngine]:
        server = self.server(**(server_changes or {}))
        return server, self.engine(server.url, **changes)

    def later(self, call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        return self.threads.submit(call, *arguments)


@pytest.fixture
def house(make_model: Callable[..., Decoder], tmp_path: Path) -> Iterator[House]:
    house = House(make_model(), tmp_path)
    yield house
    for engine in house.engines:
        engine.close()
    for server in house.servers:
        if not server.dead:
            server.die()
    house.threads.shutdown()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("pekoe ")])


@pytest.fixture
def weights(house: House) -> Path:
    """A model directory."""
    save_model(house.model, house.tmp_path / "weights")
    return house.tmp_path / "weights"


def check(requests: Sequence[Request], futures: Sequence["Future[Completion]"]) -> list[Completion]:
    """Each response has the tokens that the fake makes of its prompt, and the log-probs of its versions."""
    completions = [future.result(30) for future in futures]
    for request, completion in zip(requests, completions, strict=True):
        start = int(request.tokens.sum())
        assert completion.tokens.tolist() == [(start + i) % 32 for i in range(completion.num_tokens)]
        record = completion.handle.resolve()
        assert record.tokens[: len(request.tokens)].tolist() == request.tokens.tolist()
        ends = [*[first for _, first in completion.versions], completion.num_tokens]
        for (version, first), end in zip(completion.versions, ends[1:], strict=True):
            assert np.allclose(completion.logprobs[first:end], -1 - version / 16)
    return completions


def sampled(server: FakeSGLang) -> list[dict[str, Any]]:
    bodies: list[Any] = [body for path, body in server.requests if path == "/generate"]
    return [body for body in bodies if body["sampling_params"]["max_new_tokens"]]


def paths(server: FakeSGLang) -> list[str]:
    return [path for path, _ in server.requests if path not in ("/health", "/model_info", "/server_info")]


# Sampling


def test_a_group_computes_its_prompt_once_and_each_sample_has_its_seed(house: House, make_requests: MakeRequests):
    server, engine = house.pair()
    params = SamplingParams(n=4, max_new_tokens=10)
    requests = [request for i in range(3) for request in make_requests(f"p{i}", 5 + i, params)]
    requests += make_requests("alone", 9, SamplingParams(max_new_tokens=10))
    completions = check(requests, engine.submit(requests))
    assert {completion.finish for completion in completions} == {"length"}
    assert len(sampled(server)) == 13
    assert paths(server).count("/generate") == 13 + 3  # one that only computes the prompt, for each group
    assert len({body["sampling_params"]["sampling_seed"] for body in sampled(server)}) == 13
    stats = engine.stats()
    assert stats.num_decode_tokens == 130
    assert stats.num_cached_tokens == 4 * (4 + 5 + 6) + 8
    assert stats.num_prefill_tokens == (5 + 6 + 7) + 13
    assert 0 < stats.busy_s < 20
    assert engine.stats() == stats  # idle


def test_no_more_at_the_server_than_allowed_but_for_what_has_priority(house: House, make_requests: MakeRequests):
    server, engine = house.pair({"token_s": 0.01}, max_requests=6)
    requests = [r for i in range(5) for r in make_requests(f"p{i}", 5, SamplingParams(n=4, max_new_tokens=10))]
    futures = engine.submit(requests)
    until(lambda: len(server.running) == 6)
    (canary,) = engine.submit([replace(requests[0], uid="canary", priority=1)])
    canary.result(20)
    assert not all(future.done() for future in futures)
    check(requests, futures)
    assert server.most_running <= 7


def test_stops_and_lengths(house: House):
    _, engine = house.pair()
    ((completion,),) = engine.generate([[1, 2]], SamplingParams(max_new_tokens=10, stop_token_ids=(6, 30)))
    assert (completion.finish, completion.tokens.tolist()) == ("stop", [3, 4, 5, 6])


def test_abort_of_one_and_of_all(house: House, make_requests: MakeRequests):
    server, engine = house.pair({"token_s": 0.05}, max_requests=8)
    params = SamplingParams(n=4, max_new_tokens=90)
    requests = [r for uid in "abcd" for r in make_requests(uid, 5, params)]  # a and b are sent, c and d wait
    futures = engine.submit(requests)
    until(lambda: len(server.running) == 8 and all(server.started.values()))
    time.sleep(0.2)  # some tokens each
    engine.abort(["a", "d"])
    done, _ = wait_futures(futures[:4] + futures[12:], 20)
    assert len(done) == 8
    assert not any(future.done() for future in futures[4:12])
    engine.abort()
    for request, completion in zip(requests, check(requests, futures), strict=True):
        assert completion.finish == "abort"
        assert completion.num_tokens > 0 or request.uid in "cd"
        assert completion.num_tokens == 0 or request.uid != "d"


def test_a_future_that_is_cancelled_ends_its_request_at_the_server(house: House, make_requests: MakeRequests):
    server, engine = house.pair({"token_s": 0.05}, max_requests=2)
    requests = make_requests("a", 5, SamplingParams(n=4, max_new_tokens=90))
    futures = engine.submit(requests)
    until(lambda: len(server.running) == 2 and all(server.started.values()))
    for future in (futures[0], futures[1], futures[2]):  # two at the server, one waits here
        assert future.cancel()
    until(lambda: len(server.running) == 1 and len(engine._flights) == 1)
    engine.abort()
    assert futures[3].result(20).finish == "abort"


def test_an_abort_ends_what_is_still_on_its_way_and_nothing_else(house: House, make_requests: MakeRequests):
    server, engine = house.pair({"token_s": 0.02})
    server.late_s = 0.4
    requests = [r for uid in "abcd" for r in make_requests(uid, 5, SamplingParams(n=4, max_new_tokens=40))]
    futures = engine.submit(requests)
    until(lambda: len(sampled(server)) == 16)
    engine.abort(["a"])
    completions = check(requests, futures)
    assert [completion.finish for completion in completions] == ["abort"] * 4 + ["length"] * 12
    assert len({len(body["rid"]) for body in sampled(server)}) == 1  # SGLang takes an id for a prefix of ids


def test_what_cannot_be_sampled_is_refused_before_anything_is_sent(house: House, make_requests: MakeRequests):
    server, engine = house.pair()
    fine = make_requests("fine", 3, SamplingParams(max_new_tokens=9))
    cases = [
        (np.array([], np.int64), {}, "at least one token"),
        (np.array([1, 32]), {}, r"ids in \[0, 32\), got 32"),
        (np.ones(95, np.int64), {}, "most new tokens that fit: 5"),
        (np.ones(4, np.int64), {"stop_token_ids": (99,)}, "stop token"),
        (np.ones(4, np.int64), {"min_new_tokens": 2}, "min_new_tokens: expected 0 with SGLang"),
        (np.ones(4, np.int64), {"top_k": 5, "top_p": 0.9}, "expected one of them with SGLang .*, got 0.9 with 5"),
    ]
    for tokens, more, message in cases:
        with pytest.raises(UserError, match=message):
            engine.submit([*fine, Request("p", 0, 0, tokens, SamplingParams(max_new_tokens=9, **more))])
    assert sampled(server) == []


# Faults


def test_transport_errors_are_retried_and_answers_are_not(house: House, make_requests: MakeRequests):
    server, engine = house.pair()
    requests = make_requests("p", 5, SamplingParams(max_new_tokens=4))
    server.faults["/generate"] = ["reset", "reset"]
    check(requests, engine.submit(requests))
    assert len(sampled(server)) == 3
    server.requests.clear()
    server.faults["/generate"] = [(400, {"error": {"message": "no, because"}})]
    with pytest.raises(RunError, match="expected status 200, got 400: no, because") as caught:
        engine.submit(requests)[0].result(20)
    assert not isinstance(caught.value, EngineLost)
    assert len(sampled(server)) == 1
    server.faults["/generate"] = [(200, {"output_ids": [1], "meta_info": {}})]
    with pytest.raises(RunError, match="expected one response of numbered weights"):
        engine.submit(requests)[0].result(20)
    check(requests, engine.submit(requests))


def test_a_server_that_is_busy_is_asked_again_after_a_pause(
    house: House, make_requests: MakeRequests, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pekoe.engine.servers.engine._BUSY_S", 0.05)
    server, engine = house.pair()
    requests = make_requests("p", 5, SamplingParams(max_new_tokens=4))
    server.faults["/generate"] = [(429, None)] * 4 + [(500, {"message": "no"}), (503, None)]
    check(requests, engine.submit(requests))
    assert len(sampled(server)) == 7
    assert engine.stats().num_retries == 6
    server.requests.clear()
    server.faults["/generate"] = [(500, {"error": {"message": "no, because"}})] * 3
    with pytest.raises(RunError, match=r"status 200, got 500: no, because \(3 attempts\)") as caught:
        engine.submit(requests)[0].result(20)
    assert not isinstance(caught.value, EngineLost)
    assert len(sampled(server)) == 3
    server.faults["/generate"] = [(429, None, {"retry-after": "1"}), (503, None, {"retry-after": "nonsense"})]
    start = time.monotonic()
    check(requests, engine.submit(requests))
    assert 1 < time.monotonic() - start < 5
    server.requests.clear()
    server.faults["/generate"] = [(429, None, {"retry-after": "0"})] * 2  # no leave to send it again at once
    start = time.monotonic()
    check(requests, engine.submit(requests))
    assert time.monotonic() - start > 2 * 0.05
    # A minute at most, and no longer than the limit.
    server.faults["/generate"] = [(429, None, {"retry-after": "100000"})]
    with pytest.raises(RunError, match="got 429"):
        engine.submit(requests)[0].result(5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("another", "it answers another with 5 prompt tokens"),
        ((200, gzip.compress(b"[" + b"0," * 10**6 + b"0]"), {"content-encoding": "gzip"}), "not compressed, got gzip"),
        ((200, b" " * (1 << 21)), r"at most 1,052,672 bytes"),
        ((200, b"[" * 100_000 + b"]" * 100_000), r"expected one response .*got \[\[\["),
        (
            (200, b'{"output_ids": [1e400], "meta_info": {"finish_reason": {"type": "length"}}}'),
            "expected a list of token ids",
        ),
        ((200, b'"\\ud800\\u001b[31m"'), r"got \\ud800\\x1b\[31m"),
    ],
)
def test_what_cannot_be_an_answer_is_one_clear_error(
    house: House, make_requests: MakeRequests, fault: Any, message: str
):
    server, engine = house.pair()
    requests = make_requests("p", 5, SamplingParams(max_new_tokens=4))
    server.faults["/generate"] = [fault]
    with pytest.raises(RunError, match=message) as caught:
        engine.submit(requests)[0].result(20)
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()
    check(requests, engine.submit(requests))


def test_a_body_that_drips_has_the_time_of_one_request(house: House, make_requests: MakeRequests, weights: Path):
    server, engine = house.pair(request_limit_s=0.5, update_limit_s=0.5)
    server.faults["/generate"] = ["drip"]
    (future,) = engine.submit(make_requests("p", 5, SamplingParams(max_new_tokens=4)))
    with pytest.raises(RunError, match=r"an answer within 0\.5 s"):
        future.result(10)
    server.faults = {"/flush_cache": ["drip"]}
    with pytest.raises(EngineLost, match=r"an answer within 0\.5 s"):
        engine.flush_cache()
    server.faults = {"/health": ["drip"]}
    start = time.monotonic()
    (future,) = engine.submit(make_requests("p", 5, SamplingParams(max_new_tokens=4)))
    future.result(10)
    engine.close()  # does not wait for anything
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("tokens", "logprobs", "finish", "message"),
    [
        ([1, 2], [-1.0, -1.0], {"type": "length"}, "expected 4 tokens, got 2"),
        ([1, 2, 3, 4, 5], [-1.0] * 5, {"type": "length"}, "expected at most 4 tokens, got 5"),
        ([1, 99], [-1.0, -1.0], {"type": "stop", "matched": 99}, r"token ids in \[0, 32\)"),
        ([1, 2], [-1.0, 0.5], {"type": "stop", "matched": 2}, "finite and <= 0"),
        ([1, 2], [-1.0, float("nan")], {"type": "stop", "matched": 2}, "finite and <= 0"),
        ([1, 2], [-1.0, -1e39], {"type": "stop", "matched": 2}, "finite and <= 0"),  # -inf in float32
        ([1, 3], [-1.0, -1.0], {"type": "stop", "matched": 3}, r"a stop at one of \(2,\), got \[3\]"),
        ([], [], {"type": "stop", "matched": 2}, "at least one token"),
    ],
)
def test_wrong_answers_are_errors(
    house: House, make_requests: MakeRequests, tokens: list[int], logprobs: list[float], finish: Any, message: str
):
    server, engine = house.pair()
    entries = [[logprob, token, None] for logprob, token in zip(logprobs, tokens, strict=True)]
    spans = [{"version": "0", "start": 0, "end": len(tokens)}]
    meta = {"finish_reason": finish, "output_token_logprobs": entries, "weight_versions": spans, "cached_tokens": 0}
    server.on_generate = lambda body: (  # pyright: ignore[reportAttributeAccessIssue]
        200,
        {"output_ids": tokens, "meta_info": meta | {"id": body["rid"], "prompt_tokens": 5}},
    )
    (future,) = engine.submit(make_requests("p", 5, SamplingParams(max_new_tokens=4, stop_token_ids=(2,))))
    with pytest.raises(RunError, match=f"prompt p, sample 0: expected .*{message.removeprefix('expected ')}") as caught:
        future.result(20)
    assert not isinstance(caught.value, EngineLost)


def test_when_a_server_dies_its_requests_are_lost(house: House, make_requests: MakeRequests):
    server, engine = house.pair({"token_s": 0.01})
    requests = make_requests("p", 5, SamplingParams(n=4, max_new_tokens=60))
    futures = engine.submit(requests)
    until(lambda: len(server.running) == 4)
    assert engine.health()
    server.die()
    for future in [*futures, *engine.submit(requests)]:
        with pytest.raises(EngineLost, match=r"SGLang at http.*3 attempts"):
            future.result(20)
    assert not engine.health()
    for call in (engine.flush_cache, engine.checksums, engine.offload):
        with pytest.raises(EngineLost):
            call()


def test_a_server_that_hangs_is_lost_and_one_that_is_slow_is_an_error(
    house: House, make_requests: MakeRequests, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pekoe.engine.servers.client._HEALTH_LIMIT_S", 0.5)
    server, engine = house.pair(request_limit_s=1.0)
    requests = make_requests("p", 5, SamplingParams(max_new_tokens=5))
    server.faults = {"/generate": ["hang"], "/health": ["hang"]}
    with pytest.raises(EngineLost, match="health check fails"):
        engine.submit(requests)[0].result(20)
    server.faults = {"/generate": ["hang"]}  # the limit was too low, and the run is told so
    with pytest.raises(RunError, match="an answer within 1 s") as caught:
        engine.submit(requests)[0].result(20)
    assert not isinstance(caught.value, EngineLost)


def test_a_silent_request_does_not_condemn_a_server_that_is_paused_meanwhile(
    house: House, make_requests: MakeRequests, weights: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pekoe.engine.servers.client._HEALTH_LIMIT_S", 0.5)
    server, engine = house.pair(request_limit_s=0.5, update_limit_s=2.0)
    server.faults = {"/generate": ["hang"], "/health": ["hang"], "/update_weights_from_disk": ["hang"]}
    (future,) = engine.submit(make_requests("p", 5, SamplingParams(max_new_tokens=5)))
    until(lambda: sampled(server))
    update = house.later(engine.update_weights, weights, 1)
    with pytest.raises(RunError, match=r"an answer within 0\.5 s") as caught:
        future.result(20)
    assert not isinstance(caught.value, EngineLost)
    with pytest.raises(EngineLost, match="within 2 s"):
        update.result(20)


def test_tokens_of_weights_that_no_update_brought_lose_the_server(
    house: House, make_requests: MakeRequests, weights: Path
):
    server, engine = house.pair()
    engine.update_weights(weights, 3)
    server.version = "0"  # somebody started it again, from what it began with
    requests = make_requests("p", 5, SamplingParams(n=2, max_new_tokens=4))
    for future in engine.submit(requests):
        with pytest.raises(EngineLost, match=r"expected tokens of versions 3 to 3, got \[0\]"):
            future.result(20)
    engine.update_weights(weights, 4)
    check(requests, engine.submit(requests))


# Weights


@pytest.mark.parametrize("source", ["directory", "model"])
def test_an_update_in_mid_flight_tags_versions(house: House, make_requests: MakeRequests, weights: Path, source: str):
    server, engine = house.pair({"token_s": 0.01})
    requests = make_requests("p", 5, SamplingParams(n=3, max_new_tokens=60))
    futures = engine.submit(requests)
    until(lambda: len(server.running) == 3)
    time.sleep(0.1)  # some tokens each
    engine.update_weights(weights if source == "directory" else house.model, 3)
    assert engine.version == 3
    for completion in check(requests, futures):
        assert [version for version, _ in completion.versions] == [0, 3]
    called = paths(server)
    assert called.index("/pause_generation") < called.index("/update_weights_from_disk") < called.index("/flush_cache")
    assert ("/pause_generation", {"mode": "retract"}) in server.requests
    assert not server.paused
    assert list((house.tmp_path / "logs").glob("*")) == []


def test_what_is_submitted_during_an_update_is_sampled_after_it(
    house: House, make_requests: MakeRequests, weights: Path
):
    server, engine = house.pair(update_limit_s=20.0)
    server.slow["/update_weights_from_disk"] = 1.0
    update = house.later(engine.update_weights, weights, 1)
    until(lambda: "/update_weights_from_disk" in paths(server))
    requests = make_requests("p", 5, SamplingParams(n=2, max_new_tokens=4))
    futures = engine.submit(requests)
    assert engine.health()  # though its health check would fail
    assert not sampled(server)
    assert not update.done()
    assert {completion.versions for completion in check(requests, futures)} == {((1, 0),)}


def test_an_update_may_end_what_is_in_flight(house: House, make_requests: MakeRequests, weights: Path):
    server, engine = house.pair({"token_s": 0.02}, during_update="abort")
    futures = engine.submit(make_requests("p", 5, SamplingParams(n=2, max_new_tokens=90)))
    until(lambda: len(server.running) == 2)
    time.sleep(0.2)
    engine.update_weights(weights, 1)
    assert [(f.result(20).finish, f.result().versions) for f in futures] == [("abort", ((0, 0),))] * 2


def test_after_an_update_that_fails_requests_wait_for_one_that_succeeds(
    house: House, make_requests: MakeRequests, weights: Path
):
    server, engine = house.pair({"token_s": 0.02})
    requests = make_requests("p", 5, SamplingParams(n=2, max_new_tokens=30))
    running = engine.submit(requests)
    until(lambda: len(server.running) == 2)
    time.sleep(0.1)
    failed = {"success": False, "message": "no such file"}
    troubles: list[dict[str, Any]] = [
        {"faults": {"/update_weights_from_disk": [(400, failed)]}},
        {"faults": {"/update_weights_from_disk": [(200, failed)]}},
        {"lies_about_version": True},
    ]
    for version, trouble in enumerate(troubles, start=1):
        for name, value in trouble.items():
            setattr(server, name, value)
        with pytest.raises(RunError, match=f"update to version {version} failed: .*(no such file|a lie)") as caught:
            engine.update_weights(weights, version)
        assert not isinstance(caught.value, EngineLost)
        assert engine.version == 0
        with pytest.raises(EngineLost, match="failed"):
            engine.flush_cache()
    waiting = engine.submit(requests)
    engine.abort(["nobody"])  # has been there and back
    assert len(sampled(server)) == 2
    server.lies_about_version = False
    server.version = "0"
    engine.update_weights(weights, 9)
    assert {completion.versions[-1][0] for completion in check(requests, running)} == {9}
    assert {completion.versions for completion in check(requests, waiting)} == {((9, 0),)}


def test_requests_do_not_wait_for_ever_for_an_update_that_succeeds(
    house: House, make_requests: MakeRequests, weights: Path
):
    server, engine = house.pair(update_limit_s=0.5)
    server.faults["/update_weights_from_disk"] = [(400, {"message": "no such file"})]
    with pytest.raises(RunError, match="no such file"):
        engine.update_weights(weights, 1)
    for future in engine.submit(make_requests("p", 5, SamplingParams(n=2, max_new_tokens=4))):
        with pytest.raises(EngineLost, match="update to version 1 failed"):
            future.result(20)


@pytest.mark.parametrize("fault", ["reset", "hang"])
def test_a_server_that_dies_or_hangs_in_an_update_is_lost(
    house: House, make_requests: MakeRequests, weights: Path, fault: str
):
    server, engine = house.pair({"token_s": 0.1}, update_limit_s=1.0)
    futures = engine.submit(make_requests("p", 5, SamplingParams(n=2, max_new_tokens=90)))
    until(lambda: len(server.running) == 2)
    server.faults["/pause_generation"] = [fault]
    with pytest.raises(EngineLost, match="update to version 1 failed"):
        engine.update_weights(weights, 1)
    for future in [*futures, *engine.submit(make_requests("q", 5, SamplingParams(max_new_tokens=4)))]:
        with pytest.raises(EngineLost, match="update to version 1 failed"):
            future.result(20)


def test_broadcasts_use_one_group_until_there_is_another(house: House):
    server, engine = house.pair()
    names = [name for name, _ in house.model.named_parameters()]
    update = ["/pause_generation", "/end_weight_update", "/begin_weight_update"]
    engine.update_weights(Broadcast(GROUP, 2**30), 1)
    assert server.requests[-1][0] != "/init_weights_update_group"
    after = ["/update_weights_from_distributed", "/end_weight_update", "/update_weight_version", "/flush_cache"]
    begun = paths(server).index("/init_weights_update_group")
    assert paths(server)[begun + 1 :] == [*update, *after, "/continue_generation"]
    server.requests.clear()
    engine.update_weights(Broadcast(GROUP, 1), 2)  # a bucket a tensor
    assert paths(server)[:3] == update
    bodies: list[Any] = [body for path, body in server.requests if path == "/update_weights_from_distributed"]
    assert [body["names"] for body in bodies] == [[name] for name in names]
    assert {body["dtypes"][0] for body in bodies} == {"float32"}
    assert bodies[0]["shapes"] == [list(house.model.get_parameter(names[0]).shape)]
    server.requests.clear()
    engine.update_weights(Broadcast(replace(GROUP, name="g2"), 2**30), 3)
    assert paths(server)[:2] == ["/destroy_weights_update_group", "/init_weights_update_group"]
    assert engine.version == 3
    assert engine.num_workers == 1


def test_a_group_that_a_server_refuses_is_an_error_and_joined_anew_next_time(house: House):
    server, engine = house.pair()
    server.faults["/init_weights_update_group"] = [(400, {"success": False, "message": "no group"})]
    with pytest.raises(RunError, match="no group"):
        engine.update_weights(Broadcast(GROUP, 2**30), 1)
    server.requests.clear()
    engine.update_weights(Broadcast(replace(GROUP, name="g2"), 2**30), 1)
    assert paths(server)[0] == "/init_weights_update_group"


def test_a_flush_beside_traffic_keeps_what_is_in_flight(house: House, make_requests: MakeRequests):
    server, engine = house.pair({"token_s": 0.02})
    server.requests.clear()
    engine.flush_cache()
    assert paths(server) == ["/flush_cache"]
    requests = make_requests("p", 5, SamplingParams(n=2, max_new_tokens=60))
    futures = engine.submit(requests)
    until(lambda: len(server.running) == 2)
    engine.flush_cache()
    assert paths(server)[-3:] == ["/pause_generation", "/flush_cache", "/continue_generation"]
    assert not any(future.done() for future in futures)
    assert {completion.finish for completion in check(requests, futures)} == {"length"}


def test_checksums_and_memory_are_the_servers(house: House):
    server, engine = house.pair()
    assert engine.checksums() == {"model.norm.weight": "0"}
    engine.offload()
    engine.onload()
    assert paths(server)[-2:] == ["/release_memory_occupation", "/resume_memory_occupation"]


# Start and end


def test_a_server_that_was_left_paused_is_resumed(house: House, make_requests: MakeRequests):
    server = house.server()
    server.paused = True
    requests = make_requests("p", 5, SamplingParams(max_new_tokens=4))
    check(requests, house.engine(server.url).submit(requests))


def test_a_server_with_a_key_is_sent_it_from_the_environment(
    house: House, make_requests: MakeRequests, monkeypatch: pytest.MonkeyPatch
):
    server = house.server()
    server.key = "s3cret"
    monkeypatch.setenv("MY_KEY", "s3cret")
    requests = make_requests("p", 5, SamplingParams(max_new_tokens=4))
    check(requests, house.engine(server.url, key_env="MY_KEY").submit(requests))
    with pytest.raises(RunError, match=r"got 401: Unauthorized; engine\.server\.key_env names the variable"):
        house.engine(server.url)
    monkeypatch.setenv("MY_KEY", "another")
    with pytest.raises(RunError, match=r"got 401: Unauthorized$"):
        house.engine(server.url, key_env="MY_KEY")
    for value in ("", "two\nlines", "s\N{LATIN SMALL LETTER E WITH ACUTE}cret"):
        monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(UserError, match="expected the environment variable MY_KEY with the servers' key"):
            house.engine(server.url, key_env="MY_KEY")


def test_a_password_in_a_url_is_in_no_message(house: House):
    server = house.server()
    server.key = "another"
    with pytest.raises(RunError) as caught:
        house.engine(server.url.replace("//", "//me:s3cret@"))
    assert "s3cret" not in str(caught.value)
    assert "http://***@127.0.0.1" in str(caught.value)


def test_mistakes_in_the_config(house: House, make_model: Callable[..., Decoder]):
    with pytest.raises(UserError, match=r"servers on this host.*got http://10\.1\.2\.3:1"):
        house.engine("http://10.1.2.3:1", sync="shm")
    with pytest.raises(UserError, match="expected no --api-key"):
        house.engine(None, python=sys.executable, args=("--api-key=s3cret",))
    with pytest.raises(UserError, match="with SGLang in it, got '/no/python'"):
        house.engine(None, python="/no/python")
    _, engine = house.pair()
    with pytest.raises(UserError, match="expected a model of shape"):
        engine.update_weights(make_model(num_layers=1), 1)
    with pytest.raises(UserError, match="expected a Hugging Face model directory"):
        engine.update_weights(Path("/no/model"), 1)


def test_more_requests_than_files_may_be_open_are_refused(monkeypatch: pytest.MonkeyPatch):
    allowed: list[Any] = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: allowed.append(limits))
    allow_open_files(2, 256)
    allow_open_files(4, 512)
    assert allowed == [(2304, 4096)]
    with pytest.raises(UserError, match=r"max_requests: expected at most 480 for each of 8 servers.*got 512"):
        allow_open_files(8, 512)


def test_a_server_that_nobody_answers_at(house: House):
    gone = house.server()
    gone.die()
    with pytest.raises(RunError, match=f"SGLang at {gone.url}: expected its health check to pass within 1 s"):
        house.engine(gone.url, start_limit_s=1.0)


def test_after_the_end(house: House, make_requests: MakeRequests, weights: Path):
    server, engine = house.pair({"token_s": 0.05}, max_requests=2)
    requests = make_requests("p", 5, SamplingParams(n=4, max_new_tokens=90))
    futures = engine.submit(requests)
    until(lambda: len(server.running) == 2)
    engine.close()
    engine.close()
    for future in futures:
        with pytest.raises(RunError, match="closed"):
            future.result(1)
    until(lambda: not server.running)  # it is told to end them
    assert not server.paused
    assert not engine.health()
    engine.abort()
    calls: list[Callable[[], object]] = [lambda: engine.submit(requests), engine.flush_cache]
    for call in [*calls, lambda: engine.update_weights(weights, 1)]:
        with pytest.raises(RunError, match="closed"):
            call()


def test_a_stopped_thread_takes_no_more_work():
    async def work() -> None: ...

    thread = AsyncThread("pekoe thread")
    thread.stop()
    with pytest.raises(RunError, match="closed"):
        thread.run(work())
    with pytest.raises(RunError, match="closed"):
        thread.soon(print)


@pytest.fixture
def python(tmp_path: Path) -> str:
    """Takes the place of the Python that has SGLang: whatever is asked for, it runs the fake."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {fake_sglang.__file__} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_launched_server_that_is_killed_is_lost_with_the_end_of_its_log(
    house: House, make_requests: MakeRequests, python: str
):
    engine = house.engine(None, python=python)
    assert engine.label == "SGLang server 0"
    process = engine.process
    assert process is not None
    assert httpx.get(engine.url + "/model_info").status_code == 401  # it has a key
    assert len(engine.key) == 64
    assert not any(engine.key in " ".join(each.cmdline()) for each in psutil.Process(process.pid).children(True))
    assert process.log.stat().st_mode & 0o777 == 0o600  # servers log their arguments
    requests = make_requests("p", 5, SamplingParams(n=2, max_new_tokens=80))
    check(requests, engine.submit(requests))
    futures = engine.submit(requests)
    until(lambda: engine.stats().num_decode_tokens == 160 and engine._flights)
    os.killpg(process.pid, signal.SIGKILL)
    for future in futures:
        with pytest.raises(EngineLost, match=r"(?s)SGLang server 0: .*exited with status 137.*the fake serves"):
            future.result(20)
    assert not engine.health()


def test_closing_ends_a_launched_server(house: House, python: str):
    engine = house.engine(None, python=python)
    process = engine.process
    assert process is not None
    assert process.exit_code is None
    assert b"PYTHONSAFEPATH=1\0" in Path(f"/proc/{process.pid}/environ").read_bytes()  # `-m` imports nothing from here
    assert engine.key.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert "the fake serves" in (house.tmp_path / "logs" / "sglang-server-0.log").read_text()


def test_a_launch_that_fails_shows_the_log(house: House, tmp_path: Path):
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\necho no module named sglang\nexit 3\n")
    path.chmod(0o755)
    message = r"(?s)SGLang server 0 ended while starting.*exited with status 3.*no module named sglang"
    with pytest.raises(RunError, match=message):
        house.engine(None, python=str(path))
