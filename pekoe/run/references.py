"""The check of references before a run: what the judges refuse, and a file that spares a resumed run the work."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pekoe import __version__
from pekoe.config.data import ProblemSection
from pekoe.config.recipes import VerifySection
from pekoe.core.progress import ProgressReporter
from pekoe.core.types import Problem
from pekoe.data.mix import RefusedReferences, gather_problems
from pekoe.run.judging import check_kinds, open_judges
from pekoe.run.run_dir import write_whole
from pekoe.verify.references import Reference, judge_references, read_references

KEPT = "references.json"
PER_WORKER, MAX_WORKERS = 64, 16  # references for which a worker more is worth its start


def reference_check(verify: VerifySection, view: ProgressReporter, folder: str | None = None) -> RefusedReferences:
    """The check for `gather_problems`. `folder`: keeps what workers found, for the next run there.

    It raises UserError as `check_kinds` does, RunError where judges do not start.
    """
    return partial(_refused, verify=verify, view=view, folder=folder)


def _refused(
    problems: Sequence[Problem],
    places: Sequence[str],
    verify: VerifySection,
    view: ProgressReporter,
    folder: str | None,
) -> dict[int, str]:
    check_kinds(problems, verify, places)
    if verify.random:  # nobody reads them
        return {}
    kinds = [verify.kind_of(problem.kind) if verify.reward else problem.kind for problem in problems]
    golds = [problem.gold for problem in problems]
    reading = read_references(list(zip(golds, kinds, strict=True)), verify.rewards, view)
    if not reading.unsure:
        return reading.refused
    file, key = Path(folder or ".") / KEPT, _digest(reading.unsure, verify)
    kept = _read(file) if folder else {}
    if key not in kept:
        number = min(MAX_WORKERS, os.cpu_count() or 1, 1 + len(reading.unsure) // PER_WORKER)
        with open_judges(verify, number) as pool:
            judged = judge_references(reading.unsure, pool, view)
        kept[key] = {str(index): why for index, why in judged.items()}
        if folder:
            with contextlib.suppress(OSError):  # whoever opens the folder says what is wrong with it
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, json.dumps(kept, indent=1) + "\n")
    return reading.refused | {int(index): why for index, why in kept[key].items()}


def _digest(references: Sequence[Reference], verify: VerifySection) -> str:
    """Of all that decides what workers find: the references, the limits, and this version of the judges."""
    about = [__version__, verify.time_limit_s, verify.memory_gib, references]
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, dict[str, str]]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    return {}


def list_refused(path: str, functions: Sequence[str], view: ProgressReporter) -> tuple[list[str], int]:
    """`pekoe verify --references`: file, line and reason of what is refused in a file of problems; and of how many."""
    refused = reference_check(VerifySection(functions=tuple(functions)), view)
    problems, report = gather_problems(ProblemSection(train=path, check="warn"), 0, None, view, refused)
    return report.refused, len(problems)
