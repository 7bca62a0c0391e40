"""Measurements of the embedded engine alone, run in its worker: sharing, cache, breakdown, ceilings, updates."""

from __future__ import annotations

import cProfile
import pstats
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Lists = list[list[int]]


def counted(worker: Any, prompts: Lists, lengths: Lists, seed: int) -> dict[str, Any]:
    """`generate`, with what the engine's counters say of it. Of all context tokens that the responses stand on,
    `cache_hit_rate` was found in the prefix cache, per prompt, and `prefill_saved` was not computed (cache and group
    together)."""
    before = worker.engine.stats()
    done = worker.generate(prompts, lengths, seed)
    after = worker.engine.stats()
    counts = {name: getattr(after, name) - getattr(before, name) for name in before.__dataclass_fields__}
    computed, cached, shared = (counts[f"num_{name}_tokens"] for name in ("prefill", "cached", "shared"))
    hit, saved = cached / max(1, cached + computed), (cached + shared) / max(1, cached + shared + computed)
    return done | counts | {"cache_hit_rate": hit, "prefill_saved": saved}


# Where the time goes


def breakdown(worker: Any, prompts: Lists, lengths: Lists, seed: int) -> dict[str, Any]:
    """Seconds by kind of work, of one `generate`; `rest` is what no kernel or matrix product accounts for."""
    if worker.options["device"] == "cuda":
        return _cuda_breakdown(worker, prompts, lengths, seed)
    times: Counter[str] = Counter()
    with _timed(times, worker.model.spec.vocab_size):
        total = worker.generate(prompts, lengths, seed)["seconds"]
    seconds = {**times, "rest (Python, small operations)": total - sum(times.values())}
    ordered = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    return {
        "total": total,
        "seconds": ordered,
        "largest_but_matmul": next(name for name in ordered if name not in _MATMUL),
        "own_seconds_by_function": _by_function(worker, prompts, lengths, seed),
    }


def _by_function(worker: Any, prompts: Lists, lengths: Lists, seed: int, number: int = 12) -> dict[str, float]:
    """What `rest` is made of: the functions with the most seconds of their own, kernels counted in `jit.run`. Measured
    in another run, on the same prompts shifted; the profiler makes calls of Python functions dearer than they are."""
    vocab, profiler, forward = worker.model.spec.vocab_size, cProfile.Profile(), worker.engine._step

    def profiled() -> Any:  # a profiler sees one thread: the engine's
        profiler.enable()
        try:
            return forward()
        finally:
            profiler.disable()

    worker.engine._step = profiled
    worker.generate([[(token + 1) % vocab for token in prompt] for prompt in prompts], lengths, seed)
    del worker.engine._step
    found: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    top = sorted(found.items(), key=lambda item: -item[1][2])[:number]
    return {f"{Path(file).name}:{name}"[:100]: own for (file, _, name), (_, _, own, *_) in top}


_MATMUL = ("linear", "head")


