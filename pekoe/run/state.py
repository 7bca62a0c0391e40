"""A run directory: what is in it, how a step is committed to it, and how a stopped run goes on from it.

    config.toml            the resolved recipe
    journal.jsonl          events; `step` events carry all metrics
    ledger.jsonl           what became of every prompt drawn
    rollouts/              one compressed JSONL a step
    checkpoints/           trainer state by torch.distributed.checkpoint, and state.json with everything else
    model/                 the last saved version in Hugging Face format
    discarded/             what a resumed run took back

A checkpoint is written under a temporary name, brought to disk, and renamed; it stores the byte offsets of journal
and ledger, so that a resumed run takes back exactly what came after it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
import zstandard

from pekoe.core.config import TrainingConfig, dump_config, load_config
from pekoe.core.errors import UserError
from pekoe.core.journal import Journal, JsonLines, Listener
from pekoe.model import save_model
from pekoe.train import Trainer

Progress = dict[str, Any]  # what a loop needs to go on: plain JSON values

# Keys that may differ between a run and its continuation: how long it goes on, how often it saves, on what machine. The
# number of threads moves the last bits of sums: a resumed run has the same bits with the same threads.
MAY_CHANGE = {"num_steps", "run.threads", "train.save_every", "train.keep_checkpoints", "verify.workers"}
MAY_CHANGE_BELOW = "engine.server."  # where the servers are and how they are started


class RunDir:
    """An open run directory. Use as a context manager."""

    def __init__(self, config: TrainingConfig, listeners: tuple[Listener, ...] = ()) -> None:
        self.path = Path(config.run.dir)
        self._config = config
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"run.dir: expected a directory that can be written, got {self.path}: {error.strerror}"
            ) from None
        self._lock = (self.path / ".lock").open("w")
        try:
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        self.journal = Journal(self.path / "journal.jsonl", listeners)
        self.ledger = JsonLines(self.path / "ledger.jsonl")

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()
        self.ledger.close()
        self._lock.close()

    def _claim(self) -> None:
        """Take the directory for this process; write config.toml, or check that the one there is of the same run."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another process is running here; wait for it, or choose another run.dir"
            ) from None
        file = self.path / "config.toml"
        if file.exists():
            before = _flat(load_config(file, kind=type(self._config)).model_dump())
            now = _flat(self._config.model_dump())
            fixed = (k for k in now if k not in MAY_CHANGE and not k.startswith(MAY_CHANGE_BELOW))
            differ = [k for k in fixed if now[k] != before.get(k)]
            if differ and any((self.path / "checkpoints").glob("step-*")):
                key = differ[0]
                raise UserError(
                    f"{self.path}: holds a run with {key} = {before.get(key)!r}, got {now[key]!r}; "
                    "go on with the same recipe, or choose another run.dir"
                )
        partial = file.with_name(".config.toml")
        partial.write_text(dump_config(self._config), encoding="utf-8")
        os.replace(partial, file)

    def resume(self, trainer: Trainer) -> Progress | None:
        """Go back to the newest checkpoint: load the trainer, take back what came later, return the progress.

        None where there is no checkpoint: then everything found is taken back, and the run starts anew.
        """
        found = checkpoints(self.path)
        progress: Progress | None = None
        offsets = {"journal": 0, "ledger": 0}
        if found:
            state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
            progress, offsets = state["progress"], state["offsets"]
            load_checkpoint(found[-1], trainer)
        step = progress["step"] if progress else 0
        taken = self.journal.cut(offsets["journal"], self.path / "discarded" / "journal.jsonl")
        taken += self.ledger.cut(offsets["ledger"], self.path / "discarded" / "ledger.jsonl")
        for file in sorted((self.path / "rollouts").glob("step-*.jsonl.zst")):
            if int(file.name[5:11]) > step:
                taken += file.stat().st_size
                _set_aside(file, self.path / "discarded")
        if progress or taken:
            self.journal.write("resumed", step=step, discarded_bytes=taken)
        return progress

    def save(self, trainer: Trainer, progress: Progress, keep: int) -> Path:
        """Write a checkpoint of `progress["step"]` and the model directory; remove checkpoints beyond `keep`."""
        target = self.path / "checkpoints" / f"step-{progress['step']:06d}"
        if target.exists():
            return target
        partial = target.with_name(f".partial-{target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with _one_process():
            dcp.save(trainer.state_dict(), checkpoint_id=str(partial / "trainer"))
        offsets = {"journal": self.journal.sync(), "ledger": self.ledger.sync()}
        state = json.dumps({"progress": progress, "offsets": offsets}, indent=1)
        (partial / "state.json").write_text(state, encoding="utf-8")
        _to_disk(partial)
        # The model first: where a checkpoint stands, its model does too. Killed in between, the step is done again.
        save_model(trainer.model, self.path / "model")
        os.replace(partial, target)
        _fsync(target.parent)
        for old in checkpoints(self.path)[:-keep]:
            shutil.rmtree(old)
        return target

    def write_rollouts(self, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write a step's rollouts, compressed."""
        file = self.path / "rollouts" / f"step-{step:06d}.jsonl.zst"
        file.parent.mkdir(exist_ok=True)
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        file.write_bytes(zstandard.ZstdCompressor(level=3).compress(text.encode()))


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def load_checkpoint(path: Path, trainer: Trainer) -> None:
    """Give the trainer the state that it had."""
    tensors = trainer.state_dict()
    with _one_process():
        dcp.load(tensors, checkpoint_id=str(path / "trainer"))
    trainer.load_state_dict(tensors)


def read_rollouts(file: Path) -> list[dict[str, Any]]:
    """The lines of one rollouts file."""
    text = zstandard.ZstdDecompressor().decompress(file.read_bytes())
    return [json.loads(line) for line in text.splitlines()]


@contextmanager
def _one_process() -> Iterator[None]:
    """A checkpoint of a single process is meant, not a forgotten process group, of which DCP warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _set_aside(file: Path, folder: Path) -> None:
    """Move a file to `folder` under a name that is free there: a step may be taken back more than once."""
    folder.mkdir(exist_ok=True)
    number = 0
    while (target := folder / (f"{file.name}.{number}" if number else file.name)).exists():
        number += 1
    os.replace(file, target)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _to_disk(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
