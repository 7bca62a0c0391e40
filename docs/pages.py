"""Writes recipe.md and reference.md from the code: make pages. A test says when they are stale."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pekoe
from pekoe.config.base import ConfigSection
from pekoe.config.keys import Key, keys_of
from pekoe.config.names import NAMES
from pekoe.config.recipes import COMMANDS

FOLDER = Path(__file__).parent

RECIPE = """# Recipes: every key

<!-- Made from the code by `make pages`: do not edit. -->

A recipe is a TOML file. `pekoe rl RECIPE.toml section.key=value ...` changes keys from the command line, and
`--dry-run` prints the recipe with everything that it does not say:

```sh
pekoe rl laptop optim.lr=1e-3 --dry-run
pekoe keys optim
```

`pekoe keys [SECTION]` prints what this page says. Defaults of `pekoe rl` are the release's (AReaL v0.2, 7B). A wrong
key, type or combination ends with exit status 2 and one message that says where, what was expected, what was found and
the nearest valid name, for [names of TRL and verl](#names-of-trl-and-verl), too.
"""

NAMES_HEAD = """## Names of TRL and verl

An error about a key that is one of these names ours. Of verl's names the parts that tell them apart are given.

| ours | TRL | verl | what differs |
|---|---|---|---|
"""

REFERENCE = """# Python names

<!-- Made from the code by `make pages`: do not edit. -->

What a program may rely on; everything else is private. Each name is one of `pekoe` (`pekoe.load_model`), and of the
module that it stands under. [As a library](how-to/library.md) has a whole loop.
"""


def recipe_page() -> str:
    shown: dict[str, tuple[str, list[Key]]] = {}  # by section: where, and what
    parts = [RECIPE]
    for command, kind in COMMANDS.items():
        parts.append(f"## `pekoe {command}`\n")
        if command == "sft":
            parts.append("Sections that are not here are as above.\n")
        for section, keys in by_section(kind).items():
            if section in shown and shown[section][1] == keys:
                continue
            if section and section in shown:
                old = {key.name: key for key in shown[section][1]}
                changed = [key for key in keys if old.get(key.name) != key]
                gone = [f"`{name.rpartition('.')[2]}`" for name in old if name not in {key.name for key in keys}]
                note = f"As for `pekoe {shown[section][0]}`" + (f", without {', '.join(gone)}" if gone else "")
                parts.append(f"### `[{section}]` of `pekoe {command}`\n\n{note}{', but:' if changed else '.'}\n")
                keys = changed
            else:
                shown[section] = (command, keys)
                parts.append(f"### {f'`[{section}]`' if section else 'At the top'}\n")
            if keys:
                parts.append("| key | | default | |\n|---|---|---|---|")
                for key in keys:
                    name = key.name.rpartition(".")[2]
                    parts.append(f"| `{name}` | {cell(key.type)} | {code(key.default)} | {cell(key.meaning)} |")
                parts.append("")
    rows = [f"| `{row.ours}` | {codes(row.trl)} | {codes(row.verl)} | {cell(row.note)} |" for row in NAMES]
    return "\n".join(parts) + "\n" + NAMES_HEAD + "\n".join(rows) + "\n"


def by_section(kind: type[ConfigSection]) -> dict[str, list[Key]]:
    sections: dict[str, list[Key]] = {"": []}
    for key in keys_of(kind):
        sections.setdefault(key.name.rpartition(".")[0].replace("[]", ""), []).append(key)
    return {name: keys for name, keys in sections.items() if keys}


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def code(text: str) -> str:
    return text if text in ("required", "absent") else f"`{text}`"


def codes(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", ") if name)


def public_names() -> dict[str, list[str]]:
    """The names of `pekoe`, by the module that they come from."""
    names: dict[str, list[str]] = {}
    for name, module in pekoe._modules().items():
        names.setdefault(module, []).append(name)
    return names


def reference_page() -> str:
    parts = [REFERENCE]
    for module, names in public_names().items():
        parts.append(f"## From `{module}`\n")
        for name in names:
            parts += describe(name, getattr(importlib.import_module(module), name))
    return "\n".join(parts).rstrip() + "\n"


def describe(name: str, thing: Any) -> Iterator[str]:
    """A name's signature and docstring; of a class its methods' too."""
    yield f"### `{name}`\n"
    if isinstance(thing, type) and issubclass(thing, ConfigSection):
        yield "A section of recipes: [its keys](recipe.md) are its keyword arguments. Frozen.\n"
        return
    if isinstance(thing, type) and (issubclass(thing, Exception) or getattr(thing, "_is_protocol", False)):
        yield f"{'An exception' if issubclass(thing, Exception) else 'A protocol'}.\n"
    else:
        yield f"```python\n{signature(name, thing)}\n```\n"
    yield text_of(thing)
    if not isinstance(thing, type):
        return
    for method_name in [] if issubclass(thing, Exception) else vars_of(thing):
        method = inspect.getattr_static(thing, method_name)
        method = method.__func__ if isinstance(method, classmethod | staticmethod) else method
        if isinstance(method, property):
            yield f"- `{method_name}`{one_line(thing, method_name)}"
        elif inspect.isfunction(method):
            yield f"- `{signature(method_name, method, short=True)}`{one_line(thing, method_name)}"
    yield ""


def vars_of(thing: type) -> list[str]:
    """Public methods and properties, those of base classes of ours too."""
    names: dict[str, None] = {}
    for base in thing.__mro__:
        if base.__module__.startswith("pekoe"):
            names |= dict.fromkeys(n for n in vars(base) if not n.startswith("_"))
    fields = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set[str]()
    return sorted(names.keys() - fields)


def signature(name: str, thing: Any, short: bool = False) -> str:
    try:
        parameters = list(inspect.signature(thing).parameters.values())
        returns = "" if isinstance(thing, type) else inspect.signature(thing).return_annotation
    except (TypeError, ValueError):
        return name
    shown = [
        str(p) if short else f"\n    {p}," for p in parameters if p.name not in ("self", "cls") and p.name[0] != "_"
    ]
    text = f"{name}({', '.join(shown)})" if short else f"{name}({''.join(shown)}\n)" if shown else f"{name}()"
    if returns and returns is not inspect.Signature.empty and not short:
        text += f" -> {returns if isinstance(returns, str) else getattr(returns, '__name__', returns)}"
    text = re.sub(r"<function .* at 0x\w+>", "…", re.sub(r": '([^'\n]*)'", r": \1", text))
    return re.sub(r"<class '[\w.]+\.(\w+)'>|<[^<>\n]+>", lambda m: m[1] or "…", text)


def text_of(thing: Any) -> str:
    """The docstring, its Args as a list."""
    text = inspect.getdoc(thing) or ""
    text = re.sub(r"^(Args|Returns|Raises):$", r"\1:\n", text, flags=re.MULTILINE)
    lines = [re.sub(r"^    (\w+): ", r"- `\1`: ", line) for line in text.splitlines()]
    return "\n".join(re.sub(r"^ {8}", "  ", re.sub(r"^ {4}(?=\S)", "", line)) for line in lines) + "\n"


def one_line(thing: type, name: str) -> str:
    """The first paragraph of a method's or property's docstring, its own or a base's."""
    found = (inspect.getdoc(vars(base)[name]) for base in thing.__mro__ if name in vars(base))
    doc = next((doc for doc in found if doc), "")
    return f": {textwrap.shorten(doc.split(chr(10) * 2)[0], 400)}" if doc else ""


if __name__ == "__main__":
    for page, text in {"recipe.md": recipe_page(), "reference.md": reference_page()}.items():
        (FOLDER / page).write_text(text, encoding="utf-8")
