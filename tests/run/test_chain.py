"""The four commands one after another, each killed once (`make chain`), in the smallest form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chain.py"


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_curate_sft_rl_eval_each_killed_and_gone_on_with(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--task", "sums", "--size", "64", "--first", "1024"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "chain"), "--json", str(tmp_path / "found.json")],
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert [row["stage"] for row in found["stages"]] == ["curate", "sft", "rl", "eval"]
    assert found["same"] == dict.fromkeys(("curate", "sft", "rl", "eval"), True)
    for row in found["stages"]:
        assert 0 < row["went_on_from"] < row["end"], row
