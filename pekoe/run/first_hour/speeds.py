"""Parts of `pekoe doctor --gpu` that measure: tokens a second, FLOP/s, memory. Shapes are those of Qwen2.5 on a GPU."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch

from pekoe.algo.loss import cross_entropy
from pekoe.config.engine import EngineSection
from pekoe.config.recipes import OptimSection
from pekoe.core.hardware import USABLE, recognise
from pekoe.core.roofline import adapter_parameters, sampling_bytes, sampling_flops, training_flops
from pekoe.core.spec import ModelSpec, RopeSpec
from pekoe.core.types import SamplingParams
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.model import LoRA
from pekoe.model.lora import add_lora
from pekoe.run.first_hour.site import Figure, Site, aim, at_least, at_most, small_spec, tokens_of, training_samples
from pekoe.run.hardware import measure_ceilings
from pekoe.train import Trainer
from pekoe.train.memory import PeakMemory, limit_malloc_cache, resident
from pekoe.train.memory_estimate import StepMemory, predict

# Dimensions as in the models' config.json.
Q1_5B = ModelSpec(
    "qwen2", 151936, 1536, 28, 12, 2, 128, 8960, 32768, RopeSpec(1e6), tied_embeddings=True, qkv_bias=True
)
Q7B = ModelSpec("qwen2", 152064, 3584, 28, 28, 4, 128, 18944, 32768, RopeSpec(1e6), qkv_bias=True)
ADAPTER = LoRA(32, 32.0, ())


def large_specs(site: Site) -> dict[str, ModelSpec]:
    """What speeds are measured of."""
    return {"1.5B": Q1_5B, "7B": Q7B} if site.cuda else {"small": small_spec(site)}


def machine(site: Site) -> Iterator[Figure]:
    """The device, with the rates that it reaches."""
    if site.cuda:
        about = torch.cuda.get_device_properties(site.device)
        yield Figure("device", about.name)
        yield Figure("GPUs", torch.cuda.device_count())
        yield Figure("compute capability", f"{about.major}.{about.minor}")
        yield Figure("memory, bytes", about.total_memory)
        yield Figure("CUDA", str(torch.version.cuda))
    else:
        yield Figure("device", f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads")
        yield Figure("memory, bytes", psutil.virtual_memory().total)
    ceilings = measure_ceilings(site.device, site.dtype)
    yield Figure(f"matrix product, {str(site.dtype).removeprefix('torch.')}, FLOP/s", ceilings.flop_s)
    yield Figure("copy in memory, bytes/s", ceilings.byte_s)
    known = recognise(torch.cuda.get_device_name(site.device)) if site.cuda else None
    if known is not None:
        yield aim(f"matrix product, share of {known.name}'s data sheet", ceilings.flop_s / known.flop_s, 0.6)
        yield aim(f"copy in memory, share of {known.name}'s data sheet", ceilings.byte_s / known.byte_s, 0.8)


def memory(site: Site) -> Iterator[Figure]:
    """A training step of two micro-batches: predicted by `train.memory_estimate`, and measured."""
    limit_malloc_cache()
    budget, longest = (2048, 256) if not site.cuda else (16384, 4096)
    spec = ModelSpec("qwen2", 2048, 192, 4, 6, 2, 32, 512, 4096, tied_embeddings=True, qkv_bias=True)
    cases: list[tuple[str, torch.dtype, bool, LoRA | None]] = [("full, float32", torch.float32, False, None)]
    if site.cuda:
        spec = replace(Q1_5B, num_layers=8)
        cases = [
            ("full, bfloat16", torch.bfloat16, False, None),
            ("full, bfloat16, activations again", torch.bfloat16, True, None),
            ("full, float32", torch.float32, True, None),
            ("LoRA, bfloat16, activations again", torch.bfloat16, True, ADAPTER),
        ]
    for name, dtype, again, lora in cases:
        predicted = predict(spec, budget, longest, dtype, again, site.device.type, lora=lora)
        measured = _step_bytes(site, spec, budget, longest, dtype, again, lora)
        yield Figure(f"{name}: bytes measured", measured)
        ratio = predicted.total / measured
        low, high = (0.9, 1.1) if site.cuda else (0.75, 1.25)  # on a CPU the allocator's gaps count
        yield Figure(f"{name}: predicted / measured", ratio, f"{low} to {high}", low <= ratio <= high)
        gc.collect()


def _step_bytes(
    site: Site, spec: ModelSpec, budget: int, longest: int, dtype: torch.dtype, again: bool, lora: LoRA | None
) -> int:
    """Peak of an optimizer step, without what the process held before the model was made."""
    if site.cuda:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if site.cuda else resident()
    trainer = _trainer(site, spec, budget, dtype, again, lora)
    trainer.step(training_samples([32, 32], spec.vocab_size), cross_entropy)  # libraries that come at first use
    if not site.cuda:
        held = sum(p.nbytes * (3 if p.requires_grad else 1) for p in trainer.model.parameters())
        before = min(resident() - held, before + 2**28)
    peak = PeakMemory(site.device)
    stats = trainer.step(training_samples([longest] * (2 * budget // longest), spec.vocab_size), cross_entropy)
    assert stats.num_microbatches == 2
    if peak.bytes is None:
        raise RuntimeError("this system does not tell the peak of a process's memory")
    return peak.bytes - before


def _trainer(
    site: Site, spec: ModelSpec, budget: int, dtype: torch.dtype, again: bool, lora: LoRA | None = None
) -> Trainer:
    model = site.model(spec, dtype=dtype if lora else torch.float32, std=0.02)
    if lora is not None:
        model.lora = add_lora(model, lora, 0)
    return Trainer(model, OptimSection(), budget, 100, 1.0, dtype, activation_checkpointing=again)


@dataclass(frozen=True, slots=True)
class Load:
    """Samples of random prompts, all of one length."""

    prompts: int
    samples: int
    prompt: int  # tokens of each
    new: int  # tokens of each response

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    def engine(self, site: Site, spec: ModelSpec) -> EmbeddedEngine:
        """Room for all of it, on weights in the dtype of the matrix products."""
        longest = self.prompt + self.new
        config = EngineSection(kv_tokens=self.sequences * (longest + 16))
        return EmbeddedEngine(site.model(spec, dtype=site.dtype, std=0.02), config, longest, site.dtype)

    def seconds(self, site: Site, engine: EmbeddedEngine, seed: int) -> float:
        params = SamplingParams(
            n=self.samples, min_new_tokens=self.new, max_new_tokens=self.new, stop_token_ids=(), seed=seed
        )
        asked = tokens_of(self.prompts, self.prompt, engine.model.spec.vocab_size, seed)
        engine.flush_cache()
        return seconds(site, partial(engine.generate, asked, params))


def seconds(site: Site, work: Callable[[], Any]) -> float:
    site.wait()
    start = time.perf_counter()
    work()
    site.wait()
    return time.perf_counter() - start


def decode(site: Site) -> Iterator[Figure]:
    """Tokens/s after the prompts, and the least time that this machine's measured rates allow as a share of it."""
    ceilings = measure_ceilings(site.device, site.dtype)
    load = Load(16, 8, 512, 512) if site.cuda else Load(2, 4, 32, 24)
    for name, spec in large_specs(site).items():
        engine = load.engine(site, spec)
        load.seconds(site, engine, 0)  # compiles kernels, records graphs
        first = replace(load, new=1).seconds(site, engine, 1)
        before = engine.stats().num_forwards
        decoding = load.seconds(site, engine, 2) - first
        forwards = engine.stats().num_forwards - before
        engine.close()
        groups = [(load.prompt, [load.new] * load.samples)] * load.prompts
        prompts = [(load.prompt, [1] * load.samples)] * load.prompts
        flops = sampling_flops(spec, groups).total - sampling_flops(spec, prompts).total
        num_bytes = sampling_bytes(spec, groups, forwards, str(site.dtype).removeprefix("torch."))
        share, bound = ceilings.reached(flops, num_bytes, decoding)
        rate, sizes = load.sequences * (load.new - 1) / decoding, f"{load.prompt} + {load.new} tokens"
        yield Figure(f"{name}: tokens/s, {load.sequences} sequences of {sizes}", rate)
        yield Figure(f"{name}: milliseconds a forward", 1000 * decoding / max(1, forwards - 1))
        yield aim(f"{name}: share of what {bound} allows", share, 0.5)
        yield Figure(f"{name}: prompt tokens/s", load.prompts * load.prompt / first)
        del engine
        _free(site)


