r"""The second judgement: two answers compared by their structure, and their expressions by value at a few points.

It says "equal", "different", or nothing (None): where a text cannot be read, where values agree at some points and not
at others, or where an exact value meets a decimal that may be its rounding. Everything is bounded: exact fractions have
a few thousand digits at most, powers and factorials are refused beyond that.
"""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from pekoe.verify.expression import Tree, Unreadable, read

Number = Fraction | complex
Values = dict[str, Number]
MAX_BITS, MAX_FACTORIAL = 20_000, 1_000
TOLERANCE = 1e-9
# Where variables are evaluated: in (0, 1) for arcsin and probabilities, above, and below 0. No simple numbers.
POINTS = (0.3716, 0.8123, 0.1372, 1.4331, 2.9177, 5.3391, -0.6229, -1.7371)


class _Undefined(ArithmeticError):
    """The expression has no (finite, bounded) value at this point."""


def compare(gold: str, answer: str) -> bool | None:
    """Whether the two are the same answer; None where this reader cannot tell."""
    try:
        return same(read(gold), read(answer))
    except (Unreadable, _Undefined, RecursionError):
        return None


def same(gold: Tree, answer: Tree) -> bool | None:
    """`compare`, of trees. The order matters: the answer may name what the reference does not (`x = 7` for 7)."""
    gold, answer = _named(gold, answer)
    if _is_region(gold) or _is_region(answer):
        regions = _region(gold), _region(answer)
        if regions[0] is not None and regions[1] is not None:
            return regions[0] == regions[1]
    gold, answer = (("list", side[1]) if side[0] == "or" else side for side in (gold, answer))
    kinds = gold[0], answer[0]
    if "matrix" in kinds:
        return _same_matrix(gold, answer)
    if "text" in kinds:
        return True if gold == answer else None
    if "relation" in kinds or "in" in kinds:
        return _same_relation(gold, answer)
    many = [side[0] in ("group", "list", "union", "minus") for side in (gold, answer)]
    if any(many):
        return _same_many(gold, answer)
    return _same_value(gold, answer)


def _named(gold: Tree, answer: Tree) -> tuple[Tree, Tree]:
    """Without `x =` (or `f(x) =`), where both have it for the same name or one alone has it."""
    names: list[Tree | None] = []
    bare: list[Tree] = []
    for side in (gold, answer):
        operators = side[1] if side[0] == "relation" else ()
        is_definition = operators and set(operators) == {"="} and _is_name(side[2][0])
        names.append(side[2][0] if is_definition else None)
        if side[0] == "in" and side[1][0] == "symbol":
            names[-1], is_definition = side[1], True
        bare.append(side if not is_definition else side[-1] if side[0] == "in" else side[2][-1])
    if names[0] is not None and names[1] is not None and names[0] != names[1] and gold[0] == answer[0] == "relation":
        return gold, answer  # perhaps y = x + 1 and x = y - 1
    if [side[0] for side in (gold, answer)] == ["relation"] * 2 and None in names:
        return gold, answer
    if gold[0] != "relation" and answer[0] == "relation" and names[1] is not None:
        sides = answer[2][1:]  # x = 3 + 4 = 7: all are the same, or it contradicts itself
        if any(_same_value(left, right) is False for left, right in itertools.pairwise(sides)):
            return gold, answer
    return bare[0], bare[1]


def _is_name(tree: Tree) -> bool:
    is_call = tree[0] == "mul" and tree[1][0] == "symbol" and tree[2][0] == "symbol"  # f(x)
    return tree[0] in ("symbol", "text") or is_call


def _same_matrix(gold: Tree, answer: Tree) -> bool | None:
    if gold[0] != answer[0]:
        return None
    if [len(row) for row in gold[1]] != [len(row) for row in answer[1]]:
        return False
    return _all(same(g, a) for rows in zip(gold[1], answer[1], strict=True) for g, a in zip(*rows, strict=True))


def _all(verdicts: Iterator[bool | None]) -> bool | None:
    found = list(verdicts)
    return False if False in found else None if None in found else True


