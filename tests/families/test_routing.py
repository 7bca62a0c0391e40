"""Routing replay: the experts that the engine chose are recorded with its tokens, and are those of training."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pekoe.algo.loss import cross_entropy
from pekoe.config.engine import EngineSection
from pekoe.config.recipes import OptimSection
from pekoe.core.errors import UserError
from pekoe.core.types import Record, Sample, SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.engine.base import requests_of
from pekoe.model import LanguageModel, OwnRouting, PackedAttention, Replay, check_routing, load_model
from pekoe.model.hf import read_spec
from pekoe.model.routing import routing_of_all_layers
from pekoe.train import Trainer
from tests.engine.embedded.checks import collect
from tests.families.configs import FAMILIES, VOCAB, config_of, save

CONFIG = EngineSection(block_tokens=4, kv_tokens=100, max_running=7, prefill_tokens=16)  # chunks, and preemption
USUAL = ("qwen3_moe", "gpt_oss", "deepseek_v3", "ernie4_5_moe")


def has_experts(family: str) -> bool:
    config = config_of(family)
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


MIXTURES = [family for family in FAMILIES if has_experts(family)]


class Watch(OwnRouting):
    """Keeps the experts of every layer [T, k], those of routers or of another routing."""

    def __init__(self, inner: Replay | None = None) -> None:
        self.chosen: list[Tensor] = []
        self._inner = inner

    def choose(self, layer: int, chosen: Tensor) -> Tensor:
        experts = chosen if self._inner is None else self._inner.choose(layer, chosen)
        assert layer == len(self.chosen)
        self.chosen.append(experts)
        return experts


def of_forward(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Experts [T, layers, k] that the routers choose in one forward of a whole sequence."""
    watch, row = Watch(), torch.from_numpy(tokens)
    with torch.no_grad():
        model(row, torch.arange(len(row)), PackedAttention([0, len(row)]), watch)
    return torch.stack(watch.chosen, 1).numpy()


def sampled(model: LanguageModel, **options: Any) -> list[Record]:
    rng = np.random.default_rng(0)
    params = SamplingParams(3, 0.9, max_new_tokens=14, stop_token_ids=(), routing=True)
    prompts = [rng.integers(0, VOCAB, n) for n in (19, 3, 9, 26)]
    requests = [r for i, p in enumerate(prompts) for r in requests_of(f"p{i}", 0, p, params)]
    with closing(EmbeddedEngine(model, CONFIG, routing=True, **options)) as engine:
        first = collect(engine, requests)
        again = collect(engine, requests)  # prompts that are in the prefix cache
        records = [completion.handle.resolve() for _, completion in [*first.values(), *again.values()]]
        assert engine.stats().num_preemptions > 0
        assert engine.stats().num_cached_tokens > 0
    return records


def samples_of(records: list[Record], routing: bool) -> list[Sample]:
    return [
        Sample(r.tokens, r.loss_mask, r.logprobs, np.ones(len(r.tokens), np.float32), i)
        if not routing
        else Sample(r.tokens, r.loss_mask, r.logprobs, np.ones(len(r.tokens), np.float32), i, routing=r.routing)
        for i, r in enumerate(records)
    ]


def as_sets(experts: np.ndarray) -> np.ndarray:
    return np.sort(experts.astype(np.int64), -1)


@pytest.mark.parametrize(
    "family", [f if f in USUAL else pytest.param(f, marks=pytest.mark.slow) for f in MIXTURES if f != "phimoe"]
)
def test_the_engine_records_the_experts_of_every_token_but_the_last(family: str, tmp_path: Path):
    model = load_model(save(family, tmp_path / "model"), implementation="transformers")
    records = sampled(model)
    for record in records:
        assert record.routing is not None
        assert record.routing.dtype == np.uint8
        assert len(record.routing) == len(record.tokens)
        assert np.array_equal(as_sets(record.routing[:-1]), as_sets(of_forward(model, record.tokens)[:-1]))
        assert (record.routing[-1] == 255).all()
    trainer = Trainer(model, OptimSection(), 128, 1, 0.9)
    for routing in (False, True):
        for sample, logprobs in zip(records, trainer.logprobs(samples_of(records, routing)), strict=True):
            assert np.abs(logprobs - sample.logprobs).max() <= 1e-4


