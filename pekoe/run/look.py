"""`pekoe data`: how a file is read, before a model learns from it; with a model, as the model will see it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pekoe.config.base import MAX_COUNT
from pekoe.config.recipes import DataConfig, DemonstrationsConfig, ModelSection
from pekoe.core.errors import UserError
from pekoe.core.progress import ProgressReporter
from pekoe.core.types import Problem
from pekoe.data.formats import Seen
from pekoe.data.mix import gather_problems
from pekoe.data.problems import read_demonstrations
from pekoe.data.rows import Messages, named
from pekoe.data.sources import Place
from pekoe.data.tokenizer import Tokenizer
from pekoe.run.judging import without_judge
from pekoe.run.references import reference_check

NUM_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Look:
    """What is shown of a source, paragraph by paragraph, and how many of its rows cannot be used."""

    paragraphs: tuple[str, ...]
    num_bad: int

    def __str__(self) -> str:
        return "\n\n".join(self.paragraphs)


def look_at_problems(config: DataConfig, view: ProgressReporter) -> Look:
    """Read problems as `pekoe rl` would, and say what is wrong with which rows in place of stopping.

    Raises UserError where no row can be used, and as `pekoe rl` for sources and settings that cannot.
    """
    changes = {"skip_malformed": True, "check": "warn", "max_prompt_tokens": MAX_COUNT}
    data, tokenizer = config.data.model_copy(update=changes), _tokenizer(config.model)

    def refused(problems: Sequence[Problem], places: Sequence[str]) -> dict[int, str]:
        bad = without_judge(problems, config.verify)
        rest = [index for index in range(len(problems)) if index not in bad]
        check = reference_check(config.verify, view)
        return bad | {rest[i]: why for i, why in check([problems[i] for i in rest], [places[i] for i in rest]).items()}

    problems, report = gather_problems(data, 0, tokenizer, view, refused)
    kinds = Counter(problem.kind for problem in problems)
    prompts = [_prompt(problem.messages, tokenizer) for problem in problems]
    lines = [
        *_layouts(report.seen, report.num_read),
        f"kinds: {', '.join(f'{kind} ({number:,})' for kind, number in kinds.most_common())}",
        _sizes("prompts", [size for _, size in prompts], tokenizer),
        *report.notes,
    ]
    shown = zip(problems[:NUM_EXAMPLES], prompts, strict=False)
    examples = [f"--- {problem.uid}\n{text}\n--- answer: {problem.gold!r}" for problem, (text, _) in shown]
    bad = [
        f"{Place(drop.source, report.seen[drop.source].unit, drop.row)}: {drop.reason}: {drop.detail}"
        for drop in report.dropped
    ]
    return _look(lines, examples, bad + report.refused)


def look_at_demonstrations(config: DemonstrationsConfig) -> Look:
    """As `look_at_problems`, of worked solutions for `pekoe sft`."""
    tokenizer, source = _tokenizer(config.model), config.data.train
    file = read_demonstrations(source, skip_malformed=True, columns=config.data.columns)
    bad = [f"{Place(source, file.seen.unit, row)}: {why}" for row, why in file.skipped]
    prompts: list[int] = []
    responses: list[int] = []
    examples: list[str] = []
    for each, place in zip(file.demonstrations, file.places, strict=True):
        try:
            (prompt, size), response = _prompt(each.messages, tokenizer), _size(each.response, tokenizer)
        except UserError as error:
            bad.append(f"{place}: {error}")
            continue
        prompts.append(size)
        responses.append(response)
        if len(examples) < NUM_EXAMPLES:
            examples.append(f"--- {place}\n{prompt}\n--- response\n{each.response}")
    lines = _layouts({source: file.seen}, {source: len(file.demonstrations) + len(file.skipped)})
    lines += [_sizes("prompts", prompts, tokenizer), _sizes("responses", responses, tokenizer)]
    return _look(lines, examples, bad)


def _look(lines: Sequence[str], examples: Sequence[str], bad: list[str]) -> Look:
    faults = [named(bad, "rows that cannot be used")] if bad else []
    return Look(("\n".join(line for line in lines if line), *examples, *faults), len(bad))


def _tokenizer(model: ModelSection | None) -> Tokenizer | None:
    return None if model is None else Tokenizer.load(Path(model.path)).with_template(model.template)


def _layouts(seen: Mapping[str, Seen], num_read: Mapping[str, int]) -> list[str]:
    lines: list[str] = []
    for source, its in seen.items():
        layouts = ", ".join(f"{layout} ({number:,})" for layout, number in its.layouts.most_common(10))
        lines += [f"{source}: {num_read[source]:,} rows; layout: {layouts}", *its.notes(source)]
    return lines


def _prompt(messages: Messages, tokenizer: Tokenizer | None) -> tuple[str, int]:
    """A prompt as the model will see it, and its tokens; without a model, its messages and their characters."""
    if tokenizer is not None:
        tokens = tokenizer.encode_prompt(messages)
        return tokenizer.decode(tokens), len(tokens)
    one = len(messages) == 1
    text = "\n".join(message["content"] if one else f"{message['role']}: {message['content']}" for message in messages)
    return text, len(text)


def _size(text: str, tokenizer: Tokenizer | None) -> int:
    return len(text) if tokenizer is None else len(tokenizer.encode(text))


def _sizes(what: str, sizes: Sequence[int], tokenizer: Tokenizer | None) -> str:
    """For example: prompts: 12 to 345 tokens, median 56, 95 % at most 210."""
    if not sizes:
        return ""
    unit = "tokens" if tokenizer is not None else "characters (--model DIR counts tokens)"
    low, median, most, high = np.quantile(sizes, [0, 0.5, 0.95, 1], method="higher")
    return f"{what}: {low:,} to {high:,} {unit}, median {median:,}, 95 % at most {most:,}"
