"""Curation: n responses to each problem from any engine, judged; problems are kept by their pass rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from pekoe.config.base import flatten
from pekoe.config.recipes import CurateConfig
from pekoe.core.errors import RunError, UserError
from pekoe.core.progress import ProgressReporter
from pekoe.core.types import Problem
from pekoe.core.words import counted
from pekoe.data import write_problems
from pekoe.data.mix import DataReport, Dropped, gather_problems
from pekoe.data.tokenizer import Tokenizer
from pekoe.run.build import check_context, open_model, prepare, sampling_for
from pekoe.run.evaluate import warn_truncation
from pekoe.run.references import reference_check
from pekoe.run.sample_store import ProblemResult, sample_problems


@dataclass(frozen=True, slots=True)
class Curated:
    """What became of the problems that were read and fit."""

    problems: tuple[Problem, ...]  # kept, each with its pass rate
    report: DataReport  # and what was dropped, before sampling and after
    histogram: dict[str, int]  # problems by the number of right responses
    truncation_rate: float = 0.0


def run_curate(config: CurateConfig, view: ProgressReporter) -> Curated:
    """`pekoe curate`: `out/problems.jsonl` with the problems kept, and `out/dropped.jsonl` with the others.

    What an earlier run of the same recipe sampled is taken from `out/samples.jsonl`.
    """
    prepare(config.run)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: expected a directory that can be written, got {out}: {error.strerror}") from None
    kept = out / "problems.jsonl"
    files = [config.data.train or "", *(source.path for source in config.data.sources)]
    if kept.resolve() in map(Path.resolve, map(Path, files)):
        raise UserError(f"out: expected another directory than that of the data, of which {kept} would be replaced")
    tokenizer = Tokenizer.load(Path(config.model.path)).with_template(config.model.template)
    refused = reference_check(config.verify, view, config.out)
    keep_rows = bool(config.verify.rewards)
    problems, report = gather_problems(config.data, config.run.seed, tokenizer, view, refused, keep_rows)
    for line in report.summary():
        view.say(line)
    curated = Curated(tuple(problems), report, {})
    if config.curate.samples:
        rows = _sample(config, problems, view)
        curated = sort_out(problems, rows, config, report)
        warn_truncation(curated.truncation_rate, config.curate.max_new_tokens, view)
    report.write(out / "dropped.jsonl")
    if not curated.problems:
        raise RunError(
            f"expected problems to keep, got none of {len(problems)}; the pass rates: {curated.histogram}; "
            f"{out / 'dropped.jsonl'} says of each why"
        )
    write_problems(kept, curated.problems)
    return curated


def _sample(config: CurateConfig, problems: Sequence[Problem], view: ProgressReporter) -> list[ProblemResult]:
    section, longest = config.curate, config.data.max_prompt_tokens + config.curate.max_new_tokens
    model, tokenizer, _ = open_model(config.model)
    check_context(model.spec, config.data.max_prompt_tokens, section.max_new_tokens)
    params = sampling_for(section, section.max_new_tokens, tokenizer.stop_token_ids, config.run.seed)
    about = flatten(section.model_dump(mode="json", exclude={"drop_all_right", "drop_all_wrong"}), "curate.")
    file, logs = Path(config.out) / "samples.jsonl", Path(config.out) / "logs"
    return sample_problems(config, model, tokenizer, problems, params, longest, file, about, logs, view)[0]


def sort_out(
    problems: Sequence[Problem], rows: Sequence[ProblemResult], config: CurateConfig, report: DataReport
) -> Curated:
    """Keep problems by their pass rates; those dropped are added to `report`."""
    kept: list[Problem] = []
    reasons_to_drop: dict[float | None, str] = {None: "no verdict"}
    if config.curate.drop_all_right:
        reasons_to_drop[1.0] = "all right"
    if config.curate.drop_all_wrong:
        reasons_to_drop[0.0] = "all wrong"
    for number, (problem, row) in enumerate(zip(problems, rows, strict=True), 1):
        reason = reasons_to_drop.get(row.pass_rate)
        if reason is None:
            kept.append(replace(problem, pass_rate=row.pass_rate))
        else:
            detail = f"{row.num_correct} of {row.num_judged}"
            report.dropped.append(Dropped("curate", number, problem.uid, reason, detail))
    counts = Counter(row.num_correct for row in rows)
    reasons = [reason for row in rows for reason in row.reasons]
    return Curated(
        tuple(kept),
        report,
        {f"{n}/{config.curate.samples}": counts[n] for n in range(config.curate.samples + 1)},
        reasons.count("length") / max(1, len(reasons)),
    )


def table_of(curated: Curated) -> Table:
    """The pass rates as a histogram, and what was dropped."""
    table = Table(title=f"{counted(len(curated.problems), 'problem')} kept")
    table.add_column("right")
    table.add_column("problems", justify="right")
    table.add_column("")
    most = max(curated.histogram.values(), default=0) or 1
    for name, number in curated.histogram.items():
        table.add_row(name, f"{number:,}", "█" * round(40 * number / most))
    for reason, number in Counter(drop.reason for drop in curated.report.dropped).items():
        table.add_row(f"dropped: {reason}", f"{number:,}", "")
    return table
