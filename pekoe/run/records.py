"""What a step writes of its rollouts, off the critical path (`core.records` has the format)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pekoe.algo.scoring import Scored, reward_of
from pekoe.config.recipes import RLConfig
from pekoe.core.errors import RunError
from pekoe.core.records import spans_of, write_records
from pekoe.core.types import Handle, JudgedGroup, Record
from pekoe.data.tokenizer import Tokenizer
from pekoe.run.rollouts import Batch

_LIMIT_S = 3600.0  # of one step's records


@dataclass(frozen=True, slots=True)
class RecordLine:
    """The fields of a line, without its texts, and the handle of its tokens."""

    fields: dict[str, Any]
    handle: Handle[Record]


class RecordWriter(Protocol):
    """Writes the records of a step, one step at a time."""

    def write(self, step: int, lines: Sequence[RecordLine]) -> None:
        """Begin to write. Waits until the step before is written."""
        ...

    def settle(self) -> None:
        """Wait until everything is written. RunError where it could not be."""
        ...

    def fetch(self, groups: Sequence[JudgedGroup]) -> list[JudgedGroup]:
        """The same groups with their tokens in this process."""
        ...

    def adopt(self, groups: Sequence[JudgedGroup]) -> list[JudgedGroup]:
        """Of groups with tokens in this process, those whose tokens are where the trainer fetches them."""
        ...


class LocalRecords:
    """Writes from a thread of this process."""

    def __init__(self, run_dir: Path, tokenizer: Tokenizer) -> None:
        self._run_dir, self._tokenizer = run_dir, tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="records")
        self._writing: Future[None] | None = None

    def write(self, step: int, lines: Sequence[RecordLine]) -> None:
        self.settle()
        stem = self._run_dir / "rollouts" / f"step-{step:06d}"
        self._writing = self._thread.submit(write_lines, stem, lines, self._tokenizer)

    def settle(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result(_LIMIT_S)
            except OSError as error:
                raise RunError(f"the rollouts of a step could not be written: {error}") from None

    def fetch(self, groups: Sequence[JudgedGroup]) -> list[JudgedGroup]:
        return list(groups)

    adopt = fetch

    def close(self) -> None:
        """Wait until the step in hand is written."""
        self._thread.shutdown()


def write_lines(stem: Path, lines: Sequence[RecordLine], tokenizer: Tokenizer) -> None:
    """Add the texts, and write one pair of files."""
    records = [line.handle.resolve() for line in lines]
    texts = [_texts(record, tokenizer) for record in records]
    write_records(stem, [line.fields | text for line, text in zip(lines, texts, strict=True)], records)


def _texts(record: Record, tokenizer: Tokenizer) -> dict[str, Any]:
    """`prompt` and `text` of a single answer; of several turns those of the first, and all as `turns`."""
    parts = np.cumsum([0, *chain.from_iterable(spans_of(record))])
    texts = [tokenizer.decode(record.tokens[a:b], skip_special_tokens=False) for a, b in pairwise(parts)]
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    first = {"prompt": turns[0][0], "text": turns[0][1]} if turns else {"prompt": "", "text": ""}
    return first | ({"turns": turns} if len(turns) > 1 else {})


def record_lines(batch: Batch, scored: Scored, config: RLConfig) -> Iterator[RecordLine]:
    """A line for each branch of each trajectory. `group` is the place in the batch; dropped groups come last."""
    algo, limit = config.algo, config.rollout.max_new_tokens
    advantages = {(sample.group, sample.index): sample.advantage for sample in scored.samples}
    for position, group in enumerate(batch.everything()):
        for trajectory, verdict in zip(group.trajectories, group.verdicts, strict=True):
            reward = None if verdict.label == "fault" else reward_of(verdict, algo, trajectory.num_tokens, limit)
            for number, branch in enumerate(trajectory.branches):
                fields = {
                    "uid": trajectory.uid,
                    "draw": trajectory.draw,
                    "group": position,
                    "sample": trajectory.sample,
                    "finish_reason": trajectory.finish,
                    "versions": branch.versions,
                    "label": verdict.label,
                    "extracted": verdict.extracted,
                    "why": verdict.why,
                    "score": verdict.score,
                    "gold": group.problem.gold,
                    "kind": group.problem.kind,
                    "reward": reward,
                    "advantage": advantages.get((position, trajectory.sample)),
                }
                if trajectory.episode is not None:
                    counts = {name: n for name, n in asdict(trajectory.episode).items() if name.startswith("num_")}
                    fields |= {"branch": number, "episode": counts}
                yield RecordLine(fields, branch.handle)
