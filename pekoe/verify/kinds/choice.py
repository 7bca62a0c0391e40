"""kind = "choice": the letter in the last box must be the reference's (GPQA, BIG-Bench-Hard). gold: "C" or "(C)"."""

from __future__ import annotations

import re
from typing import Any

from pekoe.core.types import Verdict
from pekoe.verify.extract import last_boxed, unboxed
from pekoe.verify.kinds.base import Verifier

_MARKUP = re.compile(r"\\(?:text[a-z]*|math[a-z]*|mbox)\s*|[{}$\\]|(?i:\b(?:option|choice|answer)\b)")
_LETTER = re.compile(r"\(?([A-Za-z])\)?(?:[.):]?$|[.):]\s|\)\s*\S)")
_ANOTHER = re.compile(r"(?:\bor\b|\band\b|,|;|/)\s*\(?[A-Z]\)?(?:\W|$)")


def _letter(text: str) -> str | None:
    """Return the one letter that `text` chooses: `C`, `(C)`, `C.`, `C) because`, `Option C`; None for two, or none."""
    text = _MARKUP.sub("", text).strip()
    match = _LETTER.match(text)
    return match[1].upper() if match and not _ANOTHER.search(text, match.end(1)) else None


def prepare(response: str, gold: Any) -> Verdict:
    expected = _letter(gold) if isinstance(gold, str) else None
    if expected is None:
        return Verdict("fault", None, f"the reference must be a letter, got {str(gold)[:80]!r}")
    answer = last_boxed(response)
    if answer is None and (answer := unboxed(response)) is None:
        return Verdict("unparsed", None, r"no complete \boxed{...}, and no answer named")
    answer = answer.strip()[:200]
    chosen = _letter(answer)
    if chosen is None:
        return Verdict("unparsed", answer, "expected one letter")
    return Verdict("correct" if chosen == expected else "wrong", answer)


VERIFIER = Verifier("choice", prepare)
