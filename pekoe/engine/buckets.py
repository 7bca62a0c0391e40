"""A model's parameters in buckets, as they are broadcast: sender and receivers cut the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pekoe.model import LanguageModel, file_stream
from pekoe.model.lora import is_factor

BUCKET_BYTES = 512 * 2**20

Tensors = Sequence[tuple[str, Tensor]]
"""Named as in a Hugging Face checkpoint, in the order in which they are broadcast."""


def buckets(
    model: LanguageModel, max_bytes: int = BUCKET_BYTES, dtype: torch.dtype | None = None, files: bool = False
) -> Iterator[list[tuple[str, Tensor]]]:
    """A model's parameters by name, in order, in lists of about `max_bytes`: what a receiver holds beside its weights.

    Each is converted to `dtype` when its list is made (None: not converted). The size of a sharded parameter is that of
    the whole. Tied embeddings come once. A model on the meta device gives names, shapes and dtypes. Of a model with an
    adapter, the adapter alone comes: receivers have its base. `files`: by their names in files, as servers take them.
    """
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, parameter in file_stream(model) if files else model.named_parameters():
        if model.lora is not None and not is_factor(name):
            continue
        tensor = parameter.detach() if dtype is None else parameter.detach().to(dtype).contiguous()
        more = tensor.numel() * tensor.element_size()
        if bucket and size + more > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += more
    yield bucket
