r"""kind = "countdown": an expression of the given numbers must make the target. gold: {"numbers": [...], "target": n}.

Each number may be used as often as it is given; all must be where gold has `"use_all": true`. The answer is what the
last `\boxed{...}` or `<answer>...</answer>` holds: + - * / and brackets, in Python's or LaTeX's signs, and perhaps
`= target` behind. It is read by Python's parser and computed in fractions here; nothing is executed.
"""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from pekoe.core.types import Verdict
from pekoe.verify.extract import rewriter
from pekoe.verify.kinds.base import Verifier, tagged_answer

MAX_ANSWER_CHARS, MAX_DEPTH = 500, 50
_rewritten = rewriter(
    (r"\\(?:times|cdot)(?![a-z])|×|·", "*"),
    (r"\\div(?![a-z])|÷", "/"),
    (r"−|–", "-"),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\(?:left|right|,|;|!| )|\$", ""),
    (r"\[", "("),
    (r"\]", ")"),
)
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class _Refused(ValueError):
    """Not an expression of the kind asked for."""


def _value(node: ast.AST, used: Counter[int], depth: int = 0) -> Fraction:
    if depth > MAX_DEPTH:
        raise _Refused("too deep")
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            used[number] += 1
            return Fraction(number)
        case ast.BinOp() if type(node.op) in _OPERATIONS:
            left, right = (_value(side, used, depth + 1) for side in (node.left, node.right))
            return _OPERATIONS[type(node.op)](left, right)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign):
            value = _value(node.operand, used, depth + 1)
            return -value if isinstance(sign, ast.USub) else value
        case _:
            raise _Refused(f"{type(node).__name__} is not arithmetic")


def _judge(text: str, numbers: Counter[int], target: Fraction, use_all: bool) -> Verdict:
    expression, equals, claimed = _rewritten(text).partition("=")
    used: Counter[int] = Counter()
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, used)
        if equals and _value(ast.parse(claimed.strip(), mode="eval").body, Counter()) != value:
            return Verdict("wrong", text, "its two sides differ")
    except ZeroDivisionError:
        return Verdict("wrong", text, "divides by zero")
    except (_Refused, SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return Verdict("unparsed", text, f"cannot read it: {str(error)[:100]}")
    if used - numbers or (use_all and used != numbers):
        return Verdict("wrong", text, f"uses {sorted(used.elements())[:20]} of {sorted(numbers.elements())[:20]}")
    return Verdict("correct" if value == target else "wrong", text, "" if value == target else f"makes {value}"[:100])


def prepare(response: str, gold: Any) -> Verdict:
    try:
        numbers, target = Counter(int(number) for number in gold["numbers"]), Fraction(gold["target"])
        use_all = bool(gold.get("use_all", False))
    except (TypeError, ValueError, KeyError, AttributeError):
        return Verdict("fault", None, f"the reference must have numbers and a target, got {str(gold)[:80]!r}")
    text = tagged_answer(response, MAX_ANSWER_CHARS)
    if isinstance(text, Verdict):
        return text
    return _judge(text, numbers, target, use_all)


VERIFIER = Verifier("countdown", prepare)
