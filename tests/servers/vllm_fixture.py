"""Real vLLM servers for the tests: one for each model shape and set of arguments, shared by the whole session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pekoe.config.engine import EngineSection
from pekoe.engine.servers import VLLMEngine
from pekoe.model import Decoder, save_model
from tests.servers.common import attached_to

REPOSITORY = Path(__file__).resolve().parent.parent.parent
START_LIMIT_S = 400.0


def vllm_python() -> str:
    """The Python of an environment with vLLM; skips where there is none."""
    python = os.environ.get("PEKOE_VLLM_PYTHON") or str(REPOSITORY / ".venv-vllm/bin/python")
    if not os.access(python, os.X_OK):
        pytest.skip(f"no vLLM environment: neither $PEKOE_VLLM_PYTHON nor {python} (make .venv-vllm/.stamp)")
    return python


@pytest.fixture(scope="session")
def vllm_launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., VLLMEngine]:
    """Launches a server of its own: launch(model, **server settings) -> engine, which the caller closes."""
    python = vllm_python()

    def launch(model: Decoder, **server: Any) -> VLLMEngine:
        place = tmp_path_factory.mktemp("vllm")
        save_model(model, place / "model")
        settings = {"python": python, "start_limit_s": START_LIMIT_S} | server
        config = EngineSection.model_validate({"backend": "vllm", "server": settings, "kv_tokens": 16384})
        return VLLMEngine(place / "model", config, model.spec, model.spec.max_positions, place, threads=1)

    return launch


@pytest.fixture(scope="session")
def vllm_engine_factory(
    vllm_launch: Callable[..., VLLMEngine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., VLLMEngine]]:
    """Makes engines: factory(model, **server settings) -> engine at version 0 of the model's weights.

    They are attached to a server that the session launches once for a model's shape. Heads must have a dimension that
    vLLM knows (32, 64, 80, 96, 112, 128, ...). Each engine is to be closed before the next is made.
    """
    launched: dict[Any, VLLMEngine] = {}

    def factory(model: Decoder, **server: Any) -> VLLMEngine:
        if model.spec not in launched:
            launched[model.spec] = vllm_launch(model)
        place = tmp_path_factory.mktemp("weights")
        save_model(model, place / "model")
        url = launched[model.spec].url
        server = attached_to(launched[model.spec]) | server
        config = EngineSection.model_validate({"backend": "vllm", "server": server})
        engine = VLLMEngine(place / "model", config, model.spec, model.spec.max_positions, place, url=url)
        engine.update_weights(place / "model", 0)
        return engine

    yield factory
    for engine in launched.values():
        engine.close()
