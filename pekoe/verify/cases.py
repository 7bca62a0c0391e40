"""Files of responses to judge, and the error counts of verdicts where lines carry labels."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pekoe.core.errors import UserError, nearest
from pekoe.core.types import Verdict
from pekoe.verify.kinds import check_functions, find_verifier

Case = dict[str, Any]


def read_cases(path: Path) -> list[Case]:
    """Lines `{"id"?, "response", "gold", "kind"?, "label"?}`; `response_boxed`, where there is one, is the response.

    UserError, with file and line, for a line that cannot be used.
    """
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        raise UserError(f"{path}: expected a JSONL file, found none.{nearest(path.name, siblings)}")
    cases: list[Case] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            case = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise UserError(f"{path}:{number}: expected a JSON object, got {error}") from None
        for key in ("response", "gold"):
            if not isinstance(case, dict) or key not in case:
                names = case if isinstance(case, dict) else []
                raise UserError(f"{path}:{number}: expected the key {key!r}, got {sorted(names)}")
        case = {"id": number} | case | {"response": case.get("response_boxed") or case["response"]}
        if not isinstance(case["response"], str):
            raise UserError(f"{path}:{number}: response: expected text, got {case['response']!r}")
        if case.get("label") not in (None, True, False):
            raise UserError(f"{path}:{number}: label: expected true, false or null, got {case['label']!r}")
        cases.append(case)
    return cases


def check_case_kinds(path: Path, cases: Sequence[Case], default: str, functions: Collection[str]) -> None:
    """Raise UserError, with file and id, for the first case whose kind is unknown or not allowed (`find_verifier`)."""
    check_functions(functions)
    for case in cases:
        try:
            find_verifier(case.get("kind", default), functions)
        except UserError as error:
            raise UserError(f"{path}: case {case['id']!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class Errors:
    """Counts over labelled cases. A false negative rejects a right answer, a false positive accepts a wrong one."""

    num_right: int
    num_wrong: int
    false_negatives: int
    false_positives: int
    unparsed: int
    faults: int

    def cells(self) -> list[str]:
        """For a table: counts, the two errors with their share of the right and of the wrong answers."""
        fn, fp = self.false_negatives, self.false_positives
        errors = [f"{fn} ({fn / max(1, self.num_right):.1%})", f"{fp} ({fp / max(1, self.num_wrong):.1%})"]
        return [str(self.num_right), str(self.num_wrong), *errors, str(self.unparsed), str(self.faults)]


def errors_of(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> Errors:
    """Compare verdicts with labels. Cases without a label (or null) do not count."""
    pairs = [(case["label"], v) for case, v in zip(cases, verdicts, strict=True) if case.get("label") is not None]
    return Errors(
        num_right=sum(label for label, _ in pairs),
        num_wrong=sum(not label for label, _ in pairs),
        false_negatives=sum(label and v.label != "correct" for label, v in pairs),
        false_positives=sum(not label and v.label == "correct" for label, v in pairs),
        unparsed=sum(v.label == "unparsed" for _, v in pairs),
        faults=sum(v.label == "fault" for _, v in pairs),
    )
