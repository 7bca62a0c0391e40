"""A run directory: what is in it, how a step is committed to it, and how a stopped run goes on from it.

    config.toml            the resolved recipe; readable by its owner alone where it holds secrets
    journal.jsonl          events; `step` events carry all metrics
    inputs.json            digests of problems, prompts and rewards, see `run.inputs`
    ledger.jsonl           what became of every prompt drawn
    data.jsonl             problems that were read and dropped, each with the reason; absent if there are none
    rollouts/              the records of each step, see `core.records`
    checkpoints/           everything that decides the future, see `run.checkpoints`
    model/                 the last saved version in Hugging Face format; model-latest/ where something else is there
    exported.json          which of the two, and of which step it is
    discarded/             what a resumed run took back

A checkpoint is written under a temporary name while training goes on, brought to disk, and renamed; then the model is
written. It stores the byte offsets of journal and ledger, so that a resumed run takes back exactly what came after it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import IO, Any, TypeVar

from pekoe.config.base import flatten, read_toml
from pekoe.config.recipes import TrainingConfig, dump_config, load_config
from pekoe.config.secrets import without_secrets
from pekoe.core.errors import RunError, UserError
from pekoe.core.io import SUMS, fsync
from pekoe.core.journal import Journal, JsonLines, Listener, ends_at
from pekoe.core.loop import Snapshot, Trainer
from pekoe.core.progress import ProgressReporter
from pekoe.core.records import read_groups, record_files
from pekoe.core.types import JudgedGroup, Problem
from pekoe.run.checkpoints import (
    IN_FLIGHT,
    TRAINER,
    Progress,
    Saved,
    check_trainer,
    checkpoints,
    name_of,
    read_beside,
    read_json,
    short_rollouts,
    sizes_of_rollouts,
    step_of,
    write_beside,
)
from pekoe.run.inputs import INPUTS, Inputs, difference
from pekoe.run.interrupt import LastStep

C = TypeVar("C", bound=TrainingConfig)

# Keys that may differ between a run and its continuation: how long it goes on, how often it saves, on what machine. How
# the work is split (threads, processes, micro-batches) moves the last bits of sums: bits are the same with the same.
MAY_CHANGE = {
    "num_steps",
    "run.dir",
    "run.threads",
    "optim.lr",
    "optim.grad_clip",
    "train.max_not_finite",
    "train.token_budget",
    "train.activation_checkpointing",
    "train.compile",
    "train.save_every",
    "train.keep_checkpoints",
    "verify.workers",
    "verify.time_limit_s",
    "verify.memory_gib",
    "verify.max_fault_rate",
    "verify.functions",  # a kind that a problem has is found in its content, a function's source by `run.inputs`
    "sft.epochs",
    "sft.eval_data",
    "sft.eval_every",
}
# Processes, who looks on, and what is measured on the way.
MAY_CHANGE_BELOW = ("parallel.", "engine.server.", "cluster.", "track.", "eval.")
WRITE_LIMIT_S = 3600  # of one checkpoint
EXPORTED, MODEL, MODEL_BESIDE = "exported.json", "model", "model-latest"


class RunDir:
    """An open run directory. Use as a context manager.

    Args:
        config: of the run; its `run.dir`.
        listeners: called with each event of the journal.
        leader: whether this process writes. Where several train, the others read, and write their part of checkpoints.
        inputs: what decides the result beside the config, and must be that of the run that is there.
        from_step: go back to the checkpoint of this step; 0: begin anew.
    """

    def __init__(
        self,
        config: TrainingConfig,
        listeners: tuple[Listener, ...] = (),
        leader: bool = True,
        inputs: Inputs | None = None,
        from_step: int | None = None,
    ) -> None:
        self.path = Path(config.run.dir)
        self._config, self._leader = config, leader
        self._from = -1 if from_step == 0 else from_step  # a stop in the first step leaves a checkpoint of step 0
        self.same_command = "the same command" + (" (without --from)" if from_step is not None else "")  # goes on
        self.notices: list[str] = []  # what a user should know of the run that is there
        self.before: TrainingConfig | None = None  # the recipe of the run that is there
        self.changed: dict[str, list[Any]] = {}  # its keys that have other values now: those before, and these
        self._owes_model = False  # the checkpoint that was resumed stands, and its model does not
        with ExitStack() as stack, _one_message(self.path):
            _check_from(self.path, from_step)
            if leader:
                self._open(stack, inputs)
            self.ledger = JsonLines(self.path / "ledger.jsonl" if leader else None)
            stack.callback(self.ledger.close)
            self.journal = Journal(self.path / "journal.jsonl" if leader else None, listeners)
            stack.callback(self.journal.close)
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            stack.callback(self._writer.shutdown)  # waits: what was begun may as well stand
            self._stack = stack.pop_all()
        self._writing: tuple[dict[str, Any], float, Future[int]] | None = None
        self.saved: int | None = None  # the step of the last checkpoint

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            self._stack.close()

    def _open(self, stack: ExitStack, inputs: Inputs | None) -> None:
        """Make the directory, lock it for this process until `stack` closes, and write config.toml and inputs.json.

        UserError where those that are there are of another run, which has a checkpoint.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"run.dir: expected a directory that can be written, got {self.path}: {error.strerror}"
            ) from None
        model = Path(self._config.model.path).resolve()
        if model in [(self.path / name).resolve() for name in (MODEL, MODEL_BESIDE)]:
            raise UserError(f"run.dir: expected another directory than that of model.path ({model}), which is replaced")
        busy = f"{self.path}: another process is running here; wait for it, or choose another run.dir"
        stack.enter_context(lock(self.path / ".lock", busy))
        file, known = self.path / "config.toml", self.path / INPUTS
        has_checkpoint = bool(checkpoints(self.path, self._from))
        if file.exists():
            self.before = load_config(file, kind=type(self._config))
            # Whatever the recipe says of the data, the problems that come of it are compared.
            differ = self._compare(self.before, "data." if inputs is not None and known.exists() else "data.check")
            if differ and has_checkpoint:
                key, (was, now) = next(iter(differ.items()))
                raise UserError(
                    f"{self.path}: holds a run with {key} = {was!r}, got {now!r}; "
                    "go on with the same recipe, or choose another run.dir"
                )
        if inputs is not None and has_checkpoint and known.exists():
            try:
                differs = difference(read_json(known), inputs)
            except (KeyError, TypeError, AttributeError, UserError):
                raise UserError(
                    f"{known}: expected what the run began with, got something else; if problems, prompts and rewards "
                    "are still the same, remove it"
                ) from None
            if differs:
                raise UserError(cannot_go_on(self.path, differs))
            inputs = None  # they are written down
        tree = self._config.model_dump(mode="json")
        check_num_steps(self.path, getattr(self._config, "num_steps", None), self._from)
        self._newest(whole=self._from is not None)
        if self._from is not None:
            for path in checkpoints(self.path):
                if step_of(path) > self._from:
                    _set_aside(path, self.path / "discarded")
        if inputs is not None:  # no checkpoint of other inputs is left
            write_whole(known, json.dumps(inputs, indent=0) + "\n")
        write_whole(file, dump_config(self._config), private=without_secrets(tree) != tree)

    def _compare(self, before: TrainingConfig, free: str) -> dict[str, list[Any]]:
        """Set `changed`. Returns the keys, with both values, that may not change; those that begin with `free` may."""
        old, new = flatten(before.model_dump()), flatten(self._config.model_dump())
        old["model.template.date"] = old["model.template.date"] or new["model.template.date"]  # see with_date
        pairs = {key: [old.get(key), new.get(key)] for key in new | old}
        pairs = {key: pair for key, pair in pairs.items() if not _same(key, *pair)}
        shown = [flatten(without_secrets(config.model_dump(mode="json"))) for config in (before, self._config)]
        told = {key: [tree.get(key) for tree in shown] for key in pairs if key not in ("run.dir", "run.threads")}
        self.changed = {key: pair for key, pair in told.items() if pair[0] != pair[1]}
        below = (*MAY_CHANGE_BELOW, free)
        return {key: pair for key, pair in pairs.items() if key not in MAY_CHANGE and not key.startswith(below)}

    def _newest(self, whole: bool = False) -> Saved | None:
        """What the checkpoint to go on from holds beside the trainer's state, None where there is none.

        UserError where it, or what was there when it was begun, is damaged. `whole`: the trainer's state is checked,
        too, which else `Trainer.load` does.
        """
        found = checkpoints(self.path, self._from)
        if not found:
            return None
        with _way_back(found):
            saved = read_beside(found[-1])
            if whole:
                check_trainer(found[-1])
            for name in ("journal", "ledger"):
                file, offset = self.path / f"{name}.jsonl", saved.offsets[name]
                if not ends_at(file, offset):
                    size = file.stat().st_size if file.exists() else 0
                    raise UserError(
                        f"{file}: expected a line that ends at byte {offset}, as when the checkpoint of step "
                        f"{saved.progress.step} was written, got {f'{size} bytes' if size < offset else 'other lines'}"
                    )
        if short := short_rollouts(self.path, saved):
            more = f" and {len(short) - 1} more" if len(short) > 1 else ""
            self.notices = [
                f"{self.path / 'rollouts' / short[0]}{more}: shorter than it was, or missing: the run goes on, and "
                "pekoe report and pekoe rl --replay lack these steps"
            ]
        return saved

    def resume(self, trainer: Trainer) -> Progress | None:
        """Go back to the newest checkpoint: load the trainer, take back what came later, return the progress.

        None where there is no checkpoint: then everything found is taken back, and the run starts anew. UserError, with
        a way back, where the checkpoint is damaged.
        """
        progress: Progress | None = None
        offsets = {"journal": 0, "ledger": 0}
        if saved := self._newest():
            progress, offsets = saved.progress, saved.offsets
            found = checkpoints(self.path, self._from)
            self._owes_model = _owes_model(found[-1], self._from is not None)
            with _way_back(found):
                trainer.load(found[-1] / TRAINER)
            self.saved = progress.step
        self._from = None  # checkpoints to come count, too
        if self._leader:
            with _one_message(self.path):
                self._take_back(progress, offsets)
        return progress

    def _take_back(self, progress: Progress | None, offsets: Mapping[str, int]) -> None:
        """Set aside what came after a checkpoint."""
        step = progress.step if progress else 0
        taken = self.journal.cut(offsets["journal"], self.path / "discarded" / "journal.jsonl")
        taken += self.ledger.cut(offsets["ledger"], self.path / "discarded" / "ledger.jsonl")
        for file, number in record_files(self.path):
            if number > step:
                taken += file.stat().st_size
                _set_aside(file, self.path / "discarded")
        for partial in (self.path / "checkpoints").glob(".partial-*"):
            shutil.rmtree(partial)
        if progress or taken:
            changed = {"changed": self.changed} if self.changed else {}
            self.journal.write("resumed", step=step, discarded_bytes=taken, **changed)

    def sampled_in_flight(self, problems: Mapping[str, Problem]) -> list[JudgedGroup]:
        """The groups that the newest checkpoint has of its draws in flight; `problems` by their uids."""
        return read_groups(checkpoints(self.path)[-1] / IN_FLIGHT, problems)

    def save(
        self, state: Trainer | LastStep, progress: Progress, keep: int, in_flight: Sequence[JudgedGroup] = ()
    ) -> None:
        """Begin a checkpoint of `progress.step`, with the model directory; then remove checkpoints beyond `keep`.
        `in_flight` was sampled and not trained on yet.

        Waits for the checkpoint before. Returns as soon as the trainer's state is copied: it is written while training
        goes on. `settle` reports success or failure.
        """
        self.settle()
        if self.saved == progress.step and not self._owes_model:
            return
        start = time.perf_counter()
        offsets = {"journal": self.journal.sync(), "ledger": self.ledger.sync()}
        saved = Saved(progress, offsets) if self.saved != progress.step else None
        future = self._writer.submit(self._write, state.snapshot(), progress.step, saved, keep, in_flight)
        self._owes_model = False
        stall = time.perf_counter() - start
        self._writing = {"step": progress.step, "stall_s": round(stall, 4)}, start, future

    def save_at_error(self, step: int, save: Callable[[], None], view: ProgressReporter) -> None:
        """Save the last complete step, as at Ctrl-C, if that works: the error that ends the run is what is raised."""
        if step == (self.saved or 0):
            return
        try:
            save()
            self.settle()
            view.say(f"step {step} is saved; {self.same_command} goes on from there")
        except Exception as error:
            view.say(f"step {step} could not be saved: {error}")

    def settle(self, wait: bool = True) -> None:
        """Journal the checkpoint that is being written, once it stands.

        Raises RunError where it could not be written. Without `wait`, nothing happens while it is being written.
        """
        if self._writing is None:
            return
        fields, start, future = self._writing
        if not wait and not future.done():
            return
        self._writing = None
        try:
            size = future.result(WRITE_LIMIT_S)
        except OSError as error:
            kept = checkpoints(self.path)
            late = isinstance(error, TimeoutError) and not future.done()
            raise RunError(
                f"checkpoint of step {fields['step']}: {f'not written within {WRITE_LIMIT_S} s' if late else error}; "
                f"{f'that of step {int(kept[-1].name[5:])} stands' if kept else 'there is none before it'}. "
                f"With the cause removed, {self.same_command} goes on from there"
            ) from None
        self.saved = fields["step"]
        self.journal.write("checkpoint", **fields, seconds=round(time.perf_counter() - start, 4), bytes=size)

    def forget_writing(self) -> None:
        """Wait for a checkpoint whose trainer is lost, and ignore its outcome."""
        if self._writing is not None:
            wait([self._writing[2]], WRITE_LIMIT_S)
        self._writing = None

    def _write(
        self, state: Snapshot, step: int, saved: Saved | None, keep: int, in_flight: Sequence[JudgedGroup]
    ) -> int:
        """Write a checkpoint and its model (`saved` None: the model alone); returns the checkpoint's bytes. In a thread
        of its own: touches nothing that changes."""
        target = self.path / "checkpoints" / name_of(step)
        partial = target.with_name(f".partial-{target.name}")
        size = 0
        if saved is not None:
            try:
                state.write(partial / TRAINER)
                if self._leader:
                    rollouts = sizes_of_rollouts(self.path, step)
                    size = write_beside(partial, replace(saved, rollouts=rollouts), in_flight)
                    os.replace(partial, target)
                    fsync(target.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)  # its room may be what is lacking
                raise
        if not self._leader:
            return 0
        # The model comes second: the checkpoint stands whatever is in its way. Killed in between, it is written later.
        self._export(state, step)
        for old in checkpoints(self.path)[:-keep]:
            doomed = old.with_name(f".partial-{old.name}")  # under its own name it would pass for whole
            os.replace(old, doomed)
            shutil.rmtree(doomed)
        return size

    def _export(self, state: Snapshot, step: int) -> None:
        """Write the model; beside its place where something else is there, which is not ours to remove."""
        name, why = MODEL, ""
        try:
            state.export(self.path / MODEL)
        except UserError as error:
            name, why = MODEL_BESIDE, str(error)
            state.export(self.path / MODEL_BESIDE)
        write_whole(self.path / EXPORTED, json.dumps({"step": step, "model": name, "why": why}) + "\n")


