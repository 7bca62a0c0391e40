r"""Kinds that are judged without a worker, by their form.

kind = "choice": the letter in the last box must be the reference's (GPQA, BIG-Bench-Hard). gold: "C" or "(C)".

For the others the answer is what the last `\boxed{...}` or `<answer>...</answer>` holds.

kind = "logic": a structured answer must equal the solution. gold is an object, name to role (knights and knaves:
`{"Zoey": "knight"}`), or a grid of a zebra puzzle, `{"header": ["House", "Name", ...], "rows": [["1", "Eric", ...],
...]}`. The answer is JSON of the same shape (a grid may also be an object by house), or for names and roles lines such
as `(1) Zoey is a knight`. Case and spaces do not matter; every name must be there, once.

kind = "countdown": an expression of the given numbers must make the target. gold: {"numbers": [...], "target": n}. Each
number may be used as often as it is given; all must be where gold has `"use_all": true`. The answer has + - * / and
brackets, in Python's or LaTeX's signs, and perhaps `= target` behind. Python's parser reads it, and it is computed in
fractions here; nothing is executed.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any, cast

from pekoe.core.types import Verdict
from pekoe.verify.extract import after_thinking, last_boxed, unboxed
from pekoe.verify.kinds.base import Verifier, bad_reference, tagged_answer
from pekoe.verify.normalize import normalized, rewriter

_CHOICE_MARKUP = re.compile(r"\\text\s*|[{}\\*]|(?i:\b(?:option|choice|answer)\b(?: is)?:?)")
_LETTER = re.compile(r"\(?([A-Za-z])\)?(?:[.):]?$|[.):]\s|\)\s*\S)")
# Behind the letter: a letter marked as an option, one by itself (but for the article), one linked, or a denial.
_ANOTHER = re.compile(
    r"\(?\b[A-Za-z][).:](?!\w)|\b[A-J]\b(?!\s+[a-z]{2}|\s*[=+])|(?:\b(?i:or|and|nor|not)\b|[,;/&|])\s*\(?[A-Ja-j]\)?(?:\W|$)"
    r"|^\W*[a-j]\W*$|(?i:\b(?:is|are|was)\s+(?:not|wrong|incorrect|false)\b)"
)

MAX_LOGIC_CHARS = 20_000
_LOGIC_MARKUP = re.compile(r"\\(?:text[a-z]*|math[a-z]*|mbox|quad|qquad|[,;! ])|[{}$*\\]")
_STATEMENT = re.compile(r"(?<![\w'-])([\w'-]++)\s*+(?:\bis\b(?:\s+an?\b)?|[:=])\s*([\w'-]+)", re.IGNORECASE)
Solution = dict[str, Any]  # normalised: text to text, or text to such an object

MAX_COUNTDOWN_CHARS, MAX_DEPTH = 500, 50
_as_python = rewriter(
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


def _letter(text: str) -> str | None:
    """Return the one letter that `text` chooses: `C`, `(C)`, `C.`, `C) because`, `Option C`; None for two, or none."""
    text = _CHOICE_MARKUP.sub(" ", normalized(text)).strip()
    match = _LETTER.match(text)
    return match[1].upper() if match and not _ANOTHER.search(text, match.end(1) + 1) else None


def prepare_choice(response: str, gold: Any) -> Verdict:
    expected = _letter(gold) if isinstance(gold, str) else None
    if expected is None:
        return bad_reference("must be a letter", gold)
    response = after_thinking(response)
    answer = last_boxed(response)
    if answer is None and (answer := unboxed(response)) is None:
        return Verdict("unparsed", None, r"no complete \boxed{...}, and no answer named")
    answer = answer.strip()[:200]
    chosen = _letter(answer)
    if chosen is None:
        return Verdict("unparsed", answer, "expected one letter")
    return Verdict("correct" if chosen == expected else "wrong", answer)


def _plain(value: Any) -> Any:
    """Names and values without case, and with single spaces. Raises TypeError for what is neither object nor scalar."""
    if isinstance(value, dict):
        roles = {_plain(str(key)): _plain(role) for key, role in cast(dict[Any, Any], value).items()}
        if len(roles) < len(cast(dict[Any, Any], value)):
            raise TypeError("two keys that are one")
        return roles
    if isinstance(value, list | tuple) or value is None:
        raise TypeError("expected an object of texts")
    return " ".join(str(value).lower().replace("_", " ").split())


def _solution(gold: Any) -> Solution | None:
    """The reference, normalised: a grid by its first column. None where it has another shape."""
    try:
        if isinstance(gold, dict) and gold.keys() == {"header", "rows"}:
            first, *names = gold["header"]
            return _plain({f"{first} {row[0]}": dict(zip(names, row[1:], strict=True)) for row in gold["rows"]})
        return _plain(gold) if isinstance(gold, dict) and gold else None
    except (TypeError, ValueError, IndexError):
        return None


def _roles(text: str, gold: Solution) -> Solution | None:
    """Return what the text says, in the reference's shape; None where it cannot be read or contradicts itself."""
    start, end = text.find("{"), text.rfind("}")
    for source in (text, text[start : end + 1] if 0 <= start < end else ""):
        try:
            value = json.loads(source)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return _solution(cast(dict[str, Any], value).get("solution", cast(dict[str, Any], value)))
    if any(isinstance(role, dict) for role in gold.values()):
        return None
    roles: Solution = {}
    for name, role in _STATEMENT.findall(_LOGIC_MARKUP.sub(" ", text)):
        name, role = _plain(name), _plain(role)
        if roles.setdefault(name, role) != role:
            return None
    return roles


