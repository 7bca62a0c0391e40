"""Times of weight updates through real servers, by route: what `bench_rollout.py` reports of them."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROUTES = ("disk", "shm", "broadcast")


def server_python(name: str) -> str | None:
    """The Python of a server's environment, where it is there."""
    python = os.environ.get(f"PEKOE_{name.upper()}_PYTHON") or str(ROOT / f".venv-{name}/bin/python")
    return python if os.access(python, os.X_OK) else None


def server_update_times(name: str, directory: Path, place: Path, threads: int, rounds: int = 3) -> dict[str, Any]:
    """Median seconds of `update_weights` (save, send, load, flush and check) of a server launched on `directory`."""
    from pekoe.config.engine import EngineSection
    from pekoe.engine.servers.sglang import SGLangEngine
    from pekoe.engine.servers.vllm import VLLMEngine
    from pekoe.model import load_model

    engines: dict[str, Any] = {"sglang": SGLangEngine, "vllm": VLLMEngine}
    model = load_model(directory)

    def section(server: dict[str, Any]) -> EngineSection:
        common = {"start_limit_s": 300.0, "update_limit_s": 120.0}
        return EngineSection.model_validate({"backend": name, "kv_tokens": 4096, "server": common | server})

    def open_engine(server: dict[str, Any], log: str) -> Any:
        return engines[name](directory, section(server), model.spec, 512, place / log, threads=threads)

    launch: dict[str, Any] = {"python": server_python(name)}
    if name == "sglang":
        launch["env"] = {"PYTHONPATH": str(ROOT / "tests/servers/sglang_cpu/shim")}
    start = time.perf_counter()
    launched = open_engine(launch, "server")
    times: dict[str, Any] = {"start": time.perf_counter() - start}
    try:
        version = 0
        for route in ROUTES:
            engine = open_engine({"urls": [launched.servers[0].url], "sync": route}, route)
            try:
                seconds: list[float] = []
                for _ in range(rounds + 1):  # the first one opens the group, warms the page cache
                    version += 1
                    start = time.perf_counter()
                    engine.update_weights(model, version)
                    seconds.append(time.perf_counter() - start)
                times[route] = {"first": seconds[0], "median": statistics.median(seconds[1:])}
            finally:
                engine.close()
    finally:
        launched.close()
    return times
