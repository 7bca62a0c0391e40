"""What the embedded engine's tests share: requests, completions by name, and the model's own forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from pekoe.core.types import Completion, Request
from pekoe.engine import EmbeddedEngine
from pekoe.model import Decoder, PackedAttention

Name = tuple[str, int, int]  # uid, draw, sample
Sampled = dict[Name, tuple[Request, Completion]]
_LIMIT_S = 240  # in Triton's interpreter, on a busy machine


def collect(engine: EmbeddedEngine, requests: Sequence[Request]) -> Sampled:
    """Submit requests together, and wait for all."""
    futures = engine.submit(requests)
    sampled = {
        (r.uid, r.draw, r.sample): (r, future.result(_LIMIT_S)) for r, future in zip(requests, futures, strict=True)
    }
    assert len(sampled) == len(requests)
    engine.check_integrity()
    for request, completion in sampled.values():
        assert_well_formed(request, completion)
    return sampled


def assert_well_formed(request: Request, completion: Completion) -> None:
    """Tokens and log-probs belong together, and it ended as its params say."""
    tokens, params, size = completion.tokens, request.params, completion.num_tokens
    record = completion.handle.resolve()
    assert np.array_equal(record.tokens[: len(request.tokens)], request.tokens)
    assert record.loss_mask.sum() == size == len(tokens) == len(completion.logprobs)
    assert np.isfinite(completion.logprobs).all()
    assert (completion.logprobs <= 0).all()
    stops = np.isin(tokens, params.stops)
    assert not stops[:-1].any()
    assert not stops[: params.min_new_tokens].any()
    match completion.finish:
        case "stop":
            assert stops[-1]
        case "length":
            assert size == params.max_new_tokens
            assert not stops[-1]
        case "abort":
            assert size < params.max_new_tokens
    versions, starts = [v for v, _ in completion.versions], [start for _, start in completion.versions]
    assert starts[:1] == ([0] if size else [])
    assert starts == sorted(set(starts))
    assert versions == sorted(set(versions))
    assert all(start < size for start in starts)


def tokens_of(sampled: Sampled) -> dict[Name, list[int]]:
    return {name: completion.tokens.tolist() for name, (_, completion) in sampled.items()}


@torch.no_grad()
def reference_logprobs(model: Decoder, request: Request, completion: Completion) -> np.ndarray:
    """Log-probs [R] by one packed forward over prompt and response, at the sampling temperature (0: at 1)."""
    device = next(model.parameters()).device
    tokens = torch.from_numpy(completion.handle.resolve().tokens).to(device)
    start = len(request.tokens)
    hidden = model(tokens, torch.arange(len(tokens), device=device), PackedAttention([0, len(tokens)]))
    logprobs = torch.log_softmax(model.logits(hidden).float() / (request.params.temperature or 1.0), -1)
    return logprobs[start - 1 : -1].gather(1, tokens[start:, None])[:, 0].cpu().numpy()


def worst_difference(models: Mapping[int, Decoder], pairs: Iterable[tuple[Request, Completion]]) -> float:
    """Largest difference of a token's log-prob from that by the model of the token's own version."""
    worst = 0.0
    for request, completion in pairs:
        starts = [start for _, start in completion.versions]
        for (version, _), (low, high) in zip(
            completion.versions, pairwise([*starts, completion.num_tokens]), strict=True
        ):
            expected = reference_logprobs(models[version], request, completion)
            worst = max(worst, float(np.abs(completion.logprobs - expected)[low:high].max()))
    return worst
