"""Sentences on whether a run learned, each computed from what the run measured."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import mean, median

from pekoe.core.journal import Event
from pekoe.core.statistics import difference_interval, paired
from pekoe.core.words import counted
from pekoe.report.history import History

_LEVEL = 0.05  # of the test that says "beyond chance"


def learning(history: History) -> list[str]:
    """Whether the run learned, first; then what looks wrong in it. Empty for a run without steps."""
    steps = [step for step in history.steps if "pass_rate" in step]
    if not steps:
        return _losses(history)
    collapses = [f"Step {event['step']}: {event['why']}." for event in history.of("collapse")]
    return [learned(history), *collapses, *_warnings(steps, bool(collapses))]


def learned(history: History) -> str:
    """One sentence: pass@1 on held-out problems before and after, and whether the difference is beyond chance."""
    evals = history.of("eval")
    evals = [event for event in evals if event.get("data") == evals[-1].get("data")]  # a run may go on with others
    if len(evals) < 2:
        steps = [step for step in history.steps if "pass_rate" in step]
        part = max(1, len(steps) // 5)
        first, last = (mean(step["pass_rate"] for step in some) for some in (steps[:part], steps[-part:]))
        cause = "it needs eval.data and eval.every"
        if evals:
            cause = f"pass@1 was {_figure(evals[0])} at step {evals[0]['step']}, and is not measured again yet"
        return (
            f"Whether the run learned is not measured on held-out problems: {cause}. Of the responses that it trains "
            f"on, {first:.1%} were right in its first {_steps(part)} and {last:.1%} in its last."
        )
    before, after = evals[0], evals[-1]
    difference, (low, high), beyond, test = _change(before, after)
    number = counted(after["num_problems"], "held-out problem") if "num_problems" in after else "held-out problems"
    verdict, verb = "It is not shown that the run learned", "went"
    if beyond:
        verdict, verb = ("The run learned", "rose") if difference > 0 else ("The run got worse", "fell")
    return (
        f"{verdict}: pass@1 on {number} {verb} from {_figure(before)} to {_figure(after)} at step {after['step']}; the "
        f"difference, {100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], "
        f"{'is beyond' if beyond else 'may be'} chance ({test})."
    )


def _steps(number: int) -> str:
    return "step" if number == 1 else counted(number, "step")


def _change(before: Event, after: Event) -> tuple[float, tuple[float, float], bool, str]:
    """The difference of two evaluations, its 95 % interval, whether it is beyond chance, and how that was tested.

    By problem where both have the rates of the same problems; else from the two intervals, as if of other problems.
    """
    rates = before.get("rates", ()), after.get("rates", ())
    pairs = [(a, b) for a, b in zip(*rates, strict=False) if a is not None and b is not None]
    if pairs and len(rates[0]) == len(rates[1]):
        samples = before.get("samples_per_problem", inf) * len(pairs)
        result = paired([a for a, _ in pairs], [b for _, b in pairs], (samples, samples))
        p = result["p_value"]
        test = f"paired over problems, p {'< 0.001' if p < 0.001 else f'= {p:.2g}'}"
        return result["difference"], result["ci95"], p < _LEVEL, test
    means = before["pass_at_1"], after["pass_at_1"]
    interval = difference_interval(means, (before["ci95"], after["ci95"]))
    return means[1] - means[0], interval, interval[0] > 0 or interval[1] < 0, "by the two intervals"


def _figure(event: Event) -> str:
    low, high = event["ci95"]
    return f"{event['pass_at_1']:.1%} [{low:.1%}, {high:.1%}]"


def _losses(history: History) -> list[str]:
    """Of a run without rewards (`pekoe sft`)."""
    steps, evals = [step for step in history.steps if "loss" in step], history.of("eval_loss")
    sentences: list[str] = []
    if len(evals) > 1:
        first, last = evals[0], evals[-1]
        sentences.append(
            f"The loss on held-out demonstrations went from {first['loss']:.4f} at step {first['step']} to "
            f"{last['loss']:.4f} at step {last['step']}."
        )
    if steps:
        part = max(1, len(steps) // 10)
        first, last = (mean(step["loss"] for step in some) for some in (steps[:part], steps[-part:]))
        sentences.append(f"The training loss went from {first:.4f} to {last:.4f} (means of {counted(part, 'step')}).")
    return sentences


def _warnings(steps: Sequence[Event], collapsed: bool) -> list[str]:
    sentences: list[str] = []
    last = steps[-max(1, len(steps) // 5) :]
    share = median(step["truncation_rate"] for step in last)
    if share > 0.2 and not collapsed:
        sentences.append(
            f"{share:.0%} of the last responses were cut at max_new_tokens, and are judged by what they contain up to "
            f"there: raise rollout.max_new_tokens, or look at whether they repeat themselves."
        )
    if all(step.get("skipped") for step in last):
        sentences.append(
            f"Nothing was learned in the last {_steps(len(last))}: {last[-1]['skipped']}. `pekoe curate` keeps "
            f"problems that this model sometimes gets right."
        )
    if median(step["pass_rate"] for step in last) > 0.95:
        sentences.append("Nearly all of the last responses are right: these problems have little left to teach.")
    faults = round(sum(step["fault_rate"] * step["num_rollouts"] for step in steps))
    if faults:
        verb = "has no reward" if faults == 1 else "have no reward"
        sentences.append(
            f"{counted(faults, 'response')} could not be judged (FAULT) and {verb}: the judge or the reference failed, "
            f"see the list below."
        )
    return sentences
