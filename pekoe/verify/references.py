"""References checked before anything is sampled: those that their judge cannot read, or would not accept as an answer.

By kind: a reference in mathematics, a letter or a solution (`logic`) is given as the answer and must be CORRECT, and in
mathematics be read within the limits; an entry of reasoning-gym is tried on its own scorer; tests of code and numbers
of `countdown` must have their form, since a program or an expression is needed to try them; `function:` is left out:
a function of the user's would be run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from pekoe.core.progress import ProgressReporter, track
from pekoe.core.types import Verdict
from pekoe.verify.kinds import find_verifier
from pekoe.verify.kinds.base import Verifier
from pekoe.verify.pool import JudgePool


class Reference(NamedTuple):
    """A reference of one or more problems."""

    gold: Any
    kind: str
    indices: tuple[int, ...]  # of the problems
    answer: str = ""  # the reference as `Verifier.prepare` gives it to a worker


class Reading(NamedTuple):
    """What the texts of references show: why some are refused, and those that a worker must judge."""

    refused: dict[int, str]  # by the problem's index
    unsure: list[Reference]


def read_references(
    references: Sequence[tuple[Any, str]], functions: Collection[str], view: ProgressReporter
) -> Reading:
    """Read (gold, kind) pairs, equal ones once, without a worker. UserError for an unknown kind (`find_verifier`)."""
    indices: dict[str, list[int]] = defaultdict(list)
    for index, (gold, kind) in enumerate(references):
        indices[json.dumps([kind, gold], default=str)].append(index)
    reading = Reading({}, [])
    for places in track(view, "references", list(indices.values())):
        gold, kind = references[places[0]]
        verifier = find_verifier(kind, functions)
        prepared = _restated(verifier, gold)
        if isinstance(prepared, Verdict):
            reading.refused.update(dict.fromkeys(places, _why(gold, prepared)))
        elif verifier.check_reference is not None and not verifier.is_plain(gold):
            reading.unsure.append(Reference(gold, kind, tuple(places), prepared))
    return reading


def judge_references(references: Sequence[Reference], pool: JudgePool, view: ProgressReporter) -> dict[int, str]:
    """Judge references in workers. Returns why some are refused, by the problem's index. RunError as `JudgePool`."""
    futures = [pool.submit_reference(reference.answer, reference.gold, reference.kind) for reference in references]
    refused: dict[int, str] = {}
    for (gold, _, indices, _), future in zip(references, track(view, "references judged", futures), strict=True):
        if (verdict := future.result()).label != "correct":
            refused.update(dict.fromkeys(indices, _why(gold, verdict)))
    return refused


def _restated(verifier: Verifier, gold: Any) -> Verdict | str:
    """The reference as its own answer: what `prepare` makes of it, or the verdict that refuses it."""
    verdicts: list[Verdict] = []
    for response in verifier.restate(gold):
        prepared = verifier.prepare(response, gold)
        if isinstance(prepared, str):
            return prepared
        if prepared.label == "correct" or (not response and prepared.label != "fault"):
            return prepared.extracted or ""
        verdicts.append(prepared)
    return verdicts[0]


def _why(gold: Any, verdict: Verdict) -> str:
    """For example: the reference '3 + * 4' cannot be parsed."""
    named = repr(str(gold)[:80])
    if verdict.label != "fault":
        detail = f": {verdict.why}" if verdict.why else ""
        return f"the reference {named}, given as the answer, is {verdict.label.upper()}{detail}"
    return verdict.why if named in verdict.why else f"the reference {named}: {verdict.why}"
