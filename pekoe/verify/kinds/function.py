"""kind = "function:PACKAGE.MODULE:NAME": a function of the user's own.

`NAME(response: str, gold) -> bool | float | Verdict`. It is imported in worker processes of its own, from the places
that this process imports from, and called with the whole response: True, 1.0 (from 0.99 on), or a Verdict. What it
raises is FAULT: an error of the reward's, never a wrong answer. Its workers have the pool's limits and no seal: what it
executes is the user's affair.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from pekoe.core.types import Verdict
from pekoe.verify.kinds.base import Kind

MAX_RESPONSE_CHARS, PASSES = 1_000_000, 0.99


def prepare(response: str, gold: Any) -> Verdict | str:
    if len(response) > MAX_RESPONSE_CHARS:
        return Verdict("unparsed", None, f"the response holds {len(response):,} characters")
    return response


@functools.cache
def _function(path: str) -> Callable[[str, Any], Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _decide(path: str, response: str, gold: Any) -> Verdict:
    found = _function(path)(response, gold)
    if isinstance(found, Verdict):
        return found
    if not isinstance(found, bool | int | float):
        raise TypeError(f"function:{path}: expected bool, float or Verdict, got {type(found).__name__}")
    return Verdict(
        "correct" if found >= PASSES else "wrong", None, "" if isinstance(found, bool) else f"score {found:g}"
    )


def check_reference(gold: Any) -> Verdict:
    return Verdict("correct")  # a function alone knows: a limit that it hits is the response's


def make_kind(path: str) -> Kind:
    """The kind of one function; nothing is imported in this process."""
    name = f"function:{path}"
    decide, warm_up = functools.partial(_decide, path), functools.partial(_warm_up, path)
    return Kind(name, prepare, decide, check_reference, warm_up, room=name, seal="none")


def _warm_up(path: str) -> None:
    _function(path)
