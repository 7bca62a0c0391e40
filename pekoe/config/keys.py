"""Every key of the recipes, read from their sections, and what is said of one that is not a key."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import AfterValidator, ValidationError
from pydantic.fields import FieldInfo

from pekoe.config.base import ConfigSection, OneOrOwn, cut, flatten
from pekoe.config.names import NAMES, without_key
from pekoe.core.errors import UserError, nearest

MAX_MISTAKES, MAX_LINE_CHARS = 20, 1_500  # of one message

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_WORDS: dict[Any, str] = {Any: "any value", bool: "true or false", int: "whole number", float: "number", str: "text"}


@dataclass(frozen=True, slots=True)
class Key:
    """Example: Key("optim.lr", "number, above 0", "2e-05", "Learning rate, …"). Items of an array of tables have `[]`
    in their names; `default` is "required", "absent", or TOML."""

    name: str
    type: str
    default: str
    meaning: str

    @property
    def form(self) -> str:
        """What it may be, and what it is where a recipe does not say."""
        return f"{self.type}; {self.default if self.default in ('required', 'absent') else f'default {self.default}'}"


def keys_of(section: type[ConfigSection], prefix: str = "", defaults: Any = None) -> Iterator[Key]:
    """The keys of a recipe or of a section of one, in the order of the code. `defaults`: an instance that has them."""
    for name, field in section.model_fields.items():
        inner, required = section_of(field.annotation), field.is_required() and defaults is None
        value = field.get_default(call_default_factory=True) if defaults is None else getattr(defaults, name)
        if inner is None or not (required or isinstance(value, ConfigSection)):
            default = "required" if required else _toml(value)
            yield Key(
                prefix + name, _type(field.annotation, field), default, " ".join((field.description or "").split())
            )
        if inner is not None:
            below = f"{prefix}{name}{'[]' if isinstance(value, tuple) else ''}."
            yield from keys_of(inner, below, value if isinstance(value, ConfigSection) else None)


def describe(commands: Mapping[str, type[ConfigSection]], section: str = "") -> str:
    """The keys of a section, or one key, as text: of the first command that has it, and those of other commands that
    differ, under a line `of pekoe COMMAND:`. Without a section, all keys of the first. UserError for none."""
    section = section.replace("[]", "")
    shown: list[Key] = []
    lines: list[str] = []
    for command, kind in commands.items():
        keys = [
            key for key in keys_of(kind) if not section or f"{key.name}.".replace("[]", "").startswith(f"{section}.")
        ]
        new = [key for key in keys if key not in shown]
        lines += [f"of pekoe {command}:"] * bool(shown and new)
        lines += [f"{key.name}: {key.form}\n{textwrap.indent(textwrap.fill(key.meaning, 96), '    ')}" for key in new]
        shown += new
        if not section:
            break
    if not lines:
        kind, path = next(iter(commands.values())), section.split(".")
        raise UserError("\n".join(f"keys: unknown key {name!r}.{hint}" for name, hint in unknown(kind, path)))
    return "\n".join(lines)


def section_of(annotation: Any) -> type[ConfigSection] | None:
    """The section that a key holds, alone, optional or in an array; None where it holds none."""
    options = (annotation, *get_args(annotation))
    return next((a for a in options if isinstance(a, type) and issubclass(a, ConfigSection)), None)


def _type(annotation: Any, field: Any = None) -> str:
    """In words: "whole number, at least 1"."""
    bounds = "".join(
        f", {words} {limit:,}"
        for part in (getattr(field, "metadata", None) or ())
        for attribute, words in _BOUNDS.items()
        if (limit := getattr(part, attribute, None)) is not None
    )
    for part in getattr(field, "metadata", None) or ():
        if isinstance(part, AfterValidator) and isinstance(part.func, OneOrOwn):
            return part.func.expected.replace("'", '"')
    origin, args = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _type(args[0], FieldInfo.from_annotation(annotation))
    if origin is Literal:
        *names, last = map(_toml, args)
        return f"{', '.join(names)} or {last}" if names else last
    if origin is dict:
        return f"table of {_type(args[1])}"
    if origin is list or (origin is tuple and args[-1] is ...):
        return "array of tables" if section_of(args[0]) else f"array of {_type(args[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_type, args))}]"
    if args:  # a union
        return " or ".join(_type(arg) for arg in args if arg is not type(None)) + bounds
    return _WORDS.get(annotation, "section") + bounds


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return "absent" if value is None else "{}" if value == {} else tomli_w.dumps({"x": value})[len("x = ") :].strip()


def show_config(config: ConfigSection) -> str:
    """The resolved config as TOML that reads back to an equal object, with a comment for each key that is absent."""
    absent = "\x7fabsent\x7f"

    def filled(tree: dict[str, Any]) -> dict[str, Any]:
        plain = {name: value for name, value in tree.items() if not isinstance(value, dict)}
        tables = {name: filled(value) for name, value in tree.items() if isinstance(value, dict)}
        return {name: absent if value is None else _without_none(value) for name, value in plain.items()} | tables

    text = tomli_w.dumps(filled(config.model_dump()))
    return re.sub(r'^(.+) = "\\u007fabsent\\u007f"$', r"# \1 is absent", text, flags=re.MULTILINE)


def _without_none(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return {k: _without_none(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def explain(error: ValidationError, kind: type[ConfigSection], where: str) -> str:
    """A line for each mistake, of the first MAX_MISTAKES: where, expected, got, and the nearest valid name."""
    lines: list[str] = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"] if part != "[key]"]
        name, got = ".".join(path), problem.get("input")
        match problem["type"]:
            case "extra_forbidden":
                lines += [f"{where}: unknown key {key!r}.{hint}" for key, hint in unknown(kind, path, got)]
            case "missing":
                lines.append(f"{where}: missing key {name!r}.")
            case "value_error":
                lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
            case _:
                expected = problem["msg"].removeprefix("Input should be ")
                shown = type(got).__name__ + " (a section)" if isinstance(got, dict) else cut(got)
                lines.append(f"{where}: {name}: expected {expected}, got {shown}.")
    more = [f"{where}: {len(lines) - MAX_MISTAKES} more."] if len(lines) > MAX_MISTAKES else []
    return "\n".join([*(line[:MAX_LINE_CHARS] for line in lines[:MAX_MISTAKES]), *more])


def unknown(kind: type[ConfigSection], path: list[str], got: Any = None) -> Iterator[tuple[str, str]]:
    """Of a key that is none, and of each key in it where it holds others: its name, and what may be meant.

    In this order: a sibling that is spelt nearly so; what TRL or verl call so (`names`); a key of this name in another
    section; what is done in its place; the nearest sibling.
    """
    siblings = _siblings(kind, path[:-1])
    near = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.75)
    leaves = list(flatten(got, ".".join(path) + ".")) if isinstance(got, dict) and got else []
    if near:  # verl's `trainer` is no `train` that is misspelt
        leaves = [name for name in leaves if any(row.shares(name) > 1 for row in NAMES)]
    for name in leaves or [".".join(path)]:
        known = [] if near and not leaves else _elsewhere(kind, name)
        instead = "" if near else without_key(name)
        yield name, f" Did you mean {' or '.join(known)}?" if known else instead or nearest(path[-1], siblings)


def _elsewhere(kind: type[ConfigSection], name: str) -> list[str]:
    """Our key, of this kind of recipe, for what TRL or verl call `name`, or those of this name in other sections."""
    name = name.replace("-", "_").lower()
    section, _, last = name.rpartition(".")
    valid = [key.name for key in keys_of(kind)]
    rows = [row for row in NAMES if row.ours in valid and row.shares(name)]
    if rows:
        row = max(rows, key=lambda row: (row.shares(name), row.ours.rpartition(".")[0] == section))
        return [repr(row.ours) + (f" ({row.note})" if row.note else "")]
    return [repr(key) for key in valid if key.rpartition(".")[2] == last and "[]" not in key][:3]


def _siblings(kind: type[ConfigSection], path: list[str]) -> list[str]:
    """The valid keys of the section at `path`."""
    section: type[ConfigSection] | None = kind
    for part in path:
        if part.isdigit():  # an index into an array of sections
            continue
        field = section.model_fields.get(part) if section else None
        section = section_of(field.annotation) if field else None
    return list(section.model_fields) if section else []