def _same_relation(gold: Tree, answer: Tree) -> bool | None:
    """Equations: one is a multiple of the other. Else nothing is said here."""
    if gold[0] != "relation" or answer[0] != "relation" or gold[1] != ("=",) or answer[1] != ("=",):
        return None
    left, right = (("add", side[2][0], ("mul", ("number", Fraction(-1), False), side[2][1])) for side in (gold, answer))
    if _symbols(left) != _symbols(right) or len(_symbols(left)) < 2:
        return None
    ratios: list[complex] = []
    for values in _points(_symbols(left)):
        try:
            ratios.append(complex(_value(left, values)) / complex(_value(right, values)))
        except (ArithmeticError, ValueError):
            continue
    if len(ratios) < 3:
        return None
    return all(_close(ratio, ratios[0]) for ratio in ratios) or None


def _same_many(gold: Tree, answer: Tree) -> bool | None:
    """Tuples, intervals, sets and bare lists."""
    left, right = _expanded(gold), _expanded(answer)
    brackets = left[0], right[0]
    if "union" in (gold[0], answer[0]) or "minus" in (gold[0], answer[0]):
        return None
    unordered = {"{}", ""}
    if brackets[0] in unordered and brackets[1] in unordered:
        return _same_set(left[1], right[1], as_set="{}" in brackets)
    if "{}" in brackets:  # a set is not a tuple; a set of one is perhaps its element
        return None if 1 in (len(left[1]), len(right[1])) else False
    if "" in brackets and brackets != ("", ""):
        brackets = ("", "")  # 1, 2 for (1, 2)
    if brackets[0] != brackets[1]:
        return False  # (1, 2] is not [1, 2]
    if len(left[1]) != len(right[1]):
        return False
    return _all(same(g, a) for g, a in zip(left[1], right[1], strict=True))


def _same_set(gold: Sequence[Tree], answer: Sequence[Tree], as_set: bool) -> bool | None:
    """Whether each has its partner."""
    if as_set:
        gold, answer = _distinct(gold), _distinct(answer)
    if len(gold) != len(answer):
        return False
    rest = list(answer)
    unsure = False
    for one in gold:
        verdicts = [same(one, other) for other in rest]
        if True in verdicts:
            rest.pop(verdicts.index(True))
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True


def _distinct(items: Sequence[Tree]) -> list[Tree]:
    found: list[Tree] = []
    for item in items:
        if not any(same(item, other) for other in found):
            found.append(item)
    return found


def _expanded(tree: Tree) -> tuple[str, list[Tree]]:
    """Its brackets ("" for a bare list) and items, each `\\pm` written out as two."""
    brackets, items = {"group": tree[1:], "list": ("", tree[1])}.get(tree[0], ("", (tree,)))
    if tree[0] == "group" and brackets != "{}" and len(signed := _both_signs(tree)) > 1:
        return "", signed
    if brackets in ("{}", ""):
        items = [one for item in items for one in _both_signs(item)]
    return brackets, list(items)


def _both_signs(tree: Tree) -> list[Tree]:
    """A tree with plus-minus as two; coordinates of a tuple take their signs independently."""
    if tree[0] == "group":
        many = [_both_signs(item) for item in tree[2]]
        if math.prod(map(len, many)) > 64:
            raise Unreadable("too many signs")
        return [("group", tree[1], items) for items in itertools.product(*many)]
    signs = [_with_sign(tree, sign) for sign in (1, -1)]
    return signs if signs[0] != signs[1] else signs[:1]


def _with_sign(tree: Any, sign: int) -> Any:
    if not isinstance(tree, tuple):
        return tree
    if tree[:1] == ("pm",):
        return ("mul", ("number", Fraction(sign), False), _with_sign(tree[1], sign))
    return tuple(_with_sign(part, sign) for part in tree)


# Values


