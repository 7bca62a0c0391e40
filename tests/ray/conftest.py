"""A cluster on this machine: Ray with some more cores than there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pekoe.config import RLConfig, load_config
from pekoe.core.journal import read_lines
from pekoe.ray import run_cluster
from pekoe.run.interrupt import Stop
from tests.run.conftest import Messages
from tests.run.conftest import recipe as recipe
from tests.run.conftest import tiny_dir as tiny_dir

Say = Callable[[str], None]


@pytest.fixture
def cluster(recipe: dict[str, Any]) -> Callable[..., RLConfig]:
    """`cluster(*overrides)` gives a config of two engines and two ranks."""

    def make(*overrides: str) -> RLConfig:
        section = {"generation": {"engines": 2}, "training": {"ranks": 2}, "silence_limit_s": 20}
        return load_config(recipe | {"cluster": section}, ("run.threads=1", *overrides))

    return make


@pytest.fixture
def run() -> Callable[[RLConfig], list[str]]:
    """Runs a config to its end; returns what was said."""

    def go(config: RLConfig) -> list[str]:
        messages = Messages()
        run_cluster(config, messages, Stop())
        return messages.said

    return go


def events(config: RLConfig, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == kind]


def ledger(config: RLConfig) -> list[tuple[str, int]]:
    return [(line["uid"], line["draw"]) for line in read_lines(Path(config.run.dir) / "ledger.jsonl")]
