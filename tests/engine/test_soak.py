"""Two hundred steps of everything at once on the embedded engine: accounts hold throughout, memory is flat."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pekoe.config.engine import EngineSection
from pekoe.core.types import Prompt, SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.model import Decoder
from tests.engine.harness import SHAPE, STOPS, VOCAB, Harness, Rollouts, assert_ended_rightly

NUM_STEPS, WARM_UP = 200, 100
GROWTH_LIMIT_BYTES = 4 * 2**20
"""Of resident memory over the second half. A step samples some 200 tokens of 512 bytes of KV each: a hundredth of that
kept would be 0.1 MB; the allocator's own noise is below 2 MB."""
GROWTH_LIMIT_OBJECTS = 500
"""Of objects that the collector knows. One kept a step would be 100, one kept a response 1,000."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """Random work for one engine, and the accounts of what it did."""

    def __init__(self, harness: Harness, engine: EmbeddedEngine) -> None:
        self.harness, self.engine = harness, engine
        self.rng = np.random.default_rng(0)
        self.prefixes = [self.rng.integers(0, VOCAB, 24) for _ in range(5)]
        self.num = dict.fromkeys(("responses", "aborted", "updates", "closed", "preemptions", "cached", "compared"), 0)

    def prompts(self, step: int) -> list[Prompt]:
        """Beginnings of a few prefixes, some with ends of their own."""
        found: list[Prompt] = []
        for i in range(self.rng.integers(1, 7)):
            shared = self.prefixes[self.rng.integers(0, 5)][: self.rng.integers(1, 25)]
            own = self.rng.integers(0, VOCAB, self.rng.integers(0, 12))
            found.append(Prompt(f"{step}-{i}", 0, np.concatenate([shared, own])))
        return found

    def params(self, step: int) -> SamplingParams:
        return SamplingParams(
            n=int(self.rng.integers(1, 7)),
            max_new_tokens=int(self.rng.integers(1, 41)),
            temperature=float(self.rng.choice([0.0, 0.7, 1.0])),
            top_p=float(self.rng.choice([0.9, 1.0])),
            stop_token_ids=STOPS[: self.rng.integers(0, 3)],
            seed=step,
        )

    def step(self, step: int) -> None:
        """One `generate`, with something done to it after one response in five."""
        prompts, params, engine = self.prompts(step), self.params(step), self.engine
        before, num_updates = engine.stats(), self.num["updates"]
        models = {engine.version: self.weights(engine.version)}
        rollouts: Rollouts = {}
        stream = engine.generate(prompts, params)
        closed = False
        for rollout in stream:
            assert_ended_rightly(self.harness.take(engine, rollout, rollouts), params)
            chance = self.rng.random()
            if chance < 0.08:
                engine.abort([prompts[self.rng.integers(0, len(prompts))].uid])
            elif chance < 0.10:
                engine.abort()
            elif chance < 0.17:
                version = engine.version + 1
                engine.update_weights(self.weights(version), version)
                models[version] = self.weights(version)
                self.num["updates"] += 1
            elif chance < 0.19:
                closed = True
                break
            engine.check_integrity()
        stream.close()
        engine.check_integrity()
        assert closed or len(rollouts) == len(prompts) * params.n
        if step % 8 == 0:
            self.harness.assert_true(rollouts, models, params.temperature)
            self.num["compared"] += len(rollouts)
        self.num["closed"] += closed
        self.num["responses"] += len(rollouts)
        self.num["aborted"] += sum(r.finish_reason == "abort" for r in rollouts.values())
        after = engine.stats()
        self.num["cached"] += after.num_cached_tokens - before.num_cached_tokens
        if self.num["updates"] == num_updates:  # an update preempts as well, but not for want of room
            self.num["preemptions"] += after.num_preemptions - before.num_preemptions

    def weights(self, version: int) -> Decoder:
        return self.harness.other if version % 2 else self.harness.model


@pytest.mark.slow
def test_a_soak_of_everything_at_once(make_model: Callable[..., Decoder]):
    model = make_model(seed=0, **SHAPE)
    # Some 80 tokens a sequence at most, in room for four such; prompts above a forward's budget.
    config = EngineSection(kv_tokens=320, block_tokens=4, max_running=16, prefill_tokens=24)
    engine = EmbeddedEngine(model, config)
    harness = Harness(
        model=model,
        other=make_model(seed=1, **SHAPE),
        open=lambda room=None: engine,
        launch=lambda: engine,
        check=EmbeddedEngine.check_integrity,
    )
    soak, sizes = Soak(harness, engine), []
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
