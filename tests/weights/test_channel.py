"""I4: after a publish every engine holds exactly the trainer's version, and one that does not stops the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pekoe.core.errors import RunError
from pekoe.core.loop import Route
from pekoe.core.types import SamplingParams
from pekoe.engine.base import Completion, Engine, EngineLost, requests_of
from pekoe.engine.pool import Member
from tests.weights.conftest import Bench, Reference

MakeBench = Callable[..., Bench]
ROUTES: list[Route] = ["copy", "disk", "shm", "broadcast"]


def until(ready: Callable[[], object], limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < end, "not within the limit"
        time.sleep(0.02)


class Keeps:
    """From the given version on, an engine keeps the weights that it has, whatever it is given."""

    def __init__(self, since: int) -> None:
        self.since, self.state = since, dict[str, torch.Tensor]()

    def __call__(self, engine: Reference, version: int) -> None:
        if version < self.since:
            self.state = {name: value.clone() for name, value in engine.model.state_dict().items()}
        else:
            engine.model.load_state_dict(self.state)
            engine._use(engine.model, version)


# Routes


@pytest.mark.parametrize("route", ["alias", *ROUTES])
def test_every_route_brings_the_weights(make_bench: MakeBench, route: Route, tmp_path: Path):
    bench = make_bench(route)
    size = sum(p.nbytes for p in bench.model.parameters())
    for version in range(3):
        report = bench.channel.publish(version)
        assert (report.version, report.route, report.checksum) == (version, route, "equal")
        assert report.canary_diff is not None
        assert report.canary_diff <= 1e-4
        if route in ("alias", "copy"):
            assert report.copied_bytes == 0
        else:  # once, however many engines there are
            assert size <= report.copied_bytes < 1.3 * size
        assert [member.state for member in bench.pool.members] == ["serving"] * 2
        for member in bench.members:
            assert (member.engines[-1].model is bench.model) == (route == "alias")
        bench.learn(seed=version)
    assert not list(tmp_path.glob("weights/*"))
    assert bench.channel.counters()["sync_send_s"] > 0


def test_a_group_stays_open_while_its_engines_are_the_same(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch):
    bench = make_bench("broadcast")
    opened: list[Any] = []
    open_group = bench.sender.open
    monkeypatch.setattr(bench.sender, "open", lambda kind, group: (opened.append(group), open_group(kind, group)))
    for version in range(3):
        bench.channel.publish(version)
    assert len(opened) == 1
    assert opened[0].world_size == 3
    bench.channel.forget()
    bench.channel.publish(3)
    assert len(opened) == 2


def test_the_checksum_comes_with_the_first_two_and_then_as_often_as_asked(make_bench: MakeBench):
    bench = make_bench(checksum_every=3)
    due = [bench.channel.publish(version).checksum == "equal" for version in range(8)]
    assert due == [True, True, False, True, False, False, True, False]


def test_an_engine_that_can_give_no_checksum(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch):
    bench = make_bench()
    monkeypatch.setattr(Reference, "checksums", lambda engine: None)
    assert bench.channel.publish(0).checksum == "unknown"


def test_weights_that_are_there_are_proven_without_being_sent(make_bench: MakeBench):
    bench = make_bench()
    bench.channel.publish(0)
    bench.channel.prove(0)
    assert [member.updates for member in bench.members] == [1, 1]
    bench.learn()
    with pytest.raises(RunError, match="with log-probs within"):
        bench.channel.prove(0)


# Engines that lie


@pytest.mark.parametrize("route", ROUTES)
def test_one_engine_with_old_weights_is_found(make_bench: MakeBench, route: Route):
    bench = make_bench(route, checksum_every=100)
    bench.members[1].lie = Keeps(2)
    for version in range(2):
        bench.channel.publish(version)
        bench.learn(seed=version)
    with pytest.raises(RunError, match=r"expected engine 1 at version 2 with log-probs within 0\.001"):
        bench.channel.publish(2)


def test_stale_kv_is_found(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch):
    bench = make_bench(num=1)
    engine = bench.members[0].engines[0]
    bench.channel.publish(0)
    monkeypatch.setattr(engine._scheduler.cache, "flush", lambda: None)
    bench.channel.publish(1)
    bench.learn()
    with pytest.raises(RunError, match="with log-probs within"):
        bench.channel.publish(2)


def test_a_single_wrong_number_is_found_by_the_checksum(make_bench: MakeBench):
    bench = make_bench()
    bench.channel.publish(0)

    def nudge(engine: Reference, version: int) -> None:
        with torch.no_grad():
            weight = engine.model.get_parameter("model.norm.weight")
            weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))

    bench.members[0].lie = nudge
    with pytest.raises(RunError, match=r"engine 0 at version 1 .* bit by bit, got others in model\.norm\.weight"):
        bench.channel.publish(1)


def test_a_wrong_version_is_found(make_bench: MakeBench):
    bench = make_bench()
    bench.members[0].lie = lambda engine, version: setattr(engine, "_version", version + 1)
    with pytest.raises(RunError, match=r"at version 4 .* got version 5"):
        bench.channel.publish(4)


def test_log_probs_that_are_no_numbers_are_not_close(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch):
    bench = make_bench()
    logprobs = bench.sender.logprobs
    monkeypatch.setattr(bench.sender, "logprobs", lambda samples: [x * np.float32("nan") for x in logprobs(samples)])
    with pytest.raises(RunError, match="got version 0 and nan"):
        bench.channel.publish(0)


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 3e-4), (torch.float32, 1e-6)])
def test_the_version_before_is_told_from_this_one(make_bench: MakeBench, dtype: torch.dtype, rate: float):
    """A step that moves log-probs by less than the tolerance."""
    bench = make_bench(dtype=dtype, checksum_every=100)
    for version in range(5):
        bench.channel.publish(version)  # good ones pass
        bench.learn(rate, seed=version)
    bench.members[1].lie = Keeps(6)
    bench.channel.publish(5)
    bench.learn(rate, seed=5)
    with pytest.raises(RunError, match="expected engine 1 to sample from version 6, got log-probs of a version before"):
        bench.channel.publish(6)


@pytest.mark.parametrize("route", ["broadcast", "disk"])
def test_engines_may_hold_bfloat16_alone(make_bench: MakeBench, route: Route):
    """Half of the bytes, of which no second copy is made; sent into the same memory, which graphs may read."""
    bench, wide = (make_bench(route, dtype=torch.bfloat16, weights=w) for w in (torch.bfloat16, torch.float32))
    sizes = [each.channel.publish(0).copied_bytes for each in (bench, wide)]
    assert sizes[0] < 0.55 * sizes[1]
    engines = [member.engines[0] for member in bench.members]
    before = [[p.data_ptr() for p in engine.model.parameters()] for engine in engines]
    bench.learn()
    assert bench.channel.publish(1).checksum == "equal"
    for engine, pointers in zip(engines, before, strict=True):
        for ours, theirs in zip(engine.model.parameters(), bench.model.parameters(), strict=True):
            assert ours.dtype is torch.bfloat16
            assert torch.equal(ours, theirs.to(torch.bfloat16))
        assert engine._runner.sampled is engine.model  # pyright: ignore[reportPrivateUsage]
        if route == "broadcast":
            assert [p.data_ptr() for p in engine.model.parameters()] == pointers


def test_unchanged_weights_are_no_fault(make_bench: MakeBench):
    """A step without an update publishes the same weights again."""
    bench = make_bench(dtype=torch.bfloat16)
    for version in range(3):
        bench.channel.publish(version)


# Engines that die


@pytest.mark.parametrize("route", ROUTES)
def test_an_engine_that_dies_while_weights_are_sent_is_lost_and_catches_up(make_bench: MakeBench, route: Route):
    bench = make_bench(route, limit_s=2.0)
    bench.channel.publish(0)
    bench.learn()
    bench.members[0].dies_at = 2
    assert bench.channel.publish(1).checksum == "equal"
    assert bench.pool.num_lost == 1
    assert [member.number for member in bench.pool.in_state("serving")] in ([1], [0, 1])
    until(lambda: bench.pool.in_state("stale", "serving") == list(bench.pool.members))
    bench.channel.catch_up()
    assert [member.state for member in bench.pool.members] == ["serving"] * 2
    assert [member.engine.version for member in bench.pool.members] == [1, 1]
    assert len(bench.members[0].engines) == 2


def test_an_engine_that_dies_while_it_is_proven_is_lost(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch):
    bench = make_bench()
    first = bench.members[0].engines[0]

    def die(requests: Any) -> Any:
        raise EngineLost("it died")

    monkeypatch.setattr(first, "submit", die)
    bench.channel.publish(0)
    assert bench.pool.num_lost == 1
    assert 1 in [member.number for member in bench.pool.in_state("serving")]


def test_where_all_die_the_publish_waits_for_one_that_comes_back(make_bench: MakeBench):
    bench = make_bench(num=1)
    bench.members[0].dies_at = 1
    bench.channel.publish(0)
    assert len(bench.members[0].engines) == 2
    assert bench.pool.members[0].state == "serving"


def test_an_update_that_fails_again_and_again_starts_the_engines_again_once(make_bench: MakeBench):
    bench = make_bench(num=1)

    def fail(engine: Reference, version: int) -> None:
        raise RunError("no room")

    bench.members[0].lie = fail
    with pytest.raises(RunError, match="5 attempts to send version 0 failed: engine 0: no room"):
        bench.channel.publish(0)
    assert len(bench.members[0].engines) == 2
    assert bench.members[0].updates == 10


def test_an_engine_that_was_replaced_while_it_was_proven_does_not_serve(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
):
    """The one that came back in its place holds other weights."""
    bench = make_bench()
    logprobs, place = bench.sender.logprobs, bench.pool.members[0]

    def lose(samples: Any) -> Any:
        if bench.pool.num_lost == 0:
            bench.pool.lose(place, "a request of it failed")
            until(lambda: place.state == "stale")
        return logprobs(samples)

    monkeypatch.setattr(bench.sender, "logprobs", lose)
    bench.channel.publish(3)
    assert place.state == "stale"
    bench.channel.catch_up()
    assert (place.state, place.engine.version) == ("serving", 3)


def test_an_engine_that_was_replaced_after_its_proof_does_not_serve(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
):
    """Between the proof and `serve`, another thread may lose the engine."""
    bench = make_bench()
    serve, place = bench.pool.serve, bench.pool.members[0]

    def lose_first(member: Member, engine: Engine | None = None) -> None:
        if member is place and bench.pool.num_lost == 0:
            bench.pool.lose(place, "a request of it failed")
            until(lambda: place.state == "stale")
        serve(member, engine)

    monkeypatch.setattr(bench.pool, "serve", lose_first)
    bench.channel.publish(3)
    assert place.state == "stale"
    bench.channel.catch_up()
    assert (place.state, place.engine.version) == ("serving", 3)


# Beside traffic


@pytest.mark.parametrize("route", ["copy", "broadcast"])
def test_requests_in_flight_go_on_while_weights_are_published(make_bench: MakeBench, route: Route):
    bench = make_bench(route)
    bench.channel.publish(0)
    params = SamplingParams(n=8, max_new_tokens=100)
    futures = bench.pool.submit(requests_of("long", 0, [3, 4, 5], params))
    until(lambda: bench.pool.stats().num_decode_tokens > 60)
    bench.learn()
    report = bench.channel.publish(1)
    assert report.canary_diff is not None
    assert report.canary_diff <= 1e-4
    completions: list[Completion] = [future.result(60) for future in futures]
    assert {completion.num_tokens for completion in completions} == {100}
    assert {version for c in completions for version, _ in c.versions} >= {0, 1}
    assert all(np.isfinite(c.logprobs).all() for c in completions)


def test_who_asks_to_stop_does_not_wait_for_an_engine_that_does_not_answer(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pekoe.weights.channel._STOP_S", 0.2)
    bench, released = make_bench(num=1), threading.Event()
    assert bench.channel.publish(1).canary_diff is not None
    bench.members[0].lie = lambda *_: (released.wait(20), None)[1]
    bench.channel._stopping = lambda: bench.members[0].updates > 1
    start = time.monotonic()
    report = bench.channel.publish(2)
    bench.channel.catch_up()
    released.set()
    assert time.monotonic() - start < 10
    assert (report.canary_diff, report.checksum) == (None, "skipped")
    assert "sync_canary_diff" not in report.as_dict()
    assert "not proven" in str(report)
    assert not bench.pool.in_state("serving")
