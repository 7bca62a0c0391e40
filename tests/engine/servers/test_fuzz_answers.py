"""The short form of `fuzz_answers`."""

from pathlib import Path

from tests.engine.servers.fuzz_answers import fuzz


def test_every_answer_ends_with_what_it_says_or_with_one_clear_error(tmp_path: Path):
    assert fuzz(seconds=4, seed=0, folder=tmp_path) == []
