"""What each process of `test_parallel.py` does. A module of its own: spawned processes import it."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from pekoe.algo.loss import ppo
from pekoe.config.recipes import AlgoSection, OptimSection
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Sample
from pekoe.model import Decoder, LoRA
from pekoe.model.lora import add_lora
from pekoe.train import Layout, Trainer

OPTIM = OptimSection(lr=1e-2, warmup_fraction=0.0, grad_clip=0.05)  # below the norm: clipping is in it
SHAPES = {
    "qwen2, tied": {"family": "qwen2", "qkv_bias": True, "tied_embeddings": True},
    "qwen3, untied": {"family": "qwen3", "qk_norm": True, "tied_embeddings": False},
    "llama, biases": {"family": "llama", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied_embeddings": True},
}
STEPS = 3


def make_trainer(
    shape: str,
    layout: dict[str, int] | None = None,
    recompute: bool = False,
    dtype: torch.dtype = torch.float64,
    reference: bool = False,
    lora: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> Trainer:
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_positions": 128,
    }
    model = Decoder(ModelSpec(**sizes, **SHAPES[shape])).to(dtype)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():  # no bias 0, no norm 1
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.05)
    if lora:
        model.lora = add_lora(model, LoRA(4, 8.0, ()), seed=0)
    frozen = None
    if reference:
        frozen = Decoder(model.spec).to(dtype).requires_grad_(False)
        frozen.init_weights(7)
    where = None if layout is None else Layout(model.spec, **layout)
    options: dict[str, Any] = {"activation_checkpointing": recompute, "reference": frozen, "layout": where}
    return Trainer(model, OPTIM, 40, STEPS, compute_dtype=compute_dtype, **options)


def make_samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    for group, length in enumerate([5, 9, 20, 3, 14, 7, 31, 11, 2, 26]):
        mask = np.arange(length) >= 1 + length // 3
        behaviour = np.where(mask, rng.normal(-4, 0.3, length), 0).astype(np.float32)
        advantages = np.where(mask, rng.normal(), 0).astype(np.float32)
        samples.append(Sample(rng.integers(0, 50, length), mask, behaviour, advantages, group))
    return samples


def train(trainer: Trainer) -> dict[str, Any]:
    """Some steps; what they said, and the log-probs before."""
    samples = make_samples()
    logprobs = np.concatenate(trainer.logprobs(samples))
    stats = [trainer.step(samples, partial(ppo, algo=AlgoSection())) for _ in range(STEPS)]
    return {
        "logprobs": logprobs,
        "loss": [s.loss for s in stats],
        "grad_norm": [s.grad_norm for s in stats],
        "entropy": [s.means["entropy"] for s in stats],
        "logprob_diff_max": [s.means["logprob_diff_max"] for s in stats],
        "num_targets": [s.num_targets for s in stats],
    }


def train_few(trainer: Trainer, number: int) -> dict[str, Any]:
    """Steps on the `number` longest samples, with everything in the objective that there is."""
    samples = sorted(make_samples(), key=len)[-number:]
    proximal, reference = trainer.logprobs(samples), trainer.logprobs(samples, reference=True)
    samples = [
        replace(s, proximal_logprobs=p, reference_logprobs=r)
        for s, p, r in zip(samples, proximal, reference, strict=True)
    ]
    algo = AlgoSection(proximal="recompute", correction="mask_sequence", correction_limit=10.0, kl=0.5)
    stats = [trainer.step(samples, partial(ppo, algo=algo)) for _ in range(STEPS)]
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in trainer.model.parameters()]
    return {
        "proximal": np.concatenate(proximal),
        "reference": np.concatenate(reference),
        "loss": [s.loss for s in stats],
        "grad_norm": [s.grad_norm for s in stats],
        "means": [list(s.means.values()) for s in stats],
        "weights": np.concatenate([w.detach().flatten().numpy() for w in weights]),
    }


def lora_main(rank: int, world: int, folder: str, layouts: list[dict[str, int]], shape: str) -> None:
    """As `few_main`, with adapters: the trained steps, and a checkpoint."""
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/lora-{world}", rank=rank, world_size=world)
    try:
        for place, layout in enumerate(layouts):
            trainer = make_trainer(shape, layout, lora=True)
            found = train_few(trainer, 10)
            dcp.save(trainer.state_dict(), checkpoint_id=f"{folder}/lora-{place}")
            snapshot = trainer.snapshot()
            if rank == 0:
                snapshot.export(Path(folder) / f"adapter-{place}")
                torch.save(found, f"{folder}/lora-{place}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def low_main(rank: int, world: int, folder: str, layouts: list[dict[str, int]]) -> None:
    """Float32 weights that are gathered and computed with in bfloat16."""
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/low-{world}", rank=rank, world_size=world)
    try:
        for place, layout in enumerate(layouts):
            for lora in (False, True):
                options: dict[str, Any] = {"dtype": torch.float32, "compute_dtype": torch.bfloat16, "lora": lora}
                trainer, dtypes = make_trainer("qwen2, tied", layout, recompute=True, **options), set[str]()

                def look(module: Any, args: Any, out: torch.Tensor, found: set[str] = dtypes) -> None:
                    found.add(str(out.dtype))

                trainer.model.blocks[0].register_forward_hook(look)
                trainer.optimizer.register_step_pre_hook(partial(_keep_dtypes, dtypes))
                found = train(trainer) | {"dtypes": dtypes}
                found["weights"] = {str(p.dtype) for p in trainer.model.parameters()}
                if rank == 0:
                    torch.save(found, f"{folder}/low-{world}-{place}-{lora}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _keep_dtypes(found: set[str], optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        found |= {f"gradients {p.grad.dtype}" for p in group["params"] if p.grad is not None}


def few_main(rank: int, world: int, folder: str, layouts: list[dict[str, int]], numbers: list[int]) -> None:
    """Mini-batches that leave ranks without work."""
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/few-{world}", rank=rank, world_size=world)
    try:
        for place, layout in enumerate(layouts):
            for number in numbers:
                found = train_few(make_trainer("qwen3, untied", layout, reference=True), number)
                if rank == 0:
                    torch.save(found, f"{folder}/few-{world}-{place}-{number}.pt")
    finally:
        dist.destroy_process_group()


def rank_main(rank: int, world: int, folder: str, layouts: list[dict[str, int]], shapes: list[str]) -> None:
    """Train under each layout; rank 0 saves what was said, all of them the checkpoint."""
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    try:
        for number, layout in enumerate(layouts):
            for shape in shapes:
                trainer = make_trainer(shape, layout, recompute=shape == shapes[-1])  # which changes no number
                said = train(trainer)
                place = Path(folder) / f"{world}-{number}-{shape}"
                dcp.save(trainer.state_dict(), checkpoint_id=str(place))
                if rank == 0:
                    torch.save(said, f"{place}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def resume_main(rank: int, world: int, folder: str, layout: dict[str, int], shape: str, load: str, save: str) -> None:
    """Train some steps, from the checkpoint `load` where it is named, and save."""
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/join-{save}", rank=rank, world_size=world)
    try:
        trainer = make_trainer(shape, layout)
        if load:
            trainer.load(Path(folder, load))
        said = train(trainer)
        trainer.snapshot().write(Path(folder, save))
        if rank == 0:
            torch.save(said, f"{folder}/{save}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def kernels_main(rank: int, folder: str) -> None:
    """Log-probs in float32, at a width at which a forward without gradient runs on compiled kernels; then a step."""
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/kernels", rank=rank, world_size=2)
    try:
        trainer = make_trainer("qwen3, untied", {}, dtype=torch.float32)
        said = train(trainer)
        if rank == 0:
            torch.save(said, f"{folder}/kernels.pt")
    finally:
        dist.destroy_process_group()
