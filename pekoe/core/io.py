"""What several rooms know of files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import zstandard

# Of a model directory in Hugging Face format, beside config.json and the weights.
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
    """Bring a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_compressed_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that zstd has compressed."""
    text = zstandard.ZstdDecompressor().decompress(file.read_bytes())
    return [json.loads(line) for line in text.splitlines()]
