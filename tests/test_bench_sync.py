"""The sync benchmark still runs, and tells what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_it_measures_each_arrangement(repository: Path, tmp_path: Path):
    script, out = str(repository / "benchmarks/bench_sync.py"), tmp_path / "out.json"
    words = ["--mib", "60", "--bucket-mib", "16", "--rounds", "2", "--out", str(out)]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["ranks"], row["engines"]) for row in rows] == [(1, 1), (1, 2), (2, 2)]
    assert all(row["bytes"] > 2**25 and row["sync_s"] > 0 and row["broadcast_s"] > 0 for row in rows)
    assert done.stdout.count("plain broadcast") == 3
