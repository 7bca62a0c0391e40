"""Rows of JSON in users' files. Every error names the place, what was expected and what was found."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pekoe.core.errors import UserError, nearest
from pekoe.data.tables import HUB, read_dataset, read_parquet

T = TypeVar("T")
Messages = tuple[dict[str, str], ...]
Skipped = tuple[int, str]  # the row's line from 1 (in a `.json` array: its item), and the reason

# Two roles beside those of chat templates, each only in a conversation of one message.
PLAIN = "prompt"  # a question as bare text: a user turn where the model has a chat template, used as it is elsewhere
RAW = "raw"  # text that already carries a chat's markers: used as it is with every model
CHAT_ROLES = ("system", "user", "assistant", "tool")

_KINDS: dict[Any, str] = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


class Malformed(ValueError):
    """A row that cannot be used. `parse_rows` adds the file and the line, then raises or skips."""


def parse_rows(
    path: str | Path, parse: Callable[[Any, int], T], skip_malformed: bool
) -> tuple[tuple[T, ...], tuple[Skipped, ...]]:
    """Read a source and `parse(value, number)` every row of it.

    `path`: a JSONL file (a row's number is its line), a `.json` file holding one array (or an object whose `examples`
    is one), a `.parquet` file, or a Hugging Face data set `hf:OWNER/NAME[/CONFIG][:SPLIT]`.

    Raises UserError at the first row for which `parse` raises Malformed, unless `skip_malformed`; for a source that
    cannot be read, and for one without a single usable row.
    """
    values = _open(path)
    is_json = _unit(path) == ":"  # not parsed yet
    rows: list[T] = []
    skipped: list[Skipped] = []
    for number, value in enumerate(values, 1):
        if is_json and not value.strip():
            continue
        try:
            rows.append(parse(_loads(value) if is_json else value, number))
        except Malformed as error:
            if not skip_malformed:
                raise UserError(f"{place_of(path, number)}: {error}") from None
            skipped.append((number, str(error)))
    if not rows:
        got = f"{len(skipped)} malformed ones (row {skipped[0][0]}: {skipped[0][1]})" if skipped else "an empty file"
        raise UserError(f"{path}: expected at least one row, got {got}")
    return tuple(rows), tuple(skipped)


def place_of(source: str | Path, number: int) -> str:
    """Where a row is, for messages: `problems.jsonl:3`, `problems.parquet, row 3`."""
    return f"{source}{_unit(source)}{number}"


def _unit(source: str | Path) -> str:
    """What stands between a source's name and a row's number (":": rows are lines of JSON)."""
    if str(source).startswith(HUB):
        return ", row "
    return {".parquet": ", row ", ".json": ", item "}.get(Path(source).suffix, ":")


def _open(source: str | Path) -> Iterable[Any]:
    """The rows of a source: lines of JSON, or their values."""
    if str(source).startswith(HUB):
        return read_dataset(str(source))
    path = Path(source)
    if path.suffix == ".parquet":
        if not path.exists():
            raise missing(path, "a Parquet file")
        return read_parquet(path)
    text = _read_text(path)
    if path.suffix != ".json":
        return text.split("\n")  # JSON strings may hold U+2028 and others that `splitlines` cuts at
    try:
        value = _loads(text)
        value = value["examples"] if isinstance(value, dict) and "examples" in value else value
        return expect(value, list, "the file")
    except Malformed as error:
        raise UserError(f"{path}: {error} (a file of one object a line is named .jsonl)") from None


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSONL, whole or not at all: under a temporary name beside `path`, which is then renamed."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def missing(path: Path, what: str) -> UserError:
    """A UserError for a path that does not exist, naming the nearest sibling of the same kind."""
    siblings = [p.name for p in path.parent.iterdir() if p.suffix == path.suffix] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings)
    return UserError(f"{path}: expected {what}, got no such file or directory.{hint if len(hint) < 200 else ''}")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise missing(path, "a JSONL file") from None
    except OSError as error:
        raise UserError(f"{path}: expected a JSONL file, got: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise UserError(f"{path}:{line}: expected UTF-8 text, got {got} (Parquet, or a compressed file?)") from None


def _loads(text: str) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise Malformed("expected Unicode text, got half of a surrogate pair (\\ud800 to \\udfff)") from None
    except (ValueError, RecursionError) as error:
        raise Malformed(f"expected JSON, got {str(error) or 'nothing that parses'}") from None


def kind_of(value: Any) -> str:
    """A JSON value's type in the words of error messages."""
    return "an empty array" if value == [] else _KINDS.get(type(value), f"the number {value}")


def expect(value: Any, kind: type[T], what: str) -> T:
    """`value`, which must be of `kind`, and not empty if it is text or an array."""
    if not isinstance(value, kind):
        raise Malformed(f"{what}: expected {_KINDS[kind]}, got {kind_of(value)}")
    if (isinstance(value, str) and not value.strip()) or value == []:
        raise Malformed(f"{what}: expected {_KINDS[kind]} with something in it, got an empty one")
    return value


def text_of(row: dict[str, Any], key: str) -> str:
    """`row[key]`, which must be a string that is not blank."""
    return expect(row.get(key), str, repr(key))


def closed(row: dict[str, Any], valid: set[str]) -> None:
    """Refuse unknown keys: a misspelt key would otherwise be dropped silently."""
    for key in row:
        if key not in valid:
            raise Malformed(f"unknown key {key!r}.{nearest(key, valid)}")


def one_of(row: dict[str, Any], first: str, second: str) -> str:
    """The one of two keys that the row has. It must have exactly one."""
    if (first in row) == (second in row):
        raise Malformed(f"expected one of {first!r} and {second!r}, got {'both' if first in row else 'neither'}")
    return first if first in row else second


def answer_text(value: Any) -> str:
    """A reference answer as text: strings stripped, whole floats without their `.0`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value)) if value == int(value) else repr(value)
    return expect(value, str, "answer").strip()


def prompt_of(row: dict[str, Any]) -> Messages:
    """The messages of a row, which must have exactly one of `prompt` (text, or messages) and `messages`."""
    value = row[one_of(row, "prompt", "messages")]
    return ({"role": PLAIN, "content": text_of(row, "prompt")},) if isinstance(value, str) else messages_of(value)


def messages_of(value: Any) -> Messages:
    """Chat messages `[{"role", "content"}, ...]`."""
    return tuple(_message(item, number, len(value)) for number, item in enumerate(expect(value, list, "'messages'"), 1))


def _message(item: Any, number: int, of: int) -> dict[str, str]:
    message = expect(item, dict, f"message {number}")
    role, content = message.get("role"), message.get("content")
    if role not in (*CHAT_ROLES, PLAIN, RAW):
        raise Malformed(f"message {number} 'role': got {role!r}.{nearest(str(role), CHAT_ROLES)}")
    if role in (PLAIN, RAW) and of > 1:
        raise Malformed(f"message {number} 'role': expected {role!r} only in a conversation of one message")
    if not isinstance(content, str):
        raise Malformed(f"message {number} 'content': expected a string, got {kind_of(content)}")
    return {"role": str(role), "content": content}


def question(text: str) -> Messages:
    """One user turn."""
    return ({"role": "user", "content": text},)
