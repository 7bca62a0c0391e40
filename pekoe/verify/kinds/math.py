r"""kind = "math": the content of the last `\boxed{...}` must equal the reference (text, or a list: any may match).

Text equal to the reference is CORRECT, and plain integers are compared as such. Everything else math-verify parses as
LaTeX and compares. Its parser is given the content of the box alone: its `parse` would go on to look for loose text,
and with `ExprExtractionConfig` execute it. (Its LaTeX path is not safe either: every worker installs
`pekoe.verify.audit_hook`.) Its own time limits use SIGALRM; they are off, because the pool's wall clock limits it.

`_tidy`, `_read_both` and `_contradicts` correct errors of math-verify that labelled answers have shown.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from pekoe.core.types import Label, Verdict
from pekoe.verify import equivalence
from pekoe.verify.extract import conclusion, is_prose, last_boxed, linked_boxes, rewriter, unboxed
from pekoe.verify.kinds.base import Verifier, bad_reference

MAX_ANSWER_CHARS = 10_000  # no answer is this long; a list of 40,000 numbers would only buy time in the parser

_UNICODE = str.maketrans(
    {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{MULTIPLICATION SIGN}": r"\times ", "∞": r"\infty ", "π": r"\pi "}
    | {"·": r"\cdot ", "÷": "/", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "°": r"^\circ ", "²": "^2", "³": "^3"}
    | {"\x0c": r"\f", "\x08": r"\b", "€": "", "£": "", "¥": ""}  # \frac and \binom, read as escapes; currencies
    | {"\N{UNION}": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "½": r"\frac{1}{2}", "¾": r"\frac{3}{4}"}
)
_rewritten = rewriter(
    (r"\s+", " "),
    (r"√ ?([0-9]+|[a-zA-Z])", r"\\sqrt{\1}"),
    (r"√", r"\\sqrt"),
    (r"(^|[(\[,] ?)\+(?= ?\\infty)", r"\1"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (r"\^\s*$", ""),
    (r"\\varnothing", r"\\emptyset"),
    (r" (\\?%)", r"\1"),
    (r"(?<=[0-9])(?: |\\,|\\ )(?=[0-9]{3}(?![0-9]))", ""),  # 1 000
    (r"^(-?[0-9]+) ([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),  # 1 3/4
    (r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})(?!\w)", r"\1 \\times 10^{\2}"),
    (r"(?<=[0-9A-Za-z})\]])\. ?$", ""),
)
_TEXT_GROUP = re.compile(r"\\(?:text[a-z]*|mbox|math(?:rm|it|bf)) ?\{[^{}]*\}")
_PLAIN = re.compile(r"[+-]?(?:[0-9]{1,40}|[0-9]{1,3}(?:,[0-9]{3}){1,12})")
_PARTS, _BRACKETS = re.compile(r",(?![0-9]{3})|;|\band\b"), re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_COMMA, _POINT = re.compile(r"-?(?:[0-9]+,[0-9]{1,2}|0,[0-9]+)"), re.compile(r"-?[0-9]+\.[0-9]+")
_VARIABLE = re.compile(r"[A-Za-z]")
_BASE = re.compile(r"[0-9]_\{?([0-9]+)")


class _BadReference(Exception):
    """The reference cannot be used, whatever the response."""


class _Read(NamedTuple):
    text: str  # normalised
    unit: str  # what was taken off its end
    value: Any  # a sympy object, or None where it cannot be parsed


@functools.cache
def _library() -> tuple[Any, Any]:
    """Return math-verify's parser module and its `verify`. It has no types; and the parent must never import it."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return importlib.import_module("math_verify.parser"), importlib.import_module("math_verify").verify


def _tidy(text: str) -> str:
    return _rewritten(text.strip().translate(_UNICODE)).strip()


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's result, or None where math-verify or sympy gives up, with an exception of any class."""
    try:
        return function(*arguments)
    except (MemoryError, RecursionError):  # limits
        raise
    except Exception:
        return None