def prepare_logic(response: str, gold: Any) -> Verdict:
    solution = _solution(gold)
    if solution is None:
        return bad_reference("must be an object, name to value", gold)
    text = tagged_answer(response, MAX_LOGIC_CHARS)
    if isinstance(text, Verdict):
        return text
    roles = _roles(text, solution)
    if not roles:
        return Verdict("unparsed", text, "cannot read it as names and values, one to each")
    if missing := sorted(solution.keys() - roles.keys()):
        return Verdict("wrong", text, f"nothing about {', '.join(missing)}"[:300])
    return Verdict("correct" if {name: roles[name] for name in solution} == solution else "wrong", text)


def _value(node: ast.AST, used: Counter[int], depth: int = 0) -> Fraction:
    """Compute the expression, and count the numbers in it. Raises ValueError for what is no arithmetic."""
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
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
            raise ValueError(f"{type(node).__name__} is not arithmetic")


def prepare_countdown(response: str, gold: Any) -> Verdict:
    try:
        numbers, target = Counter(int(number) for number in gold["numbers"]), Fraction(gold["target"])
        use_all = bool(gold.get("use_all", False))
    except (TypeError, ValueError, KeyError, AttributeError):
        return bad_reference("must have numbers and a target", gold)
    text = tagged_answer(response, MAX_COUNTDOWN_CHARS)
    if isinstance(text, Verdict):
        return text
    expression, equals, claimed = _as_python(text).partition("=")
    used: Counter[int] = Counter()
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, used)
        if equals and _value(ast.parse(claimed.strip(), mode="eval").body, Counter()) != value:
            return Verdict("wrong", text, "its two sides differ")
    except ZeroDivisionError:
        return Verdict("wrong", text, "divides by zero")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return Verdict("unparsed", text, f"cannot read it: {str(error)[:100]}")
    if used - numbers or (use_all and used != numbers):
        return Verdict("wrong", text, f"uses {sorted(used.elements())[:20]} of {sorted(numbers.elements())[:20]}")
    return Verdict("correct", text) if value == target else Verdict("wrong", text, f"makes {value}"[:100])


CHOICE = Verifier("choice", prepare_choice, restate=lambda gold: (rf"\boxed{{{gold}}}",))
LOGIC = Verifier("logic", prepare_logic, restate=lambda gold: (f"<answer>{json.dumps(gold, default=str)}</answer>",))
COUNTDOWN = Verifier("countdown", prepare_countdown)
