"""The sections of recipes on the model. Where defaults of adapters (LoRA) come from is in the docs, under LoRA."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pekoe.config.base import ConfigSection, FileName
from pekoe.config.data import TemplateSection
from pekoe.core.roofline import adapter_parameters
from pekoe.core.spec import ModelSpec

LORA_RATE = 10.0  # times the learning rate of full training


class LoRASection(ConfigSection):
    rank: int = Field(default=32, ge=1)
    """Rank of the factors (PEFT's r); at most the smaller dimension of each layer."""
    alpha: float = Field(default=32.0, gt=0)
    """What an adapter adds is multiplied by alpha / rank (PEFT's lora_alpha)."""
    targets: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """Names of linear layers, or their ends (PEFT's target_modules): ["q_proj", "v_proj"]. Absent: every linear layer
    but the head."""


class ModelSection(ConfigSection):
    path: FileName
    """A Hugging Face model directory (config.json, *.safetensors, tokenizer.json)."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where to train and sample; auto takes a GPU where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products. Weights and optimizer state are float32 always."""
    implementation: Literal["auto", "pekoe", "transformers"] = "auto"
    """What computes the model: our decoder (pekoe), which has the families qwen2, qwen3 and llama and is faster on
    them, or the modules of the library transformers (extra models), which have most others; auto: our decoder where it
    has the family."""
    template: TemplateSection = TemplateSection()


class TrainedModelSection(ModelSection):
    """The model that a recipe trains."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products. Trained weights and optimizer state are float32 always; with a section lora the
    frozen base has this dtype."""
    lora: LoRASection | None = None
    """Absent: all weights are trained. With a section, even an empty one: factors of low rank beside frozen layers;
    optim.lr is ten times its default then, unless the recipe names one."""

    def adapter_parameters(self, spec: ModelSpec) -> int:
        """Of the adapter that is trained; 0 without one."""
        return adapter_parameters(spec, self.lora.rank, self.lora.targets or ()) if self.lora else 0
