"""One saved step again: from a checkpoint before it and the rollouts on disk, without an engine or a judge."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pekoe.config.recipes import RLConfig, load_config
from pekoe.core.errors import UserError
from pekoe.core.journal import read_lines
from pekoe.core.progress import ProgressReporter
from pekoe.core.types import Sample
from pekoe.run.build import make_trainer, open_model, prepare
from pekoe.run.interrupt import StepTimer
from pekoe.run.rl import learn
from pekoe.run.run_dir import checkpoints, read_rollouts
from pekoe.train import StepStats


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


def replay(run_dir: Path, step: int, view: ProgressReporter) -> Replayed:
    """Train on the step's rollouts again, starting from the newest checkpoint before it. Nothing is written.

    Steps between that checkpoint and `step` are trained on too, in order. With as many threads as the run had, on the
    same machine, the loss is the same to the last bit.
    """
    if not (run_dir / "config.toml").is_file() or not (run_dir / "journal.jsonl").is_file():
        raise UserError(f"--replay: expected the directory of an rl run, got {run_dir}")
    config = load_config(run_dir / "config.toml", kind=RLConfig)
    events = {e["step"]: e for e in read_lines(run_dir / "journal.jsonl") if e["event"] == "step"}
    if step not in events:
        known = f"1 to {max(events)}" if events else "none"
        raise UserError(f"--replay: expected a step of {run_dir} ({known}), got {step}")
    if "loss" not in events[step]:
        raise UserError(f"--replay: step {step} trained on nothing: {events[step].get('skipped')}")
    prepare(config.run)
    model, _, dtype = open_model(config.model)
    trainer = make_trainer(config, model, dtype)
    earlier = [path for path in checkpoints(run_dir) if int(path.name[5:]) < step]
    start = 0
    if earlier:
        trainer.load(earlier[-1] / "trainer")
        start = json.loads((earlier[-1] / "state.json").read_text(encoding="utf-8"))["progress"]["step"]
    stats: list[StepStats] = []
    for number in range(start + 1, step + 1):
        view.say(f"step {number} of {step}")
        if "loss" not in events[number]:
            trainer.skip(config.algo.minibatches)
            continue
        lines = read_rollouts(run_dir, number)
        if not lines:
            raise UserError(f"--replay: expected the rollouts of step {number} in {run_dir / 'rollouts'}, got none")
        stats, _ = learn(config, trainer, samples_of(lines), number, StepTimer(view), view)
    return Replayed(step, start, events[step], stats)


def samples_of(lines: list[dict[str, Any]]) -> list[Sample]:
    """The samples that a step was trained on, in the same order, from its rollouts file."""
    samples: list[Sample] = []
    groups: dict[tuple[str, int], int] = {}
    for line in lines:
        group = groups.setdefault((line["uid"], line["draw"]), len(groups))
        if line["advantage"] is None:
            continue
        prompt, tokens = line["prompt_tokens"], line["tokens"]
        mask = np.arange(len(prompt) + len(tokens)) >= len(prompt)
        behaviour, advantages = np.zeros(len(mask), np.float32), np.zeros(len(mask), np.float32)
        behaviour[mask], advantages[mask] = line["logprobs"], line["advantage"]
        samples.append(Sample(np.array(prompt + tokens), mask, behaviour, advantages, group))
    return samples
