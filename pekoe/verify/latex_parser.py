r"""A parser of LaTeX or plain text to a small tree, beside math-verify's, whose errors are independent of this one's.

A tree is a tuple whose head names its type:

    ("number", Fraction, is_decimal)  ("symbol", name)  ("text", words)
    ("add", a, b)  ("mul", a, b)  ("div", a, b)  ("ratio", a, b)  ("pow", a, b)  ("pm", a)
    ("call", name, argument)  ("percent", a)
    ("relation", operators, sides)  ("group", brackets, items)  ("list", items)  ("union", parts)  ("minus", a, b)
    ("such_that", condition)  ("matrix", rows)  ("in", name, set)  ("or", parts)

What it cannot read raises Unreadable, and math-verify alone then decides. Time is linear in the text; the depth of
brackets is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from pekoe.verify.normalize import GREEK, rewriter

MAX_CHARS, MAX_DEPTH = 1_000, 40

Tree = tuple[Any, ...]


class Unreadable(ValueError):
    """The parser does not know the text's form."""


_FUNCTION = re.compile(r"(?:arc)?(?:sin|cos|tan)|(?:sin|cos|tan)h|cot|sec|csc|ln|exp|log|lg|max|min|gcd|lcm")
KNOWN = re.compile(rf"{_FUNCTION.pattern}|pi|or|and|sqrt|infinity|in")
_RELATIONS = {sign: sign for sign in ("=", "<", ">", "<=", ">=", "!=")}
_RELATIONS.update(
    leq="<=", le="<=", leqslant="<=", geq=">=", ge=">=", geqslant=">=", lt="<", gt=">", neq="!=", ne="!=", approx="~"
)
_RELATIONS.update({name: name for name in ("parallel", "perp", "cong", "sim", "equiv")})
_CONSTANTS = {"pi": "pi", "infty": "infinity", "R": "reals"}
_FACTORS = {"*": "mul", "times": "mul", "cdot": "mul", "ast": "mul", "/": "div", "div": "div", ":": "ratio"}
_NO_FACTORS = {"cup", "setminus", "in", "}", "pm", "mp", "\\", "%", "|", "vee", "lor", "rfloor", "rceil", "end"}
_LINKS = (",", ";", "and", "or", "vee", "lor")
_OPEN = {"(": ")", "[": "]", "{": "}", "|": "|", "lfloor": "rfloor", "lceil": "rceil"}
_CALLS = {"|": "abs", "lfloor": "floor", "lceil": "ceil"}
_EMPTY = re.compile(r"(there (is|are) )?no (such )?(real |integer )?(solutions?|values?|roots?)|none|empty( set)?")

_TOKEN = re.compile(
    r"\s+"
    r"|\\text\s*\{(?P<text>[^{}]*)\}"
    r"|(?P<number>[0-9]+(?:\.[0-9]+|\.(?=\\overline))?|\.[0-9]+)"
    r"|\\(?P<command>[A-Za-z]+|[\\{}%|])"
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<symbol><=|>=|!=|.)"
)
_A_SET = r"\\[A-Za-z]+ ?(?:\{[A-Z]\})?(?:[_^](?:\{[^{}]*\}|\S))*"  # \mathbb{Q}_{>0}
_rewritten = rewriter(
    (r"\\mathbb\{([A-Z])\}", r"\\\1 "),
    (r"(?<![0-9])\.(?= ?\\(?:overline|bar))", "0."),
    (r"(?<=[.0-9]) ?\\bar(?![a-z])", r"\\overline"),
    (r"\\in ?\\R *(?=[:|]|\\mid)", ""),
    (r"\\\{ ?([A-Za-z]) *:", r"\\{\1 |"),
    (r"\(([0-9A-Z]+)\) ?_", r"\1_"),
    (r"\\lbrace(?![a-z])", r"\\{"),
    (r"\\rbrace(?![a-z])", r"\\}"),
    (r"\\(?:mid|vert|lvert|rvert)(?![a-z])", "|"),
    (r"\\(?:ldots|cdots|dots)(?![a-z])", r"\\text{dots}"),
    (r"\\setminus|\\backslash", r"\\setminus "),
    (r"\*\*", "^"),
    (rf"\\text\s*\{{\s*for (?:all|any|every)\s*\}} ?[a-z](?:, ?[a-z])* ?\\in ?{_A_SET}", ""),
)
Token = tuple[str, str]


