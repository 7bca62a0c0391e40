"""Reads a run directory for the report: measurements, the outcomes of prompts, and a selection of responses."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pekoe.core.errors import UserError
from pekoe.core.journal import Event, read_lines
from pekoe.core.records import read_records, steps_recorded

Decode = Callable[[Sequence[int]], str]
_MOST_TOKENS = 1500  # shown of a response: half from its beginning, half from its end
_FULL_TEXT = 6000  # characters shown of a response without tokens


@dataclass(slots=True)
class History:
    """The contents of a run directory that the report shows."""

    path: Path
    config: dict[str, Any]  # config.toml
    events: list[Event]  # of the journal
    ledger: dict[str, int]  # outcome of a prompt -> number of prompts
    responses: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # see `sample_responses`
    pieces: dict[int, str] | None = None  # token id -> its text, for the tokens of `responses`; None: no tokenizer
    left_out: str = ""  # a sentence on the responses that are not shown

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def steps(self) -> list[Event]:
        return self.of("step")

    @staticmethod
    def seconds_of(step: Event) -> float:
        return step.get("step_s") or sum(step["seconds"].values())

    @property
    def name(self) -> str:
        return self.path.name


def read_history(path: Path, decode: Decode | None = None, max_bytes: int = 2_500_000) -> History:
    """Read a run directory. Raises UserError for a path that is none.

    Args:
        decode: text of token ids; without it, responses have no tokens, only their text.
        max_bytes: approximate size of the responses to keep.
    """
    journal = path / "journal.jsonl"
    if not journal.is_file():
        raise UserError(f"{path}: expected a run directory with journal.jsonl in it, got {_description_of(path)}")
    config: dict[str, Any] = {}
    if (path / "config.toml").is_file():
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    ledger: Counter[str] = Counter()
    if (path / "ledger.jsonl").is_file():
        for line in read_lines(path / "ledger.jsonl"):
            ledger[line["outcome"] + (f": {line['reason']}" if line.get("reason") else "")] += 1
    history = History(path, config, list(read_lines(journal)), dict(ledger.most_common()))
    sample_responses(history, decode, max_bytes)
    return history


def _description_of(path: Path) -> str:
    if not path.exists():
        return "nothing there"
    runs = sorted(file.parent.name for file in path.glob("*/journal.jsonl")) if path.is_dir() else []
    return f"the runs {', '.join(runs)} below it" if runs else "a directory without one" if path.is_dir() else "a file"


def sample_responses(history: History, decode: Decode | None, max_bytes: int) -> None:
    """Select whole groups that fit in `max_bytes`: of the first and the last step, then of steps evenly between."""
    steps = steps_recorded(history.path)
    used: set[int] = set()
    size, kept, seen = 0, 0, 0
    order = list(_evenly(steps))
    for place, step in enumerate(order):
        groups = _groups(history.path, step)
        seen += len(groups)
        room = (max_bytes - size) / max(1, len(order) - place)  # an equal share for each step still to come
        spent = 0.0
        for group in groups:
            lines = [_shown(line, step, decode is not None) for line in group]
            cost = sum(len(json.dumps(line)) for line in lines)
            if spent + cost > room and spent:
                break
            spent += cost
            size += cost
            kept += 1
            history.responses += lines
            used.update(token for line in lines for token in line.get("tokens", ()))
        if size > max_bytes:
            break
    if decode is not None:
        history.pieces = {token: decode([token]) for token in sorted(used)}
    num_steps = len({line["step"] for line in history.responses})
    history.responses.sort(key=lambda line: (line["step"], line["group"], line["sample"]))
    if kept < seen or num_steps < len(steps):
        history.left_out = (
            f"{kept} groups of {num_steps} of {len(steps)} steps are here, to keep this file small; "
            f"all of them are in {history.path}/rollouts"
        )


def _evenly(steps: list[int]) -> Iterator[int]:
    """The first, the last, the middle, then the middles between: any prefix covers the run evenly."""
    if not steps:
        return
    seen: set[int] = set()
    for parts in [1, *(2**k for k in range(1, 20))]:
        for i in range(parts + 1):
            place = i * (len(steps) - 1) // parts
            if place not in seen:
                seen.add(place)
                yield steps[place]
        if len(seen) == len(steps):
            return


def _groups(path: Path, step: int) -> list[list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for line in read_records(path, step):
        groups.setdefault(line["group"], []).append(line)
    return list(groups.values())


def _shown(line: dict[str, Any], step: int, by_token: bool) -> dict[str, Any]:
    """The fields of a response that the page shows."""
    names = ("uid", "draw", "group", "sample", "label", "extracted", "why", "gold", "reward", "finish_reason", "prompt")
    fields = {name: line[name] for name in names}
    tokens, logprobs = line["tokens"].tolist(), [round(x, 3) for x in line["logprobs"].tolist()]
    advantage = line["advantage"]
    fields |= {"step": step, "length": len(tokens), "advantage": None if advantage is None else round(advantage, 4)}
    if len(tokens) > _MOST_TOKENS:
        half = _MOST_TOKENS // 2
        fields["cut"] = len(tokens) - 2 * half
        tokens, logprobs = tokens[:half] + tokens[-half:], logprobs[:half] + logprobs[-half:]
    if by_token:
        return fields | {"tokens": tokens, "logprobs": logprobs}
    text = line["text"]
    return fields | {
        "text": text if len(text) <= _FULL_TEXT else f"{text[: _FULL_TEXT // 2]} … {text[-_FULL_TEXT // 2 :]}"
    }
