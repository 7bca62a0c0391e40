"""Functions of the user's own, named "MODULE:NAME" in a recipe."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pekoe.core.errors import UserError, nearest

FUNCTION = re.compile(r"[\w.]+:\w+")


@contextlib.contextmanager
def importing_from_here() -> Iterator[None]:
    """Modules are found in the current directory too, after all other places."""
    folder, known = os.getcwd(), os.getcwd() in sys.path
    if not known:
        sys.path.append(folder)
    try:
        yield
    finally:
        if not known:
            sys.path.remove(folder)


@functools.cache
def load_function(path: str, key: str) -> Callable[..., Any]:
    """Import "MODULE:NAME" from where Python finds it or, after that, from the current directory.

    `key` is the recipe's, for the error: UserError where there is no such module, or no such function in it.
    """
    module_name, _, name = path.partition(":")
    try:
        with importing_from_here():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{key}: expected a module that Python can import, got {module_name:.200}: {error!r:.500}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{key}: expected a function in {module.__file__}, got {name!r}.{nearest(name, vars(module))}")
    return function
