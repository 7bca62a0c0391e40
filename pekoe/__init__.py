"""Pekoe trains language models to reason, by reinforcement learning on rewards that can be checked.

The names that a program needs (`pekoe.load_model`, …) are listed in `__init__.pyi`, with the rooms that they come from.
They are imported when they are asked for: `import pekoe` alone is cheap.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


@cache
def _modules() -> dict[str, str]:
    """Of each public name its module."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in _modules():
        raise AttributeError(f"module 'pekoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_modules()[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_modules()])
