"""Judging responses: `judge` for one, `JudgePool` for many. See `pekoe.verify.kinds` for what can be judged.

Importing this room is cheap: sympy and math-verify are imported in the worker processes alone.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from pekoe.core.types import Verdict
from pekoe.verify.pool import JudgePool, JudgeStats

__all__ = ["JudgePool", "JudgeStats", "Verdict", "judge"]

_lock = threading.Lock()
_pool: JudgePool | None = None


def judge(response: str, gold: Any, kind: str = "math") -> Verdict:
    """Judge one response against `gold` (for "math": text, or a list of texts of which any may match).

    The first call starts a worker process, which lives until this process ends. Any thread may call it, and a script
    needs no `if __name__ == "__main__"`. Raises UserError for an unknown kind, RunError where no worker can start.
    """
    global _pool
    with _lock:
        if _pool is None or not _pool.usable:
            _pool = JudgePool(num_workers=1)
        pool = _pool
    return pool.submit(response, gold, kind).result()


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)  # the parent may have held it at the moment of the fork
