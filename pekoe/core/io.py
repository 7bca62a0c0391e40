"""Files of a model directory, and fsync."""

from __future__ import annotations

import os
from pathlib import Path

# In a Hugging Face model directory, beside config.json and the weights.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def fsync(path: Path) -> None:
    """Write a file, or the names in a directory, through to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