def test_of_a_servers_layers_those_with_experts_are_kept(tmp_path: Path):
    spec, _ = read_spec(save("deepseek_v3", tmp_path / "model"), "transformers")  # its first layer has none
    given = np.array([[[0, 0], [3, 1]], [[0, 0], [0, 2]]])
    kept = routing_of_all_layers(spec, given.reshape(-1), 2)
    assert kept.dtype == np.uint8
    assert kept.tolist() == [[[3, 1]], [[0, 2]]]
    for wrong, why in (
        (given[:1], "expected 8 experts of 2 tokens, got 4"),
        (np.zeros_like(given), "got expert 0 for every token"),
        (given + 2, "expected 2 different experts of 4"),
        (given - 1, "expected 2 different experts of 4"),
        (given // 4 + 1, "expected 2 different experts of 4"),
    ):
        with pytest.raises(ValueError, match=why):
            routing_of_all_layers(spec, wrong.reshape(-1), 2)


def test_low_precision_chooses_other_experts_and_replay_takes_the_engines(tmp_path: Path):
    """I1, with and without: sampled in bfloat16, computed in float32."""
    place = save("qwen3_moe", tmp_path / "model", num_experts=16, num_hidden_layers=3)
    model = load_model(place, implementation="transformers")
    records = sampled(model, compute_dtype=torch.bfloat16)
    others = np.mean(
        [(as_sets(r.routing) != as_sets(of_forward(model, r.tokens)))[:-1].any(-1).mean() for r in records]
    )
    trainer = Trainer(model, OptimSection(), 128, 1, 0.9)
    means: list[float] = []
    for routing in (False, True):
        computed = trainer.logprobs(samples_of(records, routing))
        gaps = [np.abs(ours - r.logprobs)[r.loss_mask] for ours, r in zip(computed, records, strict=True)]
        means.append(float(np.concatenate(gaps).mean()))
    assert others > 0.003
    print(
        f"other experts at {others:.3%} of places; mean difference of log-probs {means[0]:.5f}, {means[1]:.5f} replayed"
    )
    assert means[1] < 0.8 * means[0]


def test_training_sends_tokens_to_the_recorded_experts(tmp_path: Path):
    """Experts of another model's choosing: each is given the tokens that the record says, the router's gradient is that
    of finite differences, recomputed activations change nothing, and without a record routers choose."""
    place = save("qwen3_moe", tmp_path / "model", num_hidden_layers=2)
    model = load_model(place, implementation="transformers")
    tokens = np.arange(12) % VOCAB
    recorded = np.stack([np.random.default_rng(i).permutation(4)[:2] for i in range(24)]).reshape(12, 2, 2)
    recorded = recorded.astype(np.uint8)
    recorded[-1] = 255
    mask = np.arange(12) >= 4
    sample = Sample(tokens, mask, np.zeros(12, np.float32), np.ones(12, np.float32), routing=recorded)
    router = next(p for name, p in model.named_parameters() if name.endswith("0.mlp.gate.weight"))

    def gradients(checkpointing: bool, sample: Sample) -> tuple[float, dict[str, Tensor]]:
        fresh = load_model(place, implementation="transformers")
        trainer = Trainer(fresh, OptimSection(lr=1e-9), 64, 1, activation_checkpointing=checkpointing)
        found: dict[str, Tensor] = {}
        for name, parameter in fresh.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
        stats = trainer.step([sample], cross_entropy)
        return stats.loss, found

    loss, found = gradients(False, sample)
    again, recomputed = gradients(True, sample)
    assert loss == again
    assert found.keys() == recomputed.keys()
    assert all(torch.equal(found[name], recomputed[name]) for name in found)
    without, _ = gradients(False, replace(sample, routing=None))
    assert abs(without - loss) > 1e-3

    trainer = Trainer(model, OptimSection(), 64, 1)
    watch = Watch(Replay(torch.from_numpy(recorded)))
    model(torch.from_numpy(tokens), torch.arange(12), PackedAttention([0, 12]), watch)
    own = of_forward(model, tokens)
    used = torch.stack(watch.chosen, 1).numpy()
    assert np.array_equal(used[:-1], recorded[:-1])
    assert not np.array_equal(own[:-1], recorded[:-1])
    loads = model.take_expert_loads()
    assert loads is not None
    assert torch.equal(loads, torch.stack([torch.bincount(c.flatten(), minlength=4) for c in watch.chosen]).double())

    def loss_of() -> float:
        return -float(trainer.logprobs([sample])[0].astype(np.float64).sum())

    place_, step = (1, 5), 3e-2
    with torch.no_grad():
        router[place_] += step
        above = loss_of()
        router[place_] -= 2 * step
        below = loss_of()
    slope = found["model.layers.0.mlp.gate.weight"][place_] * mask.sum()
    assert abs(slope) > 1e-3
    assert float(slope) == pytest.approx((above - below) / (2 * step), rel=3e-2)


def test_a_packed_batch_replays_as_its_sequences_do(tmp_path: Path):
    """I2, with one sequence that has no record."""
    model = load_model(save("gpt_oss", tmp_path / "model"), implementation="transformers")
    rng = np.random.default_rng(3)
    samples = []
    for i, size in enumerate((9, 5, 17)):
        routing = np.stack([rng.permutation(4)[:2] for _ in range(2 * size)]).reshape(size, 2, 2).astype(np.uint8)
        mask = np.arange(size) > 0
        plain = Sample(rng.integers(0, VOCAB, size), mask, np.zeros(size, np.float32), np.ones(size, np.float32), i)
        samples.append(plain if i == 1 else replace(plain, routing=routing))
    together = Trainer(model, OptimSection(), 64, 1).logprobs(samples)
    alone = [Trainer(model, OptimSection(), 64, 1).logprobs([sample])[0] for sample in samples]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one - other).max() <= 2e-5


