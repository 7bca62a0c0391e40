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
from pekoe.model.protocol import Attention, LanguageModel, Routing, Scores
from pekoe.model.routing import Balance, OwnRouting, Replay, check_balance, check_routing

__all__ = [
    "Attention",
    "Balance",
    "Decoder",
    "LanguageModel",
    "LoRA",
    "OwnRouting",
    "PackedAttention",
    "Replay",
    "Routing",
    "Scores",
    "check_balance",
    "check_model",
    "check_routing",
    "file_stream",
    "file_weights",
    "is_adapter",
    "load_model",
    "model_on_meta",
    "read_spec",
    "save_adapter",
    "save_model",
]
