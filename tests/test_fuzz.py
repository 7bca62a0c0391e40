"""The short forms of `fuzz_settings` and `fuzz_models`."""

from __future__ import annotations

from pathlib import Path

from pekoe.data import Tokenizer

from . import fuzz_models, fuzz_settings
from .fuzzing import Cases


def test_settings():
    assert fuzz_settings.fuzz(seconds=3, seed=0).problems == []


def test_model_directories():
    assert fuzz_models.fuzz(seconds=3, seed=0).problems == []


def test_what_is_in_order_must_end_well():
    cases = Cases()
    cases.in_order("good", lambda: None)
    assert cases.problems == []
    cases.in_order("bad", lambda: Tokenizer.load(Path("nowhere")))
    assert "bad: AssertionError: refused: nowhere" in cases.problems[0]
