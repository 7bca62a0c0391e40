"""A node's store, as the object that it is without Ray."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pekoe.config import load_config
from pekoe.core.errors import RunError, UserError
from pekoe.core.records import read_records
from pekoe.core.types import Branch, Problem, Record, Trajectory, Verdict
from pekoe.ray.placement import ByteCount, WorkerLost, translated
from pekoe.ray.store import RayJudge, StoreActor, StoreRef


@pytest.fixture
def store(recipe: dict[str, Any]) -> StoreActor:
    return StoreActor(load_config(recipe | {"cluster": {}}, ()), 1)


def record(first: int = 4) -> Record:
    return Record.of(np.arange(2), np.arange(first, first + 3), np.float32([-0.1, -0.2, -0.3]))


def key(uid: str, sample: int = 0) -> tuple[str | int, ...]:
    return uid, 0, sample, 7, 57


def run(work: Any) -> Any:
    return asyncio.run(work)


def test_a_record_that_is_missing_is_an_error(store: StoreActor):
    run(store.put({key("a"): record()}))
    assert run(store.get([key("a")]))[0].tokens.tolist() == [0, 1, 4, 5, 6]
    with pytest.raises(KeyError):
        run(store.get([key("a"), key("b")]))


def test_a_response_is_judged_where_it_is(store: StoreActor):
    run(store.put({key("a"): record()}))
    trajectory = Trajectory("a", 0, 0, "stop", (Branch(2, 3, ((0, 0),), StoreRef(0, key("a"))),))
    packed = pickle.dumps([(Problem("a", (), "1"), trajectory)] * 2)

    async def outcomes() -> list[tuple[int, Verdict]]:
        return [outcome async for part in store.judge(packed) for outcome in pickle.loads(part)]

    verdicts = dict(run(outcomes()))
    assert sorted(verdicts) == [0, 1]
    assert all(verdict.label in ("correct", "wrong") for verdict in verdicts.values())
    run(store.close())


def test_written_records_are_dropped_at_once_and_others_after_two_steps(store: StoreActor, tmp_path: Path):
    run(store.put({key("a"): record(), key("eval"): record(), (*key("a"), "proximal"): np.zeros(5, np.float32)}))
    lines = [({"uid": "a", "group": 0, "sample": 0}, key("a"))]
    run(store.write(str(tmp_path / "rollouts" / "step-000001.0"), pickle.dumps(lines)))
    (line,) = read_records(tmp_path, 1)
    assert line["tokens"].tolist() == [4, 5, 6]
    assert line["logprobs"].tolist() == np.float32([-0.1, -0.2, -0.3]).tolist()
    for gone in (key("a"), (*key("a"), "proximal")):
        with pytest.raises(KeyError):
            run(store.get([gone]))
    run(store.get([key("eval")]))
    run(store.put({key("next"): record()}))  # sampled while the file was being written
    for step in (2, 3):
        run(store.write(str(tmp_path / "rollouts" / f"step-{step:06d}.0"), pickle.dumps([])))
    run(store.get([key("next")]))
    with pytest.raises(KeyError):
        run(store.get([key("eval")]))
    assert not read_records(tmp_path, 2)


@pytest.mark.parametrize("cause", [UserError("wrong"), RunError("broke off"), OSError("disk full")])
def test_errors_of_ours_come_through(cause: Exception):
    remote = Exception("remote")
    remote.cause = cause  # type: ignore[attr-defined]
    assert translated(remote, "a step") is cause


def test_other_errors_are_a_worker_that_is_lost():
    remote = Exception("remote")
    remote.cause = KeyError(("a", 0))  # type: ignore[attr-defined]
    lost = translated(remote, "a step")
    assert isinstance(lost, WorkerLost)
    assert str(lost) == "a step: KeyError: ('a', 0)"


@pytest.mark.parametrize("moment", ["before it is sent", "while it is sent"])
def test_every_verdict_ends_when_the_judges_are_closed(monkeypatch: pytest.MonkeyPatch, moment: str):
    reached, released = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        """In the judges' thread."""
        reached.set()
        released.wait(10)

    monkeypatch.setattr("ray.wait", lambda *_, **more: None)
    judging = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=hold))
    actor = SimpleNamespace(judge=judging, close=SimpleNamespace(remote=lambda: None))
    stores: Any = SimpleNamespace(passed=ByteCount(), actors={0: actor})
    judge = RayJudge(stores, 1.0)
    loop, errors = judge._follower._thread.loop, list[Any]()
    loop.set_exception_handler(lambda _, context: errors.append(context))
    if moment == "before it is sent":
        judge._follower.soon(hold)
    trajectory = Trajectory("a", 0, 0, "stop", (Branch(2, 3, ((0, 0),), StoreRef(0, key("a"))),))
    verdict = judge.submit(Problem("a", (), "1"), trajectory)
    assert reached.wait(10)
    closing = threading.Thread(target=judge.close)
    closing.start()
    while not judge._follower._thread._stopping:
        time.sleep(0.001)
    released.set()
    closing.join(10)
    assert str(verdict.exception(10)) == "the judges are closed"
    assert not errors