@contextmanager
def _timed(times: Counter[str], vocab: int) -> Iterator[None]:
    """Adds up the seconds of each kernel and matrix product, as the thread that asks for them sees them; those of
    threads that work side by side, each on rows of its own, count as their mean."""
    from pekoe.kernels import jit
    from pekoe.kernels.packed_linear import PackedLinear

    num_threads, lock = torch.get_num_threads(), threading.Lock()

    def timed(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = (time.perf_counter() - start) / (1 if jit.num_threads() == num_threads else num_threads)
                with lock:
                    times[name(*args)] += taken

        return call

    linear = timed(F.linear, lambda x, weight, *_: "head" if weight.shape[0] == vocab else "linear")
    attention = timed(F.scaled_dot_product_attention, lambda *_: "attention of fresh prompts (torch)")
    packed = timed(PackedLinear.forward, lambda layer, _: "head" if layer.weight.shape[0] == vocab else "linear")
    patches: list[tuple[Any, str, Any]] = [(F, "linear", linear), (F, "scaled_dot_product_attention", attention)]
    patches.append((PackedLinear, "forward", packed))
    run = timed(jit.run, lambda function, *_: f"kernel {function.__name__.strip('_')}")
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("pekoe.") and getattr(module, "run", None) is jit.run:
            patches.append((module, "run", run))
    old = [(place, name, getattr(place, name)) for place, name, _ in patches]
    for place, name, new in patches:
        setattr(place, name, new)
    try:
        yield
    finally:
        for place, name, value in old:
            setattr(place, name, value)


def _cuda_breakdown(worker: Any, prompts: Lists, lengths: Lists, seed: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    short = [[min(length, 64) for length in each] for each in lengths]  # a trace of more would fill memory
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        total = worker.generate(prompts, short, seed)["seconds"]
    kernels = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    seconds = {event.key[:80]: event.self_device_time_total / 1e6 for event in kernels[:12]}
    seconds["rest (device idle or small kernels)"] = total - sum(seconds.values())
    other = next((n for n in seconds if not any(w in n for w in ("gemm", "mm", "linear"))), "")
    return {"total": total, "seconds": seconds, "largest_but_matmul": other}


# Ceilings


def _fastest(worker: Any, work: Callable[[], Any], rounds: int = 5, inner: int = 1) -> float:
    """Seconds of `work`, the best of some rounds: a ceiling is what the machine can do, not what it mostly does."""
    best = float("inf")
    work()
    for _ in range(rounds):
        worker.synchronise()
        start = time.perf_counter()
        for _ in range(inner):
            work()
        worker.synchronise()
        best = min(best, (time.perf_counter() - start) / inner)
    return best


@torch.no_grad()
def ceilings(worker: Any, num_rows: int) -> dict[str, float]:
    """What the machine does: matmul at 2048 x 2048 and at the model's own shapes with `num_rows` rows (its own
    weights, layer after layer, so caches are as in a forward); a copy of memory, bytes read plus bytes written."""
    device, dtype, model = worker.options["device"], worker.dtype, worker.model
    square = torch.randn(2048, 2048, device=device, dtype=dtype)
    seconds = _fastest(worker, lambda: square @ square)
    matmul = 2 * 2048**3 / seconds / 1e9

    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    if model.lm_head is None:
        weights.append(model.head_weight)
    inputs = {w.shape[1]: torch.randn(num_rows, w.shape[1], device=device, dtype=dtype) for w in weights}
    seconds = _fastest(worker, lambda: [F.linear(inputs[w.shape[1]], w) for w in weights], inner=2)
    own = 2 * num_rows * sum(w.numel() for w in weights) / seconds / 1e9

    size = 2**28 if device == "cpu" else 2**32
    source = torch.zeros(size // 4, device=device)
    target = torch.zeros_like(source)
    copy = 2 * size / _fastest(worker, lambda: target.copy_(source)) / 1e9
    return {"matmul_gflop_s": matmul, "matmul_own_shapes_gflop_s": own, "copy_gb_s": copy}


def decode(worker: Any, prompts: Lists, lengths: Lists, seed: int) -> dict[str, Any]:
    """What the engine reaches in decode: a run of full length less a run of one token each, on other prompts."""
    model, spec = worker.model, worker.model.spec
    vocab, ones = spec.vocab_size, [[1] * len(each) for each in lengths]
    others = [[[(token + shift) % vocab for token in prompt] for prompt in prompts] for shift in range(1, 5)]
    full = [counted(worker, p, lengths, seed) for p in others[:2]]
    first = [counted(worker, p, ones, seed) for p in others[2:]]
    seconds = max(1e-6, min(x["seconds"] for x in full) - min(x["seconds"] for x in first))
    steps = full[0]["num_forwards"] - first[0]["num_forwards"]

    # A token at place t sees its prompt and t response tokens; it reads them from the cache, its prompt's once a group.
    own = sum(t for each in lengths for length in each for t in range(1, length))
    seen = own + sum(len(p) * (length - 1) for p, each in zip(prompts, lengths, strict=True) for length in each)
    read = own + sum(len(p) * (max(each) - 1) for p, each in zip(prompts, lengths, strict=True))
    tokens = sum(length - 1 for each in lengths for length in each)
    in_matmul = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    in_matmul += model.head_weight.numel() if model.lm_head is None else 0
    flops = 2 * in_matmul * tokens + 4 * spec.num_layers * spec.num_heads * spec.head_dim * seen
    bytes_read = steps * in_matmul * worker.dtype.itemsize + read * spec.kv_values_per_token * worker.dtype.itemsize
    return {
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "steps": steps,
        "gflop_s": flops / seconds / 1e9,
        "gb_s": bytes_read / seconds / 1e9,
    }


# Weight updates in process


def update_times(worker: Any, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Seconds of a weight update by route: the trainer's own model; a directory on disk (synced); one in memory."""
    from pekoe.model import save_model

    engine, model = worker.engine, worker.model
    seconds: dict[str, dict[str, list[float]]] = {}

    def note(route: str, part: str, work: Callable[[], Any]) -> None:
        start = time.perf_counter()
        work()
        seconds.setdefault(route, {}).setdefault(part, []).append(time.perf_counter() - start)

    parents: dict[str, Path | None] = {"directory": None}
    if Path("/dev/shm").is_dir():
        parents["shared memory"] = Path("/dev/shm")
    for _ in range(rounds):
        note("alias", "update", lambda: engine.update_weights(model, engine.version + 1))
        for route, parent in parents.items():
            with tempfile.TemporaryDirectory(prefix="pekoe-bench-", dir=parent) as place:
                path = Path(place) / "model"
                note(route, "save", lambda path=path: save_model(model, path))
                note(route, "update", lambda path=path: engine.update_weights(path, engine.version + 1))
    engine.update_weights(model, engine.version + 1)
    return {r: {part: statistics.median(s) for part, s in parts.items()} for r, parts in seconds.items()}
