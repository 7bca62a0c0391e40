"""The short form of `fuzz_run_dir`."""

from pathlib import Path

from tests.run.fuzz_run_dir import fuzz


def test_a_damaged_run_goes_on_to_the_same_bits_or_is_refused_with_one_message(tmp_path: Path):
    assert fuzz(seconds=3, seed=0, folder=tmp_path) == []
