from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.fuzz_rows import fuzz


@pytest.mark.filterwarnings("ignore")  # of Arrow's, on what it is asked to write
def test_hostile_rows_make_messages_and_no_tracebacks(tmp_path: Path):
    outcomes = fuzz(seconds=4.0, seed=0, folder=tmp_path)
    assert outcomes["read"] > 10
    assert outcomes["refused"] > 10
