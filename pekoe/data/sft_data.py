"""Worked solutions, from which supervised fine-tuning learns before rewards can teach anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pekoe.data import rows
from pekoe.data.rows import PLAIN, Malformed, Messages, Skipped, text_of


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt (as in `Problem.messages`) and the response to learn, without its stop token."""

    messages: Messages
    response: str


@dataclass(frozen=True, slots=True)
class DemonstrationFile:
    """The demonstrations of a file, in its order, and the rows left out with their reasons."""

    demonstrations: tuple[Demonstration, ...]
    skipped: tuple[Skipped, ...] = ()


def read_demonstrations(path: str | Path, skip_malformed: bool = False) -> DemonstrationFile:
    """Read JSONL of `{"prompt" | "messages", "response"}`, or of `{"messages"}` that end with an assistant's turn.

    Raises UserError as `read_problems` does.
    """
    return DemonstrationFile(*rows.parse_rows(path, _parse, skip_malformed))


def write_demonstrations(path: str | Path, demonstrations: Iterable[Demonstration]) -> None:
    """Write JSONL that `read_demonstrations` reads. Whole or not at all."""
    rows.write_rows(path, (_row(demonstration) for demonstration in demonstrations))


def _parse(value: Any, _line: int) -> Demonstration:
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


def _row(demonstration: Demonstration) -> dict[str, Any]:
    first = demonstration.messages[0]
    plain = first["role"] == PLAIN
    prompt = {"prompt": first["content"]} if plain else {"messages": list(demonstration.messages)}
    return {**prompt, "response": demonstration.response}