def exported_model(run_dir: Path) -> tuple[Path, str]:
    """The directory of a run's last model, and why it is not `model`; empty where it is."""
    name, why = MODEL, ""
    with suppress(UserError):  # a run of an older version has no such file
        exported = read_json(run_dir / EXPORTED)
        if exported.get("model") == MODEL_BESIDE and (run_dir / MODEL_BESIDE).is_dir():
            name, why = MODEL_BESIDE, str(exported.get("why"))
    return run_dir / name, why


def where_model_is(run_dir: Path) -> str:
    path, why = exported_model(run_dir)
    return f"the model is in {path}" + (f" ({why})" if why else "")


def _owes_model(checkpoint: Path, went_back: bool) -> bool:
    """Whether the model that is there is not that of the checkpoint."""
    file = checkpoint.parents[1] / EXPORTED
    if not file.exists() and not (checkpoint / SUMS).exists():  # an older version wrote the model first
        return went_back
    try:
        return read_json(file).get("step") != step_of(checkpoint)
    except UserError:
        return True


@contextmanager
def _one_message(run_dir: Path) -> Generator[None]:
    """UserError for what the system refuses: a directory where a file was, say."""
    try:
        yield
    except OSError as error:
        raise UserError(f"run.dir: {error.filename or run_dir}: {error.strerror or error}") from None


