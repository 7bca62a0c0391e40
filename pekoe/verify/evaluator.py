"""The value of an expression at a point, exact where it is rational. Everything is bounded: see the limits below."""

from __future__ import annotations

import cmath
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from pekoe.verify.latex_parser import Tree, Unreadable

Number = Fraction | complex
Values = dict[str, Number]
MAX_BITS, MAX_FACTORIAL = 20_000, 1_000
_CONSTANTS = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j}
_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {"add": operator.add, "mul": operator.mul, "div": operator.truediv}
_OPERATIONS["ratio"] = operator.truediv


class Undefined(ArithmeticError):
    """The expression has no (finite, bounded) value at this point."""


def symbols_of(tree: Any) -> frozenset[str]:
    """Return the names in `tree` that are no constants."""
    if not isinstance(tree, tuple):
        return frozenset()
    if tree[:1] == ("symbol",):
        return frozenset() if tree[1] in ("pi", "e", "i", "infinity") else frozenset({tree[1]})
    return frozenset().union(*(symbols_of(part) for part in tree))


def value_of(tree: Tree, values: Values) -> Number:
    """Return the value of `tree`. Raises Undefined where it has none, and Unreadable where it is no expression."""
    match tree:
        case ("number", value, _):
            return value
        case ("symbol", name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ("symbol", name) if name in values:
            return values[name]
        case ("add" | "mul" | "div" | "ratio" as name, a, b):
            return _exactly(_OPERATIONS[name], value_of(a, values), value_of(b, values))
        case ("pow", a, b):
            return _power(value_of(a, values), value_of(b, values))
        case ("percent", a):
            return value_of(a, values) / 100
        case ("call", name, argument):
            return _call(name, [value_of(item, values) for item in _arguments(argument)])
        case ("based", digits, base):
            return Fraction(int(digits, base))
        case _:
            raise Unreadable(f"no value: {tree[0]}")


def _arguments(argument: Any) -> list[Tree]:
    return [argument] if isinstance(argument[0], str) else list(argument)


def _exactly(operation: Callable[[Any, Any], Any], left: Number, right: Number) -> Number:
    if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
        left, right = complex(left), complex(right)
    result = operation(left, right)
    if not isinstance(result, Fraction):
        return _finite(result)
    if result.numerator.bit_length() + result.denominator.bit_length() > MAX_BITS:
        raise Undefined("too long a number")
    return result


def _finite(value: complex) -> complex:
    if not cmath.isfinite(value):
        raise Undefined("not finite")
    return value


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator == 1:
            if abs(exponent) * size > MAX_BITS:
                raise Undefined("too large a power")
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
            raise Undefined("zero to no positive power")
        return Fraction(0)
    return _finite(base**exponent)


def is_beyond(base: Number, exponent: Number) -> bool:
    """Whether a power, also times any value, has more bits than every value here."""
    if not (isinstance(base, Fraction) and isinstance(exponent, Fraction)) or exponent.denominator > 1:
        return False
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    return abs(exponent) * (size - 1) > 4 * MAX_BITS


def _exact_root(value: int, degree: int) -> int | None:
    guess = round(value ** (1 / degree)) if value.bit_length() < 1000 else 0
    return next((g for g in (guess - 1, guess, guess + 1) if g >= 0 and g**degree == value), None)


_SAME_NAME = ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp")
_CALLS: dict[str, Callable[[complex], complex]] = {name: getattr(cmath, name) for name in _SAME_NAME}
_CALLS.update({f"arc{name}": getattr(cmath, f"a{name}") for name in ("sin", "cos", "tan")})
_CALLS.update(ln=cmath.log, lg=cmath.log10)
_CALLS.update(cot=lambda x: 1 / cmath.tan(x), sec=lambda x: 1 / cmath.cos(x), csc=lambda x: 1 / cmath.sin(x))


# Of exact numbers alone.
_OF_FRACTIONS: dict[str, Callable[..., Fraction | int]] = {"floor": math.floor, "ceil": math.ceil}
_OF_FRACTIONS.update(max=lambda *values: max(values), min=lambda *values: min(values))
_OF_INTEGERS: dict[str, Callable[..., int]] = {"gcd": math.gcd, "lcm": math.lcm}
_OF_INTEGERS.update(factorial=math.factorial, binomial=math.comb)


def _call(name: str, arguments: list[Number]) -> Number:
    if name in _OF_FRACTIONS or name in _OF_INTEGERS:
        exact = [value for value in arguments if isinstance(value, Fraction)]
        if len(exact) != len(arguments):
            raise Undefined(f"{name} of what is not exact")
        return Fraction(_OF_FRACTIONS[name](*exact) if name in _OF_FRACTIONS else _of_integers(name, exact))
    if len(arguments) != 1:
        raise Unreadable(f"{name} of {len(arguments)}")
    [value] = arguments
    if name == "abs":
        return abs(value) if isinstance(value, Fraction) else complex(abs(value))
    if name not in _CALLS:  # "log" without a base is 10 or e
        raise Unreadable(f"{name} is not known")
    return _finite(_CALLS[name](complex(value)))


def _of_integers(name: str, arguments: list[Fraction]) -> int:
    if any(value.denominator != 1 or abs(value) > 10**12 for value in arguments):
        raise Undefined(f"{name} of what is not whole, or too large")
    whole = [int(value) for value in arguments]
    if name in ("factorial", "binomial") and (min(whole) < 0 or max(whole) > MAX_FACTORIAL):
        raise Undefined(f"{name} of more than {MAX_FACTORIAL}")
    return _OF_INTEGERS[name](*whole)
