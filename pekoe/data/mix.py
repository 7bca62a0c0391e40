"""Reads, filters and mixes the problems that a recipe's `[data]` section names, and reports every row that is dropped.

In this order: malformed rows are dropped (or refused), then problems outside the pass rate, references that their judge
refuses, duplicates and conflicts, prompts that are too long, problems of evaluation sets, and near duplicates. An epoch
draws what remains by limit and weight. The result depends on the sources' content, the config and the seed alone.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pekoe.config.data import ProblemSection, SourceSection
from pekoe.core.errors import UserError
from pekoe.core.progress import NoProgress, ProgressReporter, track
from pekoe.core.types import Problem
from pekoe.data.formats import Seen, parse_problem
from pekoe.data.overlap import Contamination, gold_key, near_duplicates, prompt_key
from pekoe.data.problems import Unique
from pekoe.data.rows import MAX_NAMED, Malformed, cut, named, parse_rows, write_rows
from pekoe.data.sources import Place
from pekoe.data.tokenizer import Tokenizer

# Reasons for dropping a problem, as reports print them.
MALFORMED, TOO_LONG = "malformed", "too long"
DUPLICATE, CONFLICT, NEAR = "duplicate", "conflicting answers", "near duplicate"
CONTAMINATED, NOT_DRAWN, PASS_RATE = "contaminated", "not drawn", "pass rate"
REFERENCE = "with a reference that is refused"

# Returns why the references of problems are refused, by the problem's index; and is told where each problem stands.
RefusedReferences = Callable[[Sequence[Problem], Sequence[str]], Mapping[int, str]]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A problem that was read and not kept. `row` counts from 1 in its source; `detail` names the conflicting item."""

    source: str
    row: int
    uid: str | None
    reason: str
    detail: str


@dataclass(slots=True)
class DataReport:
    """Counts of rows read, kept and drawn, and every problem dropped."""

    num_read: Counter[str] = field(default_factory=Counter[str])  # by source
    num_kept: Counter[str] = field(default_factory=Counter[str])  # distinct problems, by source
    num_drawn: Counter[str] = field(default_factory=Counter[str])  # draws of an epoch, by source; repeats count
    dropped: list[Dropped] = field(default_factory=list[Dropped])
    refused: list[str] = field(default_factory=list[str])  # place and reason: kept for all that (data.check = "warn")
    notes: list[str] = field(default_factory=list[str])
    seen: dict[str, Seen] = field(default_factory=dict[str, Seen])  # what was understood, by source

    def summary(self) -> list[str]:
        """A line for each source that lost a problem or is drawn more than once, then the notes."""
        lines: list[str] = []
        for source, read in self.num_read.items():
            kept, drawn, skipped = self.num_kept[source], self.num_drawn[source], self.losses(source)
            line = f"{source}: kept {kept:,} of {read:,} problems"
            line += f"; skipped {skipped}" * bool(skipped) + f"; an epoch draws {drawn:,}" * (drawn != kept)
            if skipped or drawn != kept or len(self.num_read) > 1:
                lines.append(line)
        return lines + self.warnings() + self.notes

    def warnings(self) -> list[str]:
        """What is wrong with problems that were kept, and columns that are not read."""
        unread = [note for source, seen in self.seen.items() for note in seen.notes(source)]
        advice = "most verdicts on these problems will be FAULT; check = 'drop' leaves them out"
        what = "warning: references that their judge cannot read, or would not accept as answers"
        return unread + [f"{what}: {_some(self.refused)}\n{advice}"] * bool(self.refused)

    def losses(self, source: str) -> str:
        """How many problems of a source were dropped, by reason; empty if none."""
        reasons = Counter(drop.reason for drop in self.dropped if drop.source == source)
        return ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())

    def write(self, path: str | Path) -> None:
        """Write JSONL, one line for each problem dropped: `{"source", "row", "uid", "reason", "detail"}`."""
        write_rows(path, (asdict(drop) for drop in self.dropped))


_Drops = dict[int, tuple[str, str]]  # index of an item -> the reason to drop it, and the detail


@dataclass(frozen=True, slots=True)
class _Item:
    problem: Problem
    source: str
    row: int
    place: str  # file and line
    key: bytes  # of its prompt

    def __str__(self) -> str:
        return f"{self.source}, row {self.row} ({self.problem.uid})"


