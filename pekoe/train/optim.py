"""AdamW with its parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from pekoe.config.recipes import OptimSection


def make_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, none on biases and norms (the vectors)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    for parameter in parameters:
        # AdamW's initial state, before the first step: a checkpoint loads into existing state alone, silently.
        adamw.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adamw


def learning_rate(optim: OptimSection, update: int, total: int) -> float:
    """The rate at optimizer step `update` (from 0) of `total`: linear warm-up, then constant or cosine."""
    warmup = math.ceil(optim.warmup_fraction * total)
    if update < warmup:
        return optim.lr * (update + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    progress = (update - warmup) / max(1, total - warmup)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
