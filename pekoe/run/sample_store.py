"""Judged responses to problems, kept as they come: what `eval` and `curate` resume from and count.

The file has a first line that says what decided its content, then a line for each problem, in the order in which they
were finished. A resumed command samples what is not there; in the embedded engine a response depends on nothing but its
own keys (I8), so the file holds the same in the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from pekoe.config.recipes import CurateConfig, EvalConfig, VerifySection
from pekoe.core.errors import Interrupted, StopRequested, UserError
from pekoe.core.journal import JsonLines, read_lines
from pekoe.core.progress import ProgressReporter
from pekoe.core.types import Draw, JudgedGroup, Label, Problem, SamplingParams, Verdict
from pekoe.data.tokenizer import Tokenizer
from pekoe.model import LanguageModel
from pekoe.run.build import attach_weights, open_pool
from pekoe.run.inputs import digest, reward_sources
from pekoe.run.interrupt import StepTimer, Stop
from pekoe.run.judging import make_judge, response_text
from pekoe.run.rollouts import Rollouts, check_faults
from pekoe.run.run_dir import lock

_PLACES = {"model.path", "eval.data"}  # in files of earlier versions: what is there decides, and is compared
SYNC_EVERY, CHUNK = 16, 1024  # problems
RESPONSES = "responses.jsonl"
NUM_EXAMPLES = 8


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """What became of the n responses to one problem; lists are by sample index."""

    uid: str
    labels: list[Label]
    answers: list[str | None]  # what the judge found in each
    tokens: list[int]
    reasons: list[str]  # why each ended
    scores: list[float | None] = field(default_factory=list["float | None"])
    content: str = ""  # a digest of the problem: a uid may come to name another one

    @classmethod
    def of(cls, group: JudgedGroup) -> ProblemResult:
        return cls(
            uid=group.problem.uid,
            labels=[verdict.label for verdict in group.verdicts],
            answers=[verdict.extracted for verdict in group.verdicts],
            tokens=[trajectory.num_tokens for trajectory in group.trajectories],
            reasons=[trajectory.finish for trajectory in group.trajectories],
            scores=[verdict.score for verdict in group.verdicts],
            content=digest(group.problem),
        )

    def is_whole(self) -> bool:
        """Whether it has the types that it should, which a line of a file need not have."""
        lists: list[Any] = [self.labels, self.answers, self.tokens, self.reasons]
        return (
            type(self.uid) is str
            and all(isinstance(each, list) and len(each) == len(self.labels) for each in lists)
            and all(label in get_args(Label) for label in self.labels)
            and all(type(number) is int for number in self.tokens)
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


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path}: expected the lines that this command writes, got others; name another directory, or remove this one"
    )


def decided_by(config: CurateConfig | EvalConfig, problems: Sequence[Problem]) -> dict[str, Any]:
    """What decides the responses to a problem, and their verdicts, beside the command's own section."""
    files = [
        p for pattern in ("*.safetensors", "*.json", "*.jinja") for p in sorted(Path(config.model.path).glob(pattern))
    ]
    weights = hashlib.sha256()  # a path may come to name another model: that of a run that went on
    for path in files:
        with path.open("rb") as file:
            weights.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return {
        "model.weights": weights.hexdigest()[:16],
        "model.dtype": config.model.dtype,
        "engine.backend": config.engine.backend,
        "model.template": config.model.template.model_dump(exclude_none=True),
        "verify.random": config.verify.random,
        "verify.unboxed": config.verify.unboxed,
        **_rewards(config.verify, problems),
        "run.seed": config.run.seed,
    }


def _rewards(verify: VerifySection, problems: Sequence[Problem]) -> dict[str, Any]:
    """What decides the verdicts of rewards of the user's own; empty where there are none."""
    sources = reward_sources(verify, [problem.kind for problem in problems])
    about = verify.model_dump(mode="json", include={"arguments", "score_range", "correct_from"})
    return {f"the source of {name}": source for name, source in sources.items()} | (
        {f"verify.{key}": value for key, value in about.items()} if sources else {}
    )


