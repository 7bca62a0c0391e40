"""The loop of reinforcement learning on verified rewards. `run_rl` is the algorithm, on one screen.

Only the objects in `parts` differ between a laptop, a GPU and a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from pekoe.algo.loss import ppo
from pekoe.algo.packing import split_minibatches
from pekoe.algo.scoring import Scored, score
from pekoe.config.recipes import RLConfig
from pekoe.core.errors import Interrupted, RunError
from pekoe.core.progress import ProgressReporter, phase
from pekoe.core.types import AnySample
from pekoe.run.build import RLParts, sampling, sampling_for
from pekoe.run.evaluate import evaluate, warn_truncation
from pekoe.run.interrupt import StepTimer, StopRequested
from pekoe.run.metrics import step_metrics, warnings_of, work
from pekoe.run.rollouts import Batch, check_faults, is_useless, rollout_lines
from pekoe.run.run_dir import Progress
from pekoe.run.sync import SyncReport
from pekoe.train import StepStats, Trainer

TELL_EVERY = 10  # steps: how often a warning is repeated


def run_rl(parts: RLParts) -> None:
    """Train until `num_steps`. Ctrl-C keeps the last complete step and raises Interrupted."""
    config = parts.config
    start = {"step": 0, "order": parts.order.state(), "measured": config.eval.every is None}
    progress: Progress = parts.run.resume(parts.trainer) or start
    parts.order.restore(progress["order"])
    if parts.machine:
        parts.run.journal.write("machine", **parts.machine)
    parts.view.say(str(bring(parts, progress["step"])))
    parts.measured()  # what came before is no step's
    try:
        progress = measure_if_due(parts, progress)
        with phase(parts.view, "steps", config.num_steps, progress["step"]):
            while progress["step"] < config.num_steps:
                step, clock = progress["step"] + 1, StepTimer(parts.view)
                batch = collect(parts, clock)
                scored = score(batch.groups, batch.verdicts, config.algo)
                stats, untrained = train(parts, scored, step, clock)
                with clock("sync"):
                    synced = parts.sync(step)
                due = config.eval.every is not None and step % config.eval.every == 0
                progress = {"step": step, "order": parts.order.state(), "measured": not due}
                commit(parts, step, batch, scored, stats, untrained, synced, clock)
                check_finite(parts, step)
                progress = measure_if_due(parts, progress)
                if step % config.train.save_every == 0:
                    save(parts, progress)
                parts.view.advance()
    except StopRequested:
        save(parts, progress)
        parts.run.settle()
        raise Interrupted(
            f"stopped after step {progress['step']} of {config.num_steps}, which is saved; "
            f"run the same command again to go on from there"
        ) from None
    save(parts, progress)
    parts.run.settle()


def collect(parts: RLParts, clock: StepTimer) -> Batch:
    """Draw problems, sample and judge. With dynamic sampling, draw again for groups that teach nothing (DAPO)."""
    rollout, batch = parts.config.rollout, Batch()
    params = sampling(rollout, parts.tokenizer, parts.config.run.seed)
    while len(batch.groups) < rollout.prompts_per_step and batch.num_rounds <= rollout.dynamic_rounds:
        missing = rollout.prompts_per_step - len(batch.groups)
        drawn = [(parts.problems[i], epoch) for i, epoch in parts.order.draw(missing)]
        for group, verdicts in parts.sampler(drawn, params, clock):
            reason = is_useless(verdicts) if rollout.dynamic_rounds else None
            if reason:
                batch.dropped.append((group, verdicts, reason))
            else:
                batch.groups.append(group)
                batch.verdicts.append(verdicts)
        batch.num_rounds += 1
    check_faults((v for _, vs in batch.everything() for v in vs), parts.config.verify.max_fault_rate)
    return batch


def train(parts: RLParts, scored: Scored, step: int, clock: StepTimer) -> tuple[list[StepStats], dict[int, str]]:
    """One optimizer step for each minibatch, none where there is nothing to learn.

    Returns the steps, and why groups (by position in the batch) were not trained on after all.
    """
    if not scored.samples or scored.advantage_std == 0:
        parts.trainer.skip(parts.config.algo.minibatches)  # the schedule goes on
        return [], {sample.group: "all advantages are 0" for sample in scored.samples}
    return learn(parts.config, parts.trainer, scored.samples, step, clock, parts.view)


def learn(
    config: RLConfig,
    trainer: Trainer,
    samples: Sequence[AnySample],
    step: int,
    clock: StepTimer,
    view: ProgressReporter,
) -> tuple[list[StepStats], dict[int, str]]:
    """The optimizer steps of a batch; nothing but its arguments decides them. Returns as `train`."""
    algo = config.algo
    if algo.proximal == "recompute":
        with clock("recompute"):
            found = trainer.logprobs(samples)
            samples = [replace(s, proximal_logprobs=p) for s, p in zip(samples, found, strict=True)]
    rng = np.random.default_rng([config.run.seed, step])
    minibatches = split_minibatches(samples, algo.minibatches, rng)
    stats: list[StepStats] = []
    untrained: dict[int, str] = {}
    with clock("train", len(minibatches)):
        for minibatch in minibatches:
            if algo.kl:
                found = trainer.logprobs(minibatch, reference=True)
                minibatch = [replace(s, reference_logprobs=r) for s, r in zip(minibatch, found, strict=True)]
            fixed = float(len(minibatch) * config.rollout.max_new_tokens)
            stats.append(
                trainer.step(
                    minibatch,
                    partial(ppo, algo=algo),
                    fixed if algo.normalise == "max_length" else None,
                    algo.max_mean_ratio,
                )
            )
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
    clock: StepTimer,
) -> None:
    """Write the step down: rollouts, what became of every prompt drawn, metrics."""
    parts.run.write_rollouts(step, rollout_lines(batch, scored, parts.config.algo.reward), parts.tokenizer)
    for position, group in enumerate(batch.groups):
        account(parts, step, group.problem.uid, group.draw, (scored.dropped | untrained).get(position))
    for group, _, reason in batch.dropped:
        account(parts, step, group.problem.uid, group.draw, reason)
    metrics = step_metrics(step, batch, scored, stats, parts.config, clock.seconds)
    measured = parts.measured()
    if parts.spec is not None:
        metrics |= work(parts.spec, parts.config, batch, scored, stats, measured.get("num_forwards"))
    parts.run.journal.write("step", **metrics, **synced.as_dict(), **measured)
    if step % TELL_EVERY == 1:
        for warning in warnings_of(metrics, parts.config):
            parts.view.say(warning)
        warn_truncation(metrics["truncation_rate"], parts.config.rollout.max_new_tokens, parts.view)
    parts.run.settle(wait=False)


def check_finite(parts: RLParts, step: int) -> None:
    """RunError after too many optimizer steps in a row that were not finite. What was trained so far is saved."""
    count, most = parts.trainer.num_not_finite, parts.config.train.max_not_finite
    if count >= most:
        raise RunError(
            f"step {step}: the loss or the gradient of the last {count} optimizer steps was not finite "
            f"(train.max_not_finite = {most}); nothing was learned from them. To see one again: "
            f"pekoe rl --replay {parts.config.run.dir} {step}"
        )


def account(parts: RLParts, step: int, uid: str, draw: int, reason: str | None) -> None:
    """One line of the ledger: a prompt drawn was trained on, or dropped with a reason (I6)."""
    outcome = {"outcome": "dropped", "reason": reason} if reason else {"outcome": "trained"}
    parts.run.ledger.append({"step": step, "uid": uid, "draw": draw, **outcome})


def measure_if_due(parts: RLParts, progress: Progress) -> Progress:
    """Evaluate on the held-out problems where the step asks for it, and journal it."""
    if progress["measured"]:
        return progress
    clock = StepTimer(parts.view)
    new_tokens = parts.config.eval.max_new_tokens or parts.config.rollout.max_new_tokens
    params = sampling_for(parts.config.eval, new_tokens, parts.tokenizer, parts.config.run.seed)
    result = evaluate(parts.sampler, parts.held_out, params, clock, parts.config.verify.max_fault_rate)
    parts.run.journal.write("eval", step=progress["step"], seconds=clock.seconds, **result.as_dict())
    if parts.sync.route == "alias":
        bring(parts, progress["step"])  # the next step finds the caches that a resumed run would find
    parts.measured()  # what this took is no step's
    return progress | {"measured": True}


def bring(parts: RLParts, version: int) -> SyncReport:
    """A sync that belongs to no step, with its proof in the journal."""
    report = parts.sync(version)
    parts.run.journal.write("sync", step=version, **report.as_dict())
    return report


def save(parts: RLParts, progress: Progress) -> None:
    parts.run.save(parts.trainer, progress, parts.config.train.keep_checkpoints)
