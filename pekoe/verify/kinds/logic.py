r"""kind = "logic": a structured answer must equal the solution.

gold is an object, name to role (knights and knaves: `{"Zoey": "knight"}`), or a grid of a zebra puzzle,
`{"header": ["House", "Name", ...], "rows": [["1", "Eric", ...], ...]}`. The answer is what the last `\boxed{...}` or
`<answer>...</answer>` holds: JSON of the same shape (a grid may also be an object by house), or for names and roles
lines such as `(1) Zoey is a knight`. Case and spaces do not matter; every name must be there, once.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from pekoe.core.types import Verdict
from pekoe.verify.kinds.base import Verifier, tagged_answer

MAX_ANSWER_CHARS = 20_000
_STATEMENT = re.compile(r"(?<![\w'-])([\w'-]++)\s*+(?:\bis\b(?:\s+an?\b)?|[:=])\s*([\w'-]+)", re.IGNORECASE)
_MARKUP = re.compile(r"\\(?:text[a-z]*|math[a-z]*|mbox|quad|qquad|[,;! ])|[{}$*\\]")

Solution = dict[str, Any]  # normalised: text to text, or text to such an object


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
            rows = [dict(zip(names, row[1:], strict=True)) for row in gold["rows"]]
            return _plain({f"{first} {row[0]}": by_name for row, by_name in zip(gold["rows"], rows, strict=True)})
        return _plain(gold) if isinstance(gold, dict) and gold else None
    except (TypeError, ValueError, IndexError):
        return None


def _answer(text: str, gold: Solution) -> Solution | None:
    """Return what the text says, in the reference's shape; None where it cannot be read or contradicts itself."""
    start, end = text.find("{"), text.rfind("}")
    for source in (text, text[start : end + 1] if 0 <= start < end else ""):
        try:
            value = json.loads(source)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            value = cast(dict[str, Any], value).get("solution", cast(dict[str, Any], value))
            return (_solution(value) or {}) if isinstance(value, dict) else None
    if any(isinstance(role, dict) for role in gold.values()):
        return None
    roles: Solution = {}
    for name, role in _STATEMENT.findall(_MARKUP.sub(" ", text)):
        name, role = _plain(name), _plain(role)
        if roles.setdefault(name, role) != role:
            return None
    return roles


def prepare(response: str, gold: Any) -> Verdict:
    solution = _solution(gold)
    if solution is None:
        return Verdict("fault", None, f"the reference must be an object, name to value, got {str(gold)[:80]!r}")
    text = tagged_answer(response, MAX_ANSWER_CHARS)
    if isinstance(text, Verdict):
        return text
    roles = _answer(text, solution)
    if not roles:
        return Verdict("unparsed", text, "cannot read it as names and values, one to each")
    if not solution.keys() <= roles.keys():
        missing = sorted(solution.keys() - roles.keys())
        return Verdict("wrong", text, f"nothing about {', '.join(missing)}"[:300])
    return Verdict("correct" if {name: roles[name] for name in solution} == solution else "wrong", text)


VERIFIER = Verifier("logic", prepare)
