"""The types, the protocols of the loop, the errors, the journal. No torch, nothing heavy."""

from typing import Any

from pekoe.core.errors import Interrupted, RunError, UserError

__all__ = ["Interrupted", "RunError", "UserError"]


def __getattr__(name: str) -> Any:
    """`pekoe.core.load_config` is a public name of a room above; it is imported when it is asked for."""
    if name == "load_config":
        from pekoe.config import load_config

        return load_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
