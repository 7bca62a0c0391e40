"""Reads a run directory for the report: measurements, the outcomes of prompts, and a selection of responses."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from pekoe.config.base import read_toml
from pekoe.config.secrets import without_secrets
from pekoe.core.errors import UserError
from pekoe.core.journal import Event, read_lines
from pekoe.core.records import read_records, steps_recorded
from pekoe.core.words import counted

Decode = Callable[[Sequence[int]], str]
_MOST_TOKENS = 1500  # shown of a response: half from its beginning, half from its end
_FULL_TEXT = 6000  # characters shown of a response without tokens
_QUESTION = 300  # characters of a question that names a group
_MARKERS = re.compile(r"<[|｜][^<>]{1,40}[|｜]>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>")


@dataclass(slots=True)
class History:
    """The contents of a run directory that the report shows."""

    path: Path
    config: dict[str, Any]  # config.toml, without secrets
    events: list[Event]  # of the journal
    ledger: dict[str, int]  # outcome of a prompt -> number of prompts
    responses: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # see `sample_responses`
    pieces: dict[int, str] | None = None  # token id -> its text, for the tokens of `responses`; None: no tokenizer
    left_out: str = ""  # a sentence on the responses that are not shown
    label: str = ""  # a name that tells it from other runs of one page

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
        return self.label or self.path.name


def read_history(path: Path, decode: Decode | None = None, max_bytes: int = 2_500_000) -> History:
    """Read a run directory. Raises UserError for a path that is none, and for a journal or ledger that is damaged.

    Args:
        decode: text of token ids; without it, responses have no tokens, only their text.
        max_bytes: approximate size of the responses to keep.
    """
    journal = path / "journal.jsonl"
    if not journal.is_file():
        raise UserError(f"{path}: expected a run directory with journal.jsonl in it, got {_description_of(path)}")
    config: dict[str, Any] = {}
    if (path / "config.toml").is_file():
        config = without_secrets(read_toml(path / "config.toml"))
    ledger: Counter[str] = Counter()
    with drawn(path):
        if (path / "ledger.jsonl").is_file():
            for line in read_lines(path / "ledger.jsonl"):
                ledger[line["outcome"] + (f": {line['reason']}" if line.get("reason") else "")] += 1
        events = [event for event in read_lines(journal) if "event" in event]
        history = History(path, config, events, dict(ledger.most_common()))
        sample_responses(history, decode, max_bytes)
    return history


@contextmanager
def drawn(*paths: Path) -> Generator[None]:
    """UserError where what is read and drawn of these run directories lacks something: a line is damaged, or another
    version's."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        names = ", ".join(str(path) for path in paths)
        raise UserError(
            f"{names}: cannot be shown ({type(error).__name__}: {error}): a line of journal.jsonl or ledger.jsonl, or "
            "config.toml, is damaged or another version's"
        ) from None


def _description_of(path: Path) -> str:
    if not path.is_dir():
        return "a file" if path.exists() else "nothing there"
    runs = sorted(file.parent.name for file in path.glob("*/journal.jsonl"))
    return f"the runs {', '.join(runs)} below it" if runs else "a directory without one"