def gather_problems(
    data: ProblemSection,
    seed: int,
    tokenizer: Tokenizer | None,
    view: ProgressReporter | None = None,
    refused: RefusedReferences | None = None,
    keep_rows: bool = False,
) -> tuple[list[Problem], DataReport]:
    """Read the sources of `data`. Returns the problems that an epoch draws, and a report on the others.

    A problem of `data.sources` is named `source/uid`; one of `data.train` keeps its uid. A second copy (weight above
    1) is named `uid#2`. `tokenizer` measures prompts; with None, no prompt is too long. `view` shows progress.
    `refused` says which references their judges refuse; with None, all are taken. `keep_rows` fills `Problem.row`.

    Raises UserError for a source that cannot be used; unless `data.skip_malformed`, for the first malformed row or
    prompt longer than `data.max_prompt_tokens`; and with `data.check = "error"` for references that are refused.
    """
    report, view = DataReport(), view or NoProgress()
    sources = data.sources or (SourceSection(path=data.train or "", name=data.train or ""),)
    items = [item for source in sources for item in _read(source, data, report, keep_rows)]
    items = _without(items, _outside_pass_rate(items, data), report)
    if refused is not None:
        items = _without(items, _refused(items, data, refused, report), report)
    items = _without(items, _repeats(items, data, report), report)
    if tokenizer is not None:
        items = _without(items, _long_prompts(items, data, tokenizer, view), report)
    if data.decontaminate:
        items = _without(items, _contaminated(items, data, view), report)
    if data.dedup == "near":
        near = near_duplicates([item.problem for item in items], data.dedup_threshold, view)
        items = _without(items, {i: (NEAR, f"nearly {items[first]}") for i, first in near.items()}, report)
    left = Counter(item.source for item in items)
    for source in sources:
        if not left[source.name]:
            lost = report.losses(source.name)
            raise UserError(f"{source.path}: expected problems, got none that can be used" + f" ({lost})" * bool(lost))
    problems = [problem for source in sources for problem in _draw(source, items, seed, report)]
    twice = [uid for uid, number in Counter(problem.uid for problem in problems).items() if number > 1]
    if twice:
        raise UserError(f"data.sources: expected different uids, got {twice[0]!r} twice; give the sources other names")
    return problems, report


def _read(source: SourceSection, data: ProblemSection, report: DataReport, keep_rows: bool) -> list[_Item]:
    """The items of one source, each with a uid of its own. Rows that `where` leaves out do not count as read."""
    contents: dict[str, tuple[int, bytes]] = {}
    unique, seen = Unique(), report.seen.setdefault(source.name, Seen())

    def parse(value: Any, place: Place) -> _Item | None:
        matches = (str(value.get(column)) in values for column, values in source.where.items())
        if source.where and not (isinstance(value, dict) and all(matches)):
            return None
        row, columns = place.number, source.columns or data.columns
        problem = parse_problem(value, columns, seen, place.unit)
        key = prompt_key(problem)
        content = key + gold_key(problem.gold).encode()
        first, same = contents.setdefault(problem.uid, (row, content))
        if first == row or content != same or data.dedup == "off":
            unique.check(problem, place)
        else:
            report.dropped.append(Dropped(source.name, row, problem.uid, DUPLICATE, f"row {first}"))
            return None
        uid = f"{source.name}/{problem.uid}" if data.sources else problem.uid
        kept = {k: v for k, v in value.items() if not isinstance(v, Malformed)} if isinstance(value, dict) else value
        problem = replace(problem, uid=uid, row=kept if keep_rows else None)
        return _Item(problem, source.name, row, str(place), key)

    parsed, skipped = parse_rows(source.path, parse, data.skip_malformed)
    for column in list(seen.unread) if keep_rows else source.where:  # a reward may ask for any column
        seen.unread.pop(column, None)
    report.dropped.extend(Dropped(source.name, row, None, MALFORMED, why) for row, why in skipped)
    items = [item for item in parsed if item is not None]
    report.num_read[source.name] = len(items) + sum(drop.source == source.name for drop in report.dropped)
    return items


def _outside_pass_rate(items: list[_Item], data: ProblemSection) -> _Drops:
    """Items whose rate lies outside `data.pass_rate`. UserError for a problem without a rate."""
    drop: _Drops = {}
    low, high = data.pass_rate or (0, 1)
    for index, item in enumerate(items if data.pass_rate else ()):
        rate = item.problem.pass_rate
        if rate is None:
            raise UserError(
                f"data.pass_rate: expected problems that `pekoe curate` measured, got {item.place} "
                f"(uid {item.problem.uid!r}) without a rate"
            )
        if not low <= rate <= high:
            drop[index] = (PASS_RATE, f"{rate:.3g}")
    return drop


def _refused(items: list[_Item], data: ProblemSection, refused: RefusedReferences, report: DataReport) -> _Drops:
    """Items whose reference is refused, where `data.check` drops them. UserError where it is "error"."""
    why = refused([item.problem for item in items], [item.place for item in items])
    if not why or data.check == "drop":
        return {index: (REFERENCE, reason) for index, reason in why.items()}
    report.refused += [f"{items[index].place}: {reason}" for index, reason in sorted(why.items())]
    if data.check == "error":
        files = " ".join(dict.fromkeys(source.path for source in data.sources)) or data.train
        raise UserError(
            f"data.check: expected references that their judge can read and accepts as answers; of {len(items):,} it "
            f"refuses {_some(report.refused)}\nMend them, or set data.check = 'drop' (leave these out) or 'warn' (keep "
            f"them); pekoe eval has eval.check. All of them: pekoe verify --references {files}"
        )
    return {}


