"""Records of rollouts on disk: a line a trajectory, and beside it the arrays, float32 exact.

    rollouts/step-000042.jsonl.zst   JSON lines: uid, verdict, reward, texts ...
    rollouts/step-000042.npz.zst     prompt_tokens, tokens, logprobs, end to end in the order of the lines, and offsets

On a cluster each node writes its own pair, step-000042.NODE.*.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from pekoe.core.errors import UserError
from pekoe.core.types import JudgedGroup, Problem, Record, Trajectory, Verdict

LINES, ARRAYS = ".jsonl.zst", ".npz.zst"
_NAME = re.compile(r"step-(\d{6,})(?:\.\d+)?(?:\.jsonl|\.npz)\.zst")
_DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, MemoryError, RecursionError, NotImplementedError),
    *(zstandard.ZstdError, zipfile.BadZipFile),
)


def write_records(stem: Path, lines: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> None:
    """Write `stem`.jsonl.zst and `stem`.npz.zst; the lines last, so that lines never lack their arrays."""
    stem.parent.mkdir(exist_ok=True)
    responses = [record.loss_mask for record in records]
    columns = {
        "prompt_tokens": [record.tokens[~mask] for record, mask in zip(records, responses, strict=True)],
        "tokens": [record.tokens[mask] for record, mask in zip(records, responses, strict=True)],
        "logprobs": [record.logprobs[mask] for record, mask in zip(records, responses, strict=True)],
    }
    buffer = io.BytesIO()
    arrays = {name: np.concatenate([*parts, np.empty(0)]) for name, parts in columns.items()}
    np.savez(
        buffer,
        prompt_tokens=arrays["prompt_tokens"].astype(np.int32),
        tokens=arrays["tokens"].astype(np.int32),
        logprobs=arrays["logprobs"].astype(np.float32),
        prompt_offsets=np.cumsum([0, *map(len, columns["prompt_tokens"])], dtype=np.int64),
        offsets=np.cumsum([0, *map(len, columns["tokens"])], dtype=np.int64),
    )
    _write(stem.with_name(stem.name + ARRAYS), buffer.getbuffer())
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    _write(stem.with_name(stem.name + LINES), text.encode())


def read_records(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a step, group by group, each with its arrays `prompt_tokens`, `tokens` and `logprobs`.

    Empty where the step has no records. UserError, with the file's name, where they cannot be read.
    """
    files = [file for file, number in record_files(run_dir) if number == step and file.name.endswith(LINES)]
    lines = [line for file in files for line in _read(file.with_name(file.name.removesuffix(LINES)))]
    try:
        return sorted(lines, key=lambda line: (line["group"], line["sample"]))
    except (KeyError, TypeError):
        raise UserError(f"{files[0]}: cannot be read: expected group and sample in each line") from None


def record_files(run_dir: Path) -> list[tuple[Path, int]]:
    """The files of rollouts, each with its step, in order; files of other names are none."""
    named = ((file, _NAME.fullmatch(file.name)) for file in sorted((run_dir / "rollouts").glob("step-*")))
    return [(file, int(name[1])) for file, name in named if name and file.is_file()]


def _read(stem: Path) -> list[dict[str, Any]]:
    file = stem.with_name(stem.name + LINES)
    try:
        text = zstandard.ZstdDecompressor().decompress(file.read_bytes())
        rows = [dict[str, Any](json.loads(line)) for line in text.splitlines()]
        file = stem.with_name(stem.name + ARRAYS)
        data = zstandard.ZstdDecompressor().decompress(file.read_bytes())
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            prompts = np.split(arrays["prompt_tokens"], arrays["prompt_offsets"][1:-1])
            tokens, logprobs = (np.split(arrays[name], arrays["offsets"][1:-1]) for name in ("tokens", "logprobs"))
        return [
            line | {"prompt_tokens": prompt, "tokens": response, "logprobs": values}
            for line, prompt, response, values in zip(rows, prompts, tokens, logprobs, strict=bool(rows))
        ]
    except _DAMAGE as error:
        why = error.strerror if isinstance(error, OSError) else f"the file is damaged ({type(error).__name__}: {error})"
        raise UserError(f"{file}: cannot be read: {why}") from None


def record_of(line: Mapping[str, Any]) -> Record:
    """The tokens of a line that was read."""
    return Record.of(line["prompt_tokens"].astype(np.int64), line["tokens"].astype(np.int64), line["logprobs"])


def write_groups(stem: Path, groups: Sequence[JudgedGroup]) -> None:
    """Write groups that nothing was trained on yet, with their verdicts; no file where there are none."""
    pairs = [pair for group in groups for pair in zip(group.trajectories, group.verdicts, strict=True)]
    if pairs:
        lines = [
            {
                "uid": t.uid,
                "draw": t.draw,
                "finish_reason": t.finish,
                "versions": t.versions,
                "verdict": asdict(verdict),
            }
            for t, verdict in pairs
        ]
        write_records(stem, lines, [trajectory.handle.resolve() for trajectory, _ in pairs])


def read_groups(stem: Path, problems: Mapping[str, Problem]) -> list[JudgedGroup]:
    """What `write_groups` wrote, empty where it wrote nothing; `problems` by their uids."""
    if not stem.with_name(stem.name + LINES).exists():
        return []
    groups: dict[tuple[str, int], list[tuple[Trajectory, Verdict]]] = {}
    for line in _read(stem):
        record, members = record_of(line), groups.setdefault((line["uid"], line["draw"]), [])
        versions = tuple((version, start) for version, start in line["versions"])
        place = line["uid"], line["draw"], len(members), len(line["prompt_tokens"]), len(line["tokens"])
        trajectory = Trajectory(*place, line["finish_reason"], versions, record)
        members.append((trajectory, Verdict(**line["verdict"])))
    return [
        JudgedGroup(problems[uid], draw, tuple(t for t, _ in members), tuple(verdict for _, verdict in members))
        for (uid, draw), members in groups.items()
    ]


def steps_recorded(run_dir: Path) -> list[int]:
    """The steps that have records, in order."""
    return sorted({step for file, step in record_files(run_dir) if file.name.endswith(LINES)})


def _write(file: Path, data: bytes | memoryview) -> None:
    partial = file.with_name(f".{file.name}")
    try:
        partial.write_bytes(zstandard.ZstdCompressor(level=3, write_checksum=True).compress(data))
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)  # its room may be what is lacking
        raise