def prefix(site: Site) -> Iterator[Figure]:
    """Samples of one prompt, and as many prompts that differ from the first token on."""
    number, prompt, new = (64, 2048, 128) if site.cuda else (16, 128, 8)
    shared, alone = Load(1, number, prompt, new), Load(number, 1, prompt, new)
    engine = alone.engine(site, large_specs(site)["1.5B" if site.cuda else "small"])
    taken: list[float] = []
    for load, computed in ((shared, prompt), (alone, number * prompt)):
        load.seconds(site, engine, 0)  # compiles kernels, records graphs
        before = engine.stats().num_prefill_tokens
        taken.append(load.seconds(site, engine, 1))
        found, name = engine.stats().num_prefill_tokens - before, "shared" if load is shared else "not shared"
        yield Figure(f"{name}: tokens/s", number * new / taken[-1])
        yield Figure(f"{name}: prompt tokens computed", found, f"{computed:,}", found == computed)
    engine.close()
    yield at_least("times as fast by sharing", taken[1] / taken[0], 1.0)


def mfu(site: Site) -> Iterator[Figure]:
    """Optimizer steps on sequences of one length, with activation checkpointing on a GPU. Recomputation is not counted
    as work; the share is of the device's data sheet where it is known, else of a measured matrix product."""
    known = recognise(torch.cuda.get_device_name(site.device)) if site.cuda else None
    peak = known.flop_s if known else measure_ceilings(site.device, site.dtype).flop_s
    of = f"{known.name}'s data sheet" if known else "a matrix product"
    lengths, tokens = ((2048, 8192, 27648), 27648) if site.cuda else ((64, 256), 512)
    for name, spec in large_specs(site).items():
        for adapted in (False, True):
            label = f"{name}, {'LoRA' if adapted else 'full'}"
            lora = ADAPTER if adapted else None
            room = torch.cuda.mem_get_info(site.device)[0] if site.cuda else math.inf
            step = predict(spec, tokens, max(lengths), site.dtype, site.cuda, site.device.type, lora=lora)
            if step.total > USABLE * room:
                yield Figure(f"{label}: does not fit, bytes predicted", step.total, f"of {USABLE * room:,.0f}")
                continue
            yield from _steps(site, label, spec, lora, lengths, tokens, peak, of, step)
            _free(site)


