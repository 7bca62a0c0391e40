"""Regions of the real line, of inequalities, intervals and their unions, for `pekoe.verify.equivalence`.

A region is sorted, disjoint pieces (low, is low in it, high, is high in it), rounded so that equal regions are equal.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

from pekoe.verify.evaluator import symbols_of, value_of
from pekoe.verify.latex_parser import Tree, Unreadable

_INFINITY = ("symbol", "infinity")
Piece = tuple[float, bool, float, bool]


def is_region(tree: Tree) -> bool:
    """Whether `tree` can be nothing else: an interval by itself may be a point of the plane."""
    if tree[0] == "relation":
        return any(operator != "=" for operator in tree[1])
    if tree[0] == "or":
        return any(is_region(part) for part in tree[1])
    if tree[0] == "group":
        return tree[2] != () and is_region(tree[2][0])
    return tree[0] in ("union", "minus", "such_that")


def region(tree: Tree) -> list[Piece] | None:
    """The numbers that the tree describes, rounded so that equal regions are equal; None if it describes none."""
    try:
        return _joined(_pieces(tree))
    except (Unreadable, ArithmeticError, ValueError):
        return None


def _end(tree: Tree) -> float:
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
    names = [index for index, side in enumerate(sides) if symbols_of(side)]
    if len(names) != 1:
        raise Unreadable("not one side with a variable")
    middle = sides[names[0]]
    result: list[Piece] = [(-math.inf, False, math.inf, False)]
    for index, operator in enumerate(operators):
        if names[0] not in (index, index + 1):
            continue
        end = _end(sides[index + 1] if names[0] == index else sides[index])
        if names[0] == index + 1:
            operator = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(operator, operator)
        result = _intersection(result, _half(operator, end, middle))
    return result


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
    result: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p[0], not p[1])):
        low, has_low, high, has_high = piece
        if low > high or (low == high and not (has_low and has_high)):
            continue
        if result and (low < result[-1][2] or (low == result[-1][2] and (has_low or result[-1][3]))):
            before = result.pop()
            end = max((before[2], before[3]), (high, has_high))
            piece = (before[0], before[1], *end)
        result.append(piece)
    return [(low + 0.0, has_low, high + 0.0, has_high) for low, has_low, high, has_high in result]


def _complement(pieces: list[Piece]) -> list[Piece]:
    result: list[Piece] = []
    low, has_low = -math.inf, False
    for piece in pieces:
        result.append((low, has_low, piece[0], not piece[1]))
        low, has_low = piece[2], not piece[3]
    return _joined([*result, (low, has_low, math.inf, False)])


def _intersection(left: list[Piece], right: list[Piece]) -> list[Piece]:
    result: list[Piece] = []
    for a, b in itertools.product(left, right):
        low = max((a[0], not a[1]), (b[0], not b[1]))
        high = min((a[2], a[3]), (b[2], b[3]))
        result.append((low[0], not low[1], high[0], high[1]))
    return _joined(result)
