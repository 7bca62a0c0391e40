"""Files of problems and of demonstrations (worked solutions), read and written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pekoe.core.types import Problem
from pekoe.data import rows
from pekoe.data.formats import parse_problem
from pekoe.data.rows import PLAIN, Malformed, Messages, Skipped, text_of


@dataclass(frozen=True, slots=True)
class ProblemFile:
    """The problems of a file, in its order, and the rows that were skipped, with their reasons."""

    problems: tuple[Problem, ...]
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt (as in `Problem.messages`) and the response to learn, without its stop token."""

    messages: Messages
    response: str


@dataclass(frozen=True, slots=True)
class DemonstrationFile:
    """The demonstrations of a file, in its order, and the rows that were skipped, with their reasons."""

    demonstrations: tuple[Demonstration, ...]
    skipped: tuple[Skipped, ...] = ()


def read_problems(path: str | Path, skip_malformed: bool = False) -> ProblemFile:
    """Read problems of any layout in `formats` from a file or a Hugging Face data set (see `rows.parse_rows`).

    A row without a uid is named by a hash of its content. `Problem.messages` is a conversation for the chat template,
    or one message of role `rows.PLAIN` or `rows.RAW`.

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

    return ProblemFile(*rows.parse_rows(path, parse, skip_malformed))


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems in the native layout, whole or not at all. `read_problems` gives the same ones back."""
    rows.write_rows(path, map(_problem_row, problems))


def read_demonstrations(path: str | Path, skip_malformed: bool = False) -> DemonstrationFile:
    """Read JSONL of `{"prompt" | "messages", "response"}`, or of `{"messages"}` that end with an assistant's turn.

    Raises UserError as `read_problems` does.
    """
    return DemonstrationFile(*rows.parse_rows(path, _parse_demonstration, skip_malformed))


def write_demonstrations(path: str | Path, demonstrations: Iterable[Demonstration]) -> None:
    """Write JSONL that `read_demonstrations` reads, whole or not at all."""
    rows.write_rows(path, ({**_prompt_columns(d.messages), "response": d.response} for d in demonstrations))


def _parse_demonstration(value: Any, _line: int) -> Demonstration:
    row = rows.expect(value, dict, "row")
    rows.closed(row, {"uid", "prompt", "messages", "response"})
    if "response" in row:
        messages = rows.prompt_of(row)
        if messages[-1]["role"] == "assistant":
            raise Malformed("'messages': expected the user's turn before 'response', got the assistant's")
        return Demonstration(messages, text_of(row, "response"))
    if "messages" not in row:
        raise Malformed("expected 'response' beside 'prompt', got none")
    *messages, last = rows.messages_of(row["messages"])
    if last["role"] != "assistant" or not messages:
        raise Malformed(f"'messages': expected a prompt and an assistant's turn at the end, got {last['role']!r}")
    return Demonstration(tuple(messages), text_of(last, "content"))


def _problem_row(problem: Problem) -> dict[str, Any]:
    key = "answers" if problem.kind == "math" and isinstance(problem.gold, list) else "answer"
    rate = {} if problem.pass_rate is None else {"pass_rate": problem.pass_rate}
    return {"uid": problem.uid, **_prompt_columns(problem.messages), key: problem.gold, "kind": problem.kind} | rate


def _prompt_columns(messages: Messages) -> dict[str, Any]:
    first = messages[0]
    return {"prompt": first["content"]} if first["role"] == PLAIN else {"messages": list(messages)}
