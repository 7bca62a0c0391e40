"""From trajectories to verdicts: responses go to the judges as they finish, while others are still being sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Protocol

from pekoe.config.recipes import VerifySection
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Problem, Trajectory, Verdict
from pekoe.data.rows import named
from pekoe.data.tokenizer import Tokenizer
from pekoe.verify import JudgePool
from pekoe.verify.kinds import check_functions, find_verifier
from pekoe.verify.kinds.function import Options

MAX_COLUMNS_CHARS = 10_000  # of names that a judge's worker is told


class Judge(Protocol):
    """Judges one trajectory; the verdict comes later."""

    @property
    def limit_s(self) -> float:
        """How long the next verdict may take at most, given what is queued."""
        ...

    def submit(self, problem: Problem, trajectory: Trajectory) -> Future[Verdict]: ...

    def close(self) -> None: ...


class PoolJudge:
    """Judges the text of a response against the reference answer, in processes that can be killed."""

    def __init__(
        self, verify: VerifySection, tokenizer: Tokenizer, problems: Sequence[Problem] = (), log_dir: Path | None = None
    ) -> None:
        self._pool = open_judges(verify, verify.workers, log_dir, columns_of(problems))
        self._tokenizer, self._verify = tokenizer, verify
        self._pending: set[Future[Verdict]] = set()
        try:
            self._pool.start(map(verify.kind_of, kinds_of(problems)))
        except (RunError, UserError) as error:  # nothing has been judged: it is the recipe's, or the reward's
            self._pool.close()
            raise UserError(f"verify: expected judges that start, got: {error}") from None

    @property
    def limit_s(self) -> float:
        # An item is tried twice and its reference once (I9), each on a worker that may have to start first.
        return 120 + 4 * self._verify.time_limit_s * len(self._pending)

    def submit(self, problem: Problem, trajectory: Trajectory) -> Future[Verdict]:
        text = response_text(trajectory, self._tokenizer)
        context = {"messages": problem.messages, "row": problem.row}
        future = self._pool.submit(text, problem.gold, self._verify.kind_of(problem.kind), context)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def close(self) -> None:
        self._pool.close()


class RandomJudge:
    """A control: CORRECT or WRONG by the toss of a coin, whatever the response says."""

    limit_s = 1.0

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def submit(self, problem: Problem, trajectory: Trajectory) -> Future[Verdict]:
        text = f"{self._seed}\0{problem.uid}\0{trajectory.draw}\0{trajectory.sample}"
        heads = hashlib.blake2b(text.encode(), digest_size=1).digest()[0] < 128
        future: Future[Verdict] = Future()
        future.set_result(Verdict("correct" if heads else "wrong", None, "control: drawn at random"))
        return future

    def close(self) -> None: ...


def response_text(trajectory: Trajectory, tokenizer: Tokenizer) -> str:
    """What a judge reads: the sampled tokens of the last branch without special ones."""
    record = trajectory.branches[-1].handle.resolve()
    return tokenizer.decode(record.tokens[record.loss_mask], skip_special_tokens=True)


def check_kinds(problems: Sequence[Problem], verify: VerifySection, places: Sequence[str]) -> None:
    """Raise UserError that names the first rows that are `without_judge`."""
    why = without_judge(problems, verify)
    bad = [f"{places[index]}: problem {problems[index].uid!r}: {reason}" for index, reason in why.items()]
    if bad:
        raise UserError(named(bad, "problems whose kind has no judge"))


def without_judge(problems: Sequence[Problem], verify: VerifySection) -> dict[int, str]:
    """Why no judge has a problem's kind, or the recipe does not allow it, by the problem's place among them."""
    check_functions(verify.rewards)
    why: dict[str, str] = {}  # by kind
    for kind in kinds_of(problems):
        try:
            find_verifier(verify.kind_of(kind), verify.rewards)
        except UserError as error:
            why[kind] = str(error)
    return {index: why[problem.kind] for index, problem in enumerate(problems) if problem.kind in why}


def kinds_of(problems: Iterable[Problem]) -> list[str]:
    return sorted({problem.kind for problem in problems})


def columns_of(problems: Sequence[Problem]) -> tuple[str, ...] | None:
    """The columns of the problems' rows; None where rows were not kept, or have more than workers can be told."""
    rows = [problem.row for problem in problems]
    columns = sorted({column for row in rows if isinstance(row, dict) for column in row})
    return None if not rows or None in rows or sum(map(len, columns)) > MAX_COLUMNS_CHARS else tuple(columns)


def open_judges(
    verify: VerifySection, num_workers: int, log_dir: Path | None = None, columns: tuple[str, ...] | None = None
) -> JudgePool:
    """Judges as the recipe says. `log_dir`: for what rewards of the user's own print; without it, stderr. `columns`: of
    the rows that these will be given."""
    low, high = verify.score_range
    right = verify.correct_from
    functions = {n: Options(verify.arguments.get(n, {}), low, high, right, columns) for n in verify.rewards}
    memory_bytes = int(verify.memory_gib * 2**30)
    return JudgePool(num_workers, verify.time_limit_s, memory_bytes, functions=functions, log_dir=log_dir)


def make_judge(
    verify: VerifySection,
    tokenizer: Tokenizer,
    seed: int,
    problems: Sequence[Problem] = (),
    log_dir: Path | None = None,
) -> Judge:
    """The recipe's judge. Those of the problems' kinds are started first: UserError where they do not start."""
    return RandomJudge(seed) if verify.random else PoolJudge(verify, tokenizer, problems, log_dir)


def await_verdicts(futures: Sequence[Future[Verdict]], judge: Judge) -> list[Verdict]:
    """Wait for verdicts in order. RunError where one takes longer than the judge's own limits allow."""
    verdicts = []
    for future in futures:
        limit_s = judge.limit_s
        try:
            verdicts.append(future.result(timeout=limit_s))
        except FutureTimeout:
            raise RunError(f"waited {limit_s:.0f} s for a verdict: the judge pool does not answer") from None
    return verdicts