def tokens_of(text: str) -> list[Token]:
    """Return the tokens of `text`: (kind, value) with kinds number, word, text, command, symbol."""
    tokens: list[Token] = []
    for match in _TOKEN.finditer(_rewritten(text)):
        kind = match.lastgroup
        if kind is None:
            continue
        if kind == "word" and not KNOWN.fullmatch(match[kind]):
            if len(match[kind]) >= 3:
                tokens.append(("text", match[kind]))
            else:
                tokens += [("word", letter) for letter in match[kind]]
            continue
        value = match[kind].strip()
        is_link = kind == "text" and value.lower() in ("and", "or", "in")
        tokens.append(("word", value.lower()) if is_link else (kind, value))
    return tokens


def read(text: str) -> Tree:
    """Return the tree of a whole answer. Raises Unreadable."""
    if len(text) > MAX_CHARS:
        raise Unreadable("too long")
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip().lower()
    if _EMPTY.fullmatch(plain):
        return ("group", "{}", ())
    # Thousands separators: at the top alone, for `(1,234)` is a pair.
    if not re.search(r"[()\[\]{}]|,(?![0-9]{3}(?![0-9]))|(?<![0-9])0[0-9]*,", text):
        text = text.replace(",", "")
    return _Reader(tokens_of(text)).whole()


