"""Records of rollouts on disk: a line a trajectory, and beside it the arrays, float32 exact.

    rollouts/step-000042.jsonl.zst   JSON lines: uid, verdict, reward, texts ...
    rollouts/step-000042.npz.zst     prompt_tokens, tokens, logprobs, end to end in the order of the lines, and offsets

On a cluster each node writes its own pair, step-000042.NODE.*.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from pekoe.core.types import Record

LINES, ARRAYS = ".jsonl.zst", ".npz.zst"


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

    Empty where the step has no records. Raises ValueError where lines and arrays do not match.
    """
    lines: list[dict[str, Any]] = []
    for file in sorted((run_dir / "rollouts").glob(f"step-{step:06d}*{LINES}")):
        text = zstandard.ZstdDecompressor().decompress(file.read_bytes())
        rows = [json.loads(line) for line in text.splitlines()]
        stem = file.name.removesuffix(LINES)
        data = zstandard.ZstdDecompressor().decompress(file.with_name(stem + ARRAYS).read_bytes())
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            prompts = np.split(arrays["prompt_tokens"], arrays["prompt_offsets"][1:-1])
            tokens, logprobs = (np.split(arrays[name], arrays["offsets"][1:-1]) for name in ("tokens", "logprobs"))
        for line, prompt, response, values in zip(rows, prompts, tokens, logprobs, strict=bool(rows)):
            lines.append(line | {"prompt_tokens": prompt, "tokens": response, "logprobs": values})
    return sorted(lines, key=lambda line: (line["group"], line["sample"]))


def steps_recorded(run_dir: Path) -> list[int]:
    """The steps that have records, in order."""
    return sorted({int(file.name[5:11]) for file in (run_dir / "rollouts").glob(f"step-*{LINES}")})


def _write(file: Path, data: bytes | memoryview) -> None:
    partial = file.with_name(f".{file.name}")
    partial.write_bytes(zstandard.ZstdCompressor(level=3).compress(data))
    os.replace(partial, file)
