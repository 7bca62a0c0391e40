"""Rows of Parquet files, of saved `datasets` and of the hub. Their libraries are optional, imported on first use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pekoe.core.errors import RunError, UserError, nearest

HUB = "hf:"  # prefix of a data set's name: hf:OWNER/NAME[/CONFIG][:SPLIT], split "train" if absent
BATCH_ROWS = 256
MAX_RATIO, FREE_BYTES = 100, 64 << 20  # a file may unpack to so many times its size, and to so much in any case


class Unpacked:
    """Counts what a file unpacks to. UserError beyond the limit: a file of a megabyte must not fill the memory."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._bytes = path, path.stat().st_size, 0

    def add(self, number: int) -> None:
        self._bytes += number
        if self._bytes > max(FREE_BYTES, MAX_RATIO * self._size):
            raise UserError(
                f"{self._path}: expected a file that unpacks to at most {MAX_RATIO} times its size (or "
                f"{FREE_BYTES >> 20} MiB), got {self._size:,} bytes that unpack to more"
            )


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
    unpacked = Unpacked(path)
    try:
        with parquet.ParquetFile(path) as file:
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            # Before anything is unpacked. Not of each column: to ask for a damaged one's metadata ends the process.
            unpacked.add(sum(group.total_byte_size for group in groups))
            unpacked = Unpacked(path)
            for batch in file.iter_batches(BATCH_ROWS):
                unpacked.add(batch.nbytes)
                yield from _values(batch)
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: expected a Parquet file, got: {_first_line(error)}") from None


def read_saved(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a directory of `Dataset.save_to_disk`; of several splits, those of `train`."""
    if (path / "dataset_dict.json").is_file():
        splits = [entry.name for entry in sorted(path.iterdir()) if (entry / "state.json").is_file()]
        if "train" not in splits and len(splits) != 1:
            raise UserError(f"{path}: expected a split 'train', got {splits}; name one: {path}/SPLIT")
        path = path / (splits[0] if len(splits) == 1 else "train")
    if not (path / "state.json").is_file():
        files = sorted(str(file) for pattern in ("*.parquet", "*.json*") for file in path.rglob(pattern))
        hint = nearest(f"{path}/train", files[:20])
        raise UserError(f"{path}: expected a file, or a directory of datasets' save_to_disk, got another one.{hint}")
    yield from _loaded(str(path), lambda datasets: datasets.load_from_disk(str(path)))


def read_hub(source: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of `hf:OWNER/NAME[/CONFIG][:SPLIT]`, from the hub or from its cache.

    Raises UserError for a name, config or split that is not there, and where `datasets` is absent; RunError where
    the hub cannot be reached.
    """
    path, _, split = source.removeprefix(HUB).partition(":")
    owner, name, config, *more = [*path.split("/"), "", ""]
    if not owner or not name or more not in ([], [""], ["", ""]):
        raise UserError(f"{source}: expected hf:OWNER/NAME[/CONFIG][:SPLIT]")
    yield from _loaded(
        source, lambda datasets: datasets.load_dataset(f"{owner}/{name}", config or None, split=split or "train")
    )


def _loaded(source: str, load: Callable[[Any], Any]) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise needs("datasets", source) from None
    try:
        tables: Iterable[Any] = load(datasets).with_format("arrow").iter(BATCH_ROWS)
        for table in tables:
            yield from _values(table)
    except Exception as error:  # the library passes on any exception of its transports and builders
        kind = RunError if isinstance(error, ConnectionError | TimeoutError) else UserError
        raise kind(f"{source}: cannot be loaded: {type(error).__name__}: {_first_line(error)}") from None


def _values(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a table of Arrow's (or a batch of one), as Python has them; a float32 0.1 is 0.1."""
    short = {field.name: field.type for field in table.schema if "float" in str(field.type)}  # float64 is "double"
    for row in table.to_pylist():
        yield row | {name: _shortest(kind, row[name]) for name, kind in short.items()} if short else row


def _shortest(kind: Any, value: Any) -> Any:
    """A value of this type of Arrow's, its floats with the fewest digits that name them in their own precision."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {field.name: _shortest(field.type, value[field.name]) for field in kind}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_shortest(kind.value_type, item) for item in value]
    if isinstance(value, float) and str(kind) in ("float", "halffloat"):
        return float(str(np.dtype("f4" if str(kind) == "float" else "f2").type(value)))
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
