"""Times of weight updates through real servers, by route: what `bench_rollout.py` reports of them."""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
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
    import torch

    from pekoe.config.engine import EngineSection
    from pekoe.engine import SGLangEngine, VLLMEngine
    from pekoe.engine.base import Broadcast
    from pekoe.engine.buckets import BUCKET_BYTES
    from pekoe.model import load_model
    from pekoe.weights.groups import new_group
    from pekoe.weights.transport import SHARED_MEMORY, LocalSender
    from pekoe.weights.transport import directory as weight_directory

    engines: dict[str, Any] = {"sglang": SGLangEngine, "vllm": VLLMEngine}
    model = load_model(directory)

    def section(server: dict[str, Any]) -> EngineSection:
        common = {"start_limit_s": 300.0, "update_limit_s": 120.0}
        return EngineSection.model_validate({"backend": name, "kv_tokens": 4096, "server": common | server})

    def open_engine(server: dict[str, Any], log: str, url: str | None = None) -> Any:
        return engines[name](directory, section(server), model.spec, 512, place / log, threads=threads, url=url)

    def update(engine: Any, route: str, sender: LocalSender, group: Any, first: bool, version: int) -> None:
        if route != "broadcast":
            with weight_directory(SHARED_MEMORY if route == "shm" else place) as folder:
                sender.write(folder, [engine.kind], checksum=False)
                engine.update_weights(folder, version)
            return
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(engine.update_weights, Broadcast(group, BUCKET_BYTES), version)
            if first:
                sender.open(engine.kind, group)
            sender.broadcast(engine.kind, BUCKET_BYTES, checksum=False)
            receiving.result()

    launch: dict[str, Any] = {"python": server_python(name)}
    if name == "sglang":
        launch["env"] = {"PYTHONPATH": str(ROOT / "tests/servers/sglang_cpu/shim")}
    start = time.perf_counter()
    launched = open_engine(launch, "server")
    times: dict[str, Any] = {"start": time.perf_counter() - start}
    try:
        version = 0
        for route in ROUTES:
            os.environ["PEKOE_BENCH_KEY"] = launched.key
            attached = {"urls": [launched.url], "key_env": "PEKOE_BENCH_KEY", "sync": route}
            engine = open_engine(attached, route, launched.url)
            sender = LocalSender(model, torch.float32, lambda _: [])
            group = new_group(*sender.address(), 1 + engine.num_workers, "gloo", 60.0)
            try:
                seconds: list[float] = []
                for turn in range(rounds + 1):  # the first one opens the group, warms the page cache
                    version += 1
                    start = time.perf_counter()
                    update(engine, route, sender, group, turn == 0, version)
                    seconds.append(time.perf_counter() - start)
                times[route] = {"first": seconds[0], "median": statistics.median(seconds[1:])}
            finally:
                engine.close()
                sender.close()
    finally:
        launched.close()
    return times
