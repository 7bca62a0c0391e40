"""Evaluation: n samples a problem, judged; pass@1 with an interval over problems, pass@k, majority@k; by data set."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from pekoe import __version__
from pekoe.config.base import flatten
from pekoe.config.data import ProblemSection
from pekoe.config.recipes import EvalConfig
from pekoe.config.secrets import without_secrets
from pekoe.core.errors import UserError, nearest
from pekoe.core.loop import Rollouts
from pekoe.core.progress import ProgressReporter
from pekoe.core.statistics import paired
from pekoe.core.types import Draw, JudgedGroup, Problem, SamplingParams
from pekoe.core.words import counted
from pekoe.data.tokenizer import Tokenizer
from pekoe.run.build import check_context, open_model, open_problems, prepare, sampling_for
from pekoe.run.eval_metrics import majority_at_k, pass_at_1, pass_at_k, powers_up_to
from pekoe.run.judging import response_text
from pekoe.run.references import reference_check
from pekoe.run.run_dir import write_whole
from pekoe.run.sample_store import ProblemResult, sample_problems

_PROMPT = 500  # characters of a problem in results.json
MAX_TRUNCATION = 0.05  # above it a figure says more about the length limit than about the model


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Measured figures. `ci95` is the 95 % interval of pass@1 over problems."""

    pass_at_1: float
    ci95: tuple[float, float]
    num_problems: int
    samples_per_problem: int
    pass_at_k: dict[str, float]
    majority_at_k: dict[str, float]
    response_tokens: float
    truncation_rate: float
    unparsed_rate: float
    fault_rate: float
    score: float | None = None  # mean, of the verdicts that have one
    rates: tuple[float | None, ...] = ()  # of each problem, in their order; None: FAULTs alone
    examples: tuple[dict[str, Any], ...] = ()  # one response to each of the first problems
    by_set: dict[str, EvalResult] = field(default_factory=dict[str, "EvalResult"])  # where there are several

    def as_dict(self) -> dict[str, Any]:
        figures = {k: v for k, v in asdict(self).items() if k not in ("rates", "examples", "by_set")}
        if self.score is None:
            del figures["score"]
        return figures | ({"sets": {k: v.as_dict() for k, v in self.by_set.items()}} if self.by_set else {})


def result_of(rows: Sequence[ProblemResult], num_samples: int) -> EvalResult:
    """The figures of judged problems."""
    labels = [label for row in rows for label in row.labels]
    scores = [score for row in rows for score in row.scores if score is not None]
    mean, interval = pass_at_1(rows)
    sizes = powers_up_to(num_samples)
    return EvalResult(
        pass_at_1=mean,
        ci95=interval,
        num_problems=len(rows),
        samples_per_problem=num_samples,
        pass_at_k={str(k): value for k in sizes if not isnan(value := pass_at_k(rows, k))},
        majority_at_k={str(k): value for k in sizes if not isnan(value := majority_at_k(rows, k))},
        response_tokens=float(np.mean([tokens for row in rows for tokens in row.tokens])),
        truncation_rate=float(np.mean([reason == "length" for row in rows for reason in row.reasons])),
        unparsed_rate=labels.count("unparsed") / len(labels),
        fault_rate=labels.count("fault") / len(labels),
        score=float(np.mean(scores)) if scores else None,
        rates=tuple(None if row.pass_rate is None else round(row.pass_rate, 6) for row in rows),
    )


def evaluate(
    rollouts: Rollouts,
    problems: Sequence[Problem],
    params: SamplingParams,
    check: Callable[[list[JudgedGroup]], None],
) -> EvalResult:
    """Sample `params.n` responses to each problem and judge them. `check` raises where the verdicts cannot be used."""
    rollouts.put([Draw(problem, 0) for problem in problems], params)
    groups = rollouts.take(len(problems))
    check(groups)
    return result_of([ProblemResult.of(group) for group in groups], params.n)


def warn_truncation(rate: float, max_new_tokens: int, view: ProgressReporter) -> None:
    """Say so where more than 5 % of responses were cut."""
    if rate > MAX_TRUNCATION:
        view.say(
            f"warning: {rate:.1%} of the responses were cut at {max_new_tokens} tokens (max_new_tokens); they are "
            f"judged by what they had said until then: raise it, or look at whether they repeat themselves"
        )


