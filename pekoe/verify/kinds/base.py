"""What a kind of judging is made of. Each kind is one small file beside this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pekoe.core.types import Verdict


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to judge a response.

    `prepare(response, gold)` runs in the parent: the text to be judged, or the verdict where none needs judging.
    It must take time linear in its input and import nothing heavy. The others run in a worker, under its limits:
    `decide(answer, gold)` judges what `prepare` gave; `check_reference(gold)` is CORRECT where the reference can be
    judged at all, and FAULT where it is to blame; `warm_up()` imports everything, before the worker is sealed.
    An exception out of any of them is a bug of ours, and its verdict FAULT.

    Kinds of one `room` share workers. `seal` is what these put on (`pekoe.verify.seal`): "all" refuses code made of
    text and every act on the machine, "acts" the acts alone, "none" nothing.
    """

    name: str
    prepare: Callable[[str, Any], Verdict | str]
    decide: Callable[[str, Any], Verdict]
    check_reference: Callable[[Any], Verdict]
    warm_up: Callable[[], None]
    room: str = "sealed"
    seal: Literal["all", "acts", "none"] = "all"


def no_warm_up() -> None:
    """For kinds that `prepare` decides."""
