"""Training on a GPU that is not there: in every step of it devices, dtypes and shapes fit (`make test-fake-cuda`)."""

from __future__ import annotations

import runpy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pekoe.algo.loss import cross_entropy, ppo
from pekoe.config.recipes import RLConfig, load_config
from pekoe.core.spec import ModelSpec, RopeSpec
from pekoe.core.types import Sample
from pekoe.engine.buckets import buckets
from pekoe.model import Decoder, LoRA
from pekoe.model.lora import add_lora
from pekoe.run.build import make_trainer
from pekoe.train import Trainer
from pekoe.weights.transport import send
from tests.fake_cuda import answer_for_it, fake_cuda

# Two layers of the recipes' models.
_COMMON: dict[str, Any] = {"max_positions": 32768, "rope": RopeSpec(1e6), "qkv_bias": True}
SPECS = {
    "one-gpu-1.5b": ModelSpec("qwen2", 151936, 1536, 2, 12, 2, 128, 8960, tied_embeddings=True, **_COMMON),
    "one-gpu-7b-lora": ModelSpec("qwen2", 152064, 3584, 2, 28, 4, 128, 18944, **_COMMON),
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


def model_of(spec: ModelSpec, dtype: torch.dtype, config: RLConfig) -> Decoder:
    """As `run.build.load_trained` makes it."""
    section = config.model.lora
    with torch.device("cuda"):
        if section is None:
            return Decoder(spec)
        model = Decoder(spec)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.detach().to(dtype)))
        model.lora = add_lora(model, LoRA(section.rank, section.alpha, section.targets or ()), 0)
    return model


def samples(sizes: Sequence[tuple[int, int]] = ((700, 5000), (90, 1), (300, 8000), (20, 900))) -> list[Sample]:
    """Of prompts and responses of these sizes."""
    made: list[Sample] = []
    for group, (prompt, response) in enumerate(sizes):
        length = prompt + response
        mask = np.arange(length) >= prompt
        ones = mask.astype(np.float32)
        made.append(Sample(np.ones(length, np.int64), mask, -ones, ones, group))
    return made


def check(trainer: Trainer) -> None:
    """All that it keeps is on the device, in the dtypes that were asked for."""
    for parameter in trainer.model.parameters():
        assert parameter.device.type == "cuda"
        if parameter.requires_grad:
            assert parameter.dtype is torch.float32
            for name, value in trainer.optimizer.state[parameter].items():
                assert not isinstance(value, torch.Tensor) or name == "step" or value.device.type == "cuda", name


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("one-gpu-1.5b", []),
        ("one-gpu-1.5b", ["model.dtype=float32", "train.token_budget=9216"]),
        ("one-gpu-1.5b", ["train.moments=bfloat16", "optim.beta2=0.95", "train.activation_checkpointing=false"]),
        ("one-gpu-1.5b", ["algo.proximal=recompute", "algo.correction=truncate"]),
        ("one-gpu-1.5b", ["algo.normalise=sequence"]),
        ("one-gpu-7b-lora", []),
        ("one-gpu-7b-lora", ["algo.kl=0.1"]),
        ("one-gpu-7b-lora", ["model.dtype=float32", "algo.kl=0.1"]),
    ],
)
def test_a_step_of_a_recipe(repository: Path, cuda: None, recipe: str, keys: list[str]):
    """Log-probs of before, by the reference too; forward, loss, backward, clipping, AdamW; what a publish sends."""
    config = load_config(repository / "recipes" / f"{recipe}.toml", keys)
    dtype = getattr(torch, config.model.dtype)
    trainer = make_trainer(config, model_of(SPECS[recipe], dtype, config), dtype)
    check(trainer)
    batch = samples()
    if config.algo.proximal == "recompute":
        own = trainer.logprobs(batch)
        batch = [replace(sample, proximal_logprobs=values) for sample, values in zip(batch, own, strict=True)]
    if config.algo.kl:
        theirs = trainer.logprobs(batch, reference=True)
        batch = [replace(sample, reference_logprobs=values) for sample, values in zip(batch, theirs, strict=True)]
    gradients: list[torch.Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad for p in trainer.model.parameters() if p.grad is not None)
    )
    stats = trainer.step(batch, partial(ppo, algo=config.algo, num_lags=1))
    assert stats.skipped is None
    assert stats.num_tokens == sum(map(len, batch))
    assert len(gradients) == sum(p.requires_grad for p in trainer.model.parameters())
    assert all(g.device.type == "cuda" and g.dtype is torch.float32 for g in gradients)
    check(trainer)
    parts = list(buckets(trainer.model, 256 << 20, dtype))
    assert all(tensor.device.type == "cuda" and tensor.dtype is dtype for part in parts for _, tensor in part)
    send(None, iter(parts), 60)


def test_supervised_steps(repository: Path, cuda: None):
    config = load_config(repository / "recipes" / "one-gpu-1.5b.toml")
    trainer = make_trainer(config, model_of(SPECS["one-gpu-1.5b"], torch.bfloat16, config), torch.bfloat16)
    for _ in range(2):
        assert trainer.step(samples(), cross_entropy).skipped is None


def test_a_tensor_that_stayed_on_the_host_is_found(repository: Path, cuda: None):
    """What the tests above would say of it."""
    config = load_config(repository / "recipes" / "one-gpu-1.5b.toml")
    trainer = make_trainer(config, model_of(SPECS["one-gpu-1.5b"], torch.bfloat16, config), torch.bfloat16)

    def objective(logprobs: torch.Tensor, entropy: torch.Tensor, batch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        return (logprobs * torch.ones(len(logprobs))).sum(), {}

    with pytest.raises(RuntimeError, match="same device"):
        trainer.step(samples(), objective)


@pytest.mark.parametrize(
    ("model", "ranks", "dtype"),
    [
        ("1.5b", 1, torch.bfloat16),
        ("1.5b", 8, torch.float32),
        ("7b", 8, torch.bfloat16),
        ("32b", 64, torch.bfloat16),
    ],
)
def test_one_of_many_ranks(
    repository: Path, monkeypatch: pytest.MonkeyPatch, model: str, ranks: int, dtype: torch.dtype
):
    """FSDP, and the gathering of a publish; its memory is as predicted."""
    answer_for_it(monkeypatch)
    monkeypatch.setattr(dist, "new_group", dist.new_group)  # which `one_rank` sets
    one_rank = runpy.run_path(str(repository / "benchmarks" / "fake_ranks.py"))["one_rank"]
    try:
        found = one_rank(model, ranks, 2, 1024, dtype, "cuda")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert 0.95 < found["ratio"] < 1.1
