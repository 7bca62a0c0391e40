"""One of many ranks on tensors without numbers: it builds, trains, steps and publishes; its memory is as predicted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def rank(repository: Path, *words: str) -> dict[str, Any]:
    script = str(repository / "benchmarks/fake_ranks.py")
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_rank_of_eight(repository: Path):
    found = rank(repository, "--model", "1.5b", "--ranks", "8", "--layers", "3", "--tokens", "1024")
    assert 0.95 < found["ratio"] < 1.1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 8, 64])
@pytest.mark.parametrize("model", ["1.5b", "7b", pytest.param("32b", marks=pytest.mark.long)])
def test_memory_of_a_rank_is_predicted(repository: Path, model: str, ranks: int):
    """Of fewer layers than the models have, for time's sake; `benchmarks/fake_ranks.py` has them all."""
    found = rank(repository, "--model", model, "--ranks", str(ranks), "--layers", "4", "--tokens", "2048")
    assert 0.95 < found["ratio"] < 1.1


@pytest.mark.slow
def test_a_tied_heads_gradient_is_counted_once(repository: Path):
    """With many tokens the peak is in the layers' backward, which it waits through."""
    found = rank(repository, "--model", "1.5b", "--ranks", "8", "--layers", "4", "--tokens", "16384")
    assert 0.97 < found["ratio"] < 1.06