def run_eval(config: EvalConfig, view: ProgressReporter) -> EvalResult:
    """`pekoe eval`: evaluate one model on one problem file, or several. With `out`, what an earlier run of the same
    recipe sampled is taken from there, and `results.json` is written."""
    prepare(config.run)
    model, tokenizer, _ = open_model(config.model)
    context = model.spec.max_positions
    sets = _open_sets(config, tokenizer, config.max_prompt_tokens or context - 1, view)
    problems = list(chain.from_iterable(sets.values()))
    prompt_tokens = config.max_prompt_tokens or max(len(tokenizer.encode_prompt(p.messages)) for p in problems)
    new_tokens = config.eval.max_new_tokens or max(1, context - prompt_tokens)
    check_context(model.spec, prompt_tokens, new_tokens)
    params = sampling_for(config.eval, new_tokens, tokenizer.stop_token_ids, config.run.seed)
    longest = prompt_tokens + new_tokens
    out = Path(config.out) if config.out else None
    about = {"max_prompt_tokens": prompt_tokens} | flatten(
        config.eval.model_dump(mode="json", exclude={"check", "data"}), "eval."
    )
    with _kept_on_failure() as log_dir:
        file = out / "samples.jsonl" if out else None
        rows, groups = sample_problems(config, model, tokenizer, problems, params, longest, file, about, log_dir, view)
    remaining = iter(rows)
    by_set = {name: result_of(list(islice(remaining, len(its))), params.n) for name, its in sets.items()}
    result = replace(
        result_of(rows, params.n),
        examples=_examples(tokenizer, groups),
        by_set=by_set if len(sets) > 1 else {},
    )
    warn_truncation(result.truncation_rate, new_tokens, view)
    if out:
        _write_results(out / "results.json", config, result, problems, rows)
    return result


def _open_sets(
    config: EvalConfig, tokenizer: Tokenizer, max_prompt_tokens: int, view: ProgressReporter
) -> dict[str, list[Problem]]:
    """The problems of each data set, by its name; where there are several, uids begin with that name."""
    paths = [config.eval.data] if isinstance(config.eval.data, str) else list(config.eval.data)
    sets: dict[str, list[Problem]] = {}
    for path in paths:
        name = Path(path).stem if len(paths) > 1 else ""
        if name in sets:
            raise UserError(f"eval.data: expected files of different names, got {name!r} twice")
        data = ProblemSection(
            train=path, columns=config.eval.columns, max_prompt_tokens=max_prompt_tokens, check=config.eval.check
        )
        refused = reference_check(config.verify, view, config.out)
        problems = open_problems(data, tokenizer, view, refused, bool(config.verify.rewards))
        sets[name] = [replace(p, uid=f"{name}/{p.uid}") for p in problems] if name else problems
    return sets


def _write_results(
    path: Path, config: EvalConfig, total: EvalResult, problems: Sequence[Problem], rows: Sequence[ProblemResult]
) -> None:
    results = {
        "schema": 1,
        "pekoe": __version__,
        "config": without_secrets(config.model_dump(mode="json", exclude_none=True)),
        "total": total.as_dict(),
        "problems": [
            {"uid": row.uid, "prompt": problem.messages[-1]["content"][:_PROMPT]}
            | {"num_correct": row.num_correct, "num_judged": row.num_judged}
            for problem, row in sorted(zip(problems, rows, strict=True), key=lambda pair: pair[1].uid)
        ],
    }
    write_whole(path, json.dumps(results, indent=1) + "\n")


def table_of(result: EvalResult) -> Table:
    """One line a data set, and one for all. Columns that are 0 everywhere are left out; it fits 80 columns."""
    sets = [*result.by_set.items(), ("all", result)]
    last = [k for k in result.pass_at_k if k != "1"][-1:]
    columns: dict[str, list[str]] = {
        "problems": [f"{one.num_problems:,}" for _, one in sets],
        "pass@1 [95 %]": [f"{one.pass_at_1:.1%} [{100 * one.ci95[0]:.1f}, {100 * one.ci95[1]:.1f}]" for _, one in sets],
    }
    for name, rates in (("pass", "pass_at_k"), ("maj", "majority_at_k")):
        columns |= {f"{name}@{k}": [_percent(getattr(one, rates).get(k)) for _, one in sets] for k in last}
    columns["tokens"] = [f"{one.response_tokens:.0f}" for _, one in sets]
    for name, key in (("cut", "truncation_rate"), ("unparsed", "unparsed_rate"), ("FAULT", "fault_rate")):
        if getattr(result, key):
            columns[name] = [_percent(getattr(one, key)) for _, one in sets]
    table = _plain_table(f"{counted(result.samples_per_problem, 'response')} a problem")
    table.add_column("set", overflow="fold", min_width=3)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip((name for name, _ in sets), *columns.values(), strict=True):
        table.add_row(*row)
    return table


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1%}"


def _plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))


