r"""The second judgement: two answers compared by their structure, and their expressions by value at a few points.

The result is True, False, or None where neither is certain: a text cannot be read, values agree at some points and not
at others, or the reference may be the rounding of an exact answer.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from pekoe.verify.evaluator import Number, Values, is_beyond, symbols_of, value_of
from pekoe.verify.intervals import is_region, region
from pekoe.verify.latex_parser import Tree, Unreadable, read

TOLERANCE = 1e-9
# Where variables are evaluated: in (0, 1) for arcsin and probabilities, above, and below 0. No simple numbers.
POINTS = (0.3716, 0.8123, 0.1372, 1.4331, 2.9177, 5.3391, -0.6229, -1.7371)


def compare(gold: str, answer: str) -> bool | None:
    """Return whether the two are the same answer; None where the parser or the comparison cannot decide."""
    try:
        return same(read(gold), read(answer))
    except (Unreadable, ArithmeticError, RecursionError):  # an overflow is an ArithmeticError
        return None


def same(gold: Tree, answer: Tree) -> bool | None:
    """`compare`, of trees. The order matters: the answer may name what the reference does not (`x = 7` for 7)."""
    gold, answer = _exact(gold), _exact(answer)
    if gold[0] != "relation" and answer[0] == "relation" and set(answer[1]) == {"="}:
        sides = answer[2] if _definition(answer)[0] is None else answer[2][1:]
        if any(_same_value(*pair) is False for pair in itertools.pairwise(sides)):
            return False  # 5 = 7; x = 3 + 4 = 7 is none
        if not any(map(symbols_of, answer[2])):
            answer = answer[2][-1]
    gold, answer = _named(gold, answer)
    if gold == answer and gold[0] in ("text", "relation", "ratio"):
        return True
    if is_region(gold) or is_region(answer):
        regions = region(gold), region(answer)
        if regions[0] is not None and regions[1] is not None:
            return regions[0] == regions[1]
    gold, answer = (("list", side[1]) if side[0] == "or" else side for side in (gold, answer))
    kinds = gold[0], answer[0]
    if "matrix" in kinds:
        return _same_matrix(gold, answer)
    if "text" in kinds:
        return None
    if "relation" in kinds or "in" in kinds:
        return _same_relation(gold, answer)
    if {"group", "list", "union", "minus"}.intersection(kinds):
        return _same_many(gold, answer)
    return _same_value(gold, answer)


def _exact(tree: Tree) -> Tree:
    """Return `22/7 ~ 3.14` without its rounding; a name, and what is not close, are told apart by an equals sign."""
    if tree[0] != "relation" or "~" not in tree[1]:
        return tree
    at = tree[1].index("~")
    exact, *others = tree[2][at:]
    with contextlib.suppress(ArithmeticError, Unreadable):
        if all(_close(complex(value_of(exact, {})), complex(value_of(other, {})), 1e-2) for other in others):
            return ("relation", tree[1][:at], tree[2][: at + 1]) if at else exact
    return ("relation", tuple("=" if sign == "~" else sign for sign in tree[1]), tree[2])


def _named(gold: Tree, answer: Tree) -> tuple[Tree, Tree]:
    """Return both without `x =` (or `f(x) =`), where both have it for the same name or only one has it."""
    (gold_name, gold_value), (answer_name, answer_value) = _definition(gold), _definition(answer)
    if gold[0] == answer[0] == "relation" and gold_name != answer_name:
        names: list[Tree] = [name for name in (gold_name, answer_name) if name is not None]
        if [name[0] for name in names] == ["symbol"] * 2 and _is_numbered(names[0][1], names[1][1]):
            return gold_value, answer_value  # b = 3, and b_1 = 3
        if [name[0] for name in names] == ["mul"] * 2 and names[0][1] == names[1][1]:  # f(x) = x, and f(z) = z
            old, new = names[1][2], names[0][2]
            renamed: Callable[[Tree], Tree] = lambda symbol: new if symbol == old else symbol  # noqa: E731
            return gold_value, _rewritten(answer_value, "symbol", renamed)
        return gold, answer  # perhaps y = x + 1 and x = y - 1
    if gold[0] == answer[0] == "relation" and gold_name is None:
        return gold, answer
    return gold_value, answer_value


def _definition(tree: Tree) -> tuple[Tree | None, Tree]:
    """Return the name and the value of `x = 7`, `f(x) = 7` or `x in A`; None and `tree` for anything else."""
    if tree[0] == "in" and tree[1][0] == "symbol":
        return tree[1], tree[2]
    if tree[0] == "relation" and set(tree[1]) == {"="}:
        name, *_, value = tree[2]
        if name[0] in ("symbol", "text") or _is_call(name) or (name[0] == "group" and all(map(_is_call, name[2]))):
            return name, value
    return None, tree


def _is_call(name: Tree) -> bool:
    return name[0] == "mul" and name[1][0] == name[2][0] == "symbol"  # f(x)


def _is_numbered(*names: str) -> bool:
    """Whether one name is the other with a subscript."""
    short, long = sorted(names, key=len)
    return "_" not in short and long.partition("_")[0] == short


def _same_matrix(gold: Tree, answer: Tree) -> bool | None:
    if gold[0] != answer[0]:
        return None
    if [*map(len, gold[1])] != [*map(len, answer[1])]:
        return False
    return _all(same(g, a) for rows in zip(gold[1], answer[1], strict=True) for g, a in zip(*rows, strict=True))


def _all(verdicts: Iterator[bool | None]) -> bool | None:
    results = list(verdicts)
    return False if False in results else None if None in results else True


def _same_relation(gold: Tree, answer: Tree) -> bool | None:
    """Return True for two equations of which one is a multiple of the other; mostly None otherwise."""
    if gold[0] != "relation" or answer[0] != "relation" or gold[1] != ("=",) or answer[1] != ("=",):
        return None
    left, right = (("add", side[2][0], ("mul", ("number", Fraction(-1), False), side[2][1])) for side in (gold, answer))
    if symbols_of(left) != symbols_of(right) or len(symbols_of(left)) < 2:
        return None
    ratios: list[complex] = []
    for values in _points(symbols_of(left)):
        with contextlib.suppress(ArithmeticError, ValueError):
            ratios.append(complex(value_of(left, values)) / complex(value_of(right, values)))
    return (len(ratios) >= 3 and all(_close(ratio, ratios[0]) for ratio in ratios)) or None


def _same_many(gold: Tree, answer: Tree) -> bool | None:
    """Compare tuples, intervals, sets and bare lists."""
    if {"union", "minus"} & {gold[0], answer[0]}:
        return None
    (left_brackets, left), (right_brackets, right) = _expanded(gold), _expanded(answer)
    brackets = {left_brackets, right_brackets}
    if brackets <= {"{}", ""}:
        return _same_set(left, right, as_set="{}" in brackets)
    if "{}" in brackets:  # a set is not a tuple; a set of one is perhaps its element
        return None if 1 in (len(left), len(right)) else False
    if len(left) != len(right) or ("" not in brackets and len(brackets) == 2):
        return False  # (1, 2] is not [1, 2]; but 1, 2 may be (1, 2)
    return _all(same(g, a) for g, a in zip(left, right, strict=True))


def _same_set(gold: Sequence[Tree], answer: Sequence[Tree], as_set: bool) -> bool | None:
    """Return whether the items match one to one, in any order."""
    if as_set:
        gold, answer = _distinct(gold), _distinct(answer)
    if len(gold) != len(answer):
        return False
    rest = list(answer)
    unsure = False
    for item in gold:
        verdicts = [same(item, other) for other in rest]
        if True in verdicts:
            rest.pop(verdicts.index(True))
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True


def _distinct(items: Sequence[Tree]) -> list[Tree]:
    distinct: list[Tree] = []
    for item in items:
        if not any(same(item, other) for other in distinct):
            distinct.append(item)
    return distinct


def _expanded(tree: Tree) -> tuple[str, list[Tree]]:
    """Return the brackets ("" for a bare list) and the items, each `\\pm` written out as two."""
    brackets, items = {"group": tree[1:], "list": ("", tree[1])}.get(tree[0], ("", (tree,)))
    if tree[0] == "group" and brackets != "{}" and len(signed := _both_signs(tree)) > 1:
        return "", signed
    if brackets in ("{}", ""):
        items = [signed for item in items for signed in _both_signs(item)]
    return brackets, list(items)


def _both_signs(tree: Tree) -> list[Tree]:
    """Return a tree with plus-minus as two trees; coordinates of a tuple take their signs independently."""
    if tree[0] == "group":
        many = [_both_signs(item) for item in tree[2]]
        if math.prod(map(len, many)) > 64:
            raise Unreadable("too many signs")
        return [("group", tree[1], items) for items in itertools.product(*many)]
    signs = [
        _rewritten(tree, "pm", lambda pm, s=sign: ("mul", ("number", Fraction(s), False), pm[1])) for sign in (1, -1)
    ]
    return signs if signs[0] != signs[1] else signs[:1]


def _rewritten(tree: Any, head: str, rule: Callable[[Any], Any]) -> Any:
    """Return `tree` with `rule` applied to each subtree of the given head, innermost first."""
    if not isinstance(tree, tuple):
        return tree
    parts = tuple(_rewritten(part, head, rule) for part in tree)
    return rule(parts) if parts[:1] == (head,) else parts


# Values


def _same_value(gold: Tree, answer: Tree) -> bool | None:
    if (gold[0], answer[0]) == ("number", "ratio"):
        return False  # 2:1 for 2 (and 9:30 for 0.3); 2 for 2:1 is the ratio's value
    signs = _both_signs(gold), _both_signs(answer)
    if len(signs[0]) != len(signs[1]):
        return False
    if len(signs[0]) == 2:
        return _same_set(*signs, as_set=True)
    names = symbols_of(gold), symbols_of(answer)
    if names[0] != names[1] and len(names[0]) == len(names[1]) == 1:
        both = names[0] | names[1]
        if both <= {"k", "n", "m"}:  # any integer, by whatever name
            (old,), (new,) = names[1], names[0]
            answer = _rewritten(answer, "symbol", lambda symbol: ("symbol", new if symbol[1] == old else symbol[1]))
        elif gold[0] == answer[0] == "symbol" and len(both) == 2 and len({name.lower() for name in both}) == 1:
            return True  # a letter to choose: (b) and B
    symbols = symbols_of(gold) | symbols_of(answer)
    if gold[0] == "based" or answer[0] == "based":
        return gold == answer if gold[0] == answer[0] else None
    beyond = [] if symbols else [side for side in (gold, answer) if _is_beyond(side)]
    if len(beyond) == 1:  # 10^{10000000}, over which math-verify takes 15 s
        value_of(answer if beyond[0] == gold else gold, {})  # raises where this is not known either
        return False
    if beyond and gold == answer:
        return True
    pairs: list[tuple[Number, Number]] = []
    for values in _points(symbols):
        with contextlib.suppress(ArithmeticError, ValueError):
            pairs.append((value_of(gold, values), value_of(answer, values)))
    if symbols and "i" not in symbols:  # without the points outside the domain
        pairs = [pair for pair in pairs if all(map(_is_real, pair))]
    equal = [_equal(*pair) for pair in pairs]
    if len(equal) < (3 if symbols else 1):
        return None
    if all(equal):
        return True
    if any(equal):
        return None
    without_percent = [_rewritten(side, "percent", lambda percent: percent[1]) for side in (gold, answer)]
    if without_percent != [gold, answer]:
        # 12.5 % is 12.5 where percents were asked for; 0.5 % is not 0.5.
        return same(*without_percent) and (min(abs(complex(value)) for value in pairs[0]) > 0.01 or None)
    if bool(symbols_of(gold)) != bool(symbols_of(answer)):
        return None  # 10 cm, read as 10 times c times m, may be 10
    # A reference may be the rounding of what the answer has exactly; an answer that is rounded is another number.
    is_rounding = _has_decimal(gold) and not _has_decimal(answer) and not symbols
    return None if is_rounding and all(_close(complex(a), complex(b), 5e-3) for a, b in pairs) else False


def _is_beyond(tree: Tree) -> bool:
    """Whether it is a power too large or too small to be written out, perhaps times a number."""
    if tree[0] == "mul" and "number" in (tree[1][0], tree[2][0]):
        number, other = (tree[1], tree[2]) if tree[1][0] == "number" else (tree[2], tree[1])
        return bool(number[1]) and _is_beyond(other)
    if tree[0] == "pow":
        with contextlib.suppress(ArithmeticError, Unreadable):
            return is_beyond(value_of(tree[1], {}), value_of(tree[2], {}))
    return False


def _is_real(value: Number) -> bool:
    return isinstance(value, Fraction) or abs(value.imag) <= 1e-9 * max(1.0, abs(value))


def _equal(left: Number, right: Number) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    return _close(complex(left), complex(right))


def _close(left: complex, right: complex, tolerance: float = TOLERANCE) -> bool:
    return abs(left - right) <= tolerance * max(abs(left), abs(right))


def _has_decimal(tree: Any) -> bool:
    if not isinstance(tree, tuple):
        return False
    return tree[2] if tree[:1] == ("number",) else any(_has_decimal(part) for part in tree)


def _points(symbols: frozenset[str]) -> Iterator[Values]:
    """Yield values for the symbols: at every point each symbol has another value."""
    names = sorted(symbols)
    if not names:
        yield {}
        return
    for start in range(len(POINTS)):
        yield {name: complex(POINTS[(start + 2 * k) % len(POINTS)] * (1 + k / 16)) for k, name in enumerate(names)}
