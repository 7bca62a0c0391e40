"""The planner's memory beside what `pekoe doctor` gets from the trainer's own code."""

from __future__ import annotations

import pytest
import torch

from pekoe.core.hardware import DEVICES
from pekoe.core.spec import ModelSpec
from pekoe.plan.costs import Engine, Training
from pekoe.plan.memory import engine_memory, trainer_memory
from pekoe.plan.shapes import SHAPES, Shape
from pekoe.train.memory_estimate import predict

SHAPE = Shape("small", 6, 512, 8, 4, 64, 1536, 32_000)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("shards", [1, 4])
def test_a_rank_takes_what_doctor_says(half: bool, checkpointing: bool, shards: int):
    budget, s = 4096, SHAPE
    spec = ModelSpec(
        "qwen2", s.vocab, s.hidden, s.num_layers, s.num_heads, s.num_kv_heads, s.head_dim, s.dense_width, 8192
    )
    dtype = torch.bfloat16 if half else torch.float32
    known = predict(spec, budget, 1024, dtype, checkpointing, "cuda", shards=shards)
    training = Training(s, DEVICES["h100"], shards, recompute=float(checkpointing))
    parts = dict(trainer_memory(training, budget, shards, half).parts)
    state = known.weights, known.gradients, known.moments
    assert [parts[name] for name in ("parameters", "gradients", "Adam's moments")] == pytest.approx(state, rel=0.01)
    gathered = parts.get("gathered by FSDP", 0.0)  # in whichever phase the peak is: two may be as high
    assert any(gathered == pytest.approx(phase.gathered, rel=0.01) for phase in known.phases)
    assert sum(parts.values()) - parts["torch"] == pytest.approx(known.total, rel=0.06)


def test_more_ranks_and_split_layers_take_less():
    h100, shape = DEVICES["h100"], SHAPES["qwen2.5-7b"]
    sizes = [trainer_memory(Training(shape, h100, n), 30_720, n, True).total for n in (8, 16, 64)]
    assert sizes == sorted(sizes, reverse=True)
    parts = [trainer_memory(Training(shape, h100, 8, tp=tp), 30_720, 8 // tp, True).parts for tp in (1, 2, 4)]
    split = [each["activations of a micro-batch"] for each in parts]
    assert split == sorted(split, reverse=True)


@pytest.mark.parametrize(("model", "tp", "fits"), [("7b", 1, True), ("32b", 1, False), ("32b", 2, True)])
def test_engines_that_are_known_to_fit(model: str, tp: int, fits: bool):
    engine = Engine(SHAPES[f"qwen2.5-{model}"], DEVICES["h100"], tp)
    assert engine_memory(engine, 28_672).fits is fits


def test_a_kv_cache_that_is_set_is_not_exceeded():
    engine = Engine(SHAPES["qwen2.5-7b"], DEVICES["h100"], kv_limit=1000)
    assert engine.kv_tokens() == 1000
