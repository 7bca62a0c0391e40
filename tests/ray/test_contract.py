"""An engine in a Ray actor keeps the contract of every engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from pekoe.config import load_config
from pekoe.core.errors import RunError
from pekoe.core.progress import NoProgress
from pekoe.engine.base import WeightSource
from pekoe.model import Decoder, save_model
from pekoe.ray.engine_actor import RayEngine, RayStarter
from pekoe.ray.placement import bundles, connect, place
from pekoe.ray.store import StoreRegistry
from tests.engine.contract import Contract
from tests.engine.harness import LIMIT_S, LONG, SHAPE, Harness, prompt, wait_for_one

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

BLOCK_TOKENS = 16


class Borrowed:
    """The module's engine, as one that a test opened: closing it brings it back to where it began."""

    def __init__(self, engine: RayEngine, start: Path) -> None:
        self._engine, self._start = engine, start
        engine.update_weights(start, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        self._engine.abort()


@pytest.fixture(scope="module")
def actors(make_model: Callable[..., Decoder], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    folder, names = tmp_path_factory.mktemp("ray"), itertools.count()
    models = [make_model(seed=seed, **SHAPE) for seed in range(2)]
    save_model(models[0], folder / "model")
    recipe: dict[str, Any] = {
        "num_steps": 1,
        "run": {"dir": str(folder / "run"), "threads": 1},
        "model": {"path": str(folder / "model"), "device": "cpu"},
        "data": {"train": "none.jsonl", "max_prompt_tokens": 8},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 12},
        "train": {"token_budget": 64},
        "engine": {"block_tokens": BLOCK_TOKENS},
        "cluster": {"generation": {"engines": 2}},
    }

    def update(engine: RayEngine, source: WeightSource, version: int) -> None:
        if isinstance(source, Decoder):
            save_model(source, path := folder / f"model-{next(names)}")
            source = path
        engine.update_weights(source, version)

    with ExitStack() as stack:
        config = load_config(recipe, ())
        assert config.cluster is not None
        connect(config.cluster, NoProgress(), stack)
        stores = StoreRegistry(config)
        places = [place([bundle], "PACK", "an engine", 60, stack) for bundle in bundles(config.cluster)["engine"]]

        def start(number: int, room: int) -> RayEngine:
            kv_tokens = {64: 16384, 8: 448}.get(room, 32 * room)
            engine = {"block_tokens": BLOCK_TOKENS, "max_running": room, "kv_tokens": kv_tokens}
            starter = RayStarter(load_config(recipe | {"engine": engine}, ()), number, places[number], 0, stores, 512)
            return starter.start()

        shared = stack.enter_context(closing(start(0, 64)))
        yield Harness(
            *models,
            open=lambda room=None: start(1, room) if room else Borrowed(shared, folder / "model"),
            launch=lambda: start(1, 64),
            num_draws=480,
            update=update,
            reusable=lambda length: (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS,
        )


class TestRayEngine(Contract):
    @pytest.fixture
    def harness(self, actors: Harness) -> Harness:
        return actors

    def test_after_close_nothing_is_left(self, harness: Harness):
        """Of the engine: Ray's own processes go on."""
        engine = harness.launch()
        futures = engine.submit(prompt("p", 9, LONG))
        wait_for_one(futures)
        engine.close()
        engine.close()
        assert not wait(futures, LIMIT_S).not_done
        assert not engine.health()
        with pytest.raises(RunError, match="closed"):
            engine.submit(prompt("p", 9, LONG))
