"""Problem files in and out. A uid names one problem of a file: the ledger and the data order rely on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pekoe.core.types import Problem
from pekoe.data.formats import parse_problem
from pekoe.data.rows import PLAIN, Malformed, Skipped, parse_rows, write_rows


@dataclass(frozen=True, slots=True)
class ProblemFile:
    """The problems of a file, in its order, and the rows left out with their reasons."""

    problems: tuple[Problem, ...]
    skipped: tuple[Skipped, ...] = ()


def read_problems(path: str | Path, skip_malformed: bool = False) -> ProblemFile:
    """Read problems from a `.jsonl`, `.json` or `.parquet` file or a Hugging Face data set (see `parse_rows`).

    Layouts are told by their keys, row by row. Native is `{"uid", "prompt" | "messages", "answer" | "answers",
    "kind"}`; AReaL's, GSM8K's, SVAMP's, MATH's (DeepScaleR's, NuminaMath's), DAPO's, Open-Reasoner-Zero's, Light-R1's,
    Logic-RL's, ZebraLogic's, GPQA's, BIG-Bench-Hard's and TinyZero's are read as they are. A row without a uid is
    named by a hash of its content.

    `Problem.messages` is a conversation for the chat template, or one message of role `"prompt"` (native bare text: a
    user turn where the model has a template, used as it is elsewhere) or `"raw"` (AReaL: never templated).

    Raises UserError, naming file and line, for a malformed row or a second row of the same uid (with `skip_malformed`
    these are skipped and reported), and for a source that is missing, unreadable or without a usable row.
    """
    lines: dict[str, int] = {}

    def parse(value: Any, line: int) -> Problem:
        problem = parse_problem(value)
        first = lines.setdefault(problem.uid, line)
        if first != line:
            raise Malformed(f"uid {problem.uid!r}: expected a name of its own, got that of row {first}")
        return problem

    return ProblemFile(*parse_rows(path, parse, skip_malformed))


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems in the native layout; `read_problems` gives the same ones back. Whole or not at all."""
    write_rows(path, (_native_row(problem) for problem in problems))


def _native_row(problem: Problem) -> dict[str, Any]:
    first = problem.messages[0]
    prompt = {"prompt": first["content"]} if first["role"] == PLAIN else {"messages": list(problem.messages)}
    many = problem.kind == "math" and isinstance(problem.gold, list)
    rate = {} if problem.pass_rate is None else {"pass_rate": problem.pass_rate}
    return {"uid": problem.uid, **prompt, "answers" if many else "answer": problem.gold, "kind": problem.kind} | rate
