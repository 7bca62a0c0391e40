"""SGLang's real server keeps the contract of every engine."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pekoe.config.engine import EngineSection
from pekoe.engine.servers import SGLangEngine
from pekoe.model import Decoder, save_model
from tests.engine.contract import Contract
from tests.engine.harness import SHAPE, Harness

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

NO_MINIMUM = "SGLang bans early stops only where it has the tokenizer"
NO_SEEDS = "SGLang's seeds decide only with --enable-deterministic-inference, which needs a GPU"
JOINT = "SGLang takes top-p of the whole distribution, not of what top-k left"


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Decoder]) -> list[Decoder]:
    return [make_model(seed, **SHAPE) for seed in range(2)]


class TestSGLangEngine(Contract):
    @pytest.fixture
    def harness(
        self,
        models: list[Decoder],
        sglang_engine_factory: Callable[..., SGLangEngine],
        sglang_section: Callable[..., EngineSection],
        tmp_path: Path,
    ) -> Harness:
        def launch() -> SGLangEngine:
            save_model(models[0], tmp_path / "model")
            spec = models[0].spec
            place = tmp_path / "logs"
            return SGLangEngine(tmp_path / "model", sglang_section(), spec, spec.max_positions, place, threads=1)

        def open_engine(room: int | None = None) -> SGLangEngine:
            return sglang_engine_factory(models[0], **({"max_requests": room} if room else {}))

        return Harness(
            *models,
            open=open_engine,
            launch=launch,
            tolerance=5e-4,  # its draws are not seeded on a CPU, and rare tokens are up to 1.3e-4 off
            refuses={
                "min_new_tokens": NO_MINIMUM,
                "min_new_tokens, eval": NO_MINIMUM,
                "top-k, then top-p, eval": JOINT,
            },
            cannot={"seeds": NO_SEEDS},
            has_processes=True,
            prompt_tokens_again=lambda length: 1,
            reusable=lambda length: length - 1,
            num_draws=480,
        )
