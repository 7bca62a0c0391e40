"""The two ways a run can end badly: the user's mistake (exit 2) and a failed run (exit 1)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: a wrong key, a missing file, an impossible shape.

    The message says where, expected, got, and the nearest valid value. The command line prints it and exits with 2.
    """


class RunError(RuntimeError):
    """A valid run failed. The command line exits with 1."""

    retried = False  # whether the caller begins again from the last checkpoint


class Interrupted(RuntimeError):
    """A signal asked the run to stop. The command line prints how to continue and exits with `status`, 128 + signal."""

    status = 130  # SIGINT, Ctrl-C


class StopRequested(Exception):
    """The user asked to stop, and the work in hand can be dropped without loss."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the valid name closest to `name`, or all valid names if none is close."""
    names = sorted(valid)
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f" Did you mean {close[0]!r}?"
    return f" Valid: {', '.join(names)}." if names else ""


OF_HUB = "If it is on the hub: hf download {name} --local-dir {name}"


def hub_hint(path: str, advice: str = OF_HUB) -> str:
    """`advice` after a space, where `path` may be a name on the Hugging Face hub, OWNER/NAME; else nothing."""
    files = "".join(rf"(?<!\.{suffix})" for suffix in ("gz", "zst", "json", "jsonl", "csv", "parquet"))
    return " " + advice.format(name=path) if re.fullmatch(rf"[\w-][\w.-]*/[\w-][\w.-]*{files}", path) else ""
