"""Sections of recipes: read from TOML and `section.key=value` overrides, with an explanation of each mistake."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pekoe.core.errors import UserError, nearest
from pekoe.core.functions import FUNCTION

MAX_COUNT = 2**31 - 1  # of whole numbers without a bound of their own: more tokens, steps or bytes no key can mean
MAX_DEPTH = 16  # of sections in sections, and of tables and arrays in a value
MAX_SHOWN_CHARS = 200  # of a value in a message


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "the name of a file, a directory or a data set")
    return text


class OneOrOwn:
    """A validator: one of some names, or a function of the user's own, "MODULE:NAME"."""

    def __init__(self, *names: str) -> None:
        quoted = [f"'{name}'" for name in names]
        self.expected = f"{', '.join(quoted)}{' or ' if names else ''}MODULE:NAME, a function of your own"
        self._names = names

    def __call__(self, text: str) -> str:
        if text not in self._names and not FUNCTION.fullmatch(text):
            raise PydanticCustomError("function", "{expected}", {"expected": self.expected})
        return text


FileName = Annotated[str, AfterValidator(_not_blank)]
FunctionName = Annotated[str, AfterValidator(OneOrOwn())]
Processes = Annotated[int, Field(ge=1, le=1024)]  # or threads of one machine
Samples = Annotated[int, Field(ge=1, le=65_536)]  # of one problem
Seconds = Annotated[float, Field(gt=0, le=2_000_000)]  # what the system's waits can take: 23 days
GiB = Annotated[float, Field(gt=0, le=1_000_000)]


class ConfigSection(BaseModel):
    """Frozen and closed: an unknown key is an error, a wrong type is an error, nothing changes later.

    Numbers are finite unless a field says otherwise (`allow_inf_nan`), and whole numbers at most MAX_COUNT.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="after")
    @classmethod
    def _sane(cls, value: Any, info: ValidationInfo) -> Any:
        bounded = any(hasattr(bound, "le") for bound in cls.model_fields[str(info.field_name)].metadata)
        if isinstance(value, int) and value > MAX_COUNT and not bounded:
            raise PydanticCustomError("count", "less than or equal to {limit}", {"limit": MAX_COUNT})
        if not all(map(_is_plain, _texts(value))):
            raise PydanticCustomError("text", "text in UTF-8 without the character NUL")
        return value


def _texts(value: Any) -> list[str]:
    items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
    return [item for item in items if isinstance(item, str)]


def _is_plain(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of TOML. Raises ValueError, and RecursionError for brackets in brackets.

    A dotted key of a line may make thousands of tables in tables: what walks the tree later need not expect them.
    """
    tree = tomllib.loads(text)
    level: list[Any] = [tree]
    for _ in range(MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    if level:
        raise ValueError(f"tables and arrays nested more than {MAX_DEPTH} deep")
    return tree


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


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with Pekoe, by name: in the package where it was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    folders = (folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())
    return {path.stem: path for path in sorted(next(folders, package).glob("*.toml"))}


def heads_of_recipes() -> dict[str, str]:
    """What each recipe that comes with Pekoe is: the first paragraph of its head."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in shipped_recipes().items()}
    return {name: text.removeprefix("# ").partition("\n#\n")[0].replace("\n# ", " ") for name, text in texts.items()}


def start_of_recipe(name: str, file: Path) -> str:
    """The command of the head of a recipe that comes with Pekoe, with the recipe's `file` in place of its name."""
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    found = re.search(rf"^# +(.* ){re.escape(name)} *(#.*)?$", text, re.MULTILINE)
    return f"{found[1] if found else 'pekoe rl '}{file}"


def copy_recipe(name: str, out: str | None) -> Path:
    """Write a recipe that comes with Pekoe to a new file, by default NAME.toml here."""
    shipped = shipped_recipes()
    if name not in shipped:
        raise UserError(f"recipe: unknown name {name!r}.{nearest(name, shipped)}")
    file = Path(out or f"{name}.toml")
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(shipped[name].read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe: expected a new file that can be written, got {file}: {error.strerror}") from None
    return file


def refuse_recipe(file: str) -> None:
    """UserError where a file of rows is expected and this is a recipe; names the files that the recipe reads."""
    if not (file.endswith(".toml") if Path(file).exists() else file in shipped_recipes()):
        return
    flat = flatten(read_toml(Path(file)))
    sources = flat.get("data.sources")
    of_sources = (
        [source.get("path") for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    )
    paths = [path for path in (flat.get("data.train"), flat.get("eval.data"), *of_sources) if isinstance(path, str)]
    hint = f"; nearest: pekoe data {paths[0]}" if paths else ""
    raise UserError(f"data: expected a file of rows, a directory or hf:OWNER/NAME, got the recipe {file}{hint}")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a recipe, not yet validated: of a file, or of one that comes with Pekoe, by its name."""
    if not path.is_file():
        shipped = shipped_recipes()
        if str(path) not in shipped:
            siblings = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
            hint = f" Did you mean {path.stem!r}, which comes with Pekoe?" if path.stem in shipped else ""
            hint = hint or nearest(path.name, [*siblings, *shipped])
            raise UserError(f"{path}: expected a recipe (a TOML file, or a name of `pekoe recipe`), found none.{hint}")
        path = shipped[str(path)]
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected TOML, got something else: {error}") from None


def merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Set the keys of another recipe, in place."""
    for key, value in other.items():
        mine = tree.get(key)
        if isinstance(mine, dict) and isinstance(value, Mapping):
            merge(mine, value)
        else:
            tree[key] = value


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the key that `section.key=value` names, or the keys of a further recipe, in place."""
    key, equals, text = override.partition("=")
    if not equals and (override.endswith(".toml") or override in shipped_recipes()):
        merge(tree, read_toml(Path(override)))
        return
    if not equals or not key.strip():
        hint = nearest(override, shipped_recipes()) if not equals else ""
        raise UserError(f"override {cut(override)}: expected section.key=value, or a recipe.{hint}")
    *sections, last = key.strip().split(".")
    node: Any = tree
    if len(sections) > MAX_DEPTH:
        raise UserError(f"override {cut(override)}: expected at most {MAX_DEPTH} sections, got {len(sections)}")
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"override {cut(override)}: {cut(section)} is a value, not a section")
    try:
        node[last] = parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        node[last] = text
    except (ValueError, RecursionError) as error:  # such as a number of 5,000 digits, or as many tables
        raise UserError(f"override {cut(override)}: expected a value that TOML can have: {error}") from None


def cut(value: Any) -> str:
    """As in Python, and short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits; what is nested deeply
        text = f"{type(value).__name__} too large to be shown"
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"
