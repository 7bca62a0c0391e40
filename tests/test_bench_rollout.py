"""The rollout benchmark measures what it says: the same work for all, all of it, and a report that names it."""

from __future__ import annotations

import importlib
import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FIELDS = (
    "what",
    "hardware",
    "date",
    "commit",
    "versions",
    "args",
    "parameters",
    "notes",
    "cases",
    "memory",
    "ceilings",
)


@pytest.fixture
def cases(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("rollout_cases")


@pytest.mark.parametrize(("name", "millions"), [("tiny", 0.85), ("small", 26), ("q0.5b", 494)])
def test_models_have_the_sizes_they_are_known_by(cases: ModuleType, name: str, millions: float):
    from pekoe.core.spec import ModelSpec

    spec = ModelSpec(**cases.SHAPES[name].spec(1024))
    assert spec.num_parameters / 1e6 == pytest.approx(millions, rel=0.03)
    assert spec.kv_values_per_token == cases.SHAPES[name].kv_values_per_token


def test_lengths(cases: ModuleType):
    equal, ragged = (cases.Case(cases.SHAPES["tiny"], 16, 64, kind) for kind in ("equal", "ragged"))
    assert equal.lengths() == [[64] * 16] * 32
    flat = [length for each in ragged.lengths() for length in each]
    rng = random.Random(0)
    drawn = [rng.lognormvariate(math.log(64), 0.7) for _ in range(512)]
    assert flat == [min(max(round(x), 8), 256) for x in drawn]
    assert 56 <= statistics.median(flat) <= 72
    assert ragged.num_tokens == sum(flat)
    assert [len(each) for each in ragged.lengths()] == [16] * 32


def test_every_round_has_other_prompts_for_all_systems_alike(cases: ModuleType):
    case = cases.Case(cases.SHAPES["small"], 16, 512, "equal")
    assert case.request(1) == case.request(1)
    first, second = case.prompts(1), case.prompts(2)
    assert len(first) == 4
    assert {len(prompt) for prompt in first} == {512}
    assert all(a[:16] != b[:16] for a, b in zip(first, second, strict=True))


def test_unrelated_sequences_share_no_first_token(cases: ModuleType):
    case = cases.Case(cases.SHAPES["tiny"], 16, 64, "ragged")
    request = case.request(3)
    apart = cases.unrelated(request, case.shape.vocab)
    assert len({prompt[0] for prompt in apart["prompts"]}) == len(apart["prompts"]) == 512
    assert [length for each in apart["lengths"] for length in each] == [x for each in case.lengths() for x in each]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_run_measures_and_reports(repository: Path, tmp_path: Path):
    """The smallest run there is, with the embedded engine alone: its report has what the large one's has."""
    out = tmp_path / "results.json"
    argv = ["--models", "nano", "--n", "16", "--prompts", "64", "--systems", "embedded", "--rounds", "2"]
    argv += ["--threads", "1", "--servers", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(repository / "benchmarks/bench_rollout.py"), *argv],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert set(FIELDS) <= set(results)
    assert results["notes"] == []
    assert [case["lengths"] for case in results["cases"]] == ["equal", "ragged"]
    for case in results["cases"]:
        assert case["num_sequences"] == 16
        assert case["systems"]["embedded"]["num_rounds"] == 2
        assert case["systems"]["embedded"]["tokens_per_s"] > 0
    assert results["cases"][0]["num_tokens"] == 16 * 4
    sharing = results["sharing"]["nano"]["64"]
    assert (sharing["on_prefill_tokens"], sharing["off_prefill_tokens"]) == (64, 16 * 64)
    assert sharing["prefill_saved"] == 15 / 16
    assert 0.5 < sharing["again_cache_hit_rate"] < 1
    assert results["memory"]["nano"]["embedded_peak_bytes"] > results["memory"]["nano"]["embedded_kv_bytes"] > 0
    ceilings = results["ceilings"]["nano"]
    assert ceilings["machine"]["matmul_gflop_s"] > 0
    assert ceilings["decode"]["steps"] == 3
    assert sum(ceilings["breakdown"]["seconds"].values()) == pytest.approx(ceilings["breakdown"]["total"])
    assert {"alias", "directory"} <= set(results["updates"]["nano"]["embedded"])
    assert "Throughput" in done.stdout
