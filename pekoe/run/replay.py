"""Training again from the rollouts on disk, without an engine or a judge: one step from the checkpoint before it, or
the whole run from the model that it began with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pekoe.config.recipes import RLConfig, load_config
from pekoe.core.errors import UserError
from pekoe.core.journal import read_lines
from pekoe.core.loop import StepStats
from pekoe.core.progress import ProgressReporter, phase
from pekoe.core.records import read_records, record_of
from pekoe.core.types import Sample
from pekoe.core.words import counted
from pekoe.model import load_model
from pekoe.model.peft import read_weights
from pekoe.run.build import make_trainer, open_model, prepare
from pekoe.run.checkpoints import TRAINER, checkpoints, read_beside, step_of
from pekoe.run.interrupt import StepTimer
from pekoe.run.rl import learn
from pekoe.run.run_dir import exported_model
from pekoe.train import Trainer


@dataclass(frozen=True, slots=True)
class Replayed:
    """A step as it was, and as it is again."""

    step: int
    started_from: int  # the step of the checkpoint; 0: the model that the run began with
    before: dict[str, Any]  # of the journal: loss, grad_norm
    stats: list[StepStats]

    @property
    def loss(self) -> float:
        return float(np.mean([s.loss for s in self.stats]))

    @property
    def grad_norm(self) -> float:
        return float(np.mean([s.grad_norm for s in self.stats]))

    @property
    def differs(self) -> bool:
        """Whether the loss or the gradient norm is not the run's."""
        pairs = [(self.loss, self.before["loss"]), (self.grad_norm, self.before["grad_norm"])]
        return any(now != was and not (np.isnan(now) and np.isnan(was)) for now, was in pairs)

    def __str__(self) -> str:
        lines = [f"step {self.step}, from the weights of step {self.started_from}:"]
        for number, s in enumerate(self.stats, 1):
            lines.append(
                f"  optimizer step {number}: loss {s.loss:.9g}, gradient norm {s.grad_norm:.9g}, {s.num_targets} tokens"
                + (f", skipped: {s.skipped}" if s.skipped else "")
            )
        for name, now in (("loss", self.loss), ("grad_norm", self.grad_norm)):
            was = self.before[name]
            same = now == was or (np.isnan(now) and np.isnan(was))
            lines.append(f"  {name}: {now:.9g}, {'the same' if same else f'was {was:.9g}'} in the run")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class ReplayedRun:
    """A whole run as it is again."""

    num_steps: int
    differing: list[int]  # steps whose loss or gradient norm is another one than the journal's
    same_weights: bool | None  # as the run's model directory; None: that is of another step
    logprob_diffs: dict[int, float]  # by version: the largest |engine's - trainer's| of the tokens that it sampled

    @property
    def same(self) -> bool:
        return not self.differing and self.same_weights is not False

    def __str__(self) -> str:
        weights = {True: "the same weights, bit by bit", False: "other weights", None: "no weights to compare with"}
        steps = "all with the loss of the run" if not self.differing else f"other losses in {_listed(self.differing)}"
        worst = max(self.logprob_diffs, key=lambda version: self.logprob_diffs[version], default=None)
        number = counted(self.num_steps, "step")
        lines = [f"{number} trained again from saved rollouts: {steps}; {weights[self.same_weights]}"]
        if worst is not None:
            lines.append(
                f"log-probs of sampling and training differ by at most {self.logprob_diffs[worst]:.2g} in each of "
                f"{counted(len(self.logprob_diffs), 'version')} (the most in version {worst})"
            )
        return "\n".join(lines)


def _listed(steps: list[int]) -> str:
    more = f" and {len(steps) - 5} more" if len(steps) > 5 else ""
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps[:5]))}{more}"


class _Run:
    """The records of a run, and a trainer that goes through them again."""

    def __init__(self, run_dir: Path) -> None:
        if not (run_dir / "config.toml").is_file() or not (run_dir / "journal.jsonl").is_file():
            raise UserError(f"--replay: expected the directory of an rl run, got {run_dir}")
        self.path = run_dir
        self.config = load_config(run_dir / "config.toml", kind=RLConfig)
        events = read_lines(run_dir / "journal.jsonl")
        self.events = {event["step"]: event for event in events if event.get("event") == "step" and "step" in event}

    def open(self) -> Trainer:
        prepare(self.config.run)
        self.model, _, dtype = open_model(self.config.model, self.config.run.seed)
        return make_trainer(self.config, self.model, dtype)

    def records(self, step: int) -> list[dict[str, Any]]:
        lines = read_records(self.path, step)
        if not lines:
            raise UserError(f"--replay: expected the rollouts of step {step} in {self.path / 'rollouts'}, got none")
        return lines

    def train(self, trainer: Trainer, step: int, view: ProgressReporter) -> list[StepStats]:
        if "loss" not in self.events[step]:
            trainer.skip(self.config.algo.minibatches)
            return []
        return learn(self.config, trainer, samples_of(self.records(step)), step, StepTimer(view), view)[0]


