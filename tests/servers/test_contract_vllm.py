"""vLLM's real server keeps the contract of every engine."""

from collections.abc import Callable

import pytest

from pekoe.engine.servers import VLLMEngine
from pekoe.engine.servers.vllm import CPU_BLOCK_TOKENS
from pekoe.model import Decoder
from tests.engine.contract import Contract
from tests.engine.harness import SHAPE, Harness

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

AFTER_TRUNCATION = "vLLM's log-probs are those after truncation: for evaluation alone"


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Decoder]) -> list[Decoder]:
    return [make_model(seed, **SHAPE) for seed in range(2)]


class TestVLLMEngine(Contract):
    @pytest.fixture
    def harness(
        self,
        models: list[Decoder],
        vllm_engine_factory: Callable[..., VLLMEngine],
        vllm_launch: Callable[..., VLLMEngine],
    ) -> Harness:
        def open_engine(room: int | None = None) -> VLLMEngine:
            return vllm_engine_factory(models[0], **({"max_requests": room} if room else {}))

        def reusable(length: int) -> int:
            return (length - 1) // CPU_BLOCK_TOKENS * CPU_BLOCK_TOKENS

        return Harness(
            *models,
            open=open_engine,
            launch=lambda: vllm_launch(models[0]),
            refuses=dict.fromkeys(("top_p", "top_k", "min_new_tokens"), AFTER_TRUNCATION),
            has_processes=True,
            prompt_tokens_again=lambda length: length - reusable(length),
            reusable=reusable,
            num_draws=480,
        )
