"""The training benchmark measures what it says: the same work for all, counted right, and a report that names it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pekoe.core.roofline import training_flops
from pekoe.core.spec import ModelSpec
from pekoe.model import Decoder, PackedAttention


@pytest.fixture
def module(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module


def run(repository: Path, out: Path, *argv: str) -> tuple[dict[str, Any], str]:
    command = [
        sys.executable,
        str(repository / "benchmarks/bench_train.py"),
        "--threads",
        "1",
        *argv,
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_flops_are_those_that_torch_counts(module: Any):
    shape = module("rollout_cases").SHAPES["nano"]
    model = Decoder(ModelSpec(**shape.spec(64)))
    model.init_weights(0)
    lengths, num_targets = [24, 24], 40
    tokens, positions = torch.arange(48) % 7, torch.arange(24).repeat(2)
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens, positions, PackedAttention([0, 24, 48]))
        model.logits(hidden[:num_targets]).sum().backward()
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    matmul = sum(flops for name, flops in found.items() if name in ("aten.mm", "aten.addmm"))
    ours = training_flops(model.spec, lengths, num_targets)
    assert ours.matmul == matmul
    # A document of L tokens has L (L + 1) / 2 pairs; scores and values are 2 products forward and 4 backward.
    assert ours.attention == 6 * 2 * shape.layers * shape.heads * shape.head_dim * 2 * (24 * 25 // 2)


def test_rectangles_keep_to_the_budget(module: Any):
    worker: ModuleType = module("train_worker")
    lengths = [30, 5, 40, 40, 12, 90, 3, 3]
    bins = worker.rectangles(lengths, 90)
    assert bins == [[0, 1], [2, 3], [4], [5], [6, 7]]
    assert worker.rectangles([10] * 9, 90) == [list(range(9))]


def test_systems_are_given_the_same(module: Any):
    cases = module("train_cases")
    case = cases.trl_case("tiny", False)
    assert cases.Case.of(json.loads(json.dumps(case.options()))) == case
    rows = case.rows()
    assert rows == case.rows()
    assert [[len(row.response) for row in each] for each in rows] == case.lengths()
    assert all(len(row.logprobs) == len(row.response) for each in rows for row in each)
    assert sum(map(len, rows[0])) <= case.budget  # one micro-batch, as trl's


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_run_measures_and_reports(repository: Path, tmp_path: Path):
    argv = ("--quick", "--sections", "packed", "flops", "memory")
    results, shown = run(repository, tmp_path / "results.json", *argv)
    assert results["notes"] == []
    assert {"what", "hardware", "date", "commit", "versions", "args", "parameters"} <= set(results)
    systems = results["packed"]["nano"]["systems"]
    assert list(systems) == ["packed", "padded", "padded-sorted"]
    assert systems["packed"]["padding"] == 0 < systems["padded-sorted"]["padding"] < systems["padded"]["padding"]
    for one in systems.values():
        assert one["loss_difference"] < 1e-5
        assert one["grad_norm_difference"] < 1e-4
        assert one["tokens_per_s"] > 0
    for one in results["flops"]["nano"].values():
        assert 0 < one["share_of_best"] < 1
    memory = results["memory"]
    assert memory["chunked"]["logprob_mean"] == pytest.approx(memory["unchunked"]["logprob_mean"], rel=1e-5)
    assert memory["chunked"]["grad_norms"] == pytest.approx(memory["unchunked"]["grad_norms"], rel=1e-4)
    assert 0 < memory["ratio"] < 1
    assert "Packed beside padded" in shown


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_gpu_form_runs_on_a_cpu(repository: Path, tmp_path: Path):
    results, shown = run(repository, tmp_path / "results.json", "--smoke")
    assert results["notes"] == []
    found = results["large"]["nano"]
    assert found["num_sequences"] == 8
    assert found["num_microbatches"] >= 2
    assert found["tokens_per_s"] > 0
    assert found["share"] == pytest.approx(found["flop_s"] / found["matmul_flop_s"])
    assert found["peak_bytes"] > 0
    assert "MFU" in shown