def _same_value(gold: Tree, answer: Tree) -> bool | None:
    signs = _both_signs(gold), _both_signs(answer)
    if len(signs[0]) != len(signs[1]):
        return False
    if len(signs[0]) == 2:
        return _same_set(*signs, as_set=True)
    names = _symbols(gold), _symbols(answer)
    if names[0] != names[1] and len(names[0]) == len(names[1]) == 1:
        both = names[0] | names[1]
        if both <= {"k", "n", "m"}:  # any integer, by whatever name
            answer = _renamed(answer, {next(iter(names[1])): next(iter(names[0]))})
        elif gold[0] == answer[0] == "symbol" and len(both) == 2 and len({name.lower() for name in both}) == 1:
            return True  # a letter to choose: (b) and B
    symbols = _symbols(gold) | _symbols(answer)
    if gold[0] == "based" or answer[0] == "based":
        return gold == answer if gold[0] == answer[0] else None
    found: list[bool | None] = []
    for values in _points(symbols):
        try:
            left, right = _value(gold, values), _value(answer, values)
        except (ArithmeticError, ValueError):
            continue
        if symbols and "i" not in symbols and not (_is_real(left) and _is_real(right)):
            continue  # outside its domain
        found.append(_equal(left, right))
    if len(found) < min(3, len(list(_points(symbols)))):
        return None
    if all(found):
        return True
    if any(found):
        return None
    if _without_percent(gold) != gold or _without_percent(answer) != answer:
        bare = _without_percent(gold), _without_percent(answer)
        return None if bare != (gold, answer) and same(*bare) is not False else False
    decimals = _has_decimal(gold), _has_decimal(answer)
    if decimals[0] != decimals[1] and not symbols:
        return None if _close(complex(left), complex(right), 5e-3) else False  # perhaps its rounding
    return False


def _is_real(value: Number) -> bool:
    return isinstance(value, Fraction) or abs(value.imag) <= 1e-9 * max(1.0, abs(value))


def _equal(left: Number, right: Number) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    return _close(complex(left), complex(right))


def _close(left: complex, right: complex, tolerance: float = TOLERANCE) -> bool:
    return abs(left - right) <= tolerance * max(abs(left), abs(right))


def _symbols(tree: Any) -> frozenset[str]:
    if not isinstance(tree, tuple):
        return frozenset()
    if tree[:1] == ("symbol",):
        return frozenset() if tree[1] in ("pi", "e", "i", "infinity") else frozenset({tree[1]})
    return frozenset().union(*(_symbols(part) for part in tree))


def _renamed(tree: Any, names: dict[str, str]) -> Any:
    if not isinstance(tree, tuple):
        return tree
    if tree[:1] == ("symbol",):
        return ("symbol", names.get(tree[1], tree[1]))
    return tuple(_renamed(part, names) for part in tree)


def _without_percent(tree: Any) -> Any:
    if not isinstance(tree, tuple):
        return tree
    return _without_percent(tree[1]) if tree[:1] == ("percent",) else tuple(_without_percent(part) for part in tree)


def _has_decimal(tree: Any) -> bool:
    if not isinstance(tree, tuple):
        return False
    return tree[2] if tree[:1] == ("number",) else any(_has_decimal(part) for part in tree)


def _points(symbols: frozenset[str]) -> Iterator[Values]:
    """Values for the symbols: each has another at every point."""
    names = sorted(symbols)
    if not names:
        yield {}
        return
    for start in range(len(POINTS)):
        yield {name: complex(POINTS[(start + 2 * k) % len(POINTS)] * (1 + k / 16)) for k, name in enumerate(names)}


def _value(tree: Tree, values: Values) -> Number:
    match tree:
        case ("number", value, _):
            return value
        case ("symbol", "pi"):
            return complex(math.pi)
        case ("symbol", "e"):
            return complex(math.e)
        case ("symbol", "i"):
            return 1j
        case ("symbol", name) if name in values:
            return values[name]
        case ("add", a, b):
            return _exactly(lambda x, y: x + y, _value(a, values), _value(b, values))
        case ("mul", a, b):
            return _exactly(lambda x, y: x * y, _value(a, values), _value(b, values))
        case ("div", a, b):
            return _exactly(lambda x, y: x / y, _value(a, values), _value(b, values))
        case ("pow", a, b):
            return _power(_value(a, values), _value(b, values))
        case ("percent", a):
            return _value(a, values) / 100
        case ("call", name, argument):
            return _call(name, [_value(one, values) for one in _arguments(argument)])
        case ("based", digits, base):
            return Fraction(int(digits, base))
        case _:
            raise Unreadable(f"no value: {tree[0]}")