def _read(text: str, take_unit: bool = True) -> _Read:
    parser, _ = _library()
    text = _tidy(text)
    config = parser.NormalizationConfig
    plain = parser.normalize_latex(text, config(boxed="last"))
    # math-verify cuts from the *first* \text{...} to the end: `7 \text{ or so } \frac{8}{1}` would read as 7.
    rests = [plain[match.end() :] for match in _TEXT_GROUP.finditer(plain)]
    cut = take_unit and all(re.fullmatch(r" ?(\^\{?[0-9]\}?)?", rest) for rest in rests)
    bare = parser.normalize_latex(plain, config(boxed="none", units=True)) if cut else plain
    unit = plain[len(bare) :] if plain.startswith(bare) else ""
    whole = parser.normalize_latex(bare, config(boxed="none", malformed_operators=True, nits=True))
    return _Read(whole, unit, _attempt(parser.parse_latex_cached, whole))


def _unit_name(unit: str) -> str:
    return re.sub(r"\\(?:text|mbox)|[^A-Za-z0-9^°]", "", unit).lower().removesuffix("s")


def _read_both(gold: str, answer: str) -> tuple[_Read, _Read]:
    reference, response = _read(gold), _read(answer)
    # A unit may be left out. It may not be another one (10 cm for 10 m), nor a variable: the t of 2t is not a tonne.
    units = reference.unit, response.unit
    if _unit_name(units[0]) != _unit_name(units[1]) and (all(units) or _VARIABLE.fullmatch("".join(units))):
        return _read(gold, take_unit=False), _read(answer, take_unit=False)
    return reference, response


def _verify(gold: Any, answer: Any) -> bool:
    # The order matters to math-verify: it follows the reference's form (`x = 7` for 7, a set for an inequality).
    return bool(_library()[1](gold, answer, timeout_seconds=None, raise_on_error=True))


def _contradicts(reference: _Read, response: _Read) -> bool:
    """Whether two values that math-verify calls equal are not."""
    bases = [set(_BASE.findall(side.text)) for side in (reference, response)]
    if bases[0] and bases[1] and bases[0] != bases[1]:  # it ignores the base: 204_5 is not 204_6
        return True
    gold, answer = reference.value, response.value
    sympy = _library()[0].sympy
    if not gold.atoms(sympy.Equality):
        # It takes the last side of an equation; `5 = 7` is not 7.
        lefts = [equation.lhs for equation in answer.atoms(sympy.Equality)]
        if any(getattr(left, "is_number", False) and not _verify(gold, left) for left in lefts):
            return True
    # A percentage, which it marks as unevaluated, may be written in two ways: 50 % is both 50 and 1/2.
    if not all(getattr(side, "is_number", False) and not side.has(sympy.UnevaluatedExpr) for side in (gold, answer)):
        return False
    # It rounds to six places, and chops what is near zero: 2^-99 is not 2^-98, and 0.0000001 is not 0.
    left, right = gold.evalf(), answer.evalf()
    return bool(abs(left - right) > 1e-5 * max(abs(left), abs(right)))


def _golds(gold: Any) -> list[str]:
    """Return the references, or an empty list where `gold` is not text or a list of texts."""
    golds: list[Any] = cast(list[Any], gold) if isinstance(gold, (list, tuple)) else [gold]
    return golds if all(isinstance(text, str) and text.strip() for text in golds) else []


def _plain(text: str) -> int | None:
    """Return the integer that `text` plainly is; most references are, and need no sympy."""
    return int(text.replace(",", "")) if _PLAIN.fullmatch(text) else None


def prepare(response: str, gold: Any) -> Verdict | str:
    """Return the boxed answer, or the verdict where the text alone decides. Linear in the length of `response`."""
    golds = _golds(gold)
    if not golds:
        return bad_reference("must be text, or a list of texts", gold)
    answer = last_boxed(response)
    if answer is None:
        return Verdict("unparsed", None, r"no complete \boxed{...}")
    boxes = linked_boxes(response)  # side by side they are one answer, where a reference is a list of as many
    if len(boxes) > 1 and any(len(_PARTS.findall(_BRACKETS.sub("", text))) == len(boxes) - 1 for text in golds):
        answer = ", ".join(boxes)
    return _prepared(answer, golds)


def prepare_unboxed(response: str, gold: Any) -> Verdict | str:
    """As `prepare`, but where no box is complete what follows the last "answer is" will do."""
    golds = _golds(gold)
    if golds and last_boxed(response) is None and (answer := unboxed(response)):
        return _prepared(answer, golds)
    return prepare(response, gold)


