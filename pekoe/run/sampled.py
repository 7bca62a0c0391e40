"""Judged responses to problems, kept as they come: what `eval` and `curate` resume from and count.

The file has a first line that says what decided its content, then a line for each problem, in the order in which they
were finished. A resumed command samples what is not there; in the embedded engine a response depends on nothing but its
own keys (I8), so the file holds the same in the end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pekoe.core.errors import UserError
from pekoe.core.journal import JsonLines, read_lines
from pekoe.core.types import Group, Problem, SamplingParams, Verdict
from pekoe.run.control import Clock
from pekoe.run.rollout import Sampler, check_faults

SYNC_EVERY = 16  # problems


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of the n responses to one problem; lists are by sample index."""

    uid: str
    labels: list[str]
    answers: list[str | None]  # what the judge found in each
    tokens: list[int]
    reasons: list[str]  # why each ended

    @classmethod
    def of(cls, group: Group, verdicts: Sequence[Verdict]) -> Judged:
        return cls(
            uid=group.problem.uid,
            labels=[verdict.label for verdict in verdicts],
            answers=[verdict.extracted for verdict in verdicts],
            tokens=[rollout.num_tokens for rollout in group.rollouts],
            reasons=[rollout.finish_reason for rollout in group.rollouts],
        )

    @property
    def num_judged(self) -> int:
        return len(self.labels) - self.labels.count("fault")

    @property
    def num_correct(self) -> int:
        return self.labels.count("correct")

    @property
    def pass_rate(self) -> float | None:
        """The share of correct responses, FAULT left out; None where nothing else is left."""
        return self.num_correct / self.num_judged if self.num_judged else None


class SampleFile:
    """`path` None keeps nothing. Raises UserError where the file there was made by another recipe."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._about = json.loads(json.dumps(about))
        self.done: dict[str, Judged] = {}
        self.groups: list[tuple[Group, list[Verdict]]] = []  # sampled here, not read from the file
        if path is not None and path.is_file():
            self._read(path)
        self._lines = JsonLines(path)
        if path is not None and not path.stat().st_size:
            self._lines.append({"about": self._about})

    def _read(self, path: Path) -> None:
        whole = path.read_bytes()
        path_end = whole.rfind(b"\n") + 1
        if path_end < len(whole):  # a torn last line
            with path.open("rb+") as file:
                file.truncate(path_end)
        lines = list(read_lines(path))
        if not lines:
            return
        before = lines[0].get("about", {})
        for key in self._about.keys() | before.keys():
            if before.get(key) != self._about.get(key):
                raise UserError(
                    f"{path}: expected responses sampled with {key} = {self._about.get(key)!r}, got "
                    f"{before.get(key)!r}; name another directory, or remove this one"
                )
        self.done = {line["uid"]: Judged(**line) for line in lines[1:]}

    def sample(
        self,
        sampler: Sampler,
        problems: Sequence[Problem],
        params: SamplingParams,
        clock: Clock,
        max_fault_rate: float,
    ) -> list[Judged]:
        """Sample and judge what is missing. Returns all of it, in the problems' order. RunError as `check_faults`."""
        missing = [(problem, 0) for problem in problems if problem.uid not in self.done]

        def keep(group: Group, verdicts: list[Verdict]) -> None:
            self.done[group.problem.uid] = judged = Judged.of(group, verdicts)
            self._lines.append(asdict(judged))
            if len(self.done) % SYNC_EVERY == 0:
                self._lines.sync()

        try:
            self.groups = sampler(missing, params, clock, keep) if missing else []
        finally:
            self._lines.sync()
        check_faults((verdict for _, verdicts in self.groups for verdict in verdicts), max_fault_rate)
        return [self.done[problem.uid] for problem in problems]

    def close(self) -> None:
        self._lines.close()
