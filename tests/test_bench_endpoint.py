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


def test_sessions_that_break_off_read_slowly_or_send_nonsense_harm_nobody(bench, capsys: pytest.CaptureFixture[str]):
    assert bench.main([*TINY, "--sessions=24", "--seconds=4", "--odd=0.5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["requests"]["orderly: 200"] > 10
    assert result["requests"]["oversized: 413"] > 0
    assert result["left_sampling"] == 0
    assert result["endpoint_tokens_per_s"] > 0


def test_a_request_that_fails_is_seen(bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "KeyedSessions", lambda *_: lambda key: None)  # no key is right
    assert bench.main([*TINY, "--sessions=2", "--seconds=1", "--odd=0"]) == 1
