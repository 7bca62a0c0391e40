"""The embedded engine keeps the contract of every engine, and so does a pool of two."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pekoe.config.engine import EngineSection
from pekoe.engine import EmbeddedEngine, EnginePool
from pekoe.engine.base import EngineKind, WeightSource
from pekoe.engine.embedded.attention_cpu import CPUCache
from pekoe.model import Decoder
from tests.engine.contract import Contract
from tests.engine.harness import SHAPE, Harness


@pytest.fixture(scope="module", params=[4, 16], ids=["plain", "kernels"])
def embedded(request: pytest.FixtureRequest, make_model: Callable[..., Decoder]) -> Harness:
    model, block = make_model(seed=0, **SHAPE), request.param

    def open_engine(room: int | None = None) -> EmbeddedEngine:
        # Little room is little KV as well: less than the sequences that may run together take at their ends.
        sizes = (
            {"max_running": room, "kv_tokens": 448 if room == 8 else 32 * room}
            if room
            else {"max_running": 64, "kv_tokens": 16384}
        )
        engine = EmbeddedEngine(model, EngineSection.model_validate({"block_tokens": block} | sizes))
        assert isinstance(engine._runner.cache, CPUCache) == (block == 16)
        return engine

    return Harness(
        model=model,
        other=make_model(seed=1, **SHAPE),
        open=open_engine,
        launch=open_engine,
        reusable=lambda length: (length - 1) // block * block,
        check=EmbeddedEngine.check_integrity,
    )


class TestEmbeddedEngine(Contract):
    @pytest.fixture
    def harness(self, embedded: Harness) -> Harness:
        return embedded


@dataclass
class Starter:
    """Starts an embedded engine (implements `engine.pool.Starter`)."""

    model: Decoder
    max_requests: int | None
    name: str = "engine"
    kind: EngineKind = "embedded"

    def start(self) -> EmbeddedEngine:
        config = EngineSection(kv_tokens=8192, max_running=64)
        return EmbeddedEngine(self.model, config, max_requests=self.max_requests)


def update_pool(pool: EnginePool, source: WeightSource, version: int) -> None:
    pool.stale()
    try:
        for member in pool.members:
            member.engine.update_weights(source, version)
    finally:
        for member in pool.members:
            pool.serve(member)


class TestEnginePool(Contract):
    @pytest.fixture
    def harness(self, make_model: Callable[..., Decoder]) -> Harness:
        model = make_model(seed=0, **SHAPE)

        def open_pool(room: int | None = None) -> EnginePool:
            sizes = [None, None] if room is None else [room - room // 2, room // 2]
            pool = EnginePool([Starter(model, size) for size in sizes], start_limit_s=60, serving_at_once=True)
            pool.wait_started()
            return pool

        return Harness(
            model=model,
            other=make_model(seed=1, **SHAPE),
            open=open_pool,
            launch=open_pool,
            update=update_pool,
            cannot={"refuse whole calls": "an engine may begin before another refuses its part"},
            reusable=lambda length: (length - 1) // EngineSection().block_tokens * EngineSection().block_tokens,
        )
