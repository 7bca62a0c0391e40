"""Where rows come from: JSON and CSV, also compressed, Parquet, what `datasets` has saved, and the Hugging Face hub."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from pekoe.core.errors import OF_HUB, UserError, hub_hint, nearest
from pekoe.data.tables import HUB, Unpacked, read_hub, read_parquet, read_saved

MAX_ROW_CHARS = 64 << 20  # of a line of JSON, or of a cell; the tests of a program may take megabytes
WRAPPERS = ("examples", "data", "rows", "train")  # under which a JSON object may hold its rows
_BROKEN = (OSError, EOFError, zstandard.ZstdError, lzma.LZMAError, zlib.error)


class Place(NamedTuple):
    """Where a row is. As text, for messages: `problems.jsonl:3`, `problems.parquet, row 3`."""

    source: str
    unit: str  # what stands between the source's name and the row's number
    number: int  # of the line, the item or the row, from 1

    def __str__(self) -> str:
        return f"{self.source}{self.unit}{self.number}"


class Source(NamedTuple):
    """The rows of a source, by their numbers."""

    unit: str  # see `Place`
    rows: Iterable[tuple[int, Any]]
    is_json: bool = False  # rows are JSON, not parsed yet


def open_source(name: str) -> Source:
    """The rows of a file, of a directory that `datasets` has saved, or of `hf:OWNER/NAME[/CONFIG][:SPLIT]`.

    What a file's content is decides over its suffix: a `.jsonl` may hold one array, a `.json` an object a line.
    Raises UserError for what is missing, cannot be read, or unpacks to far more than it takes on disk.
    """
    if name.startswith(HUB):
        return Source(", row ", enumerate(read_hub(name), 1))
    path = Path(name)
    try:
        if path.is_dir():
            return Source(", row ", enumerate(read_saved(path), 1))
        if not path.exists():
            raise missing(path, "a file of problems", "If it is on the hub: 'hf:{name}' reads it")
        if path.suffix == ".parquet":
            return Source(", row ", enumerate(read_parquet(path), 1))
        text = _decoded(path, _content(path))
    except _BROKEN as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"{path}: expected a file that can be read, got: {reason}") from None
    kind = Path(path.stem).suffix if path.suffix in _PARTS else path.suffix
    if kind in (".csv", ".tsv"):
        return Source(":", _csv_rows(path, text))
    return _json_source(path, text, kind == ".json")


def missing(path: Path, what: str, hub: str = OF_HUB) -> UserError:
    """A UserError for a path that does not exist. It names the nearest sibling, and what to do where the path may be a
    name on the hub (`hub_hint`)."""
    try:
        siblings = [p.name for p in path.parent.iterdir()]
    except (OSError, ValueError):  # not there; no path at all
        siblings = []
    hint = nearest(path.name, siblings)
    hint = (hint if len(hint) < 200 else "") + hub_hint(str(path), hub)
    return UserError(f"{path}: expected {what}, got no such file or directory.{hint}")


def _content(path: Path) -> bytes:
    """A file's bytes, unpacked where its suffix says that it is compressed."""
    if path.suffix not in _PARTS:
        return path.read_bytes()
    unpacked, parts = Unpacked(path), list[bytes]()
    for part in _PARTS[path.suffix](path):
        unpacked.add(len(part))
        parts.append(part)
    return b"".join(parts)


def _zstd_parts(path: Path) -> Iterator[bytes]:
    """Frame by frame, since `zstandard.open` ends silently where a file is cut; so few bytes at a time that what they
    unpack to is bounded."""
    data, position = path.read_bytes(), 0
    while position < len(data):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if position >= len(data):
                raise EOFError("it ends in the middle of a frame")
            chunk = data[position : position + 1024]
            position += len(chunk)
            yield frame.decompress(chunk)
        position -= len(frame.unused_data)


def _parts(opener: Callable[..., Any], path: Path) -> Iterator[bytes]:
    with opener(path, "rb") as file:
        yield from iter(partial(file.read, 1 << 20), b"")


_PARTS: dict[str, Callable[[Path], Iterator[bytes]]] = {
    ".gz": partial(_parts, gzip.open),
    ".bz2": partial(_parts, bz2.open),
    ".xz": partial(_parts, lzma.open),
    ".zst": _zstd_parts,
}


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise UserError(
            f"{path}:{line}: expected UTF-8 text, got {got} (Parquet, or a compressed file? Then its name ends so: "
            f".parquet, {', '.join(_PARTS)})"
        ) from None


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Rows by the line on which each begins. The header's commonest of comma, semicolon and tab divides columns; an
    empty cell is absent."""
    csv.field_size_limit(MAX_ROW_CHARS)
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    try:
        if len(set(names := reader.fieldnames or [])) < len(names):
            raise UserError(f"{path}:1: expected columns of different names, got {names}")
        for row in reader:
            cells = {key: value for key, value in row.items() if value != ""}
            yield max(2, reader.line_num - sum(str(value).count("\n") for value in cells.values())), cells
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: expected CSV, got: {error}") from None


def _json_source(path: Path, text: str, is_one: bool) -> Source:
    """One array, an object that holds one (`is_one`: its name says so), or (most often) a value a line."""
    start = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        first = text[start:].partition("\n")[0].rstrip()
        if isinstance(error, json.JSONDecodeError) and first[:1] == "[" and first[-1:] != "]" and start < error.pos:
            raise UserError(f"{path}:{error.lineno}: expected a JSON array, got: {error.msg}") from None
        value, end = None, len(text)
    many_lines, rest = "\n" in text[start:end], text[end:].strip()
    if not rest and isinstance(value, dict) and (many_lines or is_one):
        lists = [value[key] for key in WRAPPERS if isinstance(value.get(key), list)]
        value = max(lists, key=bool, default=[value])  # the first with something in it
        return Source(", item ", enumerate(value, 1))
    if not rest and isinstance(value, list) and not (value and all(map(_is_turn, value))):
        return Source(", item ", enumerate(value, 1))
    if rest and many_lines:
        raise UserError(
            f"{path}: expected an array, or a JSON object a line, got several values over many lines: "
            f"jq -c . {path} writes them a line each"
        )
    # JSON strings may hold U+2028 and others that `splitlines` cuts at.
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line and not line.isspace())
    return Source(":", lines, is_json=True)


def _is_turn(value: Any) -> bool:
    """Whether an array's item is a turn of Open-Reasoner-Zero's: the array is one row then."""
    return isinstance(value, dict) and "from" in value