def _arguments(argument: Any) -> list[Tree]:
    return [argument] if isinstance(argument[0], str) else list(argument)


def _exactly(operation: Callable[[Any, Any], Any], left: Number, right: Number) -> Number:
    if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
        left, right = complex(left), complex(right)
    found = operation(left, right)
    if isinstance(found, Fraction):
        if found.numerator.bit_length() + found.denominator.bit_length() > MAX_BITS:
            raise _Undefined("too long a number")
    elif not cmath.isfinite(found):
        raise _Undefined("not finite")
    return found


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator == 1:
            if abs(exponent) * size > MAX_BITS:
                raise _Undefined("too large a power")
            return base ** int(exponent)
        if base > 0 and exponent.denominator <= 64 and abs(exponent) < 64 and size <= 1000:
            roots = [_exact_root(part, exponent.denominator) for part in (base.numerator, base.denominator)]
            if roots[0] is not None and roots[1] is not None:
                return Fraction(roots[0], roots[1]) ** exponent.numerator
        if base < 0 and exponent.denominator % 2:  # the real root, as schools have it
            return -_power(-base, exponent) if exponent.numerator % 2 else _power(-base, exponent)
    base, exponent = complex(base), complex(exponent)
    if base == 0:
        if exponent.real <= 0:
            raise _Undefined("zero to no positive power")
        return Fraction(0)
    found = base**exponent
    if not cmath.isfinite(found):
        raise _Undefined("not finite")
    return found


def _exact_root(value: int, degree: int) -> int | None:
    guess = round(value ** (1 / degree)) if value.bit_length() < 1000 else 0
    return next((g for g in (guess - 1, guess, guess + 1) if g >= 0 and g**degree == value), None)


_CALLS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "exp": cmath.exp,
    "ln": cmath.log,
    "lg": cmath.log10,
}


def _call(name: str, arguments: list[Number]) -> Number:
    first = arguments[0]
    if name in ("max", "min", "gcd", "lcm", "binomial", "factorial", "floor", "ceil"):
        whole = [one for one in arguments if isinstance(one, Fraction)]
        if len(whole) != len(arguments):
            raise _Undefined(f"{name} of what is not exact")
        return Fraction(_exact_call(name, whole))
    if len(arguments) != 1:
        raise Unreadable(f"{name} of {len(arguments)}")
    if name == "abs":
        return abs(first) if isinstance(first, Fraction) else complex(abs(first))
    if name not in _CALLS:  # "log" without a base is 10 or e
        raise Unreadable(f"{name} is not known")
    found = _CALLS[name](complex(first))
    if not cmath.isfinite(found):
        raise _Undefined("not finite")
    return found


def _exact_call(name: str, arguments: list[Fraction]) -> Fraction | int:
    if name in ("max", "min"):
        return (max if name == "max" else min)(arguments)
    if name in ("floor", "ceil"):
        return math.floor(arguments[0]) if name == "floor" else math.ceil(arguments[0])
    if any(one.denominator != 1 or abs(one) > 10**12 for one in arguments):
        raise _Undefined(f"{name} of what is not whole, or too large")
    whole = [int(one) for one in arguments]
    if name in ("factorial", "binomial"):
        if min(whole) < 0 or max(whole) > MAX_FACTORIAL:
            raise _Undefined(f"{name} of more than {MAX_FACTORIAL}")
        return math.factorial(whole[0]) if name == "factorial" else math.comb(whole[0], whole[1])
    return math.gcd(*whole) if name == "gcd" else math.lcm(*whole)


# Regions of the real line: sorted, disjoint pieces (low, is low in it, high, is high in it).

Piece = tuple[float, bool, float, bool]


def _is_region(tree: Tree) -> bool:
    if tree[0] == "relation":
        return any(operator != "=" for operator in tree[1])
    if tree[0] == "or":
        return any(_is_region(part) for part in tree[1])
    return tree[0] in ("union", "minus", "such_that") or (tree[0] == "group" and tree[2] != () and _is_region(tree[2][0]))


def _region(tree: Tree) -> list[Piece] | None:
    """The numbers that the tree describes, rounded so that equal regions are equal; None if it describes none."""
    try:
        return _joined(_pieces(tree))
    except (Unreadable, ArithmeticError, ValueError):
        return None