def test_what_cannot_be_replayed_is_refused(tmp_path: Path):
    for family, words in (
        ("phimoe", "do not choose experts by the largest"),
        ("mistral", "mistral, which has no experts"),
    ):
        model = load_model(save(family, tmp_path / family), implementation="transformers")
        with pytest.raises(UserError, match=words):
            check_routing(model)
        with pytest.raises(UserError, match=words):
            EmbeddedEngine(model, CONFIG, routing=True)
    model = load_model(save("mixtral", tmp_path / "mixtral"), implementation="transformers")
    params = SamplingParams(max_new_tokens=2, routing=True)
    with closing(EmbeddedEngine(model, CONFIG)) as engine, pytest.raises(UserError, match="sampling routing"):
        engine.generate([[1, 2]], params)


def test_many_experts_take_two_bytes(tmp_path: Path):
    place = save("qwen3_moe", tmp_path / "model", num_experts=260)
    model = load_model(place, implementation="transformers")
    with closing(EmbeddedEngine(model, CONFIG, routing=True)) as engine:
        params = SamplingParams(max_new_tokens=20, stop_token_ids=(), routing=True)
        record = engine.generate([list(range(9))], params)[0][0].handle.resolve()
    assert record.routing is not None
    assert record.routing.dtype == np.int16
    assert record.routing[:-1].max() > 255
    assert np.array_equal(as_sets(record.routing[:-1]), as_sets(of_forward(model, record.tokens)[:-1]))
    assert (record.routing[-1] == -1).all()
