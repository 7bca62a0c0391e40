"""The loss for even use of experts: transformers' own by sequence and layer, whatever shares a micro-batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pekoe.algo.loss import cross_entropy
from pekoe.config.recipes import OptimSection
from pekoe.core.errors import UserError
from pekoe.core.types import Sample
from pekoe.model import Balance, LanguageModel, OwnRouting, PackedAttention, load_model
from pekoe.train import Trainer
from tests.families.configs import VOCAB, make, save

FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "olmoe", "granitemoe", "qwen2_moe", "flex_olmo")


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    made: list[Sample] = []
    for i, size in enumerate((12, 7, 20, 5)):
        mask = np.arange(size) >= 3
        tokens = rng.integers(0, VOCAB, size)
        made.append(Sample(tokens, mask, np.zeros(size, np.float32), np.ones(size, np.float32), i))
    return made


@pytest.mark.parametrize(
    "family", [f if f in FAMILIES[:2] else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_it_is_that_of_transformers_for_each_sequence_and_layer(family: str, tmp_path: Path):
    model = load_model(save(family, tmp_path / "model"), implementation="transformers")
    own: Any = make(family)
    docs = [torch.from_numpy(sample.tokens) for sample in samples()]
    sizes = torch.tensor([len(doc) for doc in docs])
    balance = Balance(OwnRouting(), torch.arange(len(docs)).repeat_interleave(sizes), sizes)
    positions = torch.cat([torch.arange(len(doc)) for doc in docs])
    model(torch.cat(docs), positions, PackedAttention(torch.cat([torch.zeros(1), sizes.cumsum(0)]).int()), balance)
    expected: list[Tensor] = []
    for doc in docs:
        logits = own(doc[None], use_cache=False, output_router_logits=True).router_logits
        expected.append(torch.stack([load_balancing_loss_func((one,), 4, 2) for one in logits]).mean())  # pyright: ignore
    assert torch.allclose(balance.losses(), torch.stack(expected), rtol=1e-5)
    balance.losses().sum().backward()
    torch.stack(expected).sum().backward()
    theirs = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    routers = [name for name in theirs if theirs[name].abs().max() > 0 and ("gate.w" in name or "router" in name)]
    assert routers
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-6, name


def gradients(model: LanguageModel, **options: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    budget = options.pop("budget")
    trainer, found = Trainer(model, OptimSection(lr=1e-9), budget, 1, **options), dict[str, Tensor]()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
    stats = trainer.step(samples(), cross_entropy)
    return stats.means | {"loss": stats.loss}, found


def test_micro_batches_and_recomputed_layers_change_nothing(tmp_path: Path):
    """I2; and its weight changes the gradient."""
    place = save("qwen3_moe", tmp_path / "model")

    def of(**options: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
        return gradients(load_model(place, implementation="transformers"), **options)

    means, whole = of(balance_loss=0.5, budget=64)
    assert 2.0 < means["balance_loss"] < 8.0
    for options in ({"budget": 20}, {"budget": 64, "activation_checkpointing": True}):
        again, parts = of(balance_loss=0.5, **options)
        assert again["balance_loss"] == pytest.approx(means["balance_loss"], rel=1e-5)
        for name, gradient in whole.items():
            assert (parts[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-7, name
    plain, without = of(budget=64)
    assert "balance_loss" not in plain
    assert plain["loss"] == means["loss"]
    router = "model.layers.0.mlp.gate.weight"
    assert (without[router] - whole[router]).norm() > 0.05 * whole[router].norm()


def test_routers_learn_to_use_all_experts(tmp_path: Path):
    place = save("qwen3_moe", tmp_path / "model", num_experts=8)
    entropies: list[float] = []
    for weight in (0.0, 2.0):
        model = load_model(place, implementation="transformers")
        trainer = Trainer(model, OptimSection(lr=3e-3, warmup_fraction=0.0), 64, 30, balance_loss=weight)
        entropies.append([trainer.step(samples(), cross_entropy) for _ in range(30)][-1].means["expert_entropy"])
    assert entropies[1] > entropies[0] + 0.01


def test_families_without_such_a_loss_are_refused(tmp_path: Path):
    for family, why in (
        ("deepseek_v3", "transformers has no such loss"),
        ("mistral", "which has no experts"),
        ("phimoe", "largest of their scores"),
    ):
        model = load_model(save(family, tmp_path / family), implementation="transformers")
        with pytest.raises(UserError, match=why):
            Trainer(model, OptimSection(), 64, 1, balance_loss=0.1)