def _some(refused: list[str]) -> str:
    """Their number, and the first of them on a line each."""
    more = [f"and {len(refused) - MAX_NAMED:,} more"] * (len(refused) > MAX_NAMED)
    return "\n  ".join([f"{len(refused):,}:", *map(cut, refused[:MAX_NAMED]), *more])


def _repeats(items: list[_Item], data: ProblemSection, report: DataReport) -> _Drops:
    """All but the first of the items with one prompt; where their answers differ, `data.conflicts` decides."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[item.key].append(index)
    drop: _Drops = {}
    for group in groups.values():
        first = items[group[0]]
        other = next((items[i] for i in group if gold_key(items[i].problem.gold) != gold_key(first.problem.gold)), None)
        if other is None:
            drop |= dict.fromkeys(group[1:], (DUPLICATE, f"repeats {first}"))
        else:
            detail = f"{first} says {first.problem.gold!r}, {other} says {other.problem.gold!r}"
            drop |= dict.fromkeys(group[data.conflicts == "first" :], (CONFLICT, detail))
    if data.dedup != "off":
        return drop
    if drop:
        reasons = Counter(reason for reason, _ in drop.values())
        report.notes.append(
            f"{reasons[DUPLICATE]:,} problems repeat an earlier prompt, and {reasons[CONFLICT]:,} have a prompt that "
            'occurs with different answers: data.dedup = "exact" drops them'
        )
    return {}


def _long_prompts(items: list[_Item], data: ProblemSection, tokenizer: Tokenizer, view: ProgressReporter) -> _Drops:
    """Items whose prompt is too long, or cannot be written in the model's tokens."""
    drop: _Drops = {}
    limit = data.max_prompt_tokens
    for index, item in enumerate(track(view, "prompts", items)):
        try:
            size = len(tokenizer.encode_prompt(item.problem.messages))
        except UserError as error:
            drop[index] = (MALFORMED, str(error))
        else:
            if size > limit:
                drop[index] = (TOO_LONG, f"expected a prompt of at most {limit} tokens (max_prompt_tokens), got {size}")
    if drop and not data.skip_malformed:
        lines = {  # what the tokenizer says of many alike is said once
            i if reason == TOO_LONG else detail: f"{items[i].place}: problem {items[i].problem.uid!r}: {detail}"
            for i, (reason, detail) in reversed(drop.items())
        }
        raise UserError(
            named([*lines.values()][::-1], "prompts that cannot be used")
            + "\nRaise max_prompt_tokens where prompts are too long, or leave such problems out: skip_malformed = true"
        )
    return drop


def _contaminated(items: list[_Item], data: ProblemSection, view: ProgressReporter) -> _Drops:
    known = Contamination({path: _evaluation_set(path) for path in data.decontaminate}, data.ngram)
    overlaps = ((index, known.find(item.problem)) for index, item in enumerate(track(view, "overlap", items)))
    return {i: (CONTAMINATED, f"{hit[0]}: {hit[1]}") for i, hit in overlaps if hit}


def _evaluation_set(path: str) -> Sequence[Problem]:
    """Its problems; one that it has twice is no mistake here."""
    return parse_rows(path, lambda value, _: parse_problem(value), False)[0]


def _without(items: list[_Item], drop: _Drops, report: DataReport) -> list[_Item]:
    """The items whose index is not in `drop`. The others go into the report."""
    for index, (reason, detail) in sorted(drop.items()):
        item = items[index]
        report.dropped.append(Dropped(item.source, item.row, item.problem.uid, reason, detail))
    return [item for index, item in enumerate(items) if index not in drop]


def _draw(source: SourceSection, items: list[_Item], seed: int, report: DataReport) -> list[Problem]:
    """The problems that an epoch draws from one source by limit and weight: in file order, further copies last."""
    own = [item for item in items if item.source == source.name]
    bits = np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(source.name.encode())]))
    chosen = np.argsort(bits.random_raw(len(own)), kind="stable")[: source.limit].tolist()
    number = max(1, round(source.weight * len(chosen)))
    places = sorted((turn // len(chosen), chosen[turn % len(chosen)]) for turn in range(number))
    left_out: _Drops = dict.fromkeys(set(range(len(own))) - {i for _, i in places}, (NOT_DRAWN, "by limit or weight"))
    report.num_kept[source.name] = len(_without(own, left_out, report))
    report.num_drawn[source.name] = number
    problems = [(copy, own[index].problem) for copy, index in places]
    return [replace(problem, uid=f"{problem.uid}#{copy + 1}") if copy else problem for copy, problem in problems]
