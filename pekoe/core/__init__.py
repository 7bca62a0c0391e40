"""The types, the protocols of the loop, the errors, the journal. No torch, nothing heavy."""

from typing import Any

from pekoe.core.errors import Interrupted, RunError, UserError
from pekoe.core.types import (
    Completion,
    Draw,
    JudgedGroup,
    Problem,
    Record,
    Request,
    Sample,
    SamplingParams,
    Trajectory,
    Verdict,
)

__all__ = [
    "Completion",
    "Draw",
    "Interrupted",
    "JudgedGroup",
    "Problem",
    "Record",
    "Request",
    "RunError",
    "Sample",
    "SamplingParams",
    "Trajectory",
    "UserError",
    "Verdict",
]


def __getattr__(name: str) -> Any:
    """`pekoe.core.load_config` is a public name of a room above; it is looked up when it is asked for."""
    if name == "load_config":
        from pekoe.config import load_config

        return load_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
