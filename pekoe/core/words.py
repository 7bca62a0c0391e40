"""Numbers in sentences."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """The number with its noun, which agree: `1 step`, `1,200 steps`, `2 boxes`, `3 replies`. Of a phrase, its end."""
    if number != 1:
        if noun.endswith("y") and noun[-2] not in "aeiou":
            noun = f"{noun[:-1]}ie"
        noun += "es" if noun.endswith(("x", "s", "ch", "sh")) else "s"
    return f"{number:,.0f} {noun}"
