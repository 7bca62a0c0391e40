"""Rows of users' data. Every error names the place, what was expected and what was found."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from pekoe.core.errors import UserError, nearest
from pekoe.data.sources import MAX_ROW_CHARS, Place, open_source

T = TypeVar("T")
Messages = tuple[dict[str, str], ...]
Skipped = tuple[int, str]  # the row's line from 1 (in an array: its item), and the reason

# Two roles beside those of chat templates, each only in a conversation of one message.
PLAIN = "prompt"  # a question as bare text: a user turn where the model has a chat template, used as it is elsewhere
RAW = "raw"  # text that already carries a chat's markers: used as it is with every model
CHAT_ROLES = ("system", "user", "assistant", "tool")
MAX_DEPTH = 100  # of a row's values
MAX_CHARS = 4_000_000  # of a prompt, and of what becomes tokens: a million of them
MAX_NAMED = 10  # rows in one message
MAX_REASON_CHARS = 1000

# Columns that a column of this name takes the place of.
_SAME: dict[Any, tuple[str, ...]] = {"prompt": ("messages",), "answer": ("answers",)}
_KINDS: dict[Any, str] = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


class Malformed(ValueError):
    """A row that cannot be used. `parse_rows` adds the file and the line, then raises or skips."""


class Row(dict[str, Any]):
    """A row without its columns that are null. It knows which of its columns were read.

    Raises Malformed where a column is read that JSON has no form for (`_columns`).
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__((key, value) for key, value in values.items() if value is not None)
        self.all = values
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return _readable(key, super().__getitem__(key))

    def get(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        return _readable(key, super().get(key, default))

    def find(self, names: Iterable[str]) -> str | None:
        """The column that has the first of these names (in lower case), as the row spells it."""
        spelt = {key.lower(): key for key in reversed(self)}
        return next((spelt[name] for name in names if name in spelt), None)

    @property
    def shown(self) -> str:
        """Its columns, for messages."""
        return ", ".join(repr(key) + " (null)" * (value is None) for key, value in self.all.items()) or "none"

    @property
    def unread(self) -> set[str]:
        return {key for key in self if key in self.all} - self.used

    def take(self, columns: Mapping[Any, str]) -> None:
        """Give columns the names of their meanings: {"answer": "reward_model.ground_truth"}. Dots lead into objects.

        Raises Malformed for a column that the row lacks.
        """
        for meaning, column in columns.items():
            value: Any = self.all
            path = [column] if column in self.all else column.split(".")
            for key in path:
                if not isinstance(value, Mapping) or key not in value:
                    hint = nearest(column, self.all)
                    raise Malformed(f"expected the column {column!r} (columns.{meaning}), got {self.shown}.{hint}")
                value = _readable(key, value[key])
            self.used.add(path[0])
            names = (meaning, *_SAME.get(meaning, ()))
            for name in [key for key in self if key.lower() in names]:  # as `find` would find them
                self.pop(name)
            if value is not None:
                self[meaning] = value


def parse_rows(
    path: str | Path, parse: Callable[[Any, Place], T], skip_malformed: bool
) -> tuple[tuple[T, ...], tuple[Skipped, ...]]:
    """Read a source (`sources.open_source`) and `parse(value, place)` every row of it.

    Raises UserError that names the first rows for which `parse` raises Malformed, unless `skip_malformed`; for a source
    that cannot be read, and for one without a single usable row.
    """
    source = open_source(str(path))
    parsed: list[T] = []
    bad: list[tuple[Place, str]] = []
    for number, value in source.rows:
        place = Place(str(path), source.unit, number)
        try:
            value = _columns(loads(value) if source.is_json else value)
            parsed.append(parse(value, place))
        except Malformed as error:
            reason = str(error)
            if isinstance(value, dict) and isinstance(uid := value.get("uid"), str | int):
                reason += f" (uid {uid!r})"
            bad.append((place, cut(reason)))
    if bad and not skip_malformed:
        raise UserError(named([f"{place}: {reason}" for place, reason in bad], "rows that cannot be used"))
    if not parsed:
        got = f"{len(bad):,} malformed ones (row {bad[0][0].number}: {bad[0][1]})" if bad else "an empty file"
        raise UserError(f"{path}: expected at least one row, got {got}")
    return tuple(parsed), tuple((place.number, reason) for place, reason in bad)


def cut(text: str) -> str:
    """Text from users' data, as long as a message may quote it."""
    return text if len(text) <= MAX_REASON_CHARS else text[:MAX_REASON_CHARS] + "…"


def named(lines: list[str], what: str) -> str:
    """A message that names the first of several."""
    more = [f"and {len(lines) - MAX_NAMED:,} more; {len(lines):,} {what}"] * (len(lines) > MAX_NAMED)
    return "\n".join([*map(cut, lines[:MAX_NAMED]), *more])


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


def loads(text: str, what: str = "") -> Any:
    """JSON of a row, or of a column (`what` names it, with a colon and a space). Raises Malformed."""
    if len(text) > MAX_ROW_CHARS:
        raise Malformed(f"{what}expected at most {MAX_ROW_CHARS:,} characters, got {len(text):,}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        text = text.strip()
        got = f"{text[:60]!r}{'…' * (len(text) > 60)} ({error.msg} at character {error.pos + 1})"
    except RecursionError:
        got = "values nested too deeply"
    except ValueError as error:  # a number of more than 4,300 digits
        got = str(error)
    raise Malformed(f"{what}expected JSON, got {got}")


def is_half(character: str) -> bool:
    """Whether it is half of a surrogate pair, which no encoding has."""
    return "\ud800" <= character <= "\udfff"


def _columns(value: Any) -> Any:
    """A row as JSON has it. In place of a column that JSON has no form for stands the error, for whoever reads it."""
    if not isinstance(value, dict) or None in value:
        return plain(value)
    row: dict[str, Any] = {}
    for key, item in value.items():
        try:
            row[plain(key)] = plain(item, 1)
        except Malformed as error:
            row[key] = error
    return row


def _readable(key: str, value: Any) -> Any:
    if isinstance(value, Malformed):
        raise Malformed(f"{key!r}: {value}")
    return value


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it: dates as ISO text, decimals as written, bytes as the UTF-8 text that they are.

    Raises Malformed for what JSON has not, and beyond MAX_DEPTH.
    """
    if isinstance(value, str):
        if not value.isascii() and any(map(is_half, value)):
            raise Malformed("expected Unicode text, got half of a surrogate pair (\\ud800 to \\udfff)")
        return value
    if value is None or isinstance(value, int | float):
        return value
    if depth > MAX_DEPTH:
        raise Malformed(f"expected values nested at most {MAX_DEPTH} deep, got more")
    if isinstance(value, dict):
        if None in value:  # of a CSV
            raise Malformed(f"expected at most {len(value) - 1} cells, as in the first line, got more")
        return {plain(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal) and abs(value.adjusted()) < 1000:
        text = f"{value:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise Malformed(f"expected text, got {len(value):,} bytes that are not UTF-8") from None
    raise Malformed(f"expected text, numbers, arrays and objects, got a {type(value).__name__}")


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


def answer_text(value: Any) -> str:
    """A reference answer as text: strings stripped, whole floats without their `.0`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, dict) and {"role", "content"} <= value.keys():
        raise Malformed("answer: expected a string, got a message, as rows of pekoe sft have (pekoe data FILE --sft)")
    return expect(value, str, "answer").strip()


def prompt_of(value: Any) -> Messages:
    """The messages of a prompt: chat messages, or plain text."""
    return (
        messages_of(value) if isinstance(value, list) else ({"role": PLAIN, "content": expect(value, str, "'prompt'")},)
    )


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
