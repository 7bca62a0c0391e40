"""A run directory: what is in it, how a step is committed to it, and how a stopped run goes on from it.

    config.toml            the resolved recipe; readable by its owner alone where it holds secrets
    journal.jsonl          events; `step` events carry all metrics
    inputs.json            digests of problems, prompts and rewards, see `run.inputs`
    ledger.jsonl           what became of every prompt drawn
    data.jsonl             problems that were read and dropped, each with the reason; absent if there are none
    rollouts/              the records of each step, see `core.records`
    checkpoints/           trainer state by torch.distributed.checkpoint, state.json with everything else, and
                           in-flight.* with the rollouts that were sampled and not trained on yet (`rollout.max_lag`)
    model/                 the last saved version in Hugging Face format
    discarded/             what a resumed run took back

A checkpoint is written under a temporary name while training goes on, brought to disk, and renamed; it stores the byte
offsets of journal and ledger, so that a resumed run takes back exactly what came after it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import IO, Any, TypeVar

from pekoe.config.base import flatten, read_toml
from pekoe.config.recipes import TrainingConfig, dump_config, load_config
from pekoe.config.secrets import without_secrets
from pekoe.core.errors import RunError, UserError
from pekoe.core.io import fsync
from pekoe.core.journal import Journal, JsonLines, Listener
from pekoe.core.loop import Snapshot, Trainer
from pekoe.core.records import read_groups, write_groups
from pekoe.core.types import JudgedGroup, Problem
from pekoe.run.inputs import INPUTS, Inputs, difference


@dataclass(frozen=True, slots=True)
class Progress:
    """What a loop needs to go on from a step: plain JSON values."""

    step: int
    order: dict[str, Any]  # of the data, see `data.order`
    evaluated: bool = True  # whether the evaluation that follows the step, if any, was made
    in_flight: tuple[tuple[str, int, int], ...] = ()  # draws put and not taken: uid, number, place (`core.loop`)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """From a checkpoint's JSON; `measured` is an older name of `evaluated`."""
        in_flight = tuple((uid, number, place) for uid, number, place in state.get("in_flight", ()))
        return cls(state["step"], state["order"], state.get("evaluated", state.get("measured", True)), in_flight)


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
IN_FLIGHT = "in-flight"  # the stem of the files of a checkpoint's rollouts


