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
    text and every act on the machine, "formulas" the same but for code that is a formula, "none" nothing.
    """

    name: str
    prepare: Callable[[str, Any], Verdict | str]
    decide: Callable[[str, Any], Verdict]
    check_reference: Callable[[Any], Verdict]
    warm_up: Callable[[], None]
    room: str = "sealed"
    seal: Literal["all", "formulas", "none"] = "all"


def no_warm_up() -> None:
    """For kinds that import nothing heavy."""


def decided_at_once(name: str, prepare: Callable[[str, Any], Verdict]) -> Kind:
    """A kind whose `prepare` gives the verdict always, in time linear in the response: no worker is needed."""

    def never(*_: Any) -> Verdict:
        raise AssertionError(f"{name}: decided by `prepare`")

    return Kind(name, prepare, never, never, no_warm_up)
