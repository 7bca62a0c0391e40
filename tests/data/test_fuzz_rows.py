from __future__ import annotations

import pytest

from tests.data.fuzz_rows import main


@pytest.mark.filterwarnings("ignore")  # of Arrow's, on what it is asked to write
def test_hostile_rows_make_messages_and_no_tracebacks():
    outcomes = main(seconds=4.0, seed=0)
    assert outcomes["read"] > 10
    assert outcomes["refused"] > 10
