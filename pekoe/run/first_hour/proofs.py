"""Parts of `pekoe doctor --gpu` that say whether numbers are right. Each yields figures as it gets them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pekoe.algo.loss import cross_entropy
from pekoe.config.engine import EngineSection
from pekoe.config.recipes import OptimSection
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Sample, SamplingParams
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.engine.embedded.attention import ForwardBatch, KVCache
from pekoe.engine.embedded.attention_cpu import CPUCache
from pekoe.engine.embedded.attention_cuda import CUDACache
from pekoe.engine.embedded.graphs import DecodeGraphs
from pekoe.kernels.packed_linear import cast_once, refresh
from pekoe.model import Decoder, LoRA, PackedAttention, load_model, save_adapter, save_model
from pekoe.model.hf import merge_adapter
from pekoe.model.lora import adapters_off, add_lora, is_factor
from pekoe.run.first_hour.site import (
    Figure,
    Site,
    Skip,
    at_least,
    at_most,
    differences,
    is_true,
    relative,
    small_spec,
    tokens_of,
    training_samples,
)
from pekoe.train import Trainer
from pekoe.weights import forward_logprobs
from pekoe.weights.proof import sample_of

BLOCK = 16
_LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of attention on numbers near 1


class Scene:
    """Prompts (length, samples) and the forwards that compute them: half of each prompt, the rest, then tokens of all
    samples, which share the prompt's whole blocks."""

    def __init__(self, prompts: Sequence[tuple[int, int]], steps: int, size: int = BLOCK) -> None:
        self.prompts, self.size = prompts, size
        blocks = iter(np.random.default_rng(0).permutation(10_000).tolist())
        self.copies: list[tuple[int, int]] = []  # a prompt's last block, where it is not whole, to each other sample
        tables: list[list[int]] = []
        for length, samples in prompts:
            whole, last = length // size, -(-(length + steps) // size)
            common = [next(blocks) for _ in range(whole)]
            own = [[next(blocks) for _ in range(last - whole)] for _ in range(samples)]
            tables += [common + each for each in own]
            if length % size:
                self.copies += [(own[0][0], each[0]) for each in own[1:]]
        names = {block: i for i, block in enumerate(sorted({b for table in tables for b in table}))}
        self.copies = [(names[a], names[b]) for a, b in self.copies]
        self.num_blocks, width = len(names), max(map(len, tables))
        self._tables = np.array([[names[b] for b in t] + [0] * (width - len(t)) for t in tables], np.int32)
        self._firsts = np.cumsum([0, *(samples for _, samples in prompts)])[:-1]  # the first sample of each prompt

    def chunks(self, second: bool) -> ForwardBatch:
        """The first or the second halves of all prompts."""
        halves = [(length // 2, length) if second else (0, length // 2) for length, _ in self.prompts]
        bounds = np.cumsum([0, *(stop - start for start, stop in halves)]).tolist()
        where = np.repeat(np.arange(len(halves)), [stop - start for start, stop in halves])
        places = np.concatenate([np.arange(start, stop) for start, stop in halves])
        fresh, continued = ([bounds[-1]], bounds) if second else (bounds, [0])
        none = np.zeros(0, np.int64)
        return ForwardBatch(places, self._tables[self._firsts], where, 0, none, continued, fresh)

    def step(self, number: int) -> ForwardBatch:
        """Token `number` after the prompt, of every sample."""
        places = np.concatenate([np.full(samples, length + number) for length, samples in self.prompts])
        group = np.repeat(np.arange(len(self.prompts)), [samples for _, samples in self.prompts])
        rows = np.arange(len(places))
        return ForwardBatch(places, self._tables, rows, len(rows), group, [len(rows)], [len(rows)])


def kernels(site: Site) -> Iterator[Figure]:
    """Attention over KV blocks as the engine computes it, and `KVCache`'s in float32."""
    shapes = [(4, 2, 32), (8, 2, 64)] if not site.cuda else [(8, 8, 32), (14, 2, 64), (12, 2, 128), (28, 4, 128)]
    prompts = [(70, 8), (5, 1), (33, 3), (150, 1)] + ([(1000, 16), (3000, 4)] if site.cuda else [])
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if site.cuda else (torch.float32,):
        worst = 0.0
        for heads, kv_heads, dim in shapes:
            spec = ModelSpec("qwen2", 32, heads * dim, 1, heads, kv_heads, dim, 16, 4096)
            worst = max(worst, _attention_difference(site, spec, Scene(prompts, 3), dtype))
        name = f"largest difference, {str(dtype).removeprefix('torch.')}, {len(shapes)} shapes of heads"
        yield at_most(name, worst, _LIMITS[dtype])


@torch.no_grad()
def _attention_difference(site: Site, spec: ModelSpec, scene: Scene, dtype: torch.dtype) -> float:
    caches: list[Any] = [KVCache(spec, scene.num_blocks, BLOCK, torch.float32, site.device)]
    if site.cuda:
        assert CUDACache.takes(spec, BLOCK, dtype, site.device), f"the kernels do not take {spec}"
        caches.append(CUDACache(spec, scene.num_blocks, BLOCK, dtype, site.device))
    else:
        assert CPUCache.takes(spec, BLOCK, dtype, site.device)
        caches.append(CPUCache(spec, scene.num_blocks, BLOCK))
    generator, worst = torch.Generator(site.device).manual_seed(0), 0.0
    batches = [scene.chunks(False), scene.chunks(True), *(scene.step(i) for i in range(3))]
    for number, batch in enumerate(batches):
        if number == 2:
            for cache in caches:
                for source, target in scene.copies:
                    cache.copy_block(source, target)
        q, k, v = (
            torch.randn(len(batch.positions), h, spec.head_dim, generator=generator, device=site.device).to(dtype)
            for h in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        )
        plain = caches[0].attention(batch)(0, q.float(), k.float(), v.float())
        ours = caches[1].attention(batch)(0, q, k, v)
        worst = max(worst, _largest(ours, plain))
    return worst


def _largest(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference; NaN where one is."""
    difference = float((ours.double() - theirs.double()).abs().max())
    return math.inf if math.isnan(difference) else difference


def varlen(site: Site) -> Iterator[Figure]:
    """`PackedAttention` and gradients of it, against the formula in float64, document by document."""
    shapes = [(4, 2, 32)] if not site.cuda else [(4, 2, 64), (14, 2, 64), (28, 4, 128)]
    lengths = [1, 7, 60, 33] if not site.cuda else [1, 7, 300, 64, 1025, 2]
    for dtype in (torch.float32, torch.bfloat16):
        forward, backward = 0.0, 0.0
        for heads, kv_heads, dim in shapes:
            generator = torch.Generator(site.device).manual_seed(1)
            q, k, v, weights = (
                torch.randn(sum(lengths), h, dim, generator=generator, device=site.device).to(dtype)
                for h in (heads, kv_heads, kv_heads, heads)
            )
            ours = [x.clone().requires_grad_() for x in (q, k, v)]
            wide = [x.double().requires_grad_() for x in (q, k, v)]
            out = PackedAttention(np.cumsum([0, *lengths]).tolist())(0, ours[0], ours[1], ours[2])
            expected = _defined(lengths, *wide)
            forward = max(forward, relative([out], [expected]))
            grads = torch.autograd.grad((out * weights).sum(), ours)
            backward = max(backward, relative(grads, torch.autograd.grad((expected * weights.double()).sum(), wide)))
        limit, name = 2e-2 if dtype is torch.bfloat16 else 1e-5, str(dtype).removeprefix("torch.")
        yield at_most(f"relative error of the output, {name}", forward, limit)
        yield at_most(f"relative error of gradients, {name}", backward, limit)
    if site.cuda:
        yield _float32_memory(site)


def _defined(lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by its formula."""
    times, outs = q.shape[1] // k.shape[1], list[Tensor]()
    for start, stop in pairwise(np.cumsum([0, *lengths]).tolist()):
        qs, ks, vs = q[start:stop], *(x[start:stop].repeat_interleave(times, 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", qs, ks) / math.sqrt(q.shape[2])
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        outs.append(torch.einsum("hts,shd->thd", scores.masked_fill(future, -math.inf).softmax(-1), vs))
    return torch.cat(outs)


def _float32_memory(site: Site) -> Figure:
    """Of attention and its gradients in float32, where all scores at once would take 2 GiB."""
    length, heads = 8192, 8
    q, k, v = (torch.randn(length, h, 64, device=site.device, requires_grad=True) for h in (heads, 2, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    PackedAttention([0, length])(0, q, k, v).sum().backward()
    share = (torch.cuda.max_memory_allocated() - before) / (4 * heads * length**2)
    return at_most("memory of float32 attention, share of its scores", share, 0.25)


def i1(site: Site) -> Iterator[Figure]:
    """Sampling log-probs beside the training forward's, before and after weights change in place and are replaced."""
    spec = small_spec(site)
    n, new = (16, 100) if site.cuda else (4, 24)
    params = SamplingParams(n=n, max_new_tokens=new, seed=1, stop_token_ids=(7,))
    for dtype in (torch.float32, torch.bfloat16):
        model, means, largest = site.model(spec), list[float](), list[float]()
        engine = EmbeddedEngine(model, EngineSection(kv_tokens=16384, prefill_tokens=64), 512, dtype)
        for version in range(3):
            prompts = [p for i, n in enumerate([1, 3, 17, 150]) for p in tokens_of(1, n, spec.vocab_size, i)]
            completions = [c for group in engine.generate(prompts, params) for c in group]
            own = forward_logprobs(model, 1.0, dtype, [sample_of(c) for c in completions])
            found = differences(completions, own)
            means.append(float(found.mean()))
            largest.append(float(found.max()))
            if version:
                model = site.model(spec, seed=version + 1)
            else:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.1)
            engine.update_weights(model, version + 1)
        engine.close()
        if dtype is torch.bfloat16:
            yield at_most("bfloat16: mean difference, three versions", max(means), 2e-2)
            yield Figure("bfloat16: largest difference", max(largest))
        else:
            yield at_most("float32: largest difference, three versions", max(largest), 1e-4 if not site.cuda else 1e-3)
            yield at_most("float32: mean difference", max(means), 1e-5 if not site.cuda else 1e-4)


def training(site: Site) -> Iterator[Figure]:
    """One optimizer step: packed and one by one, with activation checkpointing, in bf16 beside float32."""
    spec = small_spec(site)
    lengths = [40, 7, 90, 25, 61] if not site.cuda else [400, 70, 900, 250, 610]
    samples = training_samples(lengths, spec.vocab_size)
    loss, gradients = gradients_of(site, spec, samples, sum(lengths))
    one_by_one = gradients_of(site, spec, samples, max(lengths))
    limit = 1e-5 if not site.cuda else 1e-4
    yield at_most("packed beside one by one: gradients, float32", relative(gradients, one_by_one[1]), limit)
    again = gradients_of(site, spec, samples, sum(lengths), checkpointing=True)
    yield at_most("activations computed again: gradients, float32", relative(gradients, again[1]), limit)
    low_loss, low = gradients_of(site, spec, samples, sum(lengths), torch.bfloat16)
    yield at_most("bfloat16 beside float32: loss, relative", abs(low_loss - loss) / loss, 1e-2)
    whole, whole_low = (torch.cat([g.flatten().double() for g in each]) for each in (gradients, low))
    cosine = float(whole @ whole_low / (whole.norm() * whole_low.norm()))
    yield at_least("bfloat16 beside float32: cosine of the gradients", cosine, 0.99)


def gradients_of(
    site: Site,
    spec: ModelSpec,
    samples: Sequence[Sample],
    budget: int,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> tuple[float, list[Tensor]]:
    """Loss and gradients of the trainer's step on fresh weights."""
    model, unclipped = site.model(spec), OptimSection(grad_clip=math.inf)
    trainer = Trainer(model, unclipped, budget, 1, 1.0, dtype, activation_checkpointing=checkpointing)
    found: list[Tensor] = []

    def keep(*_: object) -> None:
        found.extend(p.grad.clone() for p in trainer.model.parameters() if p.grad is not None)

    trainer.optimizer.register_step_pre_hook(keep)
    loss = trainer.step(samples, cross_entropy).loss
    assert found, "no optimizer step was made"
    return loss, found


def graphs(site: Site) -> Iterator[Figure]:
    """Hidden states of decoding by replayed graphs, and by the same kernels called one by one."""
    if not site.cuda:
        raise Skip("CUDA graphs need a GPU")
    spec = small_spec(site)
    model = site.model(spec)
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        sampled: Decoder = model if dtype is torch.float32 else cast_once(model, dtype)
        scene = Scene([(40, 5), (20, 1), (33, 3)], 12)
        cache = CUDACache(spec, scene.num_blocks, BLOCK, dtype, site.device)
        for memory in (cache.keys, cache.values):
            memory.normal_()
        replayed, errors = DecodeGraphs(sampled, cache, dtype), list[float]()
        for number in range(8):
            if number == 4:  # weights change where they lie
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.1)
                refresh(sampled)
                replayed.follow(sampled)
            batch = scene.step(number)
            tokens = np.random.default_rng(number).integers(0, spec.vocab_size, len(batch.positions))
            on_device = (torch.from_numpy(array).to(site.device) for array in (tokens, batch.positions))
            with torch.no_grad(), torch.autocast(site.device.type, dtype, enabled=dtype is not torch.float32):
                eager = sampled(*on_device, cache.attention(batch))
            errors.append(relative([replayed.hidden(tokens, batch)], [eager]))
        name = str(dtype).removeprefix("torch.")
        yield at_most(f"{name}: relative error of hidden states", max(errors[:4]), limit)
        yield at_most(f"{name}: after the weights changed in place", max(errors[4:]), limit)
        yield Figure(f"{name}: graphs recorded for 8 steps", len(replayed), "< 8", len(replayed) < 8)


def lora(site: Site) -> Iterator[Figure]:
    """An adapter beside a base in the dtype of the matrix products."""
    spec, dtype = small_spec(site), torch.bfloat16
    base = site.model(spec, dtype=dtype)
    save_model(base, site.folder / "base")
    lengths = [40, 7, 30]
    samples = training_samples(lengths, spec.vocab_size)
    before = forward_logprobs(base, 1.0, dtype, samples)
    model = load_model(site.folder / "base", dtype, str(site.device))
    model.lora = add_lora(model, LoRA(8, 8.0, (), str(site.folder / "base"), ""), 0)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(model, OptimSection(lr=1e-2), 128, 8, 1.0, dtype)
    losses = [trainer.step(samples, cross_entropy).loss for _ in range(6)]
    yield Figure("loss of six steps", losses[-1], f"< {losses[0]:.4g}", losses[-1] < losses[0])
    same = all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not is_factor(name))
    yield is_true("the base is as it was, bit by bit", same)
    with adapters_off(model):
        off = forward_logprobs(model, 1.0, dtype, samples)
    yield at_most("adapters off beside the base: log-probs", _apart(off, before), 0.0)
    engine = EmbeddedEngine(model, EngineSection(kv_tokens=4096), 256, dtype)
    params = SamplingParams(n=4, max_new_tokens=24, stop_token_ids=(7,))
    completions = [c for group in engine.generate(tokens_of(3, 17, spec.vocab_size), params) for c in group]
    own = forward_logprobs(model, 1.0, dtype, [sample_of(c) for c in completions])
    engine.close()
    yield at_most(
        "sampling with it beside training: mean difference", float(differences(completions, own).mean()), 2e-2
    )
    save_adapter(model, site.folder / "adapter")
    merge_adapter(site.folder / "adapter", site.folder / "merged", float32=True)
    wide = load_model(site.folder / "merged", torch.float32, str(site.device))
    merged, beside = (forward_logprobs(m, 1.0, torch.float32, samples) for m in (wide, model.float()))
    yield at_most("merged beside the adapter, float32: log-probs", _apart(merged, beside), 1e-4)


def _apart(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    return float(max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)))
