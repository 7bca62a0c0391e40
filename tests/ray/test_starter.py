"""What a starter of an engine says where Ray ends under it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
from ray.exceptions import RayError

from pekoe.engine.base import NoPlace
from pekoe.ray import engine_actor
from pekoe.ray.engine_actor import RayStarter
from pekoe.ray.placement import live_nodes


def test_ray_that_is_shut_down_while_an_engine_starts_is_no_error_of_the_engine(monkeypatch: pytest.MonkeyPatch):
    """Ray raises SystemExit in threads that wait; uncaught, it would end the pool's thread with a traceback."""

    def shut_down(*_: Any) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(engine_actor, "node_of", lambda *_: "node")
    monkeypatch.setattr(engine_actor, "PlacementGroupSchedulingStrategy", MagicMock())
    monkeypatch.setattr(engine_actor.ray, "remote", MagicMock())
    monkeypatch.setattr(engine_actor, "ray_get", shut_down)
    stores: Any = SimpleNamespace(on=lambda _: (None, None), passed=0)
    starter = RayStarter(MagicMock(), 0, MagicMock(), 0, stores, max_sequence_tokens=8)
    with pytest.raises(NoPlace, match="Ray was shut down while engine 0 started"):
        starter.start()


@pytest.mark.parametrize("call", [live_nodes, lambda: ray.kill(MagicMock()), lambda: ray.wait([MagicMock()])])
def test_a_call_after_the_end_of_a_run_starts_no_ray_of_its_own(call: Any):
    """It did, where a run ended while a lost engine started again; the next run then waited for it without end."""
    assert not ray.is_initialized()
    with pytest.raises((RayError, ValueError, TypeError)):
        call()
    assert not ray.is_initialized()
