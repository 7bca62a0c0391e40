r"""kind = "math": the content of the last `\boxed{...}` must equal the reference (text, or a list: any may match).

Text equal to the reference is CORRECT, and plain integers are compared as such. Everything else math-verify parses as
LaTeX and compares. Its parser is given the content of the box alone: its `parse` would go on to look for loose text,
and with `ExprExtractionConfig` execute it. (Its LaTeX path is not safe either: every worker installs
`pekoe.verify.audit_hook`.) Its own time limits use SIGALRM; they are off, because the pool's wall clock limits it.

Both sides are read in one spelling, without their units (`verify.normalize`, `verify.units`). math-verify decides only
what `verify.equivalence` does not, and never where words are left, around which it would read. `_contradicts` corrects
errors of it that labelled answers have shown. A reference in words is compared as text.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

from pekoe.core.types import Label, Verdict
from pekoe.verify import equivalence
from pekoe.verify.extract import after_thinking, claimed, conclusion, is_prose, last_boxed, linked_boxes, unboxed
from pekoe.verify.kinds.base import Verifier, bad_reference
from pekoe.verify.latex_parser import KNOWN
from pekoe.verify.normalize import normalized
from pekoe.verify.units import split_unit

MAX_ANSWER_CHARS = 10_000  # no answer is this long; a list of 40,000 numbers would only buy time in the parser

_PLAIN = re.compile(r"[+-]?(?:[0-9]{1,40}|[0-9]{1,3}(?:,[0-9]{3}){1,12})")
_PARTS, _BRACKETS = re.compile(r",(?![0-9]{3})|;|\band\b"), re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_COMMA, _POINT = re.compile(r"-?(?:[0-9]+,[0-9]{1,2}|0,[0-9]+)"), re.compile(r"-?[0-9]+\.[0-9]+")
_PLACEHOLDERS = ("proof", "notfound", "n/a", "null", "nan", "unknown", "tbd", "todo")
_WORDS = re.compile(r"(?<![\\A-Za-z])(?=[A-Za-z]*[a-z])[A-Za-z]{3,}|(?<=\\text\{)[A-Za-z]{2,}")
_UNCLEAR = re.compile(r"==|\.\.\.|\\[lc]?dots")
# Nothing here can grow: no factorials, no exponents but single digits, no sums.
_SMALL = re.compile(
    r"(?:\\(?:[dt]?frac|sqrt|pi|left|right|cdot|times|pm|infty|cup|in|leq?|geq?|circ|text(?=\{[A-Za-z ]*\}))(?![a-z])"
    r"|\\[ ,;!{}()$%]|\^(?:-?[0-9]|\{-?[0-9]\}|\\circ|\{\\circ\})(?![0-9^])|[-+*/=.,:()\[\]{}<>$ 0-9A-Za-z])+"
)
MAX_SMALL_CHARS = 60
_BASE = re.compile(r"[0-9]_\{?([0-9]+)")


class _BadReference(Exception):
    """The reference cannot be used, whatever the response."""


@functools.cache
def _library() -> tuple[Any, Any]:
    """Return math-verify's parser module and its `verify`. It has no types; and the parent must never import it."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return importlib.import_module("math_verify.parser"), importlib.import_module("math_verify").verify


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's result, or None where math-verify or sympy gives up, with an exception of any class."""
    try:
        return function(*arguments)
    except (MemoryError, RecursionError):  # limits
        raise
    except Exception:
        return None


class _Side(NamedTuple):
    text: str  # normalised, without its unit
    unit: str  # "" where there is none
    words: str  # the text alone, for what is compared as words

    @property
    def value(self) -> Any:
        """A sympy object, or None where math-verify cannot parse the text."""
        parser, _ = _library()
        config = parser.NormalizationConfig(boxed="none", malformed_operators=True, nits=True)
        return _attempt(lambda: parser.parse_latex_cached(parser.normalize_latex(self.text, config)))

    @property
    def is_words(self) -> bool:
        """Whether there are words in it that are no names of functions. math-verify would read around them."""
        return (
            any(not KNOWN.fullmatch(word) for word in _WORDS.findall(self.text))
            or _UNCLEAR.search(self.text) is not None
        )


def _side(text: str, is_reference: bool = False) -> _Side:
    text = normalized(text)
    value, unit = split_unit(text, is_reference)
    words = re.sub(r" ?([^\w\s]) ?", r"\1", re.sub(r"\\text ?\{([^{}]*)\}|\s+", r" \1 ", text).strip())
    return _Side(value, unit, re.sub(r"\s+", " ", words))


def _verify(gold: Any, answer: Any) -> bool:
    # The order matters to math-verify: it follows the reference's form (`x = 7` for 7, a set for an inequality).
    return bool(_library()[1](gold, answer, timeout_seconds=None, raise_on_error=True))


def _contradicts(reference: str, response: str, gold: Any, answer: Any) -> bool:
    """Whether two values that math-verify calls equal are not."""
    bases = [set(_BASE.findall(text)) for text in (reference, response)]
    if bases[0] and bases[1] and bases[0] != bases[1]:  # it ignores the base: 204_5 is not 204_6
        return True
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
    """Return the references, or an empty list where `gold` is not text, a number, or a list of them."""
    golds: list[Any] = cast(list[Any], gold) if isinstance(gold, (list, tuple)) else [gold]
    golds = [f"{text:.15g}" if type(text) is float else str(text) if type(text) is int else text for text in golds]
    if not all(isinstance(text, str) and text.strip() for text in golds):
        return []
    return [", ".join(linked_boxes(text)) or text if "boxed" in text else text for text in golds]


