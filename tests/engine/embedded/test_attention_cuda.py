"""The GPU's attention against plain torch: in Triton's interpreter anywhere, on the device where there is one.

The tests marked gpu have not been run: there was no GPU (`pytest -m gpu tests/engine/embedded`). The interpreted and
compiled ones need triton, the former an environment variable too; on a CPU build of torch:

    pip install --no-deps --target DIR triton
    PYTHONPATH=DIR TRITON_INTERPRET=1 pytest tests/engine/embedded/test_attention_cuda.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Completion, Request, SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.engine.embedded.attention import ForwardBatch, KVCache
from pekoe.engine.embedded.attention_cuda import CUDACache, PlanShape, make_plan, to_buffer
from pekoe.engine.embedded.graphs import DecodeGraphs
from pekoe.model import Decoder, Scores
from tests.engine.embedded.checks import collect, reference_logprobs, worst_difference

# Triton 3.9 says when it compiles that a default of a later version will differ.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def interpreter():
    pytest.importorskip("triton", reason="needs triton, which CPU builds of torch come without")
    if os.environ.get("TRITON_INTERPRET") != "1":  # torch imports triton early: too late to set it here
        pytest.skip("needs TRITON_INTERPRET=1 before the start (without a GPU; with one, run -m gpu)")


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


def spec(heads: int, kv_heads: int, dim: int) -> ModelSpec:
    return ModelSpec("qwen2", 32, heads * dim, 2, heads, kv_heads, dim, 16, 4096)


def make_batch(
    rng: np.random.Generator,
    size: int,
    prompts: list[tuple[int, int]],
    continued: list[tuple[int, int]],
    fresh: list[int],
    longest_response: int = 40,
) -> tuple[ForwardBatch, int]:
    """A forward of decoding prompts (length, n), continuing chunks (start, stop), fresh chunks (length); its blocks."""
    place = iter(rng.permutation(4096).tolist())
    tables: list[list[int]] = []
    positions: list[np.ndarray] = []
    group_of: list[int] = []
    for number, (length, n) in enumerate(prompts):
        common = [next(place) for _ in range(length // size)]
        for _ in range(n):
            position = length + int(rng.integers(0, longest_response))
            tables.append(common + [next(place) for _ in range(position // size + 1 - len(common))])
            positions.append(np.array([position]))
            group_of.append(number)
    for start, stop in [*continued, *((0, length) for length in fresh)]:
        tables.append([next(place) for _ in range(-(-stop // size))])
        positions.append(np.arange(start, stop))
    used = np.unique(np.concatenate([np.array(t) for t in tables]))
    padded = np.zeros((len(tables), max(map(len, tables)) + 1), np.int32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = np.searchsorted(used, table)
    sizes = [len(p) for p in positions]
    bounds = np.cumsum([0, *sizes])[len(group_of) :].tolist()
    where = np.repeat(np.arange(len(tables)), sizes)
    cut = len(continued)
    batch = ForwardBatch(
        np.concatenate(positions), padded, where, len(group_of), np.array(group_of, np.int64), bounds[: cut + 1],
        bounds[cut:],
    )  # fmt: skip
    return batch, len(used)


def difference(
    model: ModelSpec,
    size: int,
    batch: ForwardBatch,
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    scores: Scores | None = None,
) -> float:
    """Largest difference of one layer from plain torch in float32 on the same buffer; the caches must be equal."""
    generator = torch.Generator().manual_seed(0)
    fast = CUDACache(model, num_blocks, size, dtype, device)
    plain = KVCache(model, num_blocks, size, torch.float32, device)
    for ours, theirs in ((fast.keys, plain.keys), (fast.values, plain.values)):
        ours.copy_(torch.randn(ours.shape, generator=generator))
        theirs.copy_(ours)
    total = len(batch.positions)
    q, k, v = (
        torch.randn((total, heads, model.head_dim), generator=generator).to(device, dtype)
        for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    )
    with torch.no_grad():
        ours = fast.attention(batch)(1, q, k, v, scores)
        theirs = plain.attention(batch)(1, q.float(), k.float(), v.float(), scores)
    assert ours.dtype is dtype
    assert torch.equal(fast.keys.float(), plain.keys)
    assert torch.equal(fast.values.float(), plain.values)
    return float((ours.float() - theirs).abs().max())


SHAPES = [(4, 4, 32, 16), (4, 2, 64, 32), (8, 2, 80, 16), (7, 1, 128, 32), (14, 2, 32, 32), (2, 2, 128, 16)]
STEPS = {
    "suffix": ([(5, 1), (150, 1), (64, 1), (1, 1)], [], []),
    "groups": ([(70, 16), (3, 16), (33, 1), (200, 3)], [], []),
    "continuing": ([], [(16, 23), (100, 170), (33, 34)], []),
    "fresh": ([], [], [9, 40]),
    "all": ([(40, 16), (130, 2)], [(32, 75)], [1, 20]),
}
SINKS = torch.tensor([2.0, -1.0, 0.5, 30.0, 0.0, -30.0])
KINDS = {
    "scale": Scores(scale=0.3),
    "cap": Scores(softcap=5.0),
    "window 1": Scores(window=1),
    "window 20": Scores(window=20),
    "sinks": Scores(sinks=SINKS),
    "all": Scores(0.2, 37, 8.0, SINKS / 10),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), SHAPES)
def test_interpreted_kernels_equal_plain_torch(
    interpreter: None, name: str, heads: int, kv_heads: int, dim: int, size: int
):
    batch, num_blocks = make_batch(np.random.default_rng(1), size, *STEPS[name])
    assert difference(spec(heads, kv_heads, dim), size, batch, num_blocks, torch.float32, CPU) < 2e-5


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_kernels_with_scores_that_are_not_plain(interpreter: None, kind: str, name: str):
    batch, num_blocks = make_batch(np.random.default_rng(1), 16, *STEPS[name])
    assert difference(spec(6, 2, 40), 16, batch, num_blocks, torch.float32, CPU, KINDS[kind]) < 2e-5


def test_interpreted_kernels_in_half_precision(interpreter: None):
    """Not in bf16, whose products the interpreter gets wrong (as its documentation says)."""
    batch, num_blocks = make_batch(np.random.default_rng(2), 16, *STEPS["all"])
    assert difference(spec(6, 1, 64), 16, batch, num_blocks, torch.float16, CPU) < TOLERANCE[torch.float16]


def decode_twice(model: Decoder, dtype: torch.dtype, device: torch.device) -> tuple[DecodeGraphs, float]:
    """Steps of several sizes, by graphs and by the same kernels called one by one. Largest difference of [T, C]."""
    rng, vocab = np.random.default_rng(5), model.spec.vocab_size
    most = 0.0
    cache = CUDACache(model.spec, 128, 16, dtype, device)
    for memory in (cache.keys, cache.values):
        memory.copy_(torch.randn(memory.shape, generator=torch.Generator().manual_seed(0)))
    graphs = DecodeGraphs(model, cache, dtype)
    for prompts in ([(40, 2)], [(20, 1), (33, 3)], [(18, 2), (35, 2)], [(70, 5)]):
        batch, _ = make_batch(rng, 16, prompts, [], [], 4)
        tokens = rng.integers(0, vocab, len(batch.positions))
        on_device = (torch.from_numpy(a).to(device) for a in (tokens, batch.positions))
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            one_by_one = model(*on_device, cache.attention(batch))
        most = max(most, float((graphs.hidden(tokens, batch).float() - one_by_one.float()).abs().max()))
    return graphs, most


def test_interpreted_steps_in_a_graphs_larger_shape(
    interpreter: None, make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
):
    """All of `graphs` but the recording: here a replay calls the same function again."""

    def record(_: DecodeGraphs, forward: Callable[[], torch.Tensor]):
        hidden = forward()

        def replay():
            hidden.copy_(forward())

        return hidden, replay

    monkeypatch.setattr(DecodeGraphs, "_record", record)
    graphs, most = decode_twice(make_model(head_dim=16), torch.float32, CPU)
    assert most < 2e-5
    assert len(graphs) == 3  # the second and the third of the four steps have the same shape


@torch.no_grad()
def training_logprobs(model: Decoder, request: Request, completion: Completion, dtype: torch.dtype) -> np.ndarray:
    """Log-probs [R] of a response, as the trainer computes them."""
    with torch.autocast(next(model.parameters()).device.type, dtype, enabled=dtype is not torch.float32):
        return reference_logprobs(model, request, completion)


def test_i1_of_an_engine_on_interpreted_kernels(
    interpreter: None, make_model: Callable[..., Decoder], make_requests: Callable[..., list[Request]]
):
    """Chunks of every kind, shared prompts and copied blocks, as the scheduler makes them."""
    model = make_model(head_dim=16)
    engine = EmbeddedEngine(model, EngineSection(kv_tokens=256, block_tokens=4, prefill_tokens=16))
    engine._runner.cache = CUDACache(model.spec, 64, 4, torch.float32, CPU)
    params = SamplingParams(n=4, max_new_tokens=12, stop_token_ids=(7,))
    requests = [r for i, length in enumerate([1, 5, 30, 17]) for r in make_requests(f"p{i}", length, params)]
    assert worst_difference({0: model}, collect(engine, requests).values()) <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_generation_of_devices_has_registers_and_shared_memory_enough(
    repository: Path, tmp_path: Path, dtype: str
):
    """Compiled by the assembler that triton ships, which needs no device. All shapes: benchmarks/compile_kernels.py."""
    pytest.importorskip("triton", reason="needs triton, which CPU builds of torch come without")
    out, script = tmp_path / "kernels.json", str(repository / "benchmarks/compile_kernels.py")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    words = [sys.executable, script, "--quick", "--dtype", dtype, "--out", str(out)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["sm"] for row in rows} == {80, 86, 89, 90, 100, 120}
    assert {row["kernel"] for row in rows} == {"attend", "merge", "write"}
    assert all(row["registers"] > 8 for row in rows)
    assert all(row["spilled_bytes"] <= (0 if dtype == "bfloat16" else 16) for row in rows)
    assert all(row["shared_bytes"] <= row["shared_limit"] for row in rows)


def test_every_token_of_a_row_is_in_one_piece():
    """By counting, without the kernels: pieces cover what a row sees once; its parts are numbered without gaps."""
    batch, _ = make_batch(np.random.default_rng(3), 16, [(700, 16), (90, 1), (1500, 2)], [(100, 300)], [7], 900)
    plan = make_plan(batch, 16, 2, 10)
    num_paged = batch.fresh[0]
    cover = np.zeros((num_paged, 4096), int)
    parts: list[list[int]] = [[] for _ in range(num_paged)]
    for row, num_rows, low, high, part in [*plan.suffix.tolist(), *plan.prefix.tolist()]:
        cover[row : row + num_rows, low:high] += 1
        for each in range(row, row + num_rows):
            parts[each].append(part)
            assert batch.table_of[each] == batch.table_of[row] or high <= 700 or batch.group_of[each] == 2
    seen = np.arange(4096) <= batch.positions[:num_paged, None]
    assert (cover[seen] == 1).all()
    assert [sorted(p) for p in parts] == [list(range(b - a)) for a, b in pairwise(plan.base.tolist())]
    # The prefix prompt of 16 samples: 43 whole blocks, in two tiles of at most 10 rows instead of 16.
    first = plan.prefix[plan.prefix[:, 0] < 16]
    assert (first[:, 3] - first[:, 2]).sum() == 2 * 43 * 16


def test_a_plan_keeps_its_meaning_in_a_larger_shape():
    batch, _ = make_batch(np.random.default_rng(4), 16, [(70, 3), (5, 1)], [], [])
    plan = make_plan(batch, 16, 1, 4)
    shape = PlanShape(8, 8, 8, 32, 64, 64, 64)
    packed = to_buffer(plan, shape)
    assert all(at.start % 4 == 0 for at in shape.slices.values())
    array = {name: packed[at].reshape(shape.shapes[name]) for name, at in shape.slices.items()}
    assert array["positions"].tolist() == [*batch.positions.tolist(), -1, -1, -1, -1]
    assert array["counts"].tolist() == [len(plan.suffix), len(plan.prefix)]
    assert (array["base"][4:] == plan.base[-1]).all()
    assert np.array_equal(array["tables"][:4, : batch.tables.shape[1]], batch.tables)


@pytest.mark.parametrize(("dim", "dtype", "device", "takes"), [
    (64, torch.bfloat16, "cpu", False), (64, torch.float64, "cuda", False), (256, torch.float32, "cuda", False),
])  # fmt: skip
def test_what_the_kernels_do_not_take(dim: int, dtype: torch.dtype, device: str, takes: bool):
    assert CUDACache.takes(spec(2, 1, dim), 16, dtype, torch.device(device)) is takes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), SHAPES)
def test_kernels_equal_plain_torch(
    cuda: torch.device, dtype: torch.dtype, name: str, heads: int, kv_heads: int, dim: int, size: int
):
    batch, num_blocks = make_batch(np.random.default_rng(1), size, *STEPS[name])
    assert difference(spec(heads, kv_heads, dim), size, batch, num_blocks, dtype, cuda) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_with_scores_that_are_not_plain(cuda: torch.device, kind: str, name: str, dtype: torch.dtype):
    batch, num_blocks = make_batch(np.random.default_rng(1), 16, *STEPS[name])
    scores = KINDS[kind]
    if scores.sinks is not None:
        scores = replace(scores, sinks=scores.sinks.to(cuda))
    assert difference(spec(6, 2, 64), 16, batch, num_blocks, dtype, cuda, scores) < 2 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_kernels_on_long_contexts(cuda: torch.device, dtype: torch.dtype):
    steps = ([(1000, 16), (3000, 4), (17, 1), *[(50, 8)] * 40], [(512, 900), (2048, 2100)], [300, 1])
    batch, num_blocks = make_batch(np.random.default_rng(6), 16, *steps, longest_response=900)
    assert difference(spec(12, 2, 128), 16, batch, num_blocks, dtype, cuda) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-1)])
def test_graphs_equal_the_kernels_one_by_one(
    cuda: torch.device, make_model: Callable[..., Decoder], dtype: torch.dtype, most: float
):
    """bf16: the normed hidden states are near 3, and padding may change which kernel multiplies the matrices."""
    model = make_model(hidden_size=128, head_dim=32).to(cuda)
    graphs, difference = decode_twice(model, dtype, cuda)
    assert difference <= most
    assert len(graphs) == 3
    graphs.follow(model)
    assert len(graphs) == 3
    graphs.follow(make_model(hidden_size=128, head_dim=32).to(cuda))
    assert len(graphs) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_i1_on_the_device_through_updates(
    cuda: torch.device,
    make_model: Callable[..., Decoder],
    make_requests: Callable[..., list[Request]],
    dtype: torch.dtype,
    mean: float,
):
    """Sampling log-probs equal the training forward's, before and after weights change in place and are replaced."""
    shape = {"hidden_size": 128, "head_dim": 32, "max_positions": 512, "scale": 1.5}
    model = make_model(**shape).to(cuda)
    engine = EmbeddedEngine(model, EngineSection(kv_tokens=16384, prefill_tokens=64), compute_dtype=dtype)
    assert isinstance(engine._runner.cache, CUDACache)
    params = SamplingParams(n=16, max_new_tokens=100, stop_token_ids=(7,))
    requests = [r for i, length in enumerate([1, 3, 17, 30, 150]) for r in make_requests(f"p{i}", length, params)]
    for version in range(3):
        differences: list[np.ndarray] = []
        for request, completion in collect(engine, requests).values():
            differences.append(completion.logprobs - training_logprobs(model, request, completion, dtype))
        assert np.abs(np.concatenate(differences)).mean() <= mean
        if version == 0:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
        else:
            model = make_model(seed=version, **shape).to(cuda)
        engine.update_weights(model, version + 1)
