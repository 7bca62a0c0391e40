"""Measures this machine for `pekoe plan`: rates, and how long small models take to sample and to train.

What is timed is what a run does, by the embedded engine and by the trainer; `pekoe.plan.calibrate` fits constants to
it. Each is timed three times, of which the quickest counts: the first compiles kernels, others may be disturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from pekoe.algo.loss import cross_entropy
from pekoe.config.recipes import OptimSection
from pekoe.core.hardware import SAMPLES, Device, Timing, recognise
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Sample, SamplingParams
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.model import Decoder
from pekoe.run.hardware import measure_ceilings
from pekoe.train import Trainer

PROMPT, RESPONSE, TIMES = 32, 32, 3
SHAPES = ((2, 128), (6, 128), (4, 256))  # layers and hidden size, on a CPU; on a GPU eight times as wide
SEQUENCES = (8, 64, 256)
TOKENS = (1024, 4096)  # trained on in one micro-batch


def measure_machine(
    shapes: Sequence[tuple[int, int]] = SHAPES, sequences: Sequence[int] = SEQUENCES, tokens: Sequence[int] = TOKENS
) -> tuple[Device, list[Timing], float]:
    """This machine as one device, what was timed on it, and bytes of a number of the weights that were sampled from."""
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    ceilings = measure_ceilings(device, dtype)
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total
    link, network, of_links = _links(torch.cuda.get_device_name(0) if cuda else None, ceilings.byte_s)
    rates = ceilings.byte_s, ceilings.flop_s, 0.0, 0.0
    source = f"measured by pekoe doctor, but for links ({of_links})"
    machine = Device("here", float(memory), *rates, link, network, max(1, torch.cuda.device_count()), source)
    timings = list[Timing]()
    for layers, width in shapes:
        width *= 8 if cuda else 1
        spec = ModelSpec(
            "qwen2", 512, width, layers, width // 32, max(1, width // 64), 32, 3 * width, 512, tied_embeddings=True
        )
        model = Decoder(spec)
        model.init_weights(0)
        model = model.to(device)
        timings += _sampled(model, spec, sequences, dtype)
        timings += _trained(model, spec, tokens, dtype)
    return machine, timings, dtype.itemsize


def _links(name: str | None, byte_s: float) -> tuple[float, float, str]:
    """Bytes a second to others of its node and to other nodes, of a GPU (None: of processes of one machine), and where
    they are from: they are not measured."""
    if name is None:
        return byte_s / 4, byte_s / 4, "assumed: processes exchange through the memory, at a quarter of its rate"
    if (known := recognise(name)) is not None:
        return known.link_byte_s, known.network_byte_s, f"published: those of {known.name}"
    return 32e9, 12.5e9, "assumed: PCIe gen 4, 100 Gb/s"


def _sampled(model: Decoder, spec: ModelSpec, sequences: Sequence[int], dtype: torch.dtype) -> Iterator[Timing]:
    engine, rng = EmbeddedEngine(model, None, PROMPT + RESPONSE, dtype), np.random.default_rng(0)
    params = SamplingParams(n=SAMPLES, min_new_tokens=RESPONSE, max_new_tokens=RESPONSE)
    for number in sequences:
        prompts = [rng.integers(0, spec.vocab_size, (number // SAMPLES, PROMPT)).tolist() for _ in range(TIMES)]
        taken = [_seconds(partial(engine.generate, each, params)) for each in prompts]  # no prompt is cached
        yield Timing("sample", spec, number, PROMPT, RESPONSE, min(taken))
    engine.close()


def _trained(model: Decoder, spec: ModelSpec, tokens: Sequence[int], dtype: torch.dtype) -> Iterator[Timing]:
    trainer, length = Trainer(model, OptimSection(), max(tokens), 10, compute_dtype=dtype), PROMPT + RESPONSE
    mask, zeros = np.arange(length) >= PROMPT, np.zeros(length, np.float32)
    for number in (total // length for total in tokens):
        samples = [
            Sample(np.full(length, i % spec.vocab_size, np.int64), mask, zeros, mask.astype(np.float32), i)
            for i in range(number)
        ]
        taken = [_seconds(partial(trainer.step, samples, cross_entropy)) for _ in range(TIMES)]
        yield Timing("train", spec, number, PROMPT, RESPONSE, min(taken))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
