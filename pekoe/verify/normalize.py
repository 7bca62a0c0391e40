r"""One spelling for what only looks different: Unicode forms, fonts, spaces, wrappers. Everything is read after this.

After `normalized` no command is left that changes looks alone, a percent is `\%`, a degree `^\circ`, and a `\text{...}`
holds words alone: `\text{42 cm}` is `42\text{cm}`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

GREEK = re.compile(
    "alpha|beta|(?:var)?(?:epsilon|theta|phi)|[gG]amma|[dD]elta|zeta|eta|iota|kappa|[lL]ambda|mu|nu|[xX]i|rho|[sS]igma|tau"
    "|upsilon|chi|[pP]si|[oO]mega|Theta|Phi|ell|aleph|[pP]i"
)
_TABLE = r"""
− -  – -  ‐ -  ‑ -  × \times  · \cdot  ⋅ \cdot  ∙ \cdot  ÷ /  ≤ \leq  ≥ \geq  ⩽ \leq  ⩾ \geq  ≠ \neq  ± \pm
∞ \infty  ∪ \cup  ∩ \cap  ∅ \emptyset  ∈ \in  ∨ \lor  ⁄ /  ° ^\circ  ∘ ^\circ  √ \sqrt  ∛ \sqrt[3]  ∜ \sqrt[4]
… \ldots  、 ,  。 .  ′ '  ∥ \parallel  ⊥ \perp  ≈ \approx  ℝ \mathbb{R}  ℤ \mathbb{Z}  ℕ \mathbb{N}  ℚ \mathbb{Q}
ℂ \mathbb{C}
"""
_SIGNS = {sign: re.sub(r"(\\[a-z]+)$", r"\1 ", text) for sign, text in re.findall(r"(\S+) (\S+)", _TABLE)}
_SIGNS.update(
    {"\x0c": r"\f", "\x08": r"\b", "\t": " ", "\n": " ", "\r": " ", "€": "", "£": "", "¥": ""}
)  # \frac, \binom
_RUN = re.compile(r"(?:\^\{[^{}]*\}){2,}|(?:_\{[^{}]*\}){2,}")  # of single characters: ten in an exponent
_FORMS = {"<super>": "^{%s}", "<sub>": "_{%s}", "<circle>": "%s,"}

_SIZES = r"tiny|scriptsize|footnotesize|small|normalsize|[lL]arge|LARGE|[hH]uge|bf|it|rm|sf|tt|bfseries|itshape"
_SKIPPED = (
    r"(?:display|text|script)style|left|right|[bB]igg?[lr]?|limits|nolimits|q?quad|enspace|thinspace|(?:black)?square"
    "|checkmark|qed"
)
_PHRASE = r"(?i:\\text\{ ?(?:%s) ?\}|(?<![A-Za-z\\])(?:%s)(?![A-Za-z]))"
_PERCENT = "per ?cent(?:age)?|pct"
_REALS, _MANY = "(?:the set of )?all real(?:s| numbers)", "infinitely many(?: solutions)?|infinity|inf"


def rewriter(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Callable[[str], str]:
    """Return a function that applies each rule (pattern, replacement) to a text, in their order."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rewrite(text: str) -> str:
        for pattern, replacement in compiled:
            text = pattern.sub(replacement, text)
        return text

    return rewrite


