"""Rows of Parquet files and of Hugging Face datasets. Their libraries are optional, and imported on first use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pekoe.core.errors import RunError, UserError

HUB = "hf:"  # prefix of a data set's name: hf:OWNER/NAME[/CONFIG][:SPLIT], split "train" if absent


def needs(library: str, what: str) -> UserError:
    """The error for an optional library that is absent."""
    return UserError(f"{what}: expected the library {library!r}, which is not installed: pip install 'pekoe[data]'")


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a Parquet file's rows. Raises UserError for another kind of file, and where pyarrow is absent."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise needs("pyarrow", str(path)) from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: expected a Parquet file, got: {_first_line(error)}") from None


def read_dataset(source: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of `hf:OWNER/NAME[/CONFIG][:SPLIT]`, from the hub or from its cache.

    Raises UserError for a name, config or split that is not there, and where `datasets` is absent; RunError where
    the hub cannot be reached.
    """
    path, _, split = source.removeprefix(HUB).partition(":")
    owner, name, config, *more = [*path.split("/"), "", ""]
    if not owner or not name or more not in ([], [""], ["", ""]):
        raise UserError(f"{source}: expected hf:OWNER/NAME[/CONFIG][:SPLIT]")
    try:
        from datasets import load_dataset
    except ImportError:
        raise needs("datasets", source) from None
    try:
        table: Any = load_dataset(f"{owner}/{name}", config or None, split=split or "train")
    except Exception as error:  # the library passes on any exception of its transports and builders
        kind = RunError if isinstance(error, ConnectionError | TimeoutError) else UserError
        raise kind(f"{source}: cannot be loaded: {type(error).__name__}: {_first_line(error)}") from None
    yield from table


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
