"""The section of recipes on adapters of low rank (LoRA). Defaults and their sources: docs/how-to/lora.md."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pekoe.config.base import ConfigSection

LORA_RATE = 10.0  # times the learning rate of full training


class LoRASection(ConfigSection):
    rank: int = Field(default=32, ge=1)
    """Rank of the factors (PEFT's r); at most the smaller dimension of each layer."""
    alpha: float = Field(default=32.0, gt=0)
    """What an adapter adds is multiplied by alpha / rank (PEFT's lora_alpha)."""
    targets: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """Names of linear layers, or their ends (PEFT's target_modules): ["q_proj", "v_proj"]. Absent: every linear layer
    but the head."""
