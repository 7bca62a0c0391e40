"""The endpoint under load, in its short form: nothing is left, and orderly sessions are not harmed by the others."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` brings the endpoint")

TINY = ("--hidden=32", "--layers=2", "--new-tokens=12")


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("bench_endpoint")


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_it_measures_and_what_is_odd_harms_nobody(bench, capsys: pytest.CaptureFixture[str], stream: tuple[str, ...]):
    given = ["--sessions=24", "--rounds=1", "--round-seconds=4", "--seconds=4", "--odd=0.5"]
    assert bench.main([*TINY, *given, *stream]) == 0
    result = json.loads(capsys.readouterr().out)
    (requests,) = result["requests"]
    assert set(requests) == {"orderly: 200"}
    assert result["soak"]["requests"]["orderly: 200"] > 10
    assert result["soak"]["requests"]["oversized: 413"] > 0
    assert result["left_sampling"] == 0
    (alone,), (through,) = result["generate_tokens_per_s"], result["endpoint_tokens_per_s"]
    assert result["ratio_of_medians"] == pytest.approx(through / alone, abs=0.01)
    for name in ("generate_us_per_token", "engine_us_per_token", "endpoint_ms_per_answer", "clients_ms_per_answer"):
        assert result[name][0] > 0


def test_a_request_that_fails_is_seen(bench, monkeypatch: pytest.MonkeyPatch):
    from pekoe.run import serve

    monkeypatch.setattr(serve, "KeyedSessions", lambda *_: lambda key: None)  # no key is right
    assert bench.main([*TINY, "--sessions=2", "--rounds=0", "--seconds=1", "--odd=0"]) == 1
