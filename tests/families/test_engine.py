"""The embedded engine decodes families of transformers: tokens and log-probs are those of the model's own forward."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.types import SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.engine.base import requests_of
from pekoe.model import LanguageModel, PackedAttention, load_model
from tests.engine.embedded.checks import collect
from tests.families.configs import FAMILIES, VOCAB, make, save
from tests.families.test_families import is_slow

CONFIG = EngineSection(block_tokens=4, kv_tokens=200, max_running=7, prefill_tokens=16)


def forward_logits(model: LanguageModel, tokens: np.ndarray) -> torch.Tensor:
    row = torch.from_numpy(tokens)
    with torch.no_grad():
        return model.logits(model(row, torch.arange(len(row)), PackedAttention([0, len(row)])))


@pytest.mark.parametrize("family", [is_slow(family) for family in FAMILIES])
def test_it_samples_what_the_forward_says(family: str, tmp_path: Path):
    """Greedy tokens are the forward's largest, by transformers' own attention; log-probs of sampled ones are its (I1).
    Prompts are cut into chunks, shared among samples, and longer than the windows; memory is short, so some are
    preempted."""
    place = save(family, tmp_path / "model")
    model = load_model(place, implementation="transformers")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n) for n in (19, 3, 9, 26)]
    greedy = SamplingParams(1, 0.0, max_new_tokens=14, stop_token_ids=())
    drawn = SamplingParams(3, 0.9, max_new_tokens=14, stop_token_ids=(), stream="train")
    with closing(EmbeddedEngine(model, CONFIG)) as engine:
        requests = [r for i, p in enumerate(prompts) for r in requests_of(f"g{i}", 0, p, greedy)]
        requests += [r for i, p in enumerate(prompts) for r in requests_of(f"s{i}", 0, p, drawn)]
        sampled = collect(engine, requests)
    own = make(family)
    for (uid, _, _), (request, completion) in sampled.items():
        whole = np.concatenate([request.tokens, completion.tokens])
        logits = forward_logits(model, whole)[len(request.tokens) - 1 : -1]
        temperature = 0.9 if uid.startswith("s") else 1.0
        chosen = torch.log_softmax(logits / temperature, -1)[torch.arange(14), torch.from_numpy(completion.tokens)]
        assert np.abs(chosen.numpy() - completion.logprobs).max() <= 1e-4
        if uid.startswith("g"):
            theirs = own(torch.from_numpy(whole)[None], use_cache=False).logits[0, len(request.tokens) - 1 : -1]
            best = theirs.max(-1).values - theirs[torch.arange(14), torch.from_numpy(completion.tokens)]
            assert best.max() <= 1e-4  # the largest, or a tie


def test_blocks_out_of_every_window_are_given_back(tmp_path: Path):
    """Three responses that need 36 blocks have 16; the tokens are those of an engine that keeps everything."""
    model = load_model(save("mistral", tmp_path / "model"), implementation="transformers")
    config = EngineSection(block_tokens=4, kv_tokens=64, max_running=3)
    params = SamplingParams(3, 0.9, max_new_tokens=42, stop_token_ids=())
    requests = requests_of("a", 0, np.arange(5), params)
    with closing(EmbeddedEngine(model, config)) as engine:
        sampled = collect(engine, requests)
        assert engine.stats().num_preemptions == 0
        assert engine.num_kv_tokens == 64
        again = collect(engine, requests)  # whose prompt is in the tree
    with closing(EmbeddedEngine(model, config)) as engine:
        engine._scheduler._window = None
        kept = collect(engine, requests)
        assert engine.stats().num_preemptions > 0
    for name, (_, completion) in kept.items():
        for other in (sampled, again):
            assert np.array_equal(other[name][1].tokens, completion.tokens)
            assert np.abs(other[name][1].logprobs - completion.logprobs).max() <= 1e-5
