"""Two hundred steps of everything at once on the embedded engine: accounts hold throughout, memory is flat."""

import gc
import os
from collections.abc import Callable
from concurrent.futures import Future, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pekoe.config.engine import EngineSection
from pekoe.core.types import Completion, Request, SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.model import Decoder
from tests.engine.embedded.checks import assert_well_formed, worst_difference

NUM_STEPS, WARM_UP = 200, 100
GROWTH_LIMIT_BYTES = 8 * 2**20
"""Of resident memory over the second half. A step samples some 200 tokens of 512 bytes of KV each: a hundredth of that
kept would be 0.1 MB; the allocator's own noise, for threads that come and go, is below 4 MB."""
GROWTH_LIMIT_OBJECTS = 500
"""Of objects that the collector knows. One kept a step would be 100, one kept a response 1,000."""
LOGPROB_LIMIT = 1e-3
"""Weights this steep magnify rounding: of 10,000 tokens, log-probs of the engine and of one packed forward each lie up
to 6e-5 from a float64 forward's, with long tails (1.2e-4 between them was met). With the other weights the worst token
of a response differs by 0.4 and more, with one token of the context changed, too."""
VOCAB = 48
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
STOPS = (21, 36)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """Random work for one engine, and the accounts of what it did."""

    def __init__(self, engine: EmbeddedEngine, models: tuple[Decoder, Decoder]) -> None:
        self.engine, self.models = engine, models
        self.rng = np.random.default_rng(0)
        self.prefixes = [self.rng.integers(0, VOCAB, 24) for _ in range(5)]
        self.num = dict.fromkeys(("responses", "aborted", "updates", "cancelled", "preemptions", "cached"), 0)

    def requests(self, step: int, number: int) -> list[Request]:
        """A group: the beginning of one of a few prefixes, sometimes with an end of its own."""
        shared = self.prefixes[self.rng.integers(0, 5)][: self.rng.integers(1, 25)]
        tokens = np.concatenate([shared, self.rng.integers(0, VOCAB, self.rng.integers(0, 12))])
        params = SamplingParams(
            max_new_tokens=int(self.rng.integers(1, 41)),
            temperature=float(self.rng.choice([0.0, 0.7, 1.0])),
            top_p=float(self.rng.choice([0.9, 1.0])),
            stop_token_ids=STOPS[: self.rng.integers(0, 3)],
            seed=step,
        )
        if self.rng.random() < 0.2:  # lengths of their own
            lengths = self.rng.integers(1, 41, 4)
            return [
                Request(f"{step}-{number}", 0, i, tokens, replace(params, max_new_tokens=int(length)))
                for i, length in enumerate(lengths)
            ]
        uid, priority = f"{step}-{number}", int(self.rng.integers(0, 2))
        return [Request(uid, 0, i, tokens, params, priority) for i in range(self.rng.integers(1, 7))]

    def step(self, step: int) -> None:
        """Some groups, in one or several calls, with something done to them after one response in five."""
        engine = self.engine
        before, num_updates = engine.stats(), self.num["updates"]
        models = {engine.version: self.models[engine.version % 2]}
        requests: dict[Future[Completion], Request] = {}
        for number in range(self.rng.integers(1, 7)):
            group = self.requests(step, number)
            requests |= dict(zip(engine.submit(group), group, strict=True))
        pairs: list[tuple[Request, Completion]] = []
        for future in as_completed(requests):
            if future.cancelled():
                continue
            assert_well_formed(requests[future], future.result())
            pairs.append((requests[future], future.result()))
            chance = self.rng.random()
            if chance < 0.08:
                engine.abort([f"{step}-{self.rng.integers(0, 3)}"])
            elif chance < 0.10:
                engine.abort()
            elif chance < 0.17:
                version = engine.version + 1
                models[version] = self.models[version % 2]
                engine.update_weights(models[version], version)
                self.num["updates"] += 1
            elif chance < 0.21:
                self.num["cancelled"] += sum(other.cancel() for other in list(requests)[::3])
            engine.check_integrity()
        engine.check_integrity()
        if step % 8 == 0:
            assert worst_difference(models, [pair for pair in pairs if pair[1].num_tokens]) <= LOGPROB_LIMIT
        self.num["responses"] += len(pairs)
        self.num["aborted"] += sum(completion.finish == "abort" for _, completion in pairs)
        after = engine.stats()
        self.num["cached"] += after.num_cached_tokens - before.num_cached_tokens
        if self.num["updates"] == num_updates:  # an update preempts as well, but not for want of room
            self.num["preemptions"] += after.num_preemptions - before.num_preemptions


@pytest.mark.slow
def test_a_soak_of_everything_at_once(make_model: Callable[..., Decoder]):
    models = make_model(seed=0, scale=2.5, **SHAPE), make_model(seed=1, scale=2.5, **SHAPE)
    # Some 80 tokens a sequence at most, in room for four such; prompts above a forward's budget.
    config = EngineSection(kv_tokens=320, block_tokens=4, max_running=16, prefill_tokens=24)
    engine = EmbeddedEngine(models[0], config)
    soak, sizes = Soak(engine, models), []
    for step in range(NUM_STEPS):
        soak.step(step)
        if step + 1 in (WARM_UP, NUM_STEPS):
            gc.collect()
            sizes.append((resident_bytes(), len(gc.get_objects())))
    (early_bytes, early_objects), (late_bytes, late_objects) = sizes
    print(f"{soak.num}; resident {early_bytes:,} then {late_bytes:,} bytes, {late_objects - early_objects:+} objects")
    assert late_bytes - early_bytes <= GROWTH_LIMIT_BYTES
    assert late_objects - early_objects <= GROWTH_LIMIT_OBJECTS
    assert min(soak.num.values()) > 5, soak.num
    assert engine.health()
    engine.close()
