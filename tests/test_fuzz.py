"""The short forms of `fuzz_settings` and `fuzz_models`."""

from __future__ import annotations

from . import fuzz_models, fuzz_settings


def test_settings():
    assert fuzz_settings.fuzz(seconds=4, seed=0).problems == []


def test_model_directories():
    assert fuzz_models.fuzz(seconds=4, seed=0).problems == []
