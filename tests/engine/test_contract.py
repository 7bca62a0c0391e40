"""The embedded engine keeps the contract of every engine."""

from collections.abc import Callable

import pytest

from pekoe.core.config import EngineSection
from pekoe.engine import EmbeddedEngine
from pekoe.model import Decoder
from tests.engine.contract import Contract
from tests.engine.harness import SHAPE, Harness

BLOCK = 4


@pytest.fixture(scope="module")
def embedded(make_model: Callable[..., Decoder]) -> Harness:
    model = make_model(seed=0, **SHAPE)

    def open_engine(room: int | None = None) -> EmbeddedEngine:
        # Little room is little KV as well: less than the sequences that may run together take at their ends.
        sizes = (
            {"max_running": room, "kv_tokens": 448 if room == 8 else 32 * room}
            if room
            else {"max_running": 64, "kv_tokens": 16384}
        )
        return EmbeddedEngine(model, EngineSection.model_validate({"block_tokens": BLOCK} | sizes))

    return Harness(
        model=model,
        other=make_model(seed=1, **SHAPE),
        open=open_engine,
        launch=open_engine,
        reusable=lambda length: (length - 1) // BLOCK * BLOCK,
        check=EmbeddedEngine.check_integrity,
    )


class TestEmbeddedEngine(Contract):
    @pytest.fixture
    def harness(self, embedded: Harness) -> Harness:
        return embedded