def sample_responses(history: History, decode: Decode | None, max_bytes: int) -> None:
    """Select whole groups that fit in `max_bytes`: of the first and the last step, then of steps evenly between."""
    steps = _evenly(steps_recorded(history.path))
    kept: list[dict[str, Any]] = []
    num_kept, num_seen = 0, 0
    damaged: list[UserError] = []
    for place, step in enumerate(steps):
        share = max_bytes / (len(steps) - place)  # an equal share for each step still to come
        try:
            records = read_records(history.path, step)
        except UserError as error:
            damaged.append(error)
            continue
        groups = [list(lines) for _, lines in groupby(records, itemgetter("group"))]
        num_seen += len(groups)
        for number, group in enumerate(groups):
            lines = [_shown(line, step, decode is not None) for line in group]
            size = sum(len(json.dumps(line)) for line in lines)
            if number and size > share:
                break
            share, max_bytes, num_kept = share - size, max_bytes - size, num_kept + 1
            kept += lines
        if max_bytes < 0:
            break
    history.responses = sorted(kept, key=itemgetter("step", "group", "sample"))
    questions = questions_of({line["prompt"] for line in kept})
    for line in kept:
        line["question"] = questions[line["prompt"]]
    if decode is not None:
        used = {token for line in kept for token in line["tokens"]}
        history.pieces = {token: decode([token]) for token in sorted(used)}
    num_steps = len({line["step"] for line in kept})
    if num_kept < num_seen or num_steps < len(steps) - len(damaged):
        history.left_out = (
            f"{counted(num_kept, 'group')} of {num_steps} of {counted(len(steps), 'step')} are here, to keep this file "
            f"small; "
            f"all of them are in {history.path}/rollouts"
        )
    if damaged:
        history.left_out += (
            f"{'; ' if history.left_out else ''}{counted(len(damaged), 'step')} cannot be read: {damaged[0]}"
        )


def questions_of(prompts: Collection[str]) -> dict[str, str]:
    """Each prompt's text without a chat's markers, and without the lines that all begin or end with: a name for it."""
    lines = {prompt: [line for line in _MARKERS.sub("\n", prompt).splitlines() if line.strip()] for prompt in prompts}
    shortest = min(map(len, lines.values()), default=0)
    begin, end = 0, 0
    if len(lines) > 1:
        while begin < shortest - 1 and len({each[begin] for each in lines.values()}) == 1:
            begin += 1
        while end < shortest - 1 - begin and len({each[-1 - end] for each in lines.values()}) == 1:
            end += 1
    return {prompt: " ".join(each[begin : len(each) - end])[:_QUESTION] for prompt, each in lines.items()}


def _evenly(steps: list[int]) -> list[int]:
    """The first, the last, the middle, then the middles between: any prefix covers the run evenly."""
    halvings = [2**k for k in range(len(steps).bit_length() + 1) if steps]
    places = [i * (len(steps) - 1) // parts for parts in halvings for i in range(parts + 1)]
    return [steps[place] for place in dict.fromkeys(places)]


def _shown(line: dict[str, Any], step: int, by_token: bool) -> dict[str, Any]:
    """The fields of a response that the page shows."""
    names = ("uid", "draw", "group", "sample", "label", "extracted", "why", "gold", "reward", "finish_reason", "prompt")
    fields = {name: line[name] for name in names}
    tokens, logprobs, text = line["tokens"].tolist(), [_rounded(x, 3) for x in line["logprobs"].tolist()], line["text"]
    fields |= {"step": step, "length": len(tokens)}
    if turns := line.get("turns"):  # what stands before each answer but the first, by the index of its first token
        starts = np.cumsum([own for _, own in line["spans"]])[:-1].tolist()
        fields["between"] = [[at, context] for at, (context, _) in zip(starts, turns[1:], strict=True)]
        text = "".join([text, *(part for turn in turns[1:] for part in turn)])
    if line.get("branch"):
        fields["branch"] = line["branch"]
    fields |= {name: None if line[name] is None else _rounded(line[name], 4) for name in ("advantage", "reward")}
    if len(tokens) > _MOST_TOKENS:
        half = _MOST_TOKENS // 2
        fields["cut"] = len(tokens) - 2 * half
        tokens, logprobs = tokens[:half] + tokens[-half:], logprobs[:half] + logprobs[-half:]
    if by_token:
        return fields | {"tokens": tokens, "logprobs": logprobs}
    if len(text) > _FULL_TEXT:
        text = f"{text[: _FULL_TEXT // 2]} … {text[-_FULL_TEXT // 2 :]}"
    return fields | {"text": text}


def _rounded(value: float, digits: int) -> float | str:
    """A number that JSON has; "NaN", "inf" or "-inf" in place of one that it has not."""
    return round(value, digits) if math.isfinite(value) else "NaN" if math.isnan(value) else str(value)