def replay(run_dir: Path, step: int, view: ProgressReporter) -> Replayed:
    """Train on the step's rollouts again, starting from the newest checkpoint before it. Nothing is written.

    Steps between that checkpoint and `step` are trained on too, in order. With as many threads as the run had, on the
    same machine, the loss is the same to the last bit.
    """
    run = _Run(run_dir)
    if step not in run.events:
        known = f"1 to {max(run.events)}" if run.events else "none"
        raise UserError(f"--replay: expected a step of {run_dir} ({known}), got {step}")
    if "loss" not in run.events[step]:
        raise UserError(f"--replay: step {step} trained on nothing: {run.events[step].get('skipped')}")
    trainer = run.open()
    earlier = [path for path in checkpoints(run_dir) if step_of(path) < step]
    start = 0
    if earlier:
        start = read_beside(earlier[-1]).progress.step
        trainer.load(earlier[-1] / TRAINER)
    stats: list[StepStats] = []
    for number in range(start + 1, step + 1):
        view.say(f"step {number} of {step}")
        stats = run.train(trainer, number, view)
    return Replayed(step, start, run.events[step], stats)


def replay_run(run_dir: Path, view: ProgressReporter) -> ReplayedRun:
    """Train the whole run again from its records, whatever its schedule and its engines. Nothing is written.

    With as many threads, on the same machine, the weights are the same to the last bit. Before each step the tokens
    that its version sampled, for whichever step, are computed by the trainer (I1 by version).
    """
    run = _Run(run_dir)
    steps = sorted(run.events)
    if not steps or steps != list(range(1, len(steps) + 1)):
        raise UserError(f"--replay: expected every step of {run_dir} from the first on, got {steps[:1] or 'none'}")
    trainer, differing, diffs = run.open(), list[int](), dict[int, float]()
    ahead = 1 + run.config.rollout.lag_bound
    with phase(view, "steps", len(steps)):
        for step in steps:
            sampled = [line for later in range(step, min(step + ahead, steps[-1] + 1)) for line in run.records(later)]
            if (largest := _largest_diff(trainer, sampled, step - 1)) is not None:
                diffs[step - 1] = largest
            stats = run.train(trainer, step, view)
            if stats and Replayed(step, step - 1, run.events[step], stats).differs:
                differing.append(step)
            view.advance()
    saved = checkpoints(run_dir)
    same = None
    if saved and step_of(saved[-1]) == steps[-1]:
        folder, model = exported_model(run_dir)[0], run.model
        adapter = model.lora is not None
        written = (
            read_weights(folder)[0]
            if adapter
            else dict(load_model(folder, implementation=model.implementation).named_parameters())
        )
        trained = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
        same = all(torch.equal(tensor.cpu(), written[name]) for name, tensor in trained)
    return ReplayedRun(len(steps), differing, same, diffs)


def _largest_diff(trainer: Trainer, lines: list[dict[str, Any]], version: int) -> float | None:
    """The largest |engine's - trainer's log-prob| of the tokens that this version sampled; None where it has none."""
    lines = [line for line in lines if any(v == version for v, _ in line["versions"]) and len(line["tokens"])]
    if not lines:
        return None
    records = [record_of(line) for line in lines]
    samples = [
        Sample(r.tokens, r.loss_mask, r.logprobs, np.zeros(len(r.tokens), np.float32), routing=r.routing)
        for r in records
    ]
    largest = 0.0
    for line, sample, logprobs in zip(lines, samples, trainer.logprobs(samples), strict=True):
        ends = [start for _, start in line["versions"][1:]] + [len(line["tokens"])]
        gap = np.abs(sample.behaviour_logprobs - logprobs)[sample.loss_mask]
        for (number, start), end in zip(line["versions"], ends, strict=True):
            if number == version:
                largest = max(largest, float(gap[start:end].max(initial=0.0)))
    return largest


def samples_of(lines: list[dict[str, Any]]) -> list[Sample]:
    """The samples that a step was trained on, in the same order, from its rollouts file."""
    samples: list[Sample] = []
    groups: dict[tuple[str, int], int] = {}
    for line in lines:
        group = groups.setdefault((line["uid"], line["draw"]), len(groups))
        if line["advantage"] is None:
            continue
        record = record_of(line)
        advantages = np.where(record.loss_mask, np.float32(line["advantage"]), np.float32(0))
        common = record.tokens, record.loss_mask, record.logprobs, advantages, group
        samples.append(Sample(*common, routing=record.routing))
    return samples