def _end(tree: Tree) -> float:
    if _symbols(tree):
        raise Unreadable("a bound with a variable")
    if "infinity" in str(tree):
        return -math.inf if "-1" in str(tree) else math.inf
    value = complex(_value(tree, {}))
    if abs(value.imag) > 1e-12:
        raise Unreadable("a bound that is not real")
    return float(f"{value.real:.9g}")


def _pieces(tree: Tree) -> list[Piece]:
    match tree:
        case ("group", "{}", items):
            if len(items) == 1 and items[0][0] == "such_that":
                return [piece for item in items[0][1] for piece in _pieces(item)]
            return [(end, True, end, True) for end in map(_end, items)]
        case ("group", brackets, (low, high)):
            return [(_end(low), brackets[0] == "[", _end(high), brackets[1] == "]")]
        case ("union", a, b):
            return _pieces(a) + _pieces(b)
        case ("or", parts):
            return [piece for part in parts for piece in _pieces(part)]
        case ("minus", a, b):
            return _intersection(_joined(_pieces(a)), _complement(_joined(_pieces(b))))
        case ("in", _, a):
            return _pieces(a)
        case ("symbol", "reals"):
            return [(-math.inf, False, math.inf, False)]
        case ("relation", operators, sides):
            return _solved(operators, sides)
        case _:
            raise Unreadable(f"no region: {tree[0]}")


def _solved(operators: tuple[str, ...], sides: tuple[Tree, ...]) -> list[Piece]:
    """x < 3, 3 < x <= 4, |x| > 1, x != 3, x = 1: one name, and bounds without names."""
    names = [index for index, side in enumerate(sides) if _symbols(side)]
    if len(names) != 1:
        raise Unreadable("not one side with a variable")
    middle = sides[names[0]]
    found: list[Piece] = [(-math.inf, False, math.inf, False)]
    for index, operator in enumerate(operators):
        if names[0] not in (index, index + 1):
            continue
        end = _end(sides[index + 1] if names[0] == index else sides[index])
        if names[0] == index + 1:
            operator = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(operator, operator)
        found = _intersection(found, _half(operator, end, middle))
    return found


def _half(operator: str, end: float, middle: Tree) -> list[Piece]:
    match operator:
        case "<" | "<=":
            piece: list[Piece] = [(-math.inf, False, end, operator == "<=")]
        case ">" | ">=":
            piece = [(end, operator == ">=", math.inf, False)]
        case "=":
            piece = [(end, True, end, True)]
        case _:
            piece = _complement([(end, True, end, True)])
    if middle[0] == "symbol":
        return piece
    if middle[0] == "call" and middle[1] == "abs" and middle[2][0] == "symbol":
        positive = _intersection(piece, [(0.0, True, math.inf, False)])
        return positive + [(-high, has_high, -low, has_low) for low, has_low, high, has_high in positive]
    raise Unreadable("not solved for its variable")


def _joined(pieces: list[Piece]) -> list[Piece]:
    found: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p[0], not p[1])):
        low, has_low, high, has_high = piece
        if low > high or (low == high and not (has_low and has_high)):
            continue
        if found and (low < found[-1][2] or (low == found[-1][2] and (has_low or found[-1][3]))):
            before = found.pop()
            end = max((before[2], before[3]), (high, has_high))
            piece = (before[0], before[1], *end)
        found.append(piece)
    return [(low + 0.0, has_low, high + 0.0, has_high) for low, has_low, high, has_high in found]


def _complement(pieces: list[Piece]) -> list[Piece]:
    found: list[Piece] = []
    low, has_low = -math.inf, False
    for piece in pieces:
        found.append((low, has_low, piece[0], not piece[1]))
        low, has_low = piece[2], not piece[3]
    return _joined([*found, (low, has_low, math.inf, False)])


def _intersection(left: list[Piece], right: list[Piece]) -> list[Piece]:
    found: list[Piece] = []
    for a, b in itertools.product(left, right):
        low = max((a[0], not a[1]), (b[0], not b[1]))
        high = min((a[2], a[3]), (b[2], b[3]))
        found.append((low[0], not low[1], high[0], high[1]))
    return _joined(found)