class _Reader:
    """Recursive descent. Each method reads what its name says and leaves the rest."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens, self._at, self._depth = tokens, 0, 0
        self._closers: list[str] = []  # of the brackets that are open; "|" is ambiguous without

    def _peek(self, ahead: int = 0) -> Token:
        return self._tokens[self._at + ahead] if self._at + ahead < len(self._tokens) else ("end", "")

    def _next(self) -> Token:
        token = self._peek()
        if token[0] == "end":
            raise Unreadable("it ends early")
        self._at += 1
        return token

    def _take(self, *values: str, kinds: Sequence[str] = ("symbol", "command", "word", "text")) -> str:
        """Read the next token if it is one of `values`, and return it; return "" if it is not."""
        kind, value = self._peek()
        if value not in values or kind not in kinds:
            return ""
        self._at += 1
        return value

    def _need(self, value: str) -> None:
        if not self._take(value):
            raise Unreadable(f"expected {value!r}, got {self._peek()[1]!r}")

    def whole(self) -> Tree:
        tree = _one_or_list(self._items())
        if self._at < len(self._tokens):
            raise Unreadable(f"what follows is not understood: {self._peek()}")
        return tree

    def _items(self) -> tuple[Tree, ...]:
        """Read items between commas, semicolons, "and" or "or"; one "or" tree where only "or" stands between them."""
        items, groups, only_or = [self._relation()], [0], True
        while link := self._take(*_LINKS):
            while self._take("and", "or"):
                link = "or"
            only_or &= link in ("or", "vee", "lor")
            groups += [len(items)] if link == ";" else []
            items.append(self._relation())
        if 1 < len(groups) < len(items):  # p = 5, q = 2; p = 7, q = 3: each a tuple
            ends = [*groups[1:], len(items)]
            return tuple(("group", "()", tuple(items[a:b])) for a, b in zip(groups, ends, strict=True))
        return (("or", tuple(items)),) if only_or and len(items) > 1 else tuple(items)

    def _relation(self) -> Tree:
        if self._peek()[0] == "text" and self._peek(1) == ("symbol", ":"):  # minimum: 1
            self._at += 2
        sides, operators = [self._set()], list[str]()
        while sign := self._take(*_RELATIONS, kinds=("symbol", "command")):
            operators.append(_RELATIONS[sign])
            sides.append(self._set())
        if self._take("in"):
            return ("in", sides[0], self._set())
        return ("relation", tuple(operators), tuple(sides)) if operators else sides[0]

    def _set(self) -> Tree:
        tree = self._sum()
        while sign := self._take("cup", "setminus"):
            tree = ("union" if sign == "cup" else "minus", tree, self._sum())
        return tree

    def _sum(self) -> Tree:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("too deep")
        tree = _signed(self._take_sign(), self._product())
        while sign := self._take_sign():
            right = self._product()
            if sign == "-" and tree[0] == "group" and right[0] == "group" and right[1] == "{}":
                tree = ("minus", tree, right)
            else:
                tree = ("add", tree, _signed(sign, right))
        self._depth -= 1
        return tree

    def _take_sign(self) -> str:
        return self._take("+", "-", "pm", "mp", kinds=("symbol", "command"))

    def _product(self) -> Tree:
        tree = self._power()
        while True:
            if sign := self._take(*_FACTORS, kinds=("symbol", "command", "text")):
                tree = (_FACTORS[sign], tree, _signed(self._take("-"), self._power()))
            elif self._at_factor():
                before = self._tokens[self._at - 1]
                right = self._power()
                mixed = right[1] if right[0] == "percent" else right
                if before[0] == "number" and tree[0] == "number" and mixed[0] == "div":  # a mixed number
                    tree = ("add", tree, mixed) if mixed is right else ("percent", ("add", tree, mixed))
                elif right[0] in ("number", "text"):
                    raise Unreadable("a number or words after a factor")
                else:
                    tree = ("mul", tree, right)
            else:
                return tree

    def _at_factor(self) -> bool:
        kind, value = self._peek()
        if kind == "symbol":
            return value in "([{" or (value == "|" and "|" not in self._closers)
        if kind == "command":
            return value not in _RELATIONS and value not in _NO_FACTORS
        return kind in ("number", "text") or (kind == "word" and value not in ("or", "and", "in"))

    def _at_name(self) -> bool:
        kind, value = self._peek()
        return kind in ("word", "command") and bool(len(value) == 1 or GREEK.fullmatch(value))

    def _power(self) -> Tree:
        tree = self._atom()
        while True:
            if self._take("!"):
                tree = ("call", "factorial", tree)
            elif self._take("%"):
                tree = ("percent", tree)
            elif self._take("^"):
                tree = ("pow", tree, self._argument())
            elif self._take("'"):
                raise Unreadable("a derivative")
            else:
                return tree

    def _argument(self) -> Tree:
        """Read what follows `^`, `\\frac` or `\\sqrt`: a brace, or one token (`\\frac12`, `x^2`)."""
        if self._take("{"):
            return self._closed("}", self._sum)
        kind, value = self._peek()
        before = self._tokens[self._at - 1][1]
        if kind == "number" and len(value) > 1 and value.isdecimal() and before in ("frac", "sqrt"):
            self._tokens[self._at] = (kind, value[1:])
            return ("number", Fraction(int(value[0])), False)
        return _signed(self._take("-"), self._atom())

    def _closed(self, closer: str, inner: Any) -> Any:
        self._closers.append(closer)
        content = inner()
        self._closers.pop()
        self._need(closer)
        return content

    def _atom(self) -> Tree:
        kind, value = self._next()
        if kind == "number":
            return self._number(value)
        if kind == "word":
            if _FUNCTION.fullmatch(value) or value == "sqrt":
                return self._call(value)
            return ("symbol", value + self._subscript())
        if kind == "text":
            return ("text", value.strip().lower())
        if kind == "command":
            return self._command(value)
        if value in _OPEN:
            return self._bracket(value)
        raise Unreadable(f"{value!r} is not understood")

    def _number(self, value: str) -> Tree:
        if "." in value and self._take("overline", kinds=("command",)):  # 0.1\overline{6}
            self._need("{")
            digits = self._next()[1]
            self._need("}")
            if not digits.isdecimal():
                raise Unreadable("a repeating decimal")
            places = len(value) - value.index(".") - 1
            tail = Fraction(int(digits), 10**places * (10 ** len(digits) - 1))
            return ("number", Fraction(value) + tail, False)
        if self._peek() == ("symbol", "_"):
            base = self._subscript()[1:]
            if not base.isdecimal() or not 2 <= int(base) <= 36 or not value.isdecimal():
                raise Unreadable("a number with a subscript")
            return ("based", value.lstrip("0"), int(base))
        return ("number", Fraction(value), "." in value)

    def _subscript(self) -> str:
        if not self._take("_"):
            return ""
        return "_" + (self._rest_of_brace() if self._take("{") else self._next()[1])

    def _rest_of_brace(self) -> str:
        """Read the tokens up to the next closing brace, and return them joined."""
        parts: list[str] = []
        while not self._take("}"):
            parts.append(self._next()[1])
        return "".join(parts)

    def _command(self, name: str) -> Tree:
        if name == "frac":
            return ("div", self._argument(), self._argument())
        if name in ("binom", "dbinom", "tbinom"):
            return ("call", "binomial", (self._argument(), self._argument()))
        if _FUNCTION.fullmatch(name) or name == "sqrt":
            return self._call(name)
        if name in ("emptyset", "varnothing"):
            return ("group", "{}", ())
        if name in _CONSTANTS or (len(name) == 1 and name.isupper()):  # \R, \Z
            return ("symbol", _CONSTANTS.get(name) or f"\\{name}")
        if GREEK.fullmatch(name):
            return ("symbol", name + self._subscript())
        if name == "{" or name in _OPEN:
            return self._bracket(name)
        if name == "begin":
            return self._matrix()
        raise Unreadable(f"\\{name} is not understood")

    def _call(self, name: str) -> Tree:
        if name == "sqrt":
            root: Tree = ("number", Fraction(2), False)
            if self._take("["):
                root = self._closed("]", self._sum)
            inner = self._argument()
            return ("pow", inner, ("div", ("number", Fraction(1), False), root))
        base = power = None
        for _ in range(2):
            if name == "log" and self._take("_"):
                base = self._argument()
            if self._take("^"):
                power = self._argument()
        if opener := self._take("(", "[", "{", kinds=("symbol",)):
            items = self._closed(_OPEN[opener], self._items)
            inner = items[0] if len(items) == 1 else items
        else:
            inner = self._power()
            while self._at_factor() and self._at_name():
                inner = ("mul", inner, self._power())  # \sin 2x
        if power == ("number", Fraction(-1), False):
            name, power = "arc" + name, None
        tree: Tree = ("call", name, inner)
        if base is not None:
            tree = ("div", ("call", "ln", inner), ("call", "ln", base))
        return ("pow", tree, power) if power else tree

    def _bracket(self, opener: str) -> Tree:
        is_set = self._tokens[self._at - 1] == ("command", "{")
        if opener in _CALLS:
            return ("call", _CALLS[opener], self._closed(_OPEN[opener], self._sum))
        if is_set and self._take("}"):
            return ("group", "{}", ())
        closers = {"}"} if opener == "{" else {")", "]"}
        self._closers.append("|" if is_set else "")
        items = self._items()
        if is_set and self._take("|", ":"):  # {x | x < 3}
            items = (("such_that", self._items()),)
        self._closers.pop()
        closer = self._peek()[1]
        if closer not in closers:
            raise Unreadable(f"expected {' or '.join(sorted(closers))}, got {closer!r}")
        self._at += 1
        if opener == "{" and not is_set:
            return _one_or_list(items)
        if len(items) == 1 and opener + closer in ("()", "[]"):
            return items[0] if items[0][0] != "text" else ("group", "()", items)
        return ("group", opener + closer, items)

    def _matrix(self) -> Tree:
        name = self._environment()
        if name == "array":
            self._environment()
        elif not name.endswith("matrix"):
            raise Unreadable(f"{name} is not understood")
        rows: list[tuple[Tree, ...]] = []
        more = True
        while more:
            row = [self._sum()]
            while self._take("&"):
                row.append(self._sum())
            rows.append(tuple(row))
            more = self._take("\\") and self._peek() != ("command", "end")
        self._need("end")
        self._environment()
        return ("matrix", tuple(rows))

    def _environment(self) -> str:
        self._need("{")
        return self._rest_of_brace()


def _one_or_list(items: tuple[Tree, ...]) -> Tree:
    return items[0] if len(items) == 1 else ("list", items)


def _signed(sign: str, tree: Tree) -> Tree:
    if sign in ("", "+"):
        return tree
    if sign in ("pm", "mp"):
        return ("pm", tree)
    if tree[0] == "number":
        return ("number", -tree[1], tree[2])
    return ("mul", ("number", Fraction(-1), False), tree)
