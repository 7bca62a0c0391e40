"""One decoder for training and decoding, and Hugging Face checkpoints in and out."""

from pekoe.model.attention import Attention, PackedAttention
from pekoe.model.decoder import Decoder
from pekoe.model.hf import load_model, read_spec, save_model

__all__ = ["Attention", "Decoder", "PackedAttention", "load_model", "read_spec", "save_model"]
