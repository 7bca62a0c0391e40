"""The command `pekoe verify`: judges files of responses, or lists the references of problems that are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Column, Table

from pekoe.core.progress import ProgressReporter
from pekoe.core.types import Verdict
from pekoe.core.words import counted
from pekoe.run.references import list_refused
from pekoe.verify import JudgePool
from pekoe.verify.cases import COLUMNS, Case, check_case_kinds, error_cells, item_of, read_cases

Files = list[tuple[str, list[Case]]]


@dataclass(frozen=True, slots=True)
class Shown:
    """What is printed: a table, or lines; and on stderr a note. `failed`: exit status 1."""

    lines: Sequence[str]
    table: Table | None = None
    note: str = ""
    failed: bool = False


def read_files(files: Sequence[str], kind: str, functions: Sequence[str]) -> Files:
    """The cases of each file; `kind` is that of lines without one. UserError for what cannot be judged."""
    by_file = [(file, read_cases(Path(file))) for file in files]
    for file, cases in by_file:
        check_case_kinds(Path(file), cases, kind, functions)
    return by_file


def judge_files(by_file: Files, kind: str, functions: Sequence[str], summary: bool, view: ProgressReporter) -> Shown:
    """A verdict for each case, in order; with `summary`, a row of error rates for each file."""
    with JudgePool(os.cpu_count() or 1, functions=functions) as pool:
        judged = [pool.judge_many([item_of(case, kind) for case in cases], view) for _, cases in by_file]
    if not summary:
        pairs = [
            pair
            for (_, cases), verdicts in zip(by_file, judged, strict=True)
            for pair in zip(cases, verdicts, strict=True)
        ]
        return Shown([_line(case, verdict) for case, verdict in pairs])
    columns = (Column(name, justify="right", no_wrap=True) for name in COLUMNS)
    table = Table(Column("cases", overflow="fold"), *columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for (file, cases), verdicts in zip(by_file, judged, strict=True):
        table.add_row(Path(file).stem, *error_cells(cases, verdicts))
    faults = [verdict.why for verdicts in judged for verdict in verdicts if verdict.label == "fault"]
    if not faults:
        return Shown((), table)
    note = f"{counted(len(faults), 'response')} could not be judged (FAULT); the first: {faults[0]}"
    return Shown((), table, note, failed=True)


def _line(case: Case, verdict: Verdict) -> str:
    shown = {"id": case["id"], **asdict(verdict)}
    return json.dumps({key: value for key, value in shown.items() if key != "score" or value is not None})


def check_references(files: Sequence[str], functions: Sequence[str], view: ProgressReporter) -> Shown:
    """Of files of problems: a line for each reference that is refused."""
    checked = [list_refused(file, functions, view) for file in files]
    refused = [line for lines, _ in checked for line in lines]
    note = f"references refused: {len(refused):,} of {sum(number for _, number in checked):,}"
    return Shown(refused, None, note, failed=bool(refused))
