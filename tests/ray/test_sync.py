"""What a sync does about engines that cannot be reached; without Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pekoe.config.cluster import ClusterSection
from pekoe.core.errors import RunError
from pekoe.core.types import Prompt, SamplingParams
from pekoe.ray import sync as module
from pekoe.ray.engines import Engine
from pekoe.ray.sync import ClusterSync


class FewEngines:
    """Two servers; `lose` is for good."""

    def __init__(self, alive: tuple[bool, bool]) -> None:
        self.all = [self._engine(i, lives) for i, lives in enumerate(alive)]
        self.lost: list[int] = []

    def _engine(self, number: int, lives: bool) -> Engine:
        actor = SimpleNamespace(alive=SimpleNamespace(remote=lambda: lives))
        return Engine(number, "vllm", cast(Any, None), 0, actor=actor, state="stale")

    def lose(self, engine: Engine, why: str) -> None:
        engine.state = "gone"
        self.lost.append(engine.number)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch):
    """`make(engines, sends)`: a sync whose n-th attempt to send comes to sends[n], and whose proofs hold."""
    monkeypatch.setattr(module.ray, "get", lambda ref, timeout: ref)

    def make(engines: FewEngines, sends: list[bool]) -> Any:
        canary = Prompt("canary", 0, np.arange(3))
        section = ClusterSection()
        sync: Any = ClusterSync(
            cast(Any, None), cast(Any, engines), section, canary, SamplingParams(), False, 1, Path("weights")
        )
        sync._send = lambda some, look: sends.pop(0)
        sync._prove = lambda some, look: [setattr(engine, "state", "serving") for engine in some] and 0.0
        return sync

    return make


def test_a_dead_server_beside_a_living_process_is_lost_and_the_others_go_on(make: Any):
    engines = FewEngines(alive=(True, False))
    make(engines, [False, True])._bring(engines.all, False)
    assert engines.lost == [1]
    assert engines.all[0].state == "serving"


def test_engines_that_never_take_the_weights_are_started_again_once(make: Any):
    engines = FewEngines(alive=(True, True))
    sync = make(engines, [False] * 10)
    sync._bring(engines.all, False)
    assert engines.lost == [0, 1]
    for engine in engines.all:
        engine.state = "stale"
    with pytest.raises(RunError, match="5 attempts"):
        sync._bring(engines.all, False)
