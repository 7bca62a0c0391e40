"""Records of rollouts on disk: a line a branch of a trajectory, and beside it the arrays, float32 exact.

    rollouts/step-000042.jsonl.zst   JSON lines: uid, verdict, reward, texts ...
    rollouts/step-000042.npz.zst     prompt_tokens, tokens, logprobs, end to end in the order of the lines, and offsets;
                                     with rollout.replay_routing the experts of all tokens [.., layers, k]

A single answer is its prompt and its response. Where several turns are one sequence, `spans` in the line says how the
two interleave: [[tokens of a context, tokens sampled after it], ...].

On a cluster each node writes its own pair, step-000042.NODE.*.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from pekoe.core.errors import UserError
from pekoe.core.types import Branch, EpisodeStats, JudgedGroup, Problem, Record, Trajectory, Verdict

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
    routings = [record.routing for record in records if record.routing is not None]
    parts = [np.empty((0, *routings[0].shape[1:])) if r.routing is None else r.routing for r in records if routings]
    routing: dict[str, Any] = {}
    if routings:
        routing["routing"] = np.concatenate(parts).astype(routings[0].dtype)
        routing["routing_offsets"] = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    buffer = io.BytesIO()
    arrays = {name: np.concatenate([*parts, np.empty(0)]) for name, parts in columns.items()}
    np.savez(
        buffer,
        prompt_tokens=arrays["prompt_tokens"].astype(np.int32),
        tokens=arrays["tokens"].astype(np.int32),
        logprobs=arrays["logprobs"].astype(np.float32),
        prompt_offsets=np.cumsum([0, *map(len, columns["prompt_tokens"])], dtype=np.int64),
        offsets=np.cumsum([0, *map(len, columns["tokens"])], dtype=np.int64),
        **routing,
    )
    _write(stem.with_name(stem.name + ARRAYS), buffer.getbuffer())
    spans = [spans_of(record) for record in records]
    more = [{"spans": several} if len(several) > 1 else {} for several in spans]  # one is the prompt and the response
    both = zip(lines, more, strict=True)
    text = "".join(json.dumps({**line, **extra}, separators=(",", ":")) + "\n" for line, extra in both)
    _write(stem.with_name(stem.name + LINES), text.encode())


def spans_of(record: Record) -> list[tuple[int, int]]:
    """(tokens of a context, tokens sampled after it), turn by turn; no more than one for a single answer."""
    edges = np.flatnonzero(np.diff(record.loss_mask.astype(np.int8), prepend=0, append=0))
    starts, ends = edges[::2].tolist(), edges[1::2].tolist()
    spans = [(start - before, end - start) for before, start, end in zip([0, *ends], starts, ends, strict=False)]
    last = ends[-1] if ends else 0
    return [*spans, (len(record.tokens) - last, 0)] if last < len(record.tokens) else spans


def read_records(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a step, group by group, each with its arrays `prompt_tokens`, `tokens` and `logprobs` (`routing`).

    Empty where the step has no records. UserError, with the file's name, where they cannot be read.
    """
    files = [file for file, number in record_files(run_dir) if number == step and file.name.endswith(LINES)]
    lines = [line for file in files for line in _read(file.with_name(file.name.removesuffix(LINES)))]
    try:
        return sorted(lines, key=lambda line: (line["group"], line["sample"], line.get("branch", 0)))
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
            if "routing" in arrays.files:
                routings = np.split(arrays["routing"], arrays["routing_offsets"][1:-1])
                rows = [row | {"routing": r} if len(r) else row for row, r in zip(rows, routings, strict=True)]
        return [
            line | {"prompt_tokens": prompt, "tokens": response, "logprobs": values}
            for line, prompt, response, values in zip(rows, prompts, tokens, logprobs, strict=bool(rows))
        ]
    except _DAMAGE as error:
        why = error.strerror if isinstance(error, OSError) else f"the file is damaged ({type(error).__name__}: {error})"
        raise UserError(f"{file}: cannot be read: {why}") from None


def record_of(line: Mapping[str, Any]) -> Record:
    """The tokens of a line that was read."""
    contexts, sampled = line["prompt_tokens"].astype(np.int64), line["tokens"].astype(np.int64)
    if "spans" not in line:
        return Record.of(contexts, sampled, line["logprobs"], line.get("routing"))
    mask = np.concatenate([np.arange(context + own) >= context for context, own in line["spans"]])
    tokens, logprobs = np.empty(len(mask), np.int64), np.zeros(len(mask), np.float32)
    tokens[~mask], tokens[mask], logprobs[mask] = contexts, sampled, line["logprobs"]
    return Record(tokens, mask, logprobs, line.get("routing"))


def write_groups(stem: Path, groups: Sequence[JudgedGroup]) -> None:
    """Write groups that nothing was trained on yet, with their verdicts; no file where there are none."""
    lines: list[dict[str, Any]] = []
    records: list[Record] = []
    for group in groups:
        for t, verdict in zip(group.trajectories, group.verdicts, strict=True):
            for number, branch in enumerate(t.branches):
                about = {"uid": t.uid, "draw": t.draw, "finish_reason": t.finish, "versions": branch.versions}
                own = {"verdict": asdict(verdict)} | ({} if t.episode is None else {"episode": asdict(t.episode)})
                lines.append(about | ({"branch": number} if number else own))
                records.append(branch.handle.resolve())
    if lines:
        write_records(stem, lines, records)


def read_groups(stem: Path, problems: Mapping[str, Problem]) -> list[JudgedGroup]:
    """What `write_groups` wrote, empty where it wrote nothing; `problems` by their uids."""
    if not stem.with_name(stem.name + LINES).exists():
        return []
    groups: dict[tuple[str, int], list[tuple[Trajectory, Verdict]]] = {}
    for line in _read(stem):
        members = groups.setdefault((line["uid"], line["draw"]), [])
        versions = tuple((version, start) for version, start in line["versions"])
        branch = Branch(len(line["prompt_tokens"]), len(line["tokens"]), versions, record_of(line))
        if line.get("branch"):
            trajectory, verdict = members.pop()
            members.append((replace(trajectory, branches=(*trajectory.branches, branch)), verdict))
            continue
        episode = EpisodeStats(**line["episode"]) if "episode" in line else None
        place = line["uid"], line["draw"], len(members), line["finish_reason"]
        members.append((Trajectory(*place, (branch,), episode), Verdict(**line["verdict"])))
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
