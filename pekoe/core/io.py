"""Files of a model directory, checksums of files, and fsync."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from pekoe.core.errors import UserError

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


SUMS = "SHA256SUMS"  # the name of a file of checksums, in the format of sha256sum


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the checksums of files in `folder`, by name."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    (folder / SUMS).write_text(text, encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """What `write_sums` wrote. UserError where it cannot be read."""
    try:
        lines = (folder / SUMS).read_bytes().decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise UserError(f"{folder / SUMS}: {error.strerror}") from None
    pairs = [line.split("  ", 1) for line in lines]
    if not pairs or not all(len(pair) == 2 and ".." not in pair[1] and pair[1][:1] != "/" for pair in pairs):
        raise UserError(f"{folder / SUMS}: expected lines of a checksum and a name, got something else")
    return {name: digest for digest, name in pairs}


def check_sums(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> None:
    """UserError, with the file's name, where a file in `folder` is missing or not the one that was written."""
    for name in names:
        try:
            digest = sha256(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name}: {error.strerror}") from None
        if digest != sums[name]:
            raise UserError(f"{folder / name}: is not as it was written: its checksum is not that of {SUMS}")
