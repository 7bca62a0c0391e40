"""The parts of a verifier, and what several verifiers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pekoe.core.types import Verdict
from pekoe.verify.extract import after_thinking, last_boxed, tagged


@dataclass(frozen=True, slots=True)
class Verifier:
    """Judges the responses to problems of one kind.

    `prepare(response, gold)` runs in the parent. It returns the text to judge, or the verdict if the text decides.
    It takes time linear in its input and imports nothing heavy. The others run in a worker, under its limits:
    `decide(answer, gold)` judges the text from `prepare`; `check_reference(gold)` returns CORRECT if the reference can
    be judged, and FAULT if not (None: each can, where `prepare` finds no fault); `warm_up()` imports everything, before
    the audit hook is installed.
    `time_limit_s(gold)` is time that a reference asks for: an item has as much beside the pool's own limit.
    An exception in any of them is a bug in Pekoe, and its verdict is FAULT.

    For `pekoe.verify.references`, in the parent: `restate(gold)` returns responses that give the reference as their
    answer, of which one must be CORRECT (an empty one: a reference is no answer, or is not to be run);
    `is_plain(gold)` is whether the text alone shows that `check_reference` passes.

    Verifiers of one `worker_group` share workers, and install the same `audit_hook` (`pekoe.verify.audit_hook`): "all"
    refuses code made of text and every act on the machine, "formulas" allows code that is a formula, "none" allows all.
    `is_users`: a function of the user's own. `decide` is given the response's context too (`JudgePool.submit`), its
    verdict says what was extracted, and what it prints is kept.
    """

    name: str
    prepare: Callable[[str, Any], Verdict | str]
    decide: Callable[..., Verdict] | None = None  # None where `prepare` always decides
    check_reference: Callable[[Any], Verdict] | None = None
    warm_up: Callable[[], object] = lambda: None
    time_limit_s: Callable[[Any], float] = lambda _gold: 0.0
    restate: Callable[[Any], Sequence[str]] = lambda _gold: ("",)
    is_plain: Callable[[Any], bool] = lambda _gold: False
    worker_group: str = "math"
    audit_hook: Literal["all", "formulas", "none"] = "all"
    is_users: bool = False


def bad_reference(expected: str, gold: Any) -> Verdict:
    """Return FAULT for a reference that has another shape than `expected`, such as "must be a letter"."""
    return Verdict("fault", None, f"the reference {expected}, got {str(gold)[:80]!r}")


def tagged_answer(response: str, max_chars: int) -> Verdict | str:
    r"""Return what the last complete `\boxed{...}` holds, or else the last `<answer>...</answer>`; or UNPARSED."""
    response = after_thinking(response)
    answer = last_boxed(response)
    if answer is None and (answer := tagged(response)) is None:
        return Verdict("unparsed", None, r"no complete \boxed{...} and no <answer>...</answer>")
    answer = answer.strip()
    if len(answer) > max_chars:
        return Verdict("unparsed", answer[:200] + "…", f"the answer holds {len(answer):,} characters")
    return answer
