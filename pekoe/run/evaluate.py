"""Evaluation: n samples a problem, judged; pass@1 with an interval over problems."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pekoe.core.config import EvalConfig
from pekoe.core.errors import Interrupted, RunError
from pekoe.core.types import Group, Problem, SamplingParams, Verdict
from pekoe.core.view import View
from pekoe.data.tokenizer import Tokenizer
from pekoe.run.build import check_context, open_model, open_problems, open_sampler, prepare, sampling_for
from pekoe.run.control import Clock, Stop, StopRequested
from pekoe.run.rollout import Sampler, check_faults


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Measured figures. `ci95` is the 95 % interval of pass@1 over problems."""

    pass_at_1: float
    ci95: tuple[float, float]
    num_problems: int
    samples_per_problem: int
    response_tokens: float
    truncation_rate: float
    unparsed_rate: float
    fault_rate: float
    examples: tuple[dict[str, Any], ...] = ()  # one response to each of the first problems

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "examples"}


def evaluate(
    sampler: Sampler, problems: Sequence[Problem], params: SamplingParams, clock: Clock, max_fault_rate: float = 0.05
) -> EvalResult:
    """Sample `params.n` responses to each problem and judge them."""
    groups = sampler([(problem, 0) for problem in problems], params, clock)
    fault_rate = check_faults((v for _, verdicts in groups for v in verdicts), max_fault_rate)
    rollouts = [rollout for group, _ in groups for rollout in group.rollouts]
    labels = [v.label for _, verdicts in groups for v in verdicts]
    mean, interval = pass_at_1([verdicts for _, verdicts in groups])
    return EvalResult(
        pass_at_1=mean,
        ci95=interval,
        num_problems=len(groups),
        samples_per_problem=params.n,
        response_tokens=float(np.mean([r.num_tokens for r in rollouts])),
        truncation_rate=float(np.mean([r.finish_reason == "length" for r in rollouts])),
        unparsed_rate=labels.count("unparsed") / len(labels),
        fault_rate=fault_rate,
        examples=tuple(_example(sampler.tokenizer, group, verdicts) for group, verdicts in groups[:8]),
    )


def pass_at_1(verdicts: Sequence[Sequence[Verdict]]) -> tuple[float, tuple[float, float]]:
    """pass@1 and its 95 % interval.

    The mean over problems of each problem's share of correct samples (FAULT left out); the interval is +-1.96
    standard errors over problems, since the samples of one problem are not independent (Miller 2024,
    arXiv:2411.00640, section 2.2), cut to [0, 1].
    """
    rates = []
    for row in verdicts:
        judged = [v.label == "correct" for v in row if v.label != "fault"]
        if judged:
            rates.append(np.mean(judged))
    if not rates:
        return float("nan"), (float("nan"), float("nan"))
    mean = float(np.mean(rates))
    error = float(np.std(rates, ddof=1) / np.sqrt(len(rates))) if len(rates) > 1 else 1.0
    return mean, (max(0.0, mean - 1.96 * error), min(1.0, mean + 1.96 * error))


def run_eval(config: EvalConfig, view: View) -> EvalResult:
    """`pekoe eval`: evaluate one model on one problem file."""
    assert config.eval.data is not None
    prepare(config.run)
    model, tokenizer, _ = open_model(config.model)
    new_tokens = config.eval.max_new_tokens or max(1, model.spec.max_positions - config.max_prompt_tokens)
    check_context(model, config.max_prompt_tokens, new_tokens)
    problems = open_problems(config.eval.data, tokenizer, config.max_prompt_tokens, False, view)
    params = sampling_for(config.eval, new_tokens, tokenizer, config.run.seed)
    longest = config.max_prompt_tokens + new_tokens
    stop = Stop()
    with stop.listening(), ExitStack() as stack:
        log_dir = stack.enter_context(_kept_on_failure())
        sampler = open_sampler(config, model, tokenizer, longest, [params], log_dir, view, stop, stack)
        if config.engine.server.urls:  # what they held before is not known
            sampler.engine.update_weights(model, 0)
        if sampler.engine.holds(model) is False:
            raise RunError(f"expected the engine to hold the parameters of {config.model.path}, got others")
        try:
            return evaluate(sampler, problems, params, Clock(view), config.verify.max_fault_rate)
        except StopRequested:
            raise Interrupted("stopped; nothing was measured. Run the same command again to start over") from None


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


def _example(tokenizer: Tokenizer, group: Group, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    payload = group.rollouts[0].payload.resolve()
    return {
        "prompt": group.problem.messages[-1]["content"],
        "response": tokenizer.decode(payload.tokens, skip_special_tokens=True),
        "label": verdicts[0].label,
        "gold": group.problem.gold,
    }