def _plain(text: str) -> int | None:
    """Return the integer that `text` plainly is; most references are, and need no sympy."""
    return int(text.replace(",", "")) if _PLAIN.fullmatch(text) else None


def prepare(response: str, gold: Any) -> Verdict | str:
    """Return the boxed answer, or the verdict where the text alone decides. Linear in the length of `response`."""
    golds = _golds(gold)
    if not golds:
        return bad_reference("must be text, or a list of texts", gold)
    response = after_thinking(response)
    answer = last_boxed(response)
    if answer is None:
        return Verdict("unparsed", None, r"no complete \boxed{...}")
    boxes = linked_boxes(response)  # side by side they are one answer, where a reference is a list of as many
    if len(boxes) > 1 and any(len(_PARTS.findall(_BRACKETS.sub("", text))) == len(boxes) - 1 for text in golds):
        answer = ", ".join(boxes)
    return _prepared(answer, golds)


def prepare_unboxed(response: str, gold: Any) -> Verdict | str:
    """As `prepare`, but where no box is complete what follows the last "answer is" will do."""
    golds, response = _golds(gold), after_thinking(response)
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


def _check_alone(side: _Side, text: str) -> None:
    if side.words.lower() in _PLACEHOLDERS:
        raise _BadReference(f"the reference {text[:80]!r} says that there is none")
    if side.is_words or equivalence.compare(side.text, side.text):
        return
    value = side.value
    if value is None or not _attempt(_verify, value, value):  # math-verify raises for 0/0
        raise _BadReference(f"the reference {text[:80]!r} cannot be {'parsed' if value is None else 'compared'}")


def _compare(gold: str, answer: str) -> Label:
    label = _compare_once(gold, answer)
    if label == "correct" or is_prose(gold):
        return label
    if (is_prose(answer) and (claim := conclusion(answer))) or (claim := claimed(normalized(answer))):
        return _compare_once(gold, claim)
    return label


def _decimal_point(text: str, other: str) -> str:
    """1000,99 as 1000.99 where the other side has a decimal point."""
    return text.replace(",", ".") if _COMMA.fullmatch(text) and _POINT.fullmatch(other.strip(" $")) else text


def _compare_once(gold: str, answer: str) -> Label:
    reference, response = _side(gold, True), _side(answer)
    if reference.words.lower() in _PLACEHOLDERS:
        _check_alone(reference, gold)
    words, is_words = [reference.words, response.words], reference.is_words or response.is_words
    if words[0] == words[1] or (is_words and words[0].lower() == words[1].lower()):
        return "correct"
    if reference.unit and response.unit and reference.unit != response.unit:  # 10 cm for 10 m
        return "wrong"
    texts = _decimal_point(reference.text, response.text), _decimal_point(response.text, reference.text)
    if {reference.unit, response.unit} == {"", "degree"}:  # an angle in degrees, and perhaps one in radians
        radians = [
            rf"({side.text}) \cdot \frac{{\pi}}{{180}}" if side.unit else side.text for side in (reference, response)
        ]
        if any("pi" in text for text in texts) and equivalence.compare(*radians):
            return "correct"
    if (equal := equivalence.compare(*texts)) is not None:
        return "correct" if equal else "wrong"
    if is_words:
        return "wrong"
    values = reference.value, response.value
    if values[0] is None:
        _check_alone(reference, gold)
    if values[1] is None:
        return "unparsed"
    equal = _attempt(lambda: _verify(*values) and not _contradicts(*texts, *values))
    if equal is None:  # if the reference is not the cause, nothing shows that the two are equal
        _check_alone(reference, gold)
    return "correct" if equal else "wrong"


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
        side = _side(text, True)
        try:
            _check_alone(side, text)
        except _BadReference as fault:
            faults.append(str(fault))
            continue
        if equivalence.compare(side.text, "0") is not None:
            continue
        with contextlib.suppress(ArithmeticError, AttributeError, PermissionError, TypeError, ValueError):
            _verify(side.value, _library()[0].sympy.Integer(0))
    return Verdict("fault", None, "; ".join(faults)) if len(faults) == len(texts) else Verdict("correct")


def restate(gold: Any) -> list[str]:
    """Return a response for each reference, which gives it as its answer."""
    return [rf"\boxed{{{text}}}" for text in _golds(gold)] or [""]


def is_plain(gold: Any) -> bool:
    """Whether every reference is a number, or an expression too small to cost anything that our own reader can read."""
    texts = _golds(gold)
    return bool(texts) and all(_plain(text.strip()) is not None or _is_small(text) for text in texts)


def _is_small(text: str) -> bool:
    if len(text) > MAX_SMALL_CHARS or not _SMALL.fullmatch(text) or text.count("^") > 3:
        return False
    side = _side(text, is_reference=True)
    return side.words.lower() not in _PLACEHOLDERS and (
        side.is_words or equivalence.compare(side.text, side.text) is True
    )


def warm_up() -> None:
    """Import math-verify, and what sympy would import later; parse and compare once."""
    _library()
    importlib.import_module("sympy.physics.units")  # `simplify` asks for it, and it evaluates text of its own
    decide("x + 1", "1 + x")


VERIFIER = Verifier("math", prepare, decide, check_reference, warm_up, restate=restate, is_plain=is_plain)
UNBOXED = replace(VERIFIER, name="math-unboxed", prepare=prepare_unboxed)
