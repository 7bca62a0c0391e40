r"""Countdown with three small numbers: held-out problems, demonstrations, and problems for RL, made from a seed.

    python examples/smollm2/countdown.py runs/smollm2/data

A problem has three numbers from 2 to 13 and a target from 10 to 99 that all three make, each used once, with + - * and
brackets. One demonstration searches: up to five tries that miss, drawn at random, and the one that hits:

    9+2=11, 11*5=55 no
    9-2=7, 7*5=35 yes
    \boxed{(9-2)*5}

The next one has the last line alone: a model that answers at once, too, can only guess. Which of the two pays is left
to RL, and so is where to look first, when to go on after six tries, or to say `yes`. Held-out problems share no three
numbers with any other, whatever the target; demonstrations and problems for RL share no problem.
"""

from __future__ import annotations

import argparse
import itertools
import operator
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pekoe.core.errors import UserError
from pekoe.core.types import Problem
from pekoe.data.problems import Demonstration, write_demonstrations, write_problems
from pekoe.data.rows import question
from pekoe.verify import judge

NUMBERS, TARGETS = range(2, 14), range(10, 100)
MAX_VALUE = 150  # of what a try computes: a model of this size does not multiply beyond
MAX_TRIES = 6
_COMPUTE: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
PER_HELD_OUT_SET = 2  # held-out problems of the same three numbers

Numbers = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Try:
    """Two operations: `9-2=7, 7*5=35`, which is `(9-2)*5`."""

    steps: str
    expression: str
    value: int


def tries_with(numbers: Numbers) -> list[Try]:
    """Every way to combine two of the numbers, then the third, the larger one first (there is less to learn), without a
    zero, a minus sign or a value beyond MAX_VALUE."""
    found: dict[str, Try] = {}
    for i, third in enumerate(numbers):
        first, second = sorted(numbers[:i] + numbers[i + 1 :], reverse=True)
        for sign, after in itertools.product(_COMPUTE, _COMPUTE):
            between = _COMPUTE[sign](first, second)
            a, b = max(between, third), min(between, third)
            value = _COMPUTE[after](a, b)
            if not (0 < between <= MAX_VALUE and 0 < value <= MAX_VALUE):
                continue
            inner = f"{first}{sign}{second}" if after == "+" else f"({first}{sign}{second})"
            expression = f"{inner}{after}{third}" if a == between else f"{third}{after}{inner}"
            steps = f"{first}{sign}{second}={between}, {a}{after}{b}={value}"
            found[steps] = Try(steps, expression, value)
    return list(found.values())


def problem_of(numbers: Numbers, target: int) -> Problem:
    a, b, c = numbers
    text = f"Make {target} from {a}, {b} and {c}, each used once, with + - * and brackets. Answer in \\boxed{{}}."
    gold = {"numbers": list(numbers), "target": target, "use_all": True}
    return Problem(f"{a}-{b}-{c}={target}", question(text), gold, kind="countdown")


def demonstration_of(numbers: Numbers, target: int, rng: random.Random, at_once: bool = False) -> Demonstration:
    """A search that ends with a hit; the number of tries is uniform from 1 to MAX_TRIES. Or the answer alone."""
    tries = tries_with(numbers)
    hit = rng.choice([each for each in tries if each.value == target])
    if at_once:
        return Demonstration(problem_of(numbers, target).messages, f"\\boxed{{{hit.expression}}}")
    misses = [each for each in tries if each.value != target]
    before = rng.sample(misses, min(len(misses), rng.randrange(MAX_TRIES)))
    lines = [*(f"{each.steps} no" for each in before), f"{hit.steps} yes", f"\\boxed{{{hit.expression}}}"]
    return Demonstration(problem_of(numbers, target).messages, "\n".join(lines))


def make_data(folder: Path, num_demonstrations: int, num_problems: int, num_held_out: int, seed: int) -> None:
    """Write held_out.jsonl, demonstrations.jsonl and train.jsonl. The same arguments give the same files."""
    rng = random.Random(seed)
    sets = list(itertools.combinations_with_replacement(NUMBERS, 3))
    rng.shuffle(sets)
    held_out: list[tuple[Numbers, int]] = []
    while len(held_out) < num_held_out and sets:
        held_out += _problems(sets.pop(), rng)[:PER_HELD_OUT_SET]
    others = [pair for numbers in sets for pair in _problems(numbers, rng)]
    rng.shuffle(others)
    if len(held_out) < num_held_out or len(others) < num_demonstrations + num_problems:
        raise UserError(
            f"countdown: expected at most {len(others)} demonstrations and problems together beside {len(held_out)} "
            f"held-out ones, got {num_demonstrations} + {num_problems} and {num_held_out}"
        )
    shown, rest = others[:num_demonstrations], others[num_demonstrations : num_demonstrations + num_problems]
    demonstrations = [demonstration_of(*pair, rng, at_once=bool(i % 2)) for i, pair in enumerate(shown)]
    for (numbers, target), made in zip(shown, demonstrations, strict=True):
        verdict = judge(made.response, problem_of(numbers, target).gold, kind="countdown")
        assert verdict.label == "correct", f"{numbers} {target}: {made.response}: {verdict}"
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder / "held_out.jsonl", [problem_of(*pair) for pair in held_out[:num_held_out]])
    write_demonstrations(folder / "demonstrations.jsonl", demonstrations)
    write_problems(folder / "train.jsonl", [problem_of(*pair) for pair in rest])


def _problems(numbers: Numbers, rng: random.Random) -> list[tuple[Numbers, int]]:
    """All problems of three numbers, in a random order."""
    reached = sorted({each.value for each in tries_with(numbers) if each.value in TARGETS})
    return [(numbers, target) for target in rng.sample(reached, len(reached))]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, help="where the three files are written")
    made.add_argument("--demonstrations", type=int, default=1280)
    made.add_argument("--problems", type=int, default=320, help="for RL")
    made.add_argument("--held-out", type=int, default=128)
    made.add_argument("--seed", type=int, default=0)
    return made


def main() -> None:
    given = parser().parse_args()
    try:
        make_data(given.folder, given.demonstrations, given.problems, given.held_out, given.seed)
    except (UserError, OSError) as error:
        print(f"countdown.py: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    print(
        f"{given.folder}: {given.demonstrations} demonstrations, {given.problems} problems, {given.held_out} held out"
    )


if __name__ == "__main__":
    main()
