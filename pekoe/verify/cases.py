"""Files of responses to judge, and the error counts of verdicts where lines carry labels."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pekoe.core.errors import UserError, nearest
from pekoe.core.types import Verdict
from pekoe.verify.kinds import check_functions, find_verifier
from pekoe.verify.pool import Item

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
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            raise UserError(f"{path}:{number}: expected a JSON object, got {error}") from None
        names = sorted(case) if isinstance(case, dict) else []
        for key in ("response", "gold"):
            if key not in names:
                raise UserError(f"{path}:{number}: expected the key {key!r}, got {names}")
        case = {"id": number} | case | {"response": case.get("response_boxed") or case["response"]}
        if not isinstance(case["response"], str):
            raise UserError(f"{path}:{number}: response: expected text, got {case['response']!r}")
        if case.get("kind") is None:  # null is absent
            case.pop("kind", None)
        elif not isinstance(case["kind"], str):
            raise UserError(f"{path}:{number}: kind: expected text, got {case['kind']!r}")
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


def item_of(case: Case, default: str) -> Item:
    """What `JudgePool.submit` is given: a reward of the user's finds the line as its row, and its `prompt`."""
    prompt = case.get("messages", case.get("prompt"))
    messages = [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt
    return case["response"], case["gold"], case.get("kind", default), {"messages": messages, "row": case}


def error_cells(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> list[str]:
    """Compare verdicts with labels, for a table: right, wrong, FN and FP with their shares, unparsed, faults.

    A false negative rejects a right answer, a false positive accepts a wrong one. Cases without a label do not count.
    """
    pairs = list(zip(cases, verdicts, strict=True))
    right, wrong = ([v for case, v in pairs if case.get("label") == label] for label in (True, False))
    fn = sum(v.label != "correct" for v in right)
    fp = sum(v.label == "correct" for v in wrong)
    errors = [f"{fn} ({fn / max(1, len(right)):.1%})", f"{fp} ({fp / max(1, len(wrong)):.1%})"]
    others = [sum(v.label == label for v in right + wrong) for label in ("unparsed", "fault")]
    return [str(len(right)), str(len(wrong)), *errors, *map(str, others)]
