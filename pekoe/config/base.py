"""Sections of recipes: read from TOML and `section.key=value` overrides, with an explanation of each mistake."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from pekoe.core.errors import UserError, nearest


class ConfigSection(BaseModel):
    """Frozen and closed: an unknown key is an error, a wrong type is an error, nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping: `{"run": {"seed": 0}}` becomes `{"run.seed": 0}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def check_multiple(key: str, value: int, of: int, description: str) -> None:
    """Raise ValueError unless `value` is a multiple of `of`."""
    if value % of:
        near = max(of, round(value / of) * of)
        raise ValueError(f"{key}: expected a multiple of {description}, got {value}; nearest: {near}")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a recipe, not yet validated."""
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: expected a recipe (a TOML file), found none.{nearest(path.name, siblings)}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected TOML, got something else: {error}") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the key that `section.key=value` names, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r}: expected section.key=value")
    *sections, last = key.strip().split(".")
    node: Any = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        node[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        node[last] = text


def explain(error: ValidationError, kind: type[ConfigSection], where: str) -> str:
    """A line for each mistake: where, expected, got, and the nearest valid name."""
    lines: list[str] = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        name, got = ".".join(path), problem.get("input")
        match problem["type"]:
            case "extra_forbidden":
                lines.append(f"{where}: unknown key {name!r}.{nearest(path[-1], _keys(kind, path[:-1]))}")
            case "missing":
                lines.append(f"{where}: missing key {name!r}.")
            case "value_error":
                lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
            case _:
                expected = problem["msg"].removeprefix("Input should be ")
                shown = type(got).__name__ + " (a section)" if isinstance(got, dict) else repr(got)
                lines.append(f"{where}: {name}: expected {expected}, got {shown}.")
    return "\n".join(lines)


def _keys(kind: type[ConfigSection], path: list[str]) -> list[str]:
    """The valid keys of the section at `path`."""
    section: Any = kind
    for part in path:
        if part.isdigit():  # an index into an array of sections, whose item type `get_args` below has taken
            continue
        annotation = section.model_fields[part].annotation
        section = next((a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")), None)
        if section is None:
            return []
    return list(section.model_fields)
