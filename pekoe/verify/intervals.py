"""Regions of the real line, of inequalities, intervals and their unions, for `pekoe.verify.equivalence`.

A region is a sorted list of disjoint pieces (low, high), rounded so that equal regions are equal. An end is
(value, side), which orders as the points beside a number do: (2, -1) is just below 2, (2, 0) is 2, (2, 1) just above.
Example: [1, 2) is ((1.0, 0), (2.0, -1)).
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

from pekoe.verify.evaluator import symbols_of, value_of
from pekoe.verify.latex_parser import Tree, Unreadable

_INFINITY = ("symbol", "infinity")
End = tuple[float, int]
Piece = tuple[End, End]
_LOWEST, _HIGHEST = (-math.inf, 1), (math.inf, -1)
_ORDER = ("<", "<=", ">", ">=", "!=")
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def is_region(tree: Tree) -> bool:
    """Whether `tree` can be nothing else: an interval by itself may be a point of the plane."""
    if tree[0] == "relation":
        return any(operator in _ORDER for operator in tree[1])
    if tree[0] == "or":
        return any(is_region(part) for part in tree[1])
    if tree[0] == "group":
        return tree[2] != () and is_region(tree[2][0])
    return tree[0] in ("union", "minus", "such_that") or tree == ("symbol", "reals")


def region(tree: Tree) -> list[Piece] | None:
    """Return the numbers that the tree describes; None if it describes none."""
    try:
        return _joined(_pieces(tree))
    except (Unreadable, ArithmeticError, ValueError):
        return None


def _bound(tree: Tree) -> float:
    if symbols_of(tree):
        raise Unreadable("a bound with a variable")
    if tree == _INFINITY:
        return math.inf
    if tree == ("mul", ("number", Fraction(-1), False), _INFINITY):
        return -math.inf
    value = complex(value_of(tree, {}))
    if abs(value.imag) > 1e-12:
        raise Unreadable("a bound that is not real")
    return float(f"{value.real:.9g}")


def _pieces(tree: Tree) -> list[Piece]:
    match tree:
        case ("group", "{}", (("such_that", parts),)) | ("union", *parts) | ("or", parts):
            return [piece for part in parts for piece in _pieces(part)]
        case ("group", "{}", items):
            return [((value, 0), (value, 0)) for value in map(_bound, items)]
        case ("group", brackets, (low, high)):
            return [((_bound(low), int(brackets[0] != "[")), (_bound(high), -int(brackets[1] != "]")))]
        case ("minus", a, b):
            return _intersection(_joined(_pieces(a)), _complement(_joined(_pieces(b))))
        case ("in", _, a):
            return _pieces(a)
        case ("symbol", "reals"):
            return [(_LOWEST, _HIGHEST)]
        case ("relation", operators, sides):
            return _solved(operators, sides)
        case _:
            raise Unreadable(f"no region: {tree[0]}")


def _solved(operators: tuple[str, ...], sides: tuple[Tree, ...]) -> list[Piece]:
    """x < 3, 3 < x <= 4, |x| > 1, x != 3, x = 1: one name, and bounds without names."""
    names = [index for index, side in enumerate(sides) if symbols_of(side)]
    if len(names) != 1:
        raise Unreadable("not one side with a variable")
    [name] = names
    result: list[Piece] = [(_LOWEST, _HIGHEST)]
    if name < len(operators):
        result = _intersection(result, _half(operators[name], _bound(sides[name + 1]), sides[name]))
    if name > 0:
        operator = operators[name - 1]
        half = _half(_MIRRORED.get(operator, operator), _bound(sides[name - 1]), sides[name])
        result = _intersection(result, half)
    return result


def _half(operator: str, value: float, variable: Tree) -> list[Piece]:
    point = [((value, 0), (value, 0))]
    pieces: dict[str, list[Piece]] = {
        "<": [(_LOWEST, (value, -1))],
        "<=": [(_LOWEST, (value, 0))],
        ">": [((value, 1), _HIGHEST)],
        ">=": [((value, 0), _HIGHEST)],
        "=": point,
        "!=": _complement(point),
    }
    piece = pieces[operator]
    if variable[0] == "symbol":
        return piece
    if variable[0] == "call" and variable[1] == "abs" and variable[2][0] == "symbol":
        positive = _intersection(piece, [((0.0, 0), _HIGHEST)])
        return positive + [((-high, -high_side), (-low, -low_side)) for (low, low_side), (high, high_side) in positive]
    raise Unreadable("not solved for its variable")


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Return them sorted, the empty ones left out, and those that overlap or touch made one."""
    result: list[Piece] = []
    for low, high in sorted(pieces):
        if low > high:
            continue
        if result and low <= (result[-1][1][0], result[-1][1][1] + 1):
            before = result.pop()
            low, high = before[0], max(before[1], high)
        result.append((low, high))
    return result


def _complement(pieces: list[Piece]) -> list[Piece]:
    lows = [_LOWEST, *((value, side + 1) for _, (value, side) in pieces)]
    highs = [*((value, side - 1) for (value, side), _ in pieces), _HIGHEST]
    return _joined(list(zip(lows, highs, strict=True)))


def _intersection(left: list[Piece], right: list[Piece]) -> list[Piece]:
    return _joined([(max(a[0], b[0]), min(a[1], b[1])) for a, b in itertools.product(left, right)])
