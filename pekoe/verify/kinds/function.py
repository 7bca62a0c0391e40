"""kind = "function:PACKAGE.MODULE:NAME": a function that the user has written.

`NAME(response: str, gold) -> bool | float | Verdict`. It is imported in worker processes of its own, from the places
that this process imports from and, after them, the current directory; it is called with the whole response and returns
True, 1.0 (from 0.99 on), or a Verdict. An exception in it is FAULT, never a wrong answer. Its workers have the pool's
limits but no audit hook; it may execute anything, so the recipe alone names the functions (`verify.functions`); a data
row chooses among them.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from pekoe.core.types import Verdict
from pekoe.verify.kinds.base import Verifier

MAX_RESPONSE_CHARS, PASSES = 1_000_000, 0.99


def prepare(response: str, gold: Any) -> Verdict | str:
    if len(response) > MAX_RESPONSE_CHARS:
        return Verdict("unparsed", None, f"the response holds {len(response):,} characters")
    return response


@functools.cache
def _function(path: str) -> Callable[[str, Any], Any]:
    module, _, name = path.partition(":")
    sys.path.append(os.getcwd())  # in these workers alone, and last: no other code may come from there
    return getattr(importlib.import_module(module), name)


def _decide(path: str, response: str, gold: Any) -> Verdict:
    reward = _function(path)(response, gold)
    if isinstance(reward, Verdict):
        return reward
    if not isinstance(reward, bool | int | float):
        raise TypeError(f"function:{path}: expected bool, float or Verdict, got {type(reward).__name__}")
    why = "" if isinstance(reward, bool) else f"score {reward:g}"
    return Verdict("correct" if reward >= PASSES else "wrong", None, why)


def make_verifier(path: str) -> Verifier:
    """Return the verifier of one function; this process imports nothing."""
    name = f"function:{path}"
    decide = functools.partial(_decide, path)
    warm_up = functools.partial(_function, path)
    return Verifier(name, prepare, decide, warm_up=warm_up, worker_group=name, audit_hook="none")