def response_lines(group: JudgedGroup, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """A line for each response to a problem; `pekoe verify` reads them."""
    first, *more = group.problem.messages
    prompt = {"messages": [first, *more]} if more else {"prompt": first["content"]}
    for trajectory, verdict in zip(group.trajectories, group.verdicts, strict=True):
        yield {
            "uid": group.problem.uid,
            "sample": trajectory.sample,
            **prompt,
            "response": response_text(trajectory, tokenizer),
            **{key: value for key, value in asdict(verdict).items() if key != "score" or value is not None},
            "gold": group.problem.gold,
            "kind": group.problem.kind,
            "tokens": trajectory.num_tokens,
            "finish_reason": trajectory.finish,
        }


class ResumableSamples:
    """`path` None keeps nothing. `tokenizer`: every response is kept, too, in `RESPONSES` beside it.

    Raises UserError where the file there was made by another recipe, is in use by another process, or cannot be
    written.
    """

    def __init__(self, path: Path | None, about: dict[str, Any], tokenizer: Tokenizer | None = None) -> None:
        self.done: dict[str, ProblemResult] = {}
        self.groups: list[JudgedGroup] = []  # the first that were sampled here, for examples
        self._tokenizer = tokenizer if path is not None else None
        try:
            self._lines = JsonLines(path)
        except OSError as error:
            raise UserError(f"out: expected a directory that can be written, got {path}: {error.strerror}") from None
        with ExitStack() as stack:
            stack.callback(self._lines.close)
            if path is not None:
                stack.enter_context(
                    lock(path, f"{path}: another process is sampling here; wait for it, or name another out")
                )
                self._read(path, json.loads(json.dumps(about)))
            self._responses = JsonLines(path.with_name(RESPONSES) if path and tokenizer else None)
            stack.callback(self._responses.close)
            self._stack = stack.pop_all()

    def _read(self, path: Path, about: dict[str, Any]) -> None:
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # without a torn last line
        lines = list(read_lines(path))
        if not lines:
            self._lines.append({"about": about})
            return
        before = lines[0].get("about")
        if not isinstance(before, dict):
            raise _damaged(path)
        for key in sorted((about.keys() | before.keys()) - _PLACES):
            if before.get(key) != about.get(key):
                raise UserError(
                    f"{path}: expected responses sampled with {key} = {about.get(key)!r}, got "
                    f"{before.get(key)!r}; name another directory, or remove this one"
                )
        try:
            rows = [ProblemResult(**line) for line in lines[1:]]
            if not all(row.is_whole() for row in rows):
                raise TypeError
        except TypeError:
            raise _damaged(path) from None
        # A fault is ours: with its cause removed, the same responses are judged again.
        self.done = {row.uid: row for row in rows if "fault" not in row.labels}

    def sample(
        self, rollouts: Rollouts, problems: Sequence[Problem], params: SamplingParams, max_fault_rate: float
    ) -> list[ProblemResult]:
        """Sample and judge what is missing. Returns all of it, in the problems' order. RunError as `check_faults`."""
        contents = {uid: row.content for uid, row in self.done.items()}
        missing = [Draw(problem, 0) for problem in problems if contents.get(problem.uid) != digest(problem)]
        self._forget({draw.problem.uid for draw in missing})
        try:
            for start in range(0, len(missing), CHUNK):  # tokens and log-probs of all of them may not fit in memory
                chunk = missing[start : start + CHUNK]
                rollouts.put(chunk, params)
                for group in rollouts.stream(len(chunk)):
                    self._keep(group)
        finally:
            self._lines.sync()
        rows = [self.done[problem.uid] for problem in problems]
        check_faults((Verdict(label, None, f"see {row.uid}") for row in rows for label in row.labels), max_fault_rate)
        return rows

    def _keep(self, group: JudgedGroup) -> None:
        self.done[group.problem.uid] = result = ProblemResult.of(group)
        if len(self.groups) < NUM_EXAMPLES:
            self.groups.append(group)
        if self._tokenizer is not None:  # before the line by which they count as kept
            for line in response_lines(group, self._tokenizer):
                self._responses.append(line)
        self._lines.append(asdict(result))
        if len(self.done) % SYNC_EVERY == 0:
            self._lines.sync()

    def _forget(self, uids: set[str]) -> None:
        """Take out the responses to problems that will be sampled again, or were while the command was killed."""
        path = self._responses.path
        if path is None or not uids or not path.stat().st_size:
            return
        kept = path.with_name(f".{path.name}.partial")
        with kept.open("w", encoding="utf-8") as file:
            for line in read_lines(path):
                if line.get("uid") not in uids:
                    file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._responses.close()
        os.replace(kept, path)
        self._responses = JsonLines(path)
        self._stack.callback(self._responses.close)

    def close(self) -> None:
        self._stack.close()


def sample_problems(
    config: EvalConfig | CurateConfig,
    model: LanguageModel,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    params: SamplingParams,
    longest: int,
    file: Path | None,
    about: dict[str, Any],
    log_dir: Path,
    view: ProgressReporter,
) -> tuple[list[ProblemResult], list[JudgedGroup]]:
    """Sample and judge problems with the engine that the config names.

    Returns the results of all problems, in order, and the first groups that were sampled, as examples.

    Args:
        longest: tokens of the longest prompt with its response.
        file: keeps results, from which the same command goes on; None: nothing is kept.
        about: what decides the responses, beside what every command shares.
        log_dir: for servers.

    Raises:
        Interrupted: Ctrl-C; what is in `file` is kept.
    """
    stop = Stop()
    with stop.listening(), ExitStack() as stack:
        keeps = tokenizer if isinstance(config, EvalConfig) else None
        samples = ResumableSamples(file, decided_by(config, problems) | about if file else about, keeps)
        stack.callback(samples.close)
        logs = file.parent / "logs" if file else None
        judge = make_judge(config.verify, tokenizer, config.run.seed, problems, logs)
        stack.callback(judge.close)
        pool = open_pool(config, model, longest, [params], log_dir, view, stop, stack)
        weights = attach_weights(config, pool, model, tokenizer, problems[0], params, log_dir, stop)
        common = pool, tokenizer, judge, params, StepTimer(view), view, stop, weights.catch_up
        rollouts = Rollouts(*common, at_once=config.engine.max_running * len(pool.members))
        try:
            rows = samples.sample(rollouts, problems, params, config.verify.max_fault_rate)
        except StopRequested:
            kept = (
                f"{len(samples.done)} of {len(problems)} problems are kept" if file else "nothing was kept (no `out`)"
            )
            raise Interrupted(f"stopped; {kept}. Run the same command again to go on") from None
    return rows, samples.groups
