"""Files of responses to judge, and the error counts of verdicts where lines carry labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pekoe.core.errors import UserError, nearest
from pekoe.core.types import Verdict
from pekoe.verify.kinds import check_functions, find_verifier
from pekoe.verify.pool import Item

Case = dict[str, Any]
STANDARD_INPUT = "-"
# Keys under which a response and its reference are found, the first that is there: those of files of responses, of
# `pekoe eval`'s responses.jsonl, of a run's rollouts, and of problems.
_RESPONSE, _GOLD = ("response_boxed", "response", "text"), ("gold", "answer", "answers")
_LABELS = {"correct": True, "wrong": False, "unparsed": False, "fault": None}  # a verdict's, as our own output has it


def read_cases(path: Path) -> list[Case]:
    """Lines `{"id"?, "response", "gold", "kind"?, "label"?}` of a file, or of standard input ("-").

    What Pekoe writes is read, too: other names of these keys are in `_RESPONSE` and `_GOLD`, a label may be that of a
    verdict, and `uid` (with `sample`) is an id. UserError, with file and line, for a line that cannot be used.
    """
    if str(path) == STANDARD_INPUT:
        path, data = Path("standard input"), sys.stdin.buffer.read()
    elif path.is_file():
        data = path.read_bytes()
    else:
        siblings = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        raise UserError(f"{path}: expected a JSONL file, found none.{nearest(path.name, siblings)}")
    cases: list[Case] = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            case = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            raise UserError(f"{path}:{number}: expected a JSON object, got {error}") from None
        try:
            cases.append(_case(case if isinstance(case, dict) else {}, number))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    return cases


def _case(case: Case, number: int) -> Case:
    found: Case = {}
    for key, names in (("response", _RESPONSE), ("gold", _GOLD)):
        present = sorted((name for name in names if name in case), key=lambda name: case[name] in (None, ""))
        if not present:
            raise ValueError(f"expected the key {key!r}, got {sorted(case)}")
        found[key] = case[present[0]]
    if type(found["response"]) in (int, float):
        found["response"] = str(found["response"])
    if not isinstance(found["response"], str):
        raise ValueError(f"response: expected text, got {found['response']!r}")
    label = case.get("label")
    if label not in (None, True, False, *_LABELS):
        raise ValueError(f"label: expected true, false, null or a verdict's ({', '.join(_LABELS)}), got {label!r}")
    if label is not None:
        found["label"] = _LABELS[label] if isinstance(label, str) else bool(label)
    kind = case.get("kind")
    if kind is None:  # null is absent
        case = {key: value for key, value in case.items() if key != "kind"}
    elif not isinstance(kind, str):
        raise ValueError(f"kind: expected text, got {kind!r}")
    uid = case.get("uid", number)
    name = f"{uid}/{case['sample']}" if "sample" in case else uid
    return {"id": name} | case | found


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


COLUMNS = ("right", "wrong", "FN", "FP", "unparsed", "no label", "FAULT")


def error_cells(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> list[str]:
    """Compare verdicts with labels, for a table with `COLUMNS`.

    A false negative (FN) rejects a right answer, a false positive (FP) accepts a wrong one; their shares are of those
    that were judged. FAULT is no verdict: it is counted alone, of all cases, as are responses without an answer.
    """
    pairs = list(zip(cases, verdicts, strict=True))
    judged = [(case.get("label"), verdict.label) for case, verdict in pairs if verdict.label != "fault"]
    right, wrong = ([verdict for label, verdict in judged if label is truth] for truth in (True, False))
    fn, fp = sum(verdict != "correct" for verdict in right), sum(verdict == "correct" for verdict in wrong)
    errors = [f"{fn} ({fn / max(1, len(right)):.1%})", f"{fp} ({fp / max(1, len(wrong)):.1%})"]
    unparsed = sum(verdict == "unparsed" for _, verdict in judged)
    others = (unparsed, sum(case.get("label") is None for case in cases), len(cases) - len(judged))
    return [str(len(right)), str(len(wrong)), *errors, *map(str, others)]