def _prepared(answer: str, golds: list[str]) -> Verdict | str:
    answer = answer.strip()
    if not answer:
        return Verdict("unparsed", answer, "the box is empty")
    golds = [text.strip() for text in golds]
    if answer in golds:
        return Verdict("correct", answer)
    if (number := _plain(answer)) is not None and None not in (plain := [_plain(text) for text in golds]):
        return Verdict("correct" if number in plain else "wrong", answer)
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict("unparsed", answer[:200] + "…", f"the box holds {len(answer):,} characters")
    return answer


def _check_alone(value: Any, text: str) -> None:
    if equivalence.compare(_tidy(text), _tidy(text)):
        return
    if value is None or not _attempt(_verify, value, value):  # math-verify raises for 0/0
        raise _BadReference(f"the reference {text[:80]!r} cannot be {'parsed' if value is None else 'compared'}")


def _compare(gold: str, answer: str) -> Label:
    label = _compare_once(gold, answer)
    if label != "correct" and is_prose(answer) and not is_prose(gold) and (claim := conclusion(answer)):
        return _compare_once(gold, claim)
    return label


def _second(reference: _Read, response: _Read, gold: str, answer: str) -> bool | None:
    """The second judgement: on the texts as they are, else on them as math-verify normalises them."""
    equal = equivalence.compare(_decimal_point(_tidy(gold), answer), _decimal_point(_tidy(answer), gold))
    return equivalence.compare(reference.text, response.text) if equal is None else equal


def _decimal_point(text: str, other: str) -> str:
    """1000,99 as 1000.99 where the other side has a decimal point."""
    return text.replace(",", ".") if _COMMA.fullmatch(text) and _POINT.fullmatch(other.strip(" $")) else text


def _compare_once(gold: str, answer: str) -> Label:
    reference, response = _read_both(gold, answer)
    if (reference.text, reference.unit) == (response.text, response.unit):
        return "correct"
    if (equal := _second(reference, response, gold, answer)) is not None:
        return "correct" if equal else "wrong"
    if reference.value is None:
        _check_alone(None, gold)
    if response.value is None:
        return "unparsed"
    equal = _attempt(_equal, reference, response)
    if equal is None:  # if the reference is not the cause, nothing shows that the two are equal
        _check_alone(reference.value, gold)
    return "correct" if equal else "wrong"


def _equal(reference: _Read, response: _Read) -> bool:
    return _verify(reference.value, response.value) and not _contradicts(reference, response)


def decide(answer: str, gold: Any) -> Verdict:
    """Judge `answer` against each reference until one matches. FAULT only where none of them could be used."""
    labels: set[Label] = set()
    faults: list[str] = []
    for text in _golds(gold):
        try:
            labels.add(_compare(text, answer))
        except _BadReference as fault:
            faults.append(str(fault))
        if "correct" in labels:
            return Verdict("correct")
    if not labels:
        return Verdict("fault", None, "; ".join(faults))
    return Verdict("unparsed", None, "cannot parse the box") if "unparsed" in labels else Verdict("wrong")


def check_reference(gold: Any) -> Verdict:
    """Find out whether the reference is to blame for a limit: can it be judged, within the limits, by itself?

    Against itself it would match by its text, whatever it costs to evaluate. So each reference is also compared with 0,
    as it would be with any honest wrong answer: `9^{9^{9^9}}` as a reference does not come back from that.
    """
    faults: list[str] = []
    texts = _golds(gold)
    for text in texts:
        value = _read(text).value
        try:
            _check_alone(value, text)
        except _BadReference as fault:
            faults.append(str(fault))
            continue
        with contextlib.suppress(ArithmeticError, AttributeError, PermissionError, TypeError, ValueError):
            _verify(value, _library()[0].sympy.Integer(0))
    return Verdict("fault", None, "; ".join(faults)) if len(faults) == len(texts) else Verdict("correct")


def warm_up() -> None:
    """Import math-verify, and what sympy would import later; parse and compare once."""
    _library()
    importlib.import_module("sympy.physics.units")  # `simplify` asks for it, and it evaluates text of its own
    decide("x + 1", "1 + x")


VERIFIER = Verifier("math", prepare, decide, check_reference, warm_up)
UNBOXED = Verifier("math-unboxed", prepare_unboxed, decide, check_reference, warm_up)
