r"""Finding the final answer: the content of the last complete `\boxed{...}` (or `\fbox{...}`) of a response."""

from __future__ import annotations

import re

# One match takes a whole run of backslashes, so that no character is looked at twice and `\{` is told from `\\{`:
# after an odd run a brace is escaped, after an even one it is a brace. `++` never gives back what it took.
_TOKEN = re.compile(r"\\++(?:(?P<box>(?:boxed|fbox)\s*+\{)|(?P<brace>[{}]))?|[{}]")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the complete box that opens last, or None where no box is complete.

    Braces nest; `\{` and `\}` are text. Time is linear in the length of `text`, whatever it holds.
    """
    opens = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if opens < 0:
        return None
    # Most responses end with their only box: look there first, and read the whole only if that box is not complete.
    found = _scan(text, opens)
    return found if found is not None else _scan(text, 0)


def _scan(text: str, start: int) -> str | None:
    stack: list[int] = []  # where the content of each open box begins; -1 for a plain brace
    best = (-1, -1)
    for match in _TOKEN.finditer(text, start):
        token = match[0]
        if match["box"]:
            stack.append(match.end())
            continue
        if token[-1] == "\\" or (match["brace"] and len(token) % 2 == 0):  # a bare run, or an escaped brace
            continue
        if token[-1] == "{":
            stack.append(-1)
        elif stack and (opened := stack.pop()) > best[0]:
            best = (opened, match.start("brace") if match["brace"] else match.start())
    return text[best[0] : best[1]] if best[0] >= 0 else None
