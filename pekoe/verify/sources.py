"""The source of a reward of the user's own, as a digest: a run that goes on must have the same. Nothing is imported."""

from __future__ import annotations

import ast
import hashlib
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def source_digest(function: str) -> str:
    """Of the module of "PACKAGE.MODULE:NAME", and of all that it imports, directly or not, from the directory in which
    its top-level package lies. Comments and layout do not count. Empty where there is no such module."""
    module = function.partition(":")[0]
    first = _find(module, [*sys.path, os.getcwd()])
    if first is None:
        return ""
    root = str(first.resolve().parents[module.count(".") + (first.name == "__init__.py")])
    seen: dict[Path, str] = {}
    left = [module]
    while left:
        *parents, _ = name = left.pop().split(".")
        left += [".".join(parents)] if parents else []
        file = _find(".".join(name), [root])
        if file is None or file in seen or ("site-packages" in file.parts and seen):
            continue
        source = file.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            seen[file] = source
            continue
        seen[file] = ast.unparse(tree)
        left += _imported(tree, file.relative_to(root).parent.parts)
    text = "\0".join(seen[file] for file in sorted(seen))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _find(module: str, places: list[str]) -> Path | None:
    """The file of a module's source, below one of `places`."""
    file: str | None = None
    for part in module.split("."):
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            return None
        file, places = spec.origin, list(spec.submodule_search_locations or ())
    return Path(file) if file and file.endswith(".py") else None


def _imported(tree: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Names of modules that may be imported by a module of `package`: of `from a import b` both a and a.b."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" if base else alias.name for alias in node.names)]
    return [name for name in names if name]