def _character(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    kind, _, code = unicodedata.decomposition(character).partition(" ")
    if kind == "<fraction>":
        top, bottom = unicodedata.normalize("NFKC", character).split("⁄")
        return rf"\frac{{{top}}}{{{bottom}}}"
    plain = unicodedata.normalize("NFKC", character)
    if kind in _FORMS and len(code.split()) <= 2:
        return _FORMS[kind] % "".join(_SIGNS.get(part, part) for part in plain)
    if plain != character:
        return "".join(map(_character, plain))
    script, _, letter = unicodedata.name(character, "").partition(" LETTER ")
    name = letter.lower().replace("lamda", "lambda")
    if script in ("GREEK SMALL", "GREEK CAPITAL") and GREEK.fullmatch(name):
        name = name if script == "GREEK SMALL" else name.capitalize()
        return f"\\{name} " if GREEK.fullmatch(name) else character
    invisible = unicodedata.category(character) == "Cf" or "VARIATION SELECTOR" in letter + script
    return "" if invisible else character


def _group(match: re.Match[str]) -> str:
    """A group of text, its words alone: what else it holds is read as if it stood outside."""
    content = match[2].strip()
    if match[1] != "text" and (content in ("e", "i") or re.search(r"\\cdot|\^", content)):
        return f" {content} " if content in ("e", "i") else re.sub(r"(?<!\\)\b[A-Za-z]+", r"\\text{\g<0>}", content)
    if _NO_WORDS.search(content):
        return (
            re.sub(r"(?<=[0-9]) ?([^\W\d_][^\W\d_ ./'-]*(?: [^\W\d_]+)*)$", r"\\text{\1}", f" {match[2]}".rstrip())
            + " "
        )
    return rf"\text{{{content.rstrip('.')}}}" if content else " "


def _interval(match: re.Match[str]) -> str:
    return ("[" if match[1] == "[" else "(") + match[2] + ("]" if match[3] == "]" else ")")  # ]1, 2[


def _rows(match: re.Match[str]) -> str:
    rows = match[2] if match[1] == "cases" else match[2].replace("&", "")
    return match[0] if "&" in rows else ", ".join(row.strip(" ,.;") for row in rows.split(r"\\") if row.strip())


_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NO_WORDS = re.compile(rf"[\d_{{}}\\^=<>+*():;,%$|\[\]]|^[^\w]|\b(?:and|or)\b.|^(?:{'|'.join(_SCALES)})s?\b")
_unified = rewriter(
    (r"(?<=[0-9]),\\! ?(?=[0-9]{3})", ""),
    (r"(?<!\\)((?:\\\\)*)\\(?:\(|\)|\$|!|\[|\])", r"\1"),
    (r"(?<!\\)((?:\\\\)*)(?:\\[,;: ]|~)", r"\1 "),
    (r"\$", ""),
    (r"\\(?:[hv]?phantom|[hv]space\*?|label|tag) ?\{[^{}]*\}|\\(?:text)?color(?:box)? ?\{[^{}]*\}", ""),
    (rf"\\(?:{_SIZES}|{_SKIPPED})(?![A-Za-z])", " "),
    (r"\\(?:boldsymbol|bm|pmb|math(?:bf|sf|tt|it|normal|cal)|underline|ensuremath|boxed|fbox) ?(?=\{)", ""),
    (r"\\(?:text(?:tt|sf|bf|it|rm|sc|up|md|normal)|emph|mbox|hbox) ?(?=\{)", r"\\text"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\mathbb ?([A-Z])|\\mathbb ?\{ ?([A-Z]) ?\}", r"\\mathbb{\1\2}"),
    (r"\\operatorname\*? ?\{ ?(gcd|lcm|max|min|ln|log|sin|cos|tan|arcsin|arccos|arctan) ?\}", r"\\\1 "),
    (r"\\begin ?\{(cases|aligned|align\*?|gathered)\}((?:(?!\\(?:begin|end) ?\{\1\}).)*+)\\end ?\{\1\}", _rows),
    (r"\\(text|mathrm|operatorname) ?\{((?:[^{}]|\^ ?\{-?[0-9]\})*)\}", _group),
    (r"\\degree(?![a-z])|\^ ?\{ ?\\circ ?\}|\^ ?\\circ(?![a-z])|\\text\{degrees?\}", r"^\\circ "),
    (r"(?<![0-9])([0-9]++) ?\^\\circ *([0-9]++) ?(?:'|\^ ?\{? ?\\prime ?\}?)", r"(\1+\\frac{\2}{60})^\\circ"),
    (_PHRASE % (_PERCENT, _PERCENT) + r"|(?<!\\)%", r"\\%"),
    (r"\s+", " "),
    (r" (?=\\%)", ""),
    (_PHRASE % (_REALS, _REALS), r"\\mathbb{R}"),
    (_PHRASE % (_MANY, _MANY), r"\\infty "),
    (r"(?<=[0-9]) ?(?:\^ ?\{? ?)?(?:\\text ?\{ ?)?(?:st|nd|rd|th)(?![A-Za-z]) ?\}{0,2}(?: [dD]ay)?", ""),
    *(
        (rf"(?<=[0-9]) ?(?:{name}s?(?![A-Za-z])|\\text\{{{name}s?\}})", rf"\\times 10^{{{zeros}}} ")
        for name, zeros in _SCALES.items()
    ),
    (r"\\[lc]?dots(?![a-z])|\.\.\.", r"\\ldots "),
    (r"(?<![\w)}])([\[\]])([^\[\],]*+,[^\[\]]*+)([\[\]])(?![\w(-])", _interval),
    (r"\\varnothing", r"\\emptyset "),
    (r"(^|[(\[,] ?)\+(?= ?\\infty)", r"\1"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (r"\\sqrt ?([0-9]+|[a-zA-Z])(?![0-9])", r"\\sqrt{\1}"),
    (r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))|(?<=[0-9])\{,\}(?=[0-9]{3})", ""),  # 1 000
    (r"^ ?(-?[0-9]+) ([0-9]+)/([0-9]+) ?$", r"\1\\frac{\2}{\3}"),  # 1 3/4
    (r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})(?!\w)", r"\1 \\times 10^{\2}"),
    (r"(?<=[0-9)]) ?\( ?(\\text\{[^{}]*\}|[a-z]{2,}) ?\) ?$", r"\\text{\1}"),
    (r"^ ?(?:=(?!=)|\\Rightarrow|\\therefore|\\implies)", ""),
)


def normalized(text: str) -> str:
    """Return `text` in one spelling (see above). Its value is the same, for a reader that knows none of the marks."""
    if not text.isascii() or "\x0c" in text or "\x08" in text:
        text = "".join(map(_character, text))
        text = _RUN.sub(lambda run: run[0][0] + "{" + re.sub(r"[\^_{}]", "", run[0]) + "}", text)
    return _unified(text.rstrip()).rstrip(" .,;:^\\").lstrip()
