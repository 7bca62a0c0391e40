"""Real inference servers for the tests, each started once a session. Skips where their environments are absent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pekoe.config.engine import EngineSection
from pekoe.core.spec import ModelSpec
from pekoe.engine.servers import SGLangEngine
from pekoe.model import Decoder, save_model
from tests.servers.common import attached_to
from tests.servers.vllm_fixture import vllm_engine_factory, vllm_launch  # noqa: F401  # pyright: ignore[reportUnusedImport]

HERE = Path(__file__).resolve().parent
MAX_SEQUENCE_TOKENS = 512
LONG = {
    *(f"test_tokens_are_drawn_from_the_models_distribution[{form}]" for form in ("T 0.5", "T 1.7", "top-k")),
    *(f"test_random_numbers_are_independent[{part}]" for part in ("uid", "draw", "stream")),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Statistics of sampling that take a server minutes, and that the embedded engine's contract holds in all forms,
    are long.

    httpcore 1.0 forgets expired connections when the request that was to close them is cancelled; they close when they
    are collected, in whatever test runs then."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning"))
            if item.name in LONG:
                item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def sglang_python(repository: Path) -> str:
    """The Python of SGLang's environment (`make .venv-sglang/.stamp`, or $PEKOE_SGLANG_PYTHON)."""
    path = Path(os.environ.get("PEKOE_SGLANG_PYTHON") or repository / ".venv-sglang" / "bin" / "python")
    if not path.is_file():
        pytest.skip(f"no SGLang: {path} is absent (make test-servers builds it, PEKOE_SGLANG_PYTHON names another)")
    return str(path)


@pytest.fixture(scope="session")
def sglang_section(sglang_python: str) -> Callable[..., EngineSection]:
    """Makes the [engine] section that launches SGLang on this machine's CPU; keywords change [engine.server]."""

    def make(**changes: Any) -> EngineSection:
        server: dict[str, Any] = {
            "python": sglang_python,
            "env": {"PYTHONPATH": str(HERE / "sglang_cpu" / "shim")},
            "start_limit_s": 300.0,
            "request_limit_s": 120.0,
            "update_limit_s": 60.0,
            "max_requests": 32,
        }
        server |= changes
        if "urls" in changes:
            del server["python"], server["env"]
            return EngineSection.model_validate({"backend": "sglang", "server": server})
        return EngineSection.model_validate({"backend": "sglang", "max_running": 32, "server": server})

    return make


@pytest.fixture(scope="session")
def sglang_launched(
    sglang_section: Callable[..., EngineSection], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Decoder], SGLangEngine]]:
    """Makes the session's engine for models of a shape: its server is launched at the first call, and stays."""
    engines: dict[ModelSpec, SGLangEngine] = {}

    def make(model: Decoder) -> SGLangEngine:
        if model.spec not in engines:
            place = tmp_path_factory.mktemp("sglang")
            save_model(model, place / "model")
            limit = min(MAX_SEQUENCE_TOKENS, model.spec.max_positions)
            engines[model.spec] = SGLangEngine(
                place / "model", sglang_section(), model.spec, limit, place / "logs", threads=1
            )
        return engines[model.spec]

    yield make
    for engine in engines.values():
        engine.close()


@pytest.fixture
def sglang_engine_factory(
    sglang_launched: Callable[[Decoder], SGLangEngine],
    sglang_section: Callable[..., EngineSection],
    tmp_path: Path,
) -> Iterator[Callable[..., SGLangEngine]]:
    """Makes an engine that samples from `model`, at version 0: a new one, attached to the session's server for models
    of this shape. Keywords change [engine.server]. Closed when the test ends; one at a time for each shape."""
    engines: list[SGLangEngine] = []

    def make(model: Decoder, **changes: Any) -> SGLangEngine:
        launched = sglang_launched(model)
        section = sglang_section(**attached_to(launched), **changes)
        place = tmp_path / f"logs-{len(engines)}"
        engine = SGLangEngine(tmp_path, section, model.spec, launched.max_sequence_tokens, place, url=launched.url)
        engines.append(engine)
        engine.update_weights(model, 0)
        return engine

    yield make
    for engine in engines:
        engine.close()