class RunDir:
    """An open run directory. Use as a context manager.

    Args:
        config: of the run; its `run.dir`.
        listeners: called with each event of the journal.
        leader: whether this process writes. Where several train, the others read, and write their part of checkpoints.
        inputs: what decides the result beside the config, and must be that of the run that is there.
    """

    def __init__(
        self,
        config: TrainingConfig,
        listeners: tuple[Listener, ...] = (),
        leader: bool = True,
        inputs: Inputs | None = None,
    ) -> None:
        self.path = Path(config.run.dir)
        self._config, self._leader = config, leader
        self.before: TrainingConfig | None = None  # the recipe of the run that is there
        self.changed: dict[str, list[Any]] = {}  # its keys that have other values now: those before, and these
        with ExitStack() as stack:
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
        busy = f"{self.path}: another process is running here; wait for it, or choose another run.dir"
        stack.enter_context(lock(self.path / ".lock", busy))
        file, known = self.path / "config.toml", self.path / INPUTS
        has_checkpoint = bool(checkpoints(self.path))
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
            if differs := difference(json.loads(known.read_text(encoding="utf-8")), inputs):
                raise UserError(cannot_go_on(self.path, differs))
        elif inputs is not None:
            write_whole(known, json.dumps(inputs, indent=0) + "\n")
        tree = self._config.model_dump(mode="json")
        check_num_steps(self.path, getattr(self._config, "num_steps", None))
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

    def resume(self, trainer: Trainer) -> Progress | None:
        """Go back to the newest checkpoint: load the trainer, take back what came later, return the progress.

        None where there is no checkpoint: then everything found is taken back, and the run starts anew.
        """
        progress: Progress | None = None
        offsets = {"journal": 0, "ledger": 0}
        if saved := checkpoints(self.path):
            state = json.loads((saved[-1] / "state.json").read_text(encoding="utf-8"))
            progress, offsets = Progress.of(state["progress"]), state["offsets"]
            trainer.load(saved[-1] / "trainer")
            self.saved = progress.step
        if self._leader:
            self._take_back(progress, offsets)
        return progress

    def _take_back(self, progress: Progress | None, offsets: Mapping[str, int]) -> None:
        """Set aside what came after a checkpoint."""
        step = progress.step if progress else 0
        taken = self.journal.cut(offsets["journal"], self.path / "discarded" / "journal.jsonl")
        taken += self.ledger.cut(offsets["ledger"], self.path / "discarded" / "ledger.jsonl")
        for file in sorted((self.path / "rollouts").glob("step-*.zst")):
            if int(file.name[5:11]) > step:
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

    def save(self, trainer: Trainer, progress: Progress, keep: int, in_flight: Sequence[JudgedGroup] = ()) -> None:
        """Begin a checkpoint of `progress.step`, with the model directory; then remove checkpoints beyond `keep`.
        `in_flight` was sampled and not trained on yet.

        Waits for the checkpoint before. Returns as soon as the trainer's state is copied: it is written while training
        goes on. `settle` reports success or failure.
        """
        self.settle()
        if self.saved == progress.step:
            return
        start = time.perf_counter()
        offsets = {"journal": self.journal.sync(), "ledger": self.ledger.sync()}
        state = trainer.snapshot()
        future = self._writer.submit(self._write, state, progress, offsets, keep, in_flight)
        stall = time.perf_counter() - start
        self._writing = {"step": progress.step, "stall_s": round(stall, 4)}, start, future

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
                f"With the cause removed, the same command goes on from there"
            ) from None
        self.saved = fields["step"]
        self.journal.write("checkpoint", **fields, seconds=round(time.perf_counter() - start, 4), bytes=size)

    def forget_writing(self) -> None:
        """Wait for a checkpoint whose trainer is lost, and ignore its outcome."""
        if self._writing is not None:
            wait([self._writing[2]], WRITE_LIMIT_S)
        self._writing = None

    def _write(
        self,
        state: Snapshot,
        progress: Progress,
        offsets: Mapping[str, int],
        keep: int,
        in_flight: Sequence[JudgedGroup],
    ) -> int:
        """Write a checkpoint and return its size in bytes. In a thread of its own: touches nothing that changes."""
        target = self.path / "checkpoints" / f"step-{progress.step:06d}"
        partial = target.with_name(f".partial-{target.name}")
        try:
            state.write(partial / "trainer")
            if not self._leader:
                return 0
            text = json.dumps({"progress": asdict(progress), "offsets": offsets}, indent=1)
            (partial / "state.json").write_text(text, encoding="utf-8")
            write_groups(partial / IN_FLIGHT, in_flight)
            size = _to_disk(partial)
            # The model first: where a checkpoint stands, its model does too. Killed in between, the step is done again.
            state.export(self.path / "model")
            os.replace(partial, target)
            fsync(target.parent)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # its room may be what is lacking
            raise
        for old in checkpoints(self.path)[:-keep]:
            doomed = old.with_name(f".partial-{old.name}")  # under its own name it would pass for whole
            os.replace(old, doomed)
            shutil.rmtree(doomed)
        return size


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
    kept = read_toml(file).get("model", {}).get("template", {}).get("date") if file.is_file() else None
    template = template.model_copy(update={"date": kept or date.today().isoformat()})
    return config.model_copy(update={"model": config.model.model_copy(update={"template": template})})


def check_num_steps(run_dir: Path, num_steps: int | None) -> None:
    """Raise UserError where more steps than `num_steps` are done: the model would be of another step than asked for."""
    saved = checkpoints(run_dir)
    if num_steps is not None and saved and (done := int(saved[-1].name[5:])) > num_steps:
        raise UserError(
            f"num_steps: expected at least the {done} steps that {run_dir} has done, got {num_steps}; nearest: {done}"
        )


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


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
    partial.touch(0o600 if private else 0o666)  # with its mode from the beginning
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _set_aside(file: Path, folder: Path) -> None:
    """Move a file to `folder` under a name that is free there: a step may be taken back more than once."""
    folder.mkdir(exist_ok=True)
    number = 0
    while (target := folder / (f"{file.name}.{number}" if number else file.name)).exists():
        number += 1
    os.replace(file, target)


def _to_disk(folder: Path) -> int:
    """Sync all files below a folder; returns their bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in (*files, folder):
        fsync(path)
    return sum(path.stat().st_size for path in files)