def comparison_tables(found: dict[str, Any]) -> list[Table]:
    """What `compare` found, for a terminal: the means with the test, and the problems that moved most."""
    (low, high), p = found["ci95"], found["p_value"]
    means = _plain_table(f"the same {counted(found['num_problems'], 'problem')}, before and after")
    for name in ("before", "after", "difference [95 %], points", "better", "worse", "p"):
        means.add_column(name, justify="right", no_wrap=True)
    difference = f"{100 * found['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    p_value = "< 0.001" if p < 0.001 else f"{p:.2g}"
    counts = str(found["num_better"]), str(found["num_worse"])
    means.add_row(_percent(found["before"]), _percent(found["after"]), difference, *counts, p_value)
    if found["num_all_fault"]:
        left_out = counted(found["num_all_fault"], "problem")
        means.caption, means.caption_justify = f"left out: {left_out} that one side could not judge (FAULT)", "left"
    moved = _plain_table("what moved most")
    moved.add_column("problem", overflow="ellipsis", no_wrap=True, max_width=62)  # of 80 columns
    for name in ("before", "after"):
        moved.add_column(name, justify="right", no_wrap=True, min_width=7)
    for one in found["moved_most"]:
        text = " ".join(one["prompt"].split())
        moved.add_row(Text(text), *(_percent(one[name]) for name in ("before", "after")))
    return [means, moved] if found["moved_most"] else [means]


def compare(before: Path, after: Path) -> dict[str, Any]:
    """`pekoe eval --compare`: two `results.json` problem by problem. Raises UserError unless of the same problems.

    A problem of which either has FAULTs alone has no rate there: it is left out, and counted.
    """
    results = [_rows_of(path) for path in (before, after)]
    if results[0].keys() != results[1].keys():
        only = [sorted(results[i].keys() - results[1 - i].keys()) for i in (0, 1)]
        raise UserError(
            f"eval --compare: expected results on the same problems, got {len(only[0])} that only {before} has "
            f"and {len(only[1])} that only {after} has, such as {(only[0] + only[1])[0]!r}"
        )
    judged = [uid for uid in sorted(results[0]) if all(rows[uid]["num_judged"] for rows in results)]
    if not judged:
        raise UserError(f"eval --compare: expected problems that both have verdicts of, got none of {len(results[0])}")
    first, second = ([rows[uid]["num_correct"] / rows[uid]["num_judged"] for uid in judged] for rows in results)
    moves: list[dict[str, Any]] = [
        {"uid": uid, "prompt": results[0][uid].get("prompt", uid), "before": a, "after": b}
        for uid, a, b in zip(judged, first, second, strict=True)
        if a != b
    ]
    num_before, num_after = (sum(rows[uid]["num_judged"] for uid in judged) for rows in results)
    return {
        "before": float(np.mean(first)),
        "after": float(np.mean(second)),
        **paired(first, second, (num_before, num_after)),
        "num_all_fault": len(results[0]) - len(judged),
        "moved_most": sorted(moves, key=lambda one: -abs(one["after"] - one["before"]))[:10],
    }


def _rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """What `results.json` has of each problem."""
    path = path / "results.json" if path.is_dir() else path
    try:
        problems = json.loads(path.read_text(encoding="utf-8"))["problems"]
        for one in problems:
            counts = one["num_correct"], one["num_judged"]
            if type(one["uid"]) is not str or {*map(type, counts)} != {int} or not 0 <= counts[0] <= counts[1]:
                raise ValueError(f"a problem with {counts}")
        return {one["uid"]: one for one in problems}
    except FileNotFoundError:
        place = path.parent if path.name == "results.json" else path  # the `out` that was meant, or a file
        files = [p for p in place.parent.glob("*.json") if p.is_file()]
        near = [p.name for p in (*files, *(p.parent for p in place.parent.glob("*/results.json")))]
        raise UserError(f"{path}: expected results of pekoe eval, found none.{nearest(place.name, near)}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: expected results of pekoe eval, got something else: {error}") from None


@contextmanager
def _kept_on_failure() -> Iterator[Path]:
    """A directory for logs: removed in the end, unless the body fails and they may tell why."""
    path = Path(tempfile.mkdtemp(prefix="pekoe-eval-"))
    try:
        yield path
    except BaseException:
        with suppress(OSError):
            path.rmdir()  # an empty one tells nothing
        raise
    shutil.rmtree(path)


def _examples(tokenizer: Tokenizer, groups: Sequence[JudgedGroup]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "prompt": group.problem.messages[-1]["content"],
            "response": response_text(group.trajectories[0], tokenizer),
            "label": group.verdicts[0].label,
            "gold": group.problem.gold,
        }
        for group in groups
    )
