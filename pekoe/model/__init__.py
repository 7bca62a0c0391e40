"""One decoder for training and decoding, Hugging Face checkpoints in and out, and adapters (LoRA)."""

from pekoe.model.attention import Attention, PackedAttention
from pekoe.model.decoder import Decoder
from pekoe.model.hf import load_model, read_spec, save_adapter, save_model
from pekoe.model.lora import LoRA
from pekoe.model.peft import is_adapter

__all__ = [
    "Attention",
    "Decoder",
    "LoRA",
    "PackedAttention",
    "is_adapter",
    "load_model",
    "read_spec",
    "save_adapter",
    "save_model",
]
