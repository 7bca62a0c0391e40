"""The loop of reinforcement learning on verified rewards. `run_rl` is the algorithm, on one screen.

Only the objects in `parts` differ between a laptop, a GPU and a cluster; their types are in `core/loop.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from pekoe.algo.loss import denominator, ppo
from pekoe.algo.packing import split_minibatches
from pekoe.algo.scoring import Scored, score, uninformative
from pekoe.config.recipes import RLConfig
from pekoe.core.errors import Interrupted, RunError, StopRequested
from pekoe.core.loop import StepStats, SyncReport, Trainer
from pekoe.core.progress import ProgressReporter, phase
from pekoe.core.types import AnySample, Draw, JudgedGroup
from pekoe.plan.own import forecast_sentence
from pekoe.run.build import RLParts, eval_sampling
from pekoe.run.checkpoints import Progress
from pekoe.run.evaluate import evaluate, warn_truncation
from pekoe.run.interrupt import StepTimer, StoppedInStep
from pekoe.run.metrics import collapse_of, looks_well, not_finite, own_metrics, step_metrics, step_work, warnings_of
from pekoe.run.records import record_lines
from pekoe.run.rollouts import Batch, check_faults

WARN_EVERY = 10  # steps: how often a warning is repeated


def run_rl(parts: RLParts) -> None:
    """Train until `num_steps`. Ctrl-C keeps the last complete step and raises Interrupted.

    Version t of the weights is that of step t. With `rollout.max_lag` = S the groups of step t are put when version
    t - 1 - S serves, and sampled while earlier steps are trained on: by that version alone, or with
    `during_update = "go_on"` by that and later ones. Groups put are at most (S + version + 1) x prompts_per_step.
    """
    config, run = parts.config, parts.run
    progress = run.resume(parts.trainer) or Progress(0, parts.order.state(), config.eval.every is None)
    parts.order.restore(progress.order)
    parts.collapsed, parts.was_well = run.journal.has("collapse"), run.journal.has("step", looks_well)
    goes_on = config.rollout.during_update == "go_on"
    if parts.machine:
        run.journal.write("machine", **parts.machine)
    publish_first(parts, progress.step)
    put_again(parts, progress)
    whole = True  # the trainer is at `progress.step`, which is written down
    try:
        progress = evaluate_if_due(parts, progress)
        with phase(parts.view, "steps", config.num_steps, progress.step):
            while progress.step < config.num_steps:
                step = progress.step + 1
                parts.begin_step()
                admit(parts, progress.step)
                batch = collect(parts, step)
                version = step - 1 if config.rollout.max_lag else None
                scored = score(batch.groups, config.algo, version, config.rollout.max_new_tokens)
                whole = False
                stats, untrained = train(parts, scored, step)
                if not goes_on:
                    parts.rollouts.drain()
                with parts.timer("sync"):
                    synced = parts.weights.publish(step, wait=not config.rollout.max_lag)
                if goes_on:
                    admit(parts, step)
                due = config.eval.every is not None and step % config.eval.every == 0
                progress = progress_of(parts, step, evaluated=not due)
                commit(parts, step, batch, scored, stats, untrained, synced)
                whole = True
                check_finite(parts, progress)
                progress = evaluate_if_due(parts, progress)
                if step % config.train.save_every == 0:
                    save(parts, progress)
                parts.view.advance()
    except StoppedInStep:
        run.settle()
        kept = f"step {run.saved} is saved" if run.saved else "nothing is saved yet"
        raise Interrupted(
            f"stopped in step {progress.step + 1} of {config.num_steps}, before all that the version before it samples "
            f"was complete (rollout.during_update = 'wait'); {kept}; run {run.same_command} again to go on from there"
        ) from None
    except StopRequested:
        save(parts, progress)
        run.settle()
        raise Interrupted(
            f"stopped after step {progress.step} of {config.num_steps}, which is saved; "
            f"run {run.same_command} again to go on from there"
        ) from None
    except Exception as error:
        if whole and not (isinstance(error, RunError) and error.retried):
            run.save_at_error(progress.step, partial(save, parts, progress), parts.view)
        if isinstance(error, TooManyFaults):
            parts.records.write(error.step, list(record_lines(error.batch, Scored((), {}), config)))
            parts.records.settle()
        raise
    last = parts.weights.settle()
    if last is not None and config.rollout.max_lag:  # the journal's last step may have the report before
        run.journal.write("sync", step=progress.step, **last.as_dict())
    save(parts, progress)
    run.settle()


def publish_first(parts: RLParts, version: int) -> None:
    """The publish before the first step, with its proof in the journal."""
    report = parts.weights.publish(version)
    parts.run.journal.write("sync", step=version, **report.as_dict())
    parts.view.say(str(report))


def put_again(parts: RLParts, progress: Progress) -> None:
    """What was in flight at the checkpoint, first."""
    by_uid = {problem.uid: problem for problem in parts.problems}
    draws = [Draw(by_uid[uid], number) for uid, number, _ in progress.in_flight]
    places = [place for _, _, place in progress.in_flight]
    sampled = parts.run.sampled_in_flight(by_uid) if draws else []
    parts.rollouts.restore(draws, places, parts.records.adopt(sampled))
    parts.num_admitted = progress.step + len(draws) // parts.config.rollout.prompts_per_step
    parts.in_flight = parts.rollouts.in_flight()


def admit(parts: RLParts, version: int) -> None:
    """Put the groups of the steps that `version` may be the first to sample for: up to version + 1 + max_lag."""
    rollout, last = parts.config.rollout, version + 1 + parts.config.rollout.max_lag
    steps = max(0, min(last, parts.config.num_steps) - parts.num_admitted)
    parts.num_admitted += steps
    if steps:
        put(parts, steps * rollout.prompts_per_step)


def put(parts: RLParts, number: int) -> None:
    parts.rollouts.put([Draw(parts.problems[i], epoch) for i, epoch in parts.order.draw(number)])


def collect(parts: RLParts, step: int) -> Batch:
    """Take the groups of a step. With dynamic sampling, draw again for groups that teach nothing (DAPO)."""
    rollout, batch = parts.config.rollout, Batch()
    while len(batch.groups) < rollout.prompts_per_step and batch.num_rounds <= rollout.dynamic_rounds:
        missing = rollout.prompts_per_step - len(batch.groups)
        if batch.num_rounds:
            put(parts, missing)
        for group in parts.rollouts.take(missing):
            reason = uninformative(group.verdicts, parts.config.algo) if rollout.dynamic_rounds else None
            if reason:
                batch.dropped.append((group, reason))
            else:
                batch.groups.append(group)
        batch.num_rounds += 1
    check_verdicts(parts, step, batch)
    return batch


class TooManyFaults(RunError):
    """Too many verdicts of a batch are FAULT. Its responses are written as those of `step`, once the step before is
    saved: stores drop what they write, and it was in flight then."""

    def __init__(self, message: str, step: int, batch: Batch) -> None:
        super().__init__(message)
        self.step, self.batch = step, batch


def check_verdicts(parts: RLParts, step: int, batch: Batch) -> None:
    """TooManyFaults where there are more than `verify.max_fault_rate` (I9)."""
    try:
        check_faults(batch.verdicts(), parts.config.verify.max_fault_rate)
    except RunError as error:
        message = f"{str(error).rstrip('.')}. The responses: pekoe report {parts.config.run.dir}"
        raise TooManyFaults(message, step, batch) from None


def train(parts: RLParts, scored: Scored, step: int) -> tuple[list[StepStats], dict[int, str]]:
    """One optimizer step for each mini-batch, none where there is nothing to learn.

    Returns the steps, and why groups (by position in the batch) were not trained on after all. StopRequested as
    `LastStep` has it.
    """
    if not scored.samples or scored.no_signal:
        parts.trainer.skip(parts.config.algo.minibatches)  # the schedule goes on
        return [], {sample.group: scored.no_signal for sample in scored.samples}
    parts.rollouts.offload()
    with parts.last_step.kept(parts.config.algo.minibatches > 1):
        return learn(parts.config, parts.trainer, scored.samples, step, parts.timer, parts.view)


def learn(
    config: RLConfig,
    trainer: Trainer,
    samples: Sequence[AnySample],
    step: int,
    timer: StepTimer,
    view: ProgressReporter,
) -> tuple[list[StepStats], dict[int, str]]:
    """The optimizer steps of a batch; nothing but its arguments decides them. Returns as `train`."""
    algo, num_lags = config.algo, config.rollout.lag_bound + 1 if config.rollout.max_lag else 0
    if algo.proximal == "recompute":
        with timer("recompute"):
            proximal = trainer.logprobs(samples)
            samples = [replace(s, proximal_logprobs=p) for s, p in zip(samples, proximal, strict=True)]
    rng = np.random.default_rng([config.run.seed, step])
    minibatches = split_minibatches(samples, algo.minibatches, rng)
    stats: list[StepStats] = []
    untrained: dict[int, str] = {}
    with timer("train", len(minibatches)):
        for minibatch in minibatches:
            if algo.kl:
                reference = trainer.logprobs(minibatch, reference=True)
                minibatch = [replace(s, reference_logprobs=r) for s, r in zip(minibatch, reference, strict=True)]
            divisor = denominator(algo, len(minibatch), config.rollout.max_new_tokens)
            objective = partial(ppo, algo=algo, num_lags=num_lags)
            stats.append(trainer.step(minibatch, objective, divisor, algo.max_mean_ratio))
            if stats[-1].skipped:
                untrained |= {sample.group: stats[-1].skipped for sample in minibatch}
            view.advance()
    return stats, untrained


def commit(
    parts: RLParts,
    step: int,
    batch: Batch,
    scored: Scored,
    stats: list[StepStats],
    untrained: dict[int, str],
    synced: SyncReport,
) -> None:
    """Write the step down: records, what became of every prompt drawn, metrics."""
    config = parts.config
    parts.records.write(step, list(record_lines(batch, scored, config)))
    for position, group in enumerate(batch.groups):
        account(parts, step, group, (scored.dropped | untrained).get(position))
    for group, reason in batch.dropped:
        account(parts, step, group, reason)
    metrics = step_metrics(step, batch, scored, stats, config, parts.timer.seconds)
    counted = parts.counters.take()
    metrics |= step_work(parts.spec, config, batch, scored, stats, counted.get("num_forwards"))
    metrics |= own_metrics(config.track.metrics, list(batch.everything()), metrics, parts.view)
    parts.run.journal.write("step", **metrics, **synced.as_dict(), **counted)
    if outlook := parts.outlook.after_step(config, parts.run.path, counted.get("num_engines")):
        parts.run.journal.write("forecast", step=step, **outlook)
        parts.view.say(forecast_sentence(outlook))
    collapse = collapse_of(metrics, config, parts.was_well)
    parts.was_well = parts.was_well or looks_well(metrics)
    if collapse and not parts.collapsed:
        parts.run.journal.write("collapse", step=step, why=collapse)
    parts.collapsed = parts.collapsed or bool(collapse)
    if step % WARN_EVERY == 1:
        for warning in warnings_of(metrics, config):
            parts.view.say(warning)
        if not collapse:
            warn_truncation(metrics["truncation_rate"], config.rollout.max_new_tokens, parts.view)
    parts.run.settle(wait=False)


def check_finite(parts: RLParts, progress: Progress) -> None:
    """Save, and raise RunError, after too many optimizer steps in a row that were not finite."""
    if why := not_finite(parts.trainer, parts.config.train.max_not_finite, parts.run.same_command):
        save(parts, progress)
        parts.run.settle()
        again = f"To see the step again: pekoe rl --replay {parts.config.run.dir} {progress.step}"
        raise RunError(f"step {progress.step}: {why}. {again}")


def account(parts: RLParts, step: int, group: JudgedGroup, reason: str | None) -> None:
    """One line of the ledger: a prompt drawn was trained on, or dropped with a reason (I6)."""
    outcome = {"outcome": "dropped", "reason": reason} if reason else {"outcome": "trained"}
    parts.run.ledger.append({"step": step, "uid": group.problem.uid, "draw": group.draw, **outcome})


def evaluate_if_due(parts: RLParts, progress: Progress) -> Progress:
    """Evaluate on the held-out problems where the step asks for it, and journal it."""
    if progress.evaluated or not parts.held_out:  # a resumed run's recipe may have dropped them
        return replace(progress, evaluated=True)
    parts.begin_step()
    params = eval_sampling(parts.config, parts.stop_token_ids)
    check = partial(check_verdicts, parts, progress.step + 1)
    result = evaluate(parts.eval_rollouts, parts.held_out, params, lambda groups: check(Batch(groups)))
    figures = result.as_dict() | {"rates": result.rates, "data": parts.config.eval.data}
    parts.run.journal.write("eval", step=progress.step, seconds=parts.timer.seconds, **figures)
    parts.rollouts.flush_cache()  # the next step finds the caches that a resumed run would find
    return replace(progress, evaluated=True)


def progress_of(parts: RLParts, step: int, evaluated: bool) -> Progress:
    """After a step, with what is in flight."""
    parts.in_flight = left = parts.rollouts.in_flight()
    names = ((draw.problem.uid, draw.number) for draw in left.draws)
    in_flight = tuple((*name, place) for name, place in zip(names, left.places, strict=True))
    return Progress(step, parts.order.state(), evaluated, in_flight)


def save(parts: RLParts, progress: Progress) -> None:
    parts.records.settle()
    sampled = parts.in_flight.sampled() if parts.in_flight is not None else []
    keep = parts.config.train.keep_checkpoints
    parts.run.save(parts.last_step, progress, keep, parts.records.fetch(sampled))
