"""Evaluation: n samples a problem, judged; pass@1 with an interval over problems, pass@k, majority@k; by data set."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

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
from pekoe.data.tokenizer import Tokenizer
from pekoe.run.build import check_context, open_model, open_problems, prepare, sampling_for
from pekoe.run.eval_metrics import majority_at_k, pass_at_1, pass_at_k, powers_up_to
from pekoe.run.judging import response_text
from pekoe.run.references import reference_check
from pekoe.run.rollouts import check_faults
from pekoe.run.run_dir import write_whole
from pekoe.run.sample_store import ProblemResult, sample_problems

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
    rollouts: Rollouts, problems: Sequence[Problem], params: SamplingParams, max_fault_rate: float = 0.05
) -> EvalResult:
    """Sample `params.n` responses to each problem and judge them."""
    rollouts.put([Draw(problem, 0) for problem in problems], params)
    groups = rollouts.take(len(problems))
    check_faults((verdict for group in groups for verdict in group.verdicts), max_fault_rate)
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
        _write_results(out / "results.json", config, result, rows)
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


def _write_results(path: Path, config: EvalConfig, total: EvalResult, rows: Sequence[ProblemResult]) -> None:
    results = {
        "schema": 1,
        "pekoe": __version__,
        "config": without_secrets(config.model_dump(mode="json", exclude_none=True)),
        "total": total.as_dict(),
        "problems": [
            {"uid": row.uid, "num_correct": row.num_correct, "num_judged": row.num_judged}
            for row in sorted(rows, key=lambda row: row.uid)
        ],
    }
    write_whole(path, json.dumps(results, indent=1) + "\n")


def table_of(result: EvalResult) -> Table:
    """One line a data set, and one for all."""
    table = Table(title=f"{result.samples_per_problem} responses a problem")
    sizes = [k for k in result.pass_at_k if k != "1"]
    wide = sizes[-1:]
    for name in ("set", "problems", "pass@1", "95 %", *(f"pass@{k}" for k in wide), *(f"maj@{k}" for k in wide)):
        table.add_column(name, justify="left" if name == "set" else "right")
    scored = ["score"] if result.score is not None else []
    for name in (*scored, "tokens", "cut", "unparsed", "fault"):
        table.add_column(name, justify="right")
    for name, one in [*result.by_set.items(), ("all", result)]:
        table.add_row(
            name,
            str(one.num_problems),
            f"{one.pass_at_1:.1%}",
            f"{one.ci95[0]:.1%} to {one.ci95[1]:.1%}",
            *(f"{rates[k]:.1%}" if k in rates else "" for rates in (one.pass_at_k, one.majority_at_k) for k in wide),
            *([f"{one.score:.3f}" if one.score is not None else ""] if scored else []),
            f"{one.response_tokens:.0f}",
            f"{one.truncation_rate:.1%}",
            f"{one.unparsed_rate:.1%}",
            f"{one.fault_rate:.1%}",
        )
    return table


def compare(before: Path, after: Path) -> dict[str, Any]:
    """`pekoe eval --compare`: two `results.json` problem by problem. Raises UserError unless of the same problems.

    A problem of which either has FAULTs alone has no rate there: it is left out, and counted.
    """
    rates = [_rates(path) for path in (before, after)]
    if rates[0].keys() != rates[1].keys():
        only = [sorted(rates[i].keys() - rates[1 - i].keys()) for i in (0, 1)]
        raise UserError(
            f"eval --compare: expected results on the same problems, got {len(only[0])} that only {before} has "
            f"and {len(only[1])} that only {after} has, such as {(only[0] + only[1])[0]!r}"
        )
    pairs = {uid: (rates[0][uid], rates[1][uid]) for uid in sorted(rates[0])}
    judged = {uid: (a, b) for uid, (a, b) in pairs.items() if a is not None and b is not None}
    if not judged:
        raise UserError(f"eval --compare: expected problems that both have verdicts of, got none of {len(pairs)}")
    first, second = [a for a, _ in judged.values()], [b for _, b in judged.values()]
    moved = sorted(judged, key=lambda uid: -abs(judged[uid][1] - judged[uid][0]))[:10]
    return {
        "before": float(np.mean(first)),
        "after": float(np.mean(second)),
        **paired(first, second),
        "num_all_fault": len(pairs) - len(judged),
        "moved_most": {uid: list(judged[uid]) for uid in moved if judged[uid][0] != judged[uid][1]},
    }


def _rates(path: Path) -> dict[str, float | None]:
    """The pass rate of each problem; None where no verdict but FAULT was given."""
    path = path / "results.json" if path.is_dir() else path
    try:
        problems = json.loads(path.read_text(encoding="utf-8"))["problems"]
        return {one["uid"]: one["num_correct"] / one["num_judged"] if one["num_judged"] else None for one in problems}
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
        raise UserError(f"{path}: expected results of pekoe eval, found none.{nearest(path.name, siblings)}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
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
