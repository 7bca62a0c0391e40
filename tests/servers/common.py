"""What the tests of real servers share: the model's own log-probs, weights by each route, and waiting for states."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pekoe.core.types import Completion, IntArray, Request
from pekoe.engine.base import Broadcast
from pekoe.engine.servers import ServerEngine
from pekoe.model import LanguageModel, PackedAttention
from pekoe.weights.checksums import checksum_builder_for, checksums_of, differing
from pekoe.weights.groups import new_group
from pekoe.weights.transport import SHARED_MEMORY, LocalSender, directory


@torch.no_grad()
def reference(model: LanguageModel, completion: Completion, temperature: float = 1.0) -> np.ndarray:
    """Log-probs [R] by one packed forward over prompt and response."""
    record = completion.handle.resolve()
    tokens = torch.from_numpy(record.tokens)
    logits = model.logits(model(tokens, torch.arange(len(tokens)), PackedAttention([0, len(tokens)])))
    start = len(tokens) - completion.num_tokens
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs[torch.arange(start, len(tokens)) - 1, tokens[start:]].numpy()


def logprobs_by(model: LanguageModel) -> Callable[[IntArray], torch.Tensor]:
    """The log-probs [L] that the model gives each token after those before it; the first has 0."""

    @torch.no_grad()
    def compute(tokens: IntArray) -> torch.Tensor:
        ids = torch.from_numpy(tokens)
        logits = model.logits(model(ids, torch.arange(len(ids)), PackedAttention([0, len(ids)])))
        logprobs = torch.log_softmax(logits, -1)
        return torch.cat([torch.zeros(1), logprobs[:-1].gather(1, ids[1:, None])[:, 0]])

    return compute


def off(model: LanguageModel, completion: Completion, temperature: float = 1.0) -> float:
    return float(np.abs(completion.logprobs - reference(model, completion, temperature)).max(initial=0.0))


def off_by_version(models: dict[int, LanguageModel], completion: Completion) -> float:
    """Each token against the model of its own version."""
    ends = [*[start for _, start in completion.versions[1:]], completion.num_tokens]
    worst = 0.0
    for (version, start), end in zip(completion.versions, ends, strict=True):
        gap = np.abs(completion.logprobs - reference(models[version], completion))
        worst = max(worst, float(gap[start:end].max(initial=0.0)))
    return worst


def attached_to(launched: ServerEngine) -> dict[str, Any]:
    """The settings of [engine.server] for an engine on the server that another one has launched."""
    os.environ["PEKOE_TEST_KEY"] = launched.key
    return {"urls": (launched.url,), "key_env": "PEKOE_TEST_KEY"}


def results(futures: Sequence[Future[Completion]], limit_s: float = 120.0) -> list[Completion]:
    return [future.result(limit_s) for future in futures]


def sample(engine: ServerEngine, requests: Sequence[Request]) -> list[Completion]:
    return results(engine.submit(requests))


def update(engine: ServerEngine, model: LanguageModel, version: int, route: str, folder: Path) -> None:
    """Bring the model's weights to the engine."""
    sender = LocalSender(model, torch.float32, lambda _: [])
    if route != "broadcast":
        with directory(SHARED_MEMORY if route == "shm" else folder) as place:
            sender.write(place, [engine.kind], checksum=False)
            engine.update_weights(place, version)
        return
    bucket_bytes = 100_000  # several buckets, one ending within what servers fuse
    group = new_group(*sender.address(), 1 + engine.num_workers, "gloo", 60.0)
    with contextlib.closing(sender), ThreadPoolExecutor(1) as threads:
        receiving = threads.submit(engine.update_weights, Broadcast(group, bucket_bytes), version)
        sender.open(engine.kind, group)
        sender.broadcast(engine.kind, bucket_bytes, checksum=False)
        receiving.result(60)


def wrong_parameters(engine: ServerEngine, model: LanguageModel) -> list[str]:
    """Names of parameters of which the server's checksums are not the model's."""
    builder = checksum_builder_for(engine.kind, model.spec, torch.float32, "cpu")
    held = engine.checksums()
    assert builder is not None
    assert held is not None
    return differing(checksums_of(model, builder), held)


def until(holds: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
