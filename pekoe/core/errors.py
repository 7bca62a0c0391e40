"""The two ways a run can end badly: the user's mistake (exit 2) and a failed run (exit 1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: a wrong key, a missing file, an impossible shape.

    The command line prints the message alone, without a traceback, and exits with 2.
    The message says where, what was expected, what was found, and the nearest valid value.
    """


class RunError(RuntimeError):
    """A run that was well asked for and failed. The command line exits with 1."""


class Interrupted(RuntimeError):
    """The user pressed Ctrl-C. The command line prints how to go on and exits with 130."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the valid name closest to `name`, or all valid names if none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Valid: {', '.join(names)}." if names else ""
