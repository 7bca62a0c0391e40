"""What every test shares."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# One thread each, set before torch is loaded: results do not depend on the machine's cores, and worker processes that
# inherit this do not spin against one another. And no test reaches for the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

from pekoe.core.spec import ModelSpec
from pekoe.core.types import Request, SamplingParams
from pekoe.engine.base import requests_of
from pekoe.model import Decoder

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Data that developers share beside the repository and commit none of; skips where it is absent."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared beside the repository (data sets that are not committed)")
    return path


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Decoder]:
    """Makes small random decoders. Biases and norms are random too: a bug in them must show."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 3.0, **changes: Any) -> Decoder:
        shape: dict[str, Any] = {
            "family": "qwen2",
            "vocab_size": 32,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "max_positions": 128,
            "qkv_bias": True,
            "tied_embeddings": True,
        }
        model = Decoder(ModelSpec(**(shape | changes))).to(dtype)
        model.init_weights(seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():  # larger than at initialisation, so that distributions are not flat
                noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
                parameter.mul_(scale).add_(0.1 * noise)
        return model

    return make


@pytest.fixture(scope="session")
def make_requests() -> Callable[..., list[Request]]:
    """make_requests(uid, length, params): the `params.n` requests of a prompt of random tokens; the same arguments give
    the same prompt."""

    def make(
        uid: str, length: int, params: SamplingParams | None = None, vocab: int = 32, draw: int = 0
    ) -> list[Request]:
        tokens = np.random.default_rng([length, *uid.encode()]).integers(0, vocab, length)
        return requests_of(uid, draw, tokens, params or SamplingParams())

    return make