@contextmanager
def _way_back(found: Sequence[Path]) -> Generator[None]:
    """Adds to a UserError on the newest of these checkpoints how to go on without it."""
    try:
        yield
    except UserError as error:
        step, older = step_of(found[-1]), [step_of(path) for path in found[:-1]]
        way = f"--from {older[-1]} goes back to the one before it" if any(older) else "--from 0 begins anew"
        raise UserError(
            f"{error}. The run cannot go on from its checkpoint of step {step}; the same command with {way}"
        ) from None


def _check_from(run_dir: Path, from_step: int | None) -> None:
    """UserError where there is no checkpoint of this step."""
    known = sorted({0, *map(step_of, checkpoints(run_dir))})
    if from_step is not None and from_step not in known:
        nearest = min(known, key=lambda step: abs(step - from_step))
        raise UserError(
            f"--from: expected a step with a checkpoint in {run_dir} ({', '.join(map(str, known))}; 0 begins anew), "
            f"got {from_step}; nearest: {nearest}"
        )


def check_num_steps(run_dir: Path, num_steps: int | None, from_step: int | None = None) -> None:
    """Raise UserError where more steps than `num_steps` are done: the model would be of another step than asked for."""
    saved = checkpoints(run_dir, from_step)
    if num_steps is not None and saved and (done := step_of(saved[-1])) > num_steps:
        raise UserError(
            f"num_steps: expected at least the {done} steps that {run_dir} has done, got {num_steps}; nearest: {done}"
        )