def _steps(
    site: Site, label: str, spec: ModelSpec, lora: LoRA | None, lengths: tuple[int, ...], tokens: int, peak: float,
    of: str, predicted: StepMemory,
) -> Iterator[Figure]:  # fmt: skip
    """Of one model: the best of two steps at each length."""
    trainer = _trainer(site, spec, tokens, site.dtype, site.cuda, lora)
    adapter = adapter_parameters(spec, lora.rank, lora.targets) if lora else 0
    for length in lengths:
        number = max(1, tokens // length)
        samples = training_samples([length] * number, spec.vocab_size)
        trainer.step(samples, cross_entropy)
        memory = PeakMemory(site.device)
        taken = min(seconds(site, partial(trainer.step, samples, cross_entropy)) for _ in range(2))
        flops = training_flops(spec, [length] * number, number * (length - 1), adapter).total
        yield Figure(f"{label}, {number} x {length} tokens: tokens/s", number * length / taken)
        yield aim(f"{label}, {number} x {length} tokens: share of {of}", flops / taken / peak, 0.45)
        if site.cuda and memory.bytes is not None:
            yield at_most(f"{label}, {length}: memory measured / predicted", memory.bytes / predicted.total, 1.1)


def _free(site: Site) -> None:
    gc.collect()
    if site.cuda:
        torch.cuda.empty_cache()
