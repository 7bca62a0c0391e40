"""`pekoe doctor --measure --processes N`: what one of N processes of this machine reaches while all of them work.

They begin each measurement together. In pairs they also train one model by FSDP, over gloo, and gather its weights as a
publish does: that has costs of its own, which one process alone does not show.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from queue import Empty
from statistics import fmean, median
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pekoe.config.cluster import ParallelSection
from pekoe.config.recipes import OptimSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.hardware import Device, Timing
from pekoe.model import Decoder
from pekoe.run.distributed import make_layout, process_group
from pekoe.run.profile import (
    LENGTH,
    OBJECTIVE,
    SHAPES,
    TRAINED_PROMPT,
    Wait,
    measure_machine,
    median_of,
    samples_of,
    small_model,
)
from pekoe.train import Trainer
from pekoe.weights.groups import free_port

BUDGET, MICRO_BATCHES = 1024, (1, 4)  # tokens of a micro-batch, and micro-batches of each of the two
_HOST, _LIMIT_S = "127.0.0.1", 1800.0

Measured = tuple[Device, list[Timing], float]


def measure_together(number: int, shapes: Sequence[tuple[int, int]] = SHAPES, **sizes: Sequence[int]) -> Measured:
    """As `measure_machine`, of one of `number` processes, each with its share of the cores: means of the rates, medians
    of the times. `sizes`: arguments of `measure_machine`. UserError for an odd number, and where there are GPUs."""
    if number % 2 or number > 64:
        raise UserError(f"--processes: expected an even number up to 64 (they train in pairs), got {number}")
    if torch.cuda.is_available():
        raise UserError(f"--processes: expected 1 on a machine with GPUs, got {number}: a process has its own there")
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(number), context.Queue()
    ports = [free_port(_HOST) for _ in range(number // 2)]
    common = number, barrier, answers, shapes, sizes
    processes = [context.Process(target=_measure, args=(i, ports[i // 2], *common), daemon=True) for i in range(number)]
    for process in processes:
        process.start()
    try:
        return _of_one([_answer(answers, processes) for _ in processes], number)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _answer(answers: Any, processes: Sequence[Any]) -> Measured:
    for _ in range(int(_LIMIT_S)):
        try:
            return answers.get(timeout=1)
        except Empty:
            if any(process.exitcode for process in processes):
                break
    raise RunError("doctor --measure: a process that measures has ended, or does not answer")


def _of_one(found: Sequence[Measured], number: int) -> Measured:
    machines, timings, sizes = zip(*found, strict=True)
    rates = {name: fmean(getattr(m, name) for m in machines) for name in ("flop_s", "byte_s")}
    links = dict.fromkeys(("link_byte_s", "network_byte_s"), rates["byte_s"] / 4)
    source = f"of one of {number} processes, {machines[0].source}"
    machine = replace(machines[0], **rates, **links, memory_bytes=machines[0].memory_bytes / number, source=source)
    alike = zip(*timings, strict=True)
    return machine, [replace(each[0], seconds=median(t.seconds for t in each)) for each in alike], sizes[0]


def _measure(
    i: int, port: int, number: int, barrier: Any, answers: Any, shapes: Sequence[tuple[int, int]], sizes: dict[str, Any]
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // number))
    wait = partial(barrier.wait, _LIMIT_S)
    os.environ |= {"MASTER_ADDR": _HOST, "MASTER_PORT": str(port), "RANK": str(i % 2), "LOCAL_RANK": str(i % 2)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with process_group(f"measure-{i // 2}"):
        timings = [t for layers, width in shapes for t in _sharded(small_model(layers, width), wait)]
    machine, alone, size = measure_machine(shapes, wait=wait, **sizes)
    answers.put((machine, [*alone, *timings], size))


def _sharded(model: Decoder, wait: Wait) -> Iterator[Timing]:
    """Training by the two of a pair, and gathering all tensors, one after the other."""
    layout = make_layout(model.spec, ParallelSection(), torch.device("cpu"))
    trainer = Trainer(model, OptimSection(), BUDGET, 10, layout=layout)
    for micro_batches in MICRO_BATCHES:
        number = 2 * micro_batches * BUDGET // LENGTH
        seconds, _ = median_of(partial(trainer.step, samples_of(number), OBJECTIVE), wait)
        sizes = number, TRAINED_PROMPT, LENGTH - TRAINED_PROMPT
        yield Timing("shard", model.spec, *sizes, seconds, micro_batches=micro_batches)

    def gather() -> None:
        for parameter in model.parameters():
            if isinstance(parameter, DTensor):
                parameter.full_tensor()

    yield Timing("gather", model.spec, 0, 0, 0, median_of(gather, wait)[0])
