"""Supervised fine-tuning on worked solutions: loss on the response alone, packed, one token denominator a step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pekoe.algo.loss import cross_entropy
from pekoe.config.recipes import SFTConfig
from pekoe.core.errors import Interrupted, RunError, StopRequested, UserError
from pekoe.core.progress import NoProgress, ProgressReporter, phase
from pekoe.core.roofline import training_bytes, training_flops
from pekoe.core.types import Sample
from pekoe.core.words import counted
from pekoe.data.order import DataOrder
from pekoe.data.problems import Demonstration, read_demonstrations
from pekoe.data.rows import named
from pekoe.data.tokenizer import Tokenizer
from pekoe.run.build import open_model, prepare, say_changes
from pekoe.run.checkpoints import Progress, checkpoints, step_of
from pekoe.run.distributed import make_layout, process_group
from pekoe.run.hardware import describe
from pekoe.run.interrupt import StepTimer, Stop
from pekoe.run.metrics import not_finite
from pekoe.run.run_dir import RunDir, cannot_go_on, with_date
from pekoe.train import Trainer


def run_sft(config: SFTConfig, view: ProgressReporter, from_step: int | None = None) -> None:
    """Train on `data.train` for `sft.epochs`. Ctrl-C keeps the last complete step and raises Interrupted. An error of a
    process that trains alone keeps it, too (the others of several would not come to save). `from_step`: see `RunDir`.

    Started by torchrun, all processes call it, and train together as `parallel` says; the first one writes and shows.
    """
    with process_group() as rank:
        _run(config, view if rank == 0 else NoProgress(), rank == 0, from_step)


def _run(config: SFTConfig, view: ProgressReporter, leader: bool, from_step: int | None) -> None:
    config = with_date(config)
    prepare(config.run, config.train)
    model, tokenizer, dtype = open_model(config.model, config.run.seed)
    context = model.spec.max_positions
    samples = open_demonstrations(config.data.train, config, tokenizer, context, view)
    held_out = config.sft.eval_data
    measured = open_demonstrations(held_out, config, tokenizer, context, view) if held_out else []
    per_epoch = -(-len(samples) // config.sft.batch_size)
    total = per_epoch * config.sft.epochs
    trainer = Trainer(
        model,
        config.optim,
        config.train.token_budget,
        total,
        compute_dtype=dtype,
        layout=make_layout(model.spec, config.parallel, next(model.parameters()).device),
        activation_checkpointing=config.train.activation_checkpointing,
        compile=config.train.compile,
        moments=getattr(torch, config.train.moments),
        moments_on_host=config.train.moments_on_host,
        balance_loss=config.train.balance_loss,
    )
    if saved := checkpoints(Path(config.run.dir), from_step):
        epochs = -(-step_of(saved[-1]) // per_epoch)
        if epochs > config.sft.epochs:
            raise UserError(
                f"sft.epochs: expected at least the {epochs} that {config.run.dir} has begun, got {config.sft.epochs}; "
                f"nearest: {epochs}"
            )
    uids = [f"{i}/{hashlib.blake2b(s.tokens.tobytes(), digest_size=8).hexdigest()}" for i, s in enumerate(samples)]
    order = DataOrder(uids, config.run.seed)  # refuses to go on with other demonstrations
    stop = Stop()
    trainer.stopping = lambda: stop.requested
    with stop.listening(), RunDir(config, (view.event,), leader, from_step=from_step) as run:
        if isinstance(run.before, SFTConfig):
            say_changes(run, config.optim, view, 1, per_epoch * run.before.sft.epochs, total)
        progress = run.resume(trainer) or Progress(0, order.state())
        try:
            order.restore(progress.order)
        except UserError:
            why = "its demonstrations are others, or give other tokens (the data, the chat template, the tokenizer)"
            raise UserError(cannot_go_on(run.path, why)) from None
        alone, stopped = trainer.group is None, False  # several would measure one another
        run.journal.write("machine", **describe(trainer.device if alone else None, dtype))
        try:
            progress = measure_if_due(trainer, measured, progress, run)
            with phase(view, "steps", total, progress.step):
                while progress.step < total and not trainer.any(stop.requested):
                    step = progress.step + 1
                    last_of_epoch = step % per_epoch == 0
                    size = len(samples) - (per_epoch - 1) * config.sft.batch_size if last_of_epoch else None
                    batch = [samples[i] for i, _ in order.draw(size or config.sft.batch_size)]
                    train_one(trainer, batch, step, run, view)
                    due = step % config.sft.eval_every == 0 or step == total
                    progress = Progress(step, order.state(), evaluated=not due)
                    check_finite(trainer, config, progress, run)
                    progress = measure_if_due(trainer, measured, progress, run)
                    run.settle(wait=False)
                    if step % config.train.save_every == 0:
                        run.save(trainer, progress, config.train.keep_checkpoints)
        except StopRequested:
            stopped = True  # in a step or a measurement, which is done again
        except Exception:
            if alone and trainer.num_updates == progress.step:  # its weights are those of this step
                keep = config.train.keep_checkpoints
                run.save_at_error(progress.step, partial(run.save, trainer, progress, keep), view)
            raise
        run.save(trainer, progress, config.train.keep_checkpoints)
        run.settle()
        if progress.step < total or stopped:
            raise Interrupted(
                f"stopped after step {progress.step} of {total}, which is saved; "
                f"run {run.same_command} again to go on from there"
            )


def train_one(trainer: Trainer, batch: Sequence[Sample], step: int, run: RunDir, view: ProgressReporter) -> None:
    clock = StepTimer()
    with clock("train"):
        stats = trainer.step(batch, cross_entropy)
    view.advance()
    work: dict[str, float] = {}
    if trainer.group is None:  # one process; of several, each would have its own ceilings
        model, dtype = trainer.model, str(trainer.compute_dtype).removeprefix("torch.")
        adapter = sum(p.numel() for p in model.parameters() if p.requires_grad) if model.lora else 0
        work["train_flops"] = training_flops(model.spec, map(len, batch), stats.num_targets, adapter).total
        work["train_bytes"] = training_bytes(model.spec, stats.num_microbatches, 1, dtype, adapter)
    run.journal.write(
        "step",
        step=step,
        loss=stats.loss,
        grad_norm=stats.grad_norm,
        lr=stats.lr,
        entropy=stats.means["entropy"],
        num_samples=len(batch),
        num_targets=stats.num_targets,
        num_microbatches=stats.num_microbatches,
        train_tokens_per_s=stats.num_tokens / clock.seconds["train"],
        train_peak_bytes=stats.peak_bytes,
        seconds=clock.seconds,
        **work,
        **({"skipped": stats.skipped} if stats.skipped else {}),
    )


def check_finite(trainer: Trainer, config: SFTConfig, progress: Progress, run: RunDir) -> None:
    """Save, and raise RunError, after too many steps in a row that were not finite."""
    if why := not_finite(trainer, config.train.max_not_finite, run.same_command):
        run.save(trainer, progress, config.train.keep_checkpoints)
        run.settle()
        raise RunError(f"step {progress.step}: {why}")


def measure_if_due(trainer: Trainer, samples: Sequence[Sample], progress: Progress, run: RunDir) -> Progress:
    """Where the step asks for it, journal the loss on held-out demonstrations, per token over all of them, whatever the
    split or the number of ranks."""
    if progress.evaluated or not samples:  # a resumed run's recipe may have dropped them
        return replace(progress, evaluated=True)
    clock = StepTimer()
    with clock("eval"):
        total = sum(float(logprobs.sum(dtype=np.float64)) for logprobs in trainer.logprobs(samples))
    num_targets = sum(int(sample.loss_mask.sum()) for sample in samples)
    loss, seconds = -total / num_targets, clock.seconds
    run.journal.write("eval_loss", step=progress.step, loss=loss, num_targets=num_targets, seconds=seconds)
    return replace(progress, evaluated=True)


def open_demonstrations(
    path: str, config: SFTConfig, tokenizer: Tokenizer, context: int, view: ProgressReporter
) -> list[Sample]:
    """Read demonstrations as samples; one longer than the token budget or the context is an error, or skipped."""
    data = config.data
    file = read_demonstrations(path, data.skip_malformed, data.columns)
    for note in file.seen.notes(path):
        view.say(note)
    limit = min(config.train.token_budget * config.parallel.cp, context)
    samples: list[Sample] = []
    bad: list[str] = []
    for demonstration, place in zip(file.demonstrations, file.places, strict=True):
        try:
            sample = to_sample(demonstration, tokenizer)
        except UserError as error:
            bad.append(f"{place}: {error}")
            continue
        if len(sample) <= limit:
            samples.append(sample)
        else:
            bad.append(f"{place}: expected at most {limit} tokens, got {len(sample)}")
    if bad and not data.skip_malformed:
        raise UserError(
            named(bad, "demonstrations that cannot be used")
            + f"\nThe limit is the smaller of train.token_budget ({config.train.token_budget}) and the model's context "
            f"({context}); data.skip_malformed = true leaves such demonstrations out"
        )
    skipped = len(file.demonstrations) - len(samples) + len(file.skipped)
    if skipped:
        view.say(f"{path}: skipped {counted(skipped, 'demonstration')}, malformed or longer than {limit} tokens")
    if not samples:
        raise UserError(f"{path}: expected demonstrations, got none that can be used")
    return samples


def to_sample(demonstration: Demonstration, tokenizer: Tokenizer) -> Sample:
    """Prompt and response end to end; only the response, its stop token included, is trained on."""
    prompt = tokenizer.encode_prompt(demonstration.messages)
    response = tokenizer.encode_response(demonstration.response)
    tokens = np.concatenate([prompt, response])
    mask = np.arange(len(tokens)) >= len(prompt)
    zeros = np.zeros(len(tokens), np.float32)
    return Sample(tokens, mask, zeros, mask.astype(np.float32))
