"""Training of models and sequences as large as they come: bf16 products over float32 weights. Not yet run on a GPU;
what a CPU runs of it (`--smoke`) is this very code on a small model."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rollout_cases import SHAPES, Shape
from train_cases import Case
from train_flops import Ceiling, seconds
from train_memory import PeakMemory
from train_worker import OBJECTIVE, make_trainer, sample_of

from pekoe.core.roofline import training_flops
from pekoe.core.spec import ModelSpec, RopeSpec
from pekoe.model import Decoder
from pekoe.train.memory_estimate import predict

Q7B = Shape("q7b", 152064, 3584, 28, 28, 4, 18944, {}, 8192, (256, 27136))
LARGE = {shape.name: shape for shape in (SHAPES["nano"], SHAPES["q1.5b"], Q7B)}
MAX_POSITIONS = 32768


def case_of(name: str) -> Case:
    """On a GPU 32 sequences of up to 27,648 tokens, micro-batches as large as the release's."""
    shape = LARGE[name]
    if name == "nano":
        return Case(shape, samples=8, minibatches=1, budget=512)
    return Case(shape, 32, 1, budget=30720, prompt_tokens=512, median=8192, sigma=0.9, clip=(256, 27136))


def spec_of(name: str) -> ModelSpec:
    spec = ModelSpec(**LARGE[name].spec(MAX_POSITIONS))
    return replace(spec, rope=RopeSpec(theta=1e6), tied_embeddings=name != "q7b")


def make_model(spec: ModelSpec, device: torch.device) -> Decoder:
    """Random weights, made where they live."""
    with torch.device(device):
        model = Decoder(spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


def room(device: torch.device) -> int:
    """Bytes that may be used: all but a fiftieth of a GPU's. On a CPU, where models are small, no limit."""
    return int(0.98 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 1 << 50


def measure(name: str, spec: ModelSpec, device: torch.device, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """Whole optimizer steps: tokens/s, and which share of torch.matmul's FLOP/s at the model's own shapes they reach
    (MFU against what was measured, not against a data sheet; recomputation is not counted). Raises OutOfMemoryError."""
    case = case_of(name)
    torch.manual_seed(0)
    samples = [sample_of(row) for row in case.rows()[0]]
    longest, again = max(map(len, samples)), bool(options.get("activation_checkpointing"))
    predicted = predict(spec, case.budget, longest, torch.bfloat16, again, device.type)
    budget = min(case.budget, predicted.largest_budget(room(device)))
    if budget < longest:
        raise torch.OutOfMemoryError(f"predicted: {predicted.total / 2**30:.0f} GiB")
    trainer = make_trainer(make_model(spec, device), budget, torch.bfloat16, **options)
    warm = trainer.step(samples, OBJECTIVE)
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = [seconds(lambda: trainer.step(samples, OBJECTIVE), device) for _ in range(rounds)]
    memory = peak.about() if device.type == "cpu" else {"peak_bytes": torch.cuda.max_memory_allocated()}
    lengths = list(map(len, samples))
    count = training_flops(spec, lengths, warm.num_targets)
    targets = round(budget * warm.num_targets / warm.num_tokens)
    ceiling = Ceiling(trainer.model, budget, targets, torch.bfloat16)
    matmul_s = statistics.median([ceiling.measure() for _ in range(rounds + 1)][1:])
    step_s = statistics.median(taken)
    return {
        "parameters": spec.num_parameters,
        "layers": spec.num_layers,
        "num_sequences": len(samples),
        "longest": longest,
        "num_tokens": warm.num_tokens,
        "num_microbatches": warm.num_microbatches,
        "token_budget": budget,
        "trainer": options,
        "predicted_bytes": predict(spec, budget, longest, torch.bfloat16, again, device.type).total,
        "loss": warm.loss,
        "seconds": taken,
        "tokens_per_s": warm.num_tokens / step_s,
        "flops": {"linear": count.linear, "head": count.head, "attention": count.attention},
        "flop_s": count.total / step_s,
        "matmul_flop_s": ceiling.flops / matmul_s,
        "share": count.total / step_s / (ceiling.flops / matmul_s),
        "shapes_flop_s": ceiling.shapes(),
        **memory,
    }


def run(
    name: str, device: torch.device, rounds: int, options: dict[str, Any], note: Callable[[str], None]
) -> dict[str, Any] | None:
    """`measure`; where memory does not bear the whole model, with half its layers, and so on."""
    spec = spec_of(name)
    options = {"activation_checkpointing": name != "nano"} | options
    while spec.num_layers:
        try:
            return measure(name, spec, device, rounds, options)
        except torch.OutOfMemoryError:
            pass
        note(f"{name}: no memory for {spec.num_layers} layers ({spec.num_parameters / 1e9:.1f}B parameters)")
        gc.collect()
        torch.cuda.empty_cache()
        spec = replace(spec, num_layers=spec.num_layers // 2)
    return None
