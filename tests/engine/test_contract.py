"""The embedded engine keeps the contract of every engine."""

from collections.abc import Callable

import pytest

from pekoe.config.engine import EngineSection
from pekoe.engine import EmbeddedEngine
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
