"""One decoder for training and decoding, Hugging Face checkpoints in and out, and adapters (LoRA)."""

from pekoe.model.attention import PackedAttention
from pekoe.model.decoder import Decoder
from pekoe.model.family_files import file_stream
from pekoe.model.hf import (
    check_model,
    file_weights,
    load_model,
    model_on_meta,
    read_spec,
    save_adapter,
    save_model,
)
from pekoe.model.lora import LoRA
from pekoe.model.peft import is_adapter
from pekoe.model.protocol import Attention, LanguageModel, Scores

__all__ = [
    "Attention",
    "Decoder",
    "LanguageModel",
    "LoRA",
    "PackedAttention",
    "Scores",
    "check_model",
    "file_stream",
    "file_weights",
    "is_adapter",
    "load_model",
    "model_on_meta",
    "read_spec",
    "save_adapter",
    "save_model",
]
