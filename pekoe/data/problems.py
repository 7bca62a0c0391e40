"""Files of problems and of demonstrations (worked solutions), read and written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pekoe.core.types import Problem
from pekoe.data import rows
from pekoe.data.formats import PROMPTS, Seen, pair_of, parse_problem, prompt_text
from pekoe.data.rows import MAX_CHARS, PLAIN, Malformed, Messages, Row, Skipped, text_of
from pekoe.data.sources import Place

RESPONSES = ("response", "completion", "output", "solution", "answer")
# ShareGPT's names of roles, and those of chat templates.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"} | {role: role for role in rows.CHAT_ROLES}


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
    places: tuple[Place, ...] = ()  # of each demonstration
    seen: Seen = field(default_factory=Seen)


def read_problems(
    path: str | Path, skip_malformed: bool = False, columns: Mapping[Any, str] | None = None
) -> ProblemFile:
    """Read problems of any layout in `formats`, or by `columns`, from any source that `open_source` reads.

    A row without a uid is named by a hash of its content. `Problem.messages` is a conversation for the chat template,
    or one message of role `rows.PLAIN` or `rows.RAW`.

    Raises UserError, naming file and line, for malformed rows and a second row of the same uid (with `skip_malformed`
    these are skipped and reported), and for a source that is missing, unreadable or without a usable row.
    """
    unique = Unique()

    def parse(value: Any, place: Place) -> Problem:
        problem = parse_problem(value, columns)
        unique.check(problem, place)
        return problem

    return ProblemFile(*rows.parse_rows(path, parse, skip_malformed))


class Unique:
    """The uids of a source's problems so far, with the rows that have them."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}

    def check(self, problem: Problem, place: Place) -> None:
        """Raise Malformed where an earlier row has the problem's uid, and say how to mend it."""
        first = self._first.setdefault(problem.uid, place.number)
        if first == place.number:
            return
        if not re.fullmatch("[0-9a-f]{16}", problem.uid):  # not a hash of the content
            raise Malformed(f"uid {problem.uid!r}: expected a name of its own, got that of row {first}")
        raise Malformed(
            f"expected another problem, got that of row {first} again, prompt and answer: leave it out "
            "(data.dedup = 'exact' does so), or give each row a uid"
        )


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems in the native layout, whole or not at all. `read_problems` gives the same ones back."""
    rows.write_rows(path, map(_problem_row, problems))


def read_demonstrations(
    path: str | Path, skip_malformed: bool = False, columns: Mapping[Any, str] | None = None
) -> DemonstrationFile:
    """Read worked solutions from any source that `open_source` reads: a prompt and a response by `columns`, or by
    their columns' names (`PROMPTS`, `RESPONSES`), or messages that end with an assistant's turn; ShareGPT's, too.

    Raises UserError as `read_problems` does.
    """
    seen = Seen()

    def parse(value: Any, place: Place) -> tuple[Demonstration, Place]:
        row = Row(rows.expect(value, dict, "row"))
        row.take(columns or {})
        layout, demonstration = _parse_demonstration(row)
        if (size := sum(len(m["content"]) for m in demonstration.messages)) > MAX_CHARS:
            raise Malformed(f"prompt: expected at most {MAX_CHARS:,} characters, got {size:,}")
        seen.add(layout, row, place.unit)
        return demonstration, place

    read, skipped = rows.parse_rows(path, parse, skip_malformed)
    demonstrations, places = zip(*read, strict=True)
    return DemonstrationFile(demonstrations, skipped, places, seen)


def write_demonstrations(path: str | Path, demonstrations: Iterable[Demonstration]) -> None:
    """Write JSONL that `read_demonstrations` reads, whole or not at all."""
    rows.write_rows(path, ({**_prompt_columns(d.messages), "response": d.response} for d in demonstrations))


def _parse_demonstration(row: Row) -> tuple[str, Demonstration]:
    """The name of its layout, and what it shows."""
    if "conversations" in row:
        turns = rows.expect(row["conversations"], list, "'conversations'")
        return "ShareGPT", _last_turn([_turn(turn) for turn in turns], "conversations")
    if "messages" in row and "response" not in row:
        return "messages", _last_turn(rows.expect(row["messages"], list, "'messages'"), "messages")
    prompt, answer = pair_of(row, PROMPTS, RESPONSES)
    messages, response = prompt_text(row, prompt), row[answer]
    if messages[-1]["role"] == "assistant":
        raise Malformed(f"{prompt!r}: expected the user's turn before {answer!r}, got the assistant's")
    if isinstance(response, list):  # TRL's conversations: what follows the prompt
        return f"{prompt}, {answer}", _last_turn([*messages, *response], answer)
    return f"{prompt}, {answer}", Demonstration(messages, text_of(row, answer))


def _turn(turn: Any) -> Any:
    """A turn of ShareGPT's (`from`, `value`) as a message."""
    if isinstance(turn, dict) and "from" in turn:
        return {"role": _ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
    return turn


def _last_turn(turns: list[Any], column: str) -> Demonstration:
    """The last turn of a conversation, which must be the assistant's, after those before it."""
    *messages, last = rows.messages_of(turns)
    if last["role"] != "assistant" or not messages:
        raise Malformed(f"{column!r}: expected a prompt and an assistant's turn at the end, got {last['role']!r}")
    return Demonstration(tuple(messages), rows.expect(last["content"], str, "'content'"))


def _problem_row(problem: Problem) -> dict[str, Any]:
    key = "answers" if problem.kind == "math" and isinstance(problem.gold, list) else "answer"
    rate = {} if problem.pass_rate is None else {"pass_rate": problem.pass_rate}
    return {"uid": problem.uid, **_prompt_columns(problem.messages), key: problem.gold, "kind": problem.kind} | rate


def _prompt_columns(messages: Messages) -> dict[str, Any]:
    first = messages[0]
    return {"prompt": first["content"]} if first["role"] == PLAIN else {"messages": list(messages)}