def cannot_go_on(run_dir: Path, why: str) -> str:
    """The message where what decides the result has changed."""
    return (
        f"{run_dir}: the run cannot go on as it began: {why}. Go on with what it began with, or train on from its "
        f"model in another run.dir (model.path={run_dir}/model)"
    )


def _same(key: str, before: Any, now: Any) -> bool:
    """Whether two values of a key are one; `./a` and `a` are the same path."""
    if key in ("model.path", "data.train") and isinstance(now, str) and isinstance(before, str):
        return os.path.abspath(now) == os.path.abspath(before)
    return now == before


def with_date(config: C) -> C:
    """`config` with the date that its chat template prints: its own, else the run directory's, else today's.

    A template that prints the date would otherwise give other prompts on the day after, and a resumed run other bits.
    A run directory that was written without a date takes today's.
    """
    template, file = config.model.template, Path(config.run.dir) / "config.toml"
    if template.date is not None:
        return config
    kept = flatten(read_toml(file)).get("model.template.date") if file.is_file() else None
    template = template.model_copy(update={"date": kept or date.today().isoformat()})
    return config.model_copy(update={"model": config.model.model_copy(update={"template": template})})


def lock(path: Path, busy: str) -> IO[bytes]:
    """Open a file, locked for this process until it is closed. UserError (`busy`) where another process has it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(busy) from None
    return file


def write_whole(path: Path, text: str, private: bool = False) -> None:
    """Write a file that a reader sees whole or not at all. `private`: only its owner may read it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        partial.touch(0o600 if private else 0o666)  # with its mode from the beginning
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _set_aside(file: Path, folder: Path) -> None:
    """Move a file to `folder` under a name that is free there: a step may be taken back more than once."""
    folder.mkdir(exist_ok=True)
    number = 0
    while (target := folder / (f"{file.name}.{number}" if number else file.name)).exists():
        number += 1
    os.replace(file, target)
