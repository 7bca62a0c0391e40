"""What fuzzers share: their command line, odd values, and what a case may end with."""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pekoe.core.errors import UserError

LIMIT_S = 20.0  # of one case, on a busy machine
MAX_LINES, MAX_LINE_CHARS = 25, 2_000  # of a message
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 16, 1.5, -0.0, 1e-320, 1e39, -1e39, 1e308, math.nan, math.inf, -math.inf),
    *(100_000, 10**9, 10**11, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**70), 2**70, 10**400),
    *("", " ", "0", "-1", "1.5", "3", "NaN", "default", "auto", "cpu", "a.b", "../..", "/", "/dev/null", "/dev/zero"),
    *("x" * 10_000, "a\0b", "\ud800", "\x1b[2J", "\N{ARABIC-INDIC DIGIT ONE}", " 1 ", "1_0", "{{ 1 }}", "[" * 5_000),
    *([], {}, [[]], [None], [[1]], [1, 2], [1.5], ["a"], [0] * 2_000, {"": {}}, {"type": "x"}, [{"a": 1}], {"a": {}}),
]


class Cases:
    """The outcomes of cases, and what broke the promise: `problems`, each with its seed."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, what: str, call: Callable[[], object]) -> bool:
        """Whether `call` ended well. It may end with one readable message, and in time; nothing else."""
        start, problem, outcome = time.monotonic(), "", "done"
        try:
            call()
        except UserError as error:
            outcome, problem = "refused", fault_of(str(error))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome, problem = "failed", f"{type(error).__name__}: {error!s:.300}"
        if (seconds := time.monotonic() - start) > LIMIT_S:
            problem = problem or f"took {seconds:.1f} s"
        self.outcomes[outcome] += 1
        if problem:
            self.problems.append(f"{what}: {problem}")
        return outcome == "done"

    def in_order(self, what: str, call: Callable[[], object]) -> None:
        """As `run`, of a case that must end well."""

        def must() -> None:
            try:
                call()
            except UserError as error:
                raise AssertionError(f"refused: {error}") from None

        self.run(what, must)

    def end(self) -> list[str]:
        """Print how many cases ended how; returns the problems."""
        print(f"{sum(self.outcomes.values())} cases: {dict(self.outcomes)}", file=sys.stderr)
        return self.problems


def fault_of(message: str) -> str:
    """What is wrong with a message, if anything is."""
    if not message.strip() or "Traceback" in message:
        return f"no message for readers: {message[:300]!r}"
    lines = message.splitlines()
    if len(lines) > MAX_LINES or max(map(len, lines)) > MAX_LINE_CHARS:
        return f"a message of {len(message):,} characters: {message[:100]!r}…"
    return ""


def changed(value: Any, random: random.Random) -> Any:
    """`value` with one value somewhere in it replaced, left out or nested; or another in its place."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        if random.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return value | {key: changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.8:
        index = random.randrange(len(value))
        return [*value[:index], changed(value[index], random), *value[index + 1 :]]
    return random.choice(ODD) if random.random() < 0.9 else [value]


def main(doc: str | None, fuzz: Callable[[float, int, Path], Sequence[str]]) -> int:
    """The command line of a fuzzer: `fuzz(seconds, seed, an empty folder)` gives what broke its promise."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problems = fuzz(options.seconds, options.seed, Path(folder))
    print("\n".join(problems) or "nothing broke the promise")
    return bool(problems)
