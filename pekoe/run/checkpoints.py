"""Checkpoints on disk: which there are, what they hold beside the trainer's state, whether that is what was written.

checkpoints/step-000042/
    trainer/           by torch.distributed.checkpoint, with checksums of its own (`train.checkpoint`)
    state.json         progress, and how long journal, ledger and rollouts were
    in-flight.*        rollouts that were sampled and not trained on yet (`rollout.max_lag`)
    SHA256SUMS         of these files and of trainer/SHA256SUMS; absent in those of older versions
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pekoe.core.errors import UserError
from pekoe.core.io import SUMS, check_sums, fsync, read_sums, sha256, write_sums
from pekoe.core.records import record_files, write_groups
from pekoe.core.types import JudgedGroup

STATE, IN_FLIGHT, TRAINER = "state.json", "in-flight", "trainer"


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
        return cls(state["step"], dict(state["order"]), state.get("evaluated", state.get("measured", True)), in_flight)


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint holds beside the trainer's state."""

    progress: Progress
    offsets: dict[str, int]  # bytes of `journal` and `ledger` when it was begun
    rollouts: dict[str, int] = field(default_factory=dict[str, int])  # bytes of each file


def checkpoints(run_dir: Path, up_to: int | None = None) -> list[Path]:
    """The checkpoints of a run (up to a step), oldest first. What has another name than ours is none."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdecimal()]
    ours = [path for path in found if path.name == name_of(step_of(path)) and path.is_dir()]
    return sorted((path for path in ours if up_to is None or step_of(path) <= up_to), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def write_beside(folder: Path, saved: Saved, in_flight: Sequence[JudgedGroup]) -> int:
    """Write what a checkpoint has beside the trainer's state, with checksums, and bring all of it to disk. Returns its
    bytes."""
    text = json.dumps({**asdict(saved), "checksums": True}, indent=1)
    (folder / STATE).write_text(text, encoding="utf-8")
    write_groups(folder / IN_FLIGHT, in_flight)
    files = [path for path in folder.iterdir() if path.is_file()]
    files += [sums for sums in [folder / TRAINER / SUMS] if sums.exists()]  # another trainer may have none
    write_sums(folder, {str(path.relative_to(folder)): sha256(path) for path in files})
    return _to_disk(folder)


def read_beside(checkpoint: Path) -> Saved:
    """UserError, with the file's name, for what is missing or not as it was written."""
    state = read_json(checkpoint / STATE)
    if state.get("checksums") or (checkpoint / SUMS).exists():
        check_sums(checkpoint, sums := read_sums(checkpoint), sums)
    try:
        saved = Saved(Progress.of(state["progress"]), dict(state["offsets"]), dict(state.get("rollouts", {})))
        numbers = [saved.progress.step, saved.offsets["journal"], saved.offsets["ledger"], *saved.rollouts.values()]
        if saved.progress.step != step_of(checkpoint) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{checkpoint / STATE}: expected the progress of step {step_of(checkpoint)}, got something else"
        ) from None
    return saved


def check_trainer(checkpoint: Path) -> None:
    """UserError, with the file's name, where a file of the trainer's state is missing or not as it was written."""
    folder = checkpoint / TRAINER
    if (folder / SUMS).exists():
        check_sums(folder, sums := read_sums(folder), sums)


def sizes_of_rollouts(run_dir: Path, step: int) -> dict[str, int]:
    """The bytes of each file of rollouts up to a step."""
    return {file.name: file.stat().st_size for file, number in record_files(run_dir) if number <= step}


def short_rollouts(run_dir: Path, saved: Saved) -> list[str]:
    """The files of rollouts that are shorter than when the checkpoint was begun, or missing."""
    sizes = sizes_of_rollouts(run_dir, saved.progress.step)
    return [name for name, size in saved.rollouts.items() if sizes.get(name, -1) < size]


def read_json(file: Path) -> dict[str, Any]:
    """A file with a JSON object. UserError where it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: expected JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _to_disk(folder: Path) -> int:
    """Sync all files below a folder; returns their bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in (*files, folder):
        fsync(path)
    return sum(path.stat().st_size for path in files)
