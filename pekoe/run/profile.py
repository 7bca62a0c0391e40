"""Measures this machine for `pekoe plan`: rates, and how long small models take to sample and to train.

What is timed is what a run does, by the embedded engine and by the trainer; `pekoe.plan.calibrate` fits constants to
it. Of each the median counts, as of a run's steps it does, but for the first time, which compiles kernels. Responses
end where the model says, each at a step of its own. Most of what is trained on is responses, with the loss of a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from pekoe.algo.loss import ppo
from pekoe.config.recipes import AlgoSection, OptimSection
from pekoe.core.hardware import SAMPLES, Device, Timing, recognise
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Sample, SamplingParams
from pekoe.engine.base import Engine
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.model import Decoder
from pekoe.run.hardware import measure_ceilings
from pekoe.train import Trainer
from pekoe.train.memory import limit_malloc_cache

PROMPT, RESPONSE, TIMES = 32, 32, 5
TRAINED_PROMPT = 8  # of as many tokens together
VOCAB = 512
SHAPES = ((2, 128), (6, 128), (4, 256))  # layers and hidden size, on a CPU; on a GPU eight times as wide
SEQUENCES = (8, 64, 256)
TOKENS = (1024, 4096)  # trained on in one micro-batch
LENGTH = PROMPT + RESPONSE
OBJECTIVE = partial(ppo, algo=AlgoSection())
RECOMPUTED = (2048, 4096)  # the same, with activation checkpointing

Wait = Callable[[], object]


def measure_machine(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    sequences: Sequence[int] = SEQUENCES,
    tokens: Sequence[int] = TOKENS,
    recomputed: Sequence[int] = RECOMPUTED,
    wait: Wait = lambda: None,
) -> tuple[Device, list[Timing], float]:
    """This machine as one device, what was timed on it, and bytes of a number of the weights that were sampled from.

    Args:
        wait: called before each measurement: for others, who measure the same at the same time.
    """
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    wait()
    ceilings = measure_ceilings(device, dtype)
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total
    link, network, of_links = _links(torch.cuda.get_device_name(0) if cuda else None, ceilings.byte_s)
    rates = ceilings.byte_s, ceilings.flop_s, 0.0, 0.0
    source = f"measured by pekoe doctor, but for links ({of_links})"
    machine = Device("here", float(memory), *rates, link, network, max(1, torch.cuda.device_count()), source)
    timings = list[Timing]()
    for layers, width in shapes:
        model = small_model(layers, width * (8 if cuda else 1)).to(device)
        timings += _sampled(model, sequences, dtype, wait)
        timings += _trained(model, tokens, dtype, wait)
    limit_malloc_cache()  # as runs with checkpointing do; nothing is timed without it from here on
    for layers, width in shapes:
        model = small_model(layers, width * (8 if cuda else 1)).to(device)
        timings += _trained(model, recomputed, dtype, wait, again=True)
    return machine, timings, dtype.itemsize


def small_model(layers: int, width: int) -> Decoder:
    heads = width // 32, max(1, width // 64)
    model = Decoder(ModelSpec("qwen2", VOCAB, width, layers, *heads, 32, 3 * width, 512, tied_embeddings=True))
    model.init_weights(0)
    return model


def _links(name: str | None, byte_s: float) -> tuple[float, float, str]:
    """Bytes a second to others of its node and to other nodes, of a GPU (None: of processes of one machine), and where
    they are from: they are not measured."""
    if name is None:
        return byte_s / 4, byte_s / 4, "assumed: processes exchange through the memory, at a quarter of its rate"
    if (known := recognise(name)) is not None:
        return known.link_byte_s, known.network_byte_s, f"published: those of {known.name}"
    return 32e9, 12.5e9, "assumed: PCIe gen 4, 100 Gb/s"


def _sampled(model: Decoder, sequences: Sequence[int], dtype: torch.dtype, wait: Wait) -> Iterator[Timing]:
    engine = EmbeddedEngine(model, None, PROMPT + 2 * RESPONSE, dtype)
    for number in sequences:
        yield sampling_timing(engine, model.spec, number, wait)
    engine.close()


def sampling_timing(engine: Engine, spec: ModelSpec, number: int, wait: Wait) -> Timing:
    """Of `number` responses to prompts that no cache has. A token in `RESPONSE` ends one."""
    rng, stops = np.random.default_rng(0), tuple(range(VOCAB // RESPONSE))
    params = SamplingParams(n=SAMPLES, max_new_tokens=2 * RESPONSE, stop_token_ids=stops)
    lengths = list[tuple[int, ...]]()

    def sample() -> None:
        prompts = rng.integers(0, VOCAB, (number // SAMPLES, PROMPT)).tolist()
        answers = engine.generate(prompts, params)
        lengths.append(tuple(answer.num_tokens for group in answers for answer in group))

    seconds, which = median_of(sample, wait)
    mean = round(sum(lengths[which]) / number)
    return Timing("sample", spec, number, PROMPT, mean, seconds, lengths[which])


def _trained(
    model: Decoder, tokens: Sequence[int], dtype: torch.dtype, wait: Wait, again: bool = False
) -> Iterator[Timing]:
    trainer = Trainer(model, OptimSection(), max(tokens), 10, compute_dtype=dtype, activation_checkpointing=again)
    for number in (total // LENGTH for total in tokens):
        seconds, _ = median_of(partial(trainer.step, samples_of(number), OBJECTIVE), wait)
        kind = "recompute" if again else "train"
        yield Timing(kind, model.spec, number, TRAINED_PROMPT, LENGTH - TRAINED_PROMPT, seconds)


def samples_of(number: int) -> list[Sample]:
    mask, zeros = np.arange(LENGTH) >= TRAINED_PROMPT, np.zeros(LENGTH, np.float32)
    tokens = (np.full(LENGTH, i % VOCAB, np.int64) for i in range(number))
    return [Sample(each, mask, zeros, mask.astype(np.float32), i) for i, each in enumerate(tokens)]


def median_of(work: Callable[[], Any], wait: Wait) -> tuple[float, int]:
    """The median time of `work`, the first left out, and which of all it was."""
    taken = list[float]()
    for _ in range(1 + TIMES):
        wait()
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    which = 1 + int(np.argsort(taken[1:])[TIMES // 2])
    return taken[which], which
