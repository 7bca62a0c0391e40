r"""What a judge's worker gives up before it reads the first answer: the power to run text, and to act on the machine.

math-verify parses LaTeX with a grammar, but behind it text still reaches `eval` (math-verify 0.9.0,
latex2sympy2_extended 1.11.0, sympy 1.14.0; read in their source, shown in tests/verify/test_audit_hook.py):

1. every number: `sympy.Number(text)` -> `sympify` -> `parse_expr` -> `eval`. The grammar lets only digits through.
2. `evalf` of a sum: `hypsum` -> `lambdify` -> `exec` of a program into which the *names of symbols* are pasted as they
   stand; and the name of `x_{...}` is free text. `\sum_{n=0}^{\infty} \frac{x_{(1)if(eval(...))else(2)}^n}{n!}` runs
   code when the reference is `\pi`.

(`ExprExtractionConfig`, which we never use, is a third.) So `parse_expr` becomes a reader of plain numbers, which makes
parsing three times as fast too; and an audit hook, which nothing can take off again, refuses code not read from a file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

_INTEGER = re.compile(r"-?[0-9]+")
_DECIMAL = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")

# The one maker of code that simplification needs: monomial arithmetic, from templates and a count alone.
_TRUSTED_CALLER = "/sympy/polys/monomials.py"

_REFUSED = ("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pty.", "signal.pthread_kill")
_ALLOWED = ("os.listdir", "os.scandir")  # a late import looks through its folder


class Refused(PermissionError):
    """Raised in a worker where an answer would have run code or acted on the machine."""


def refuse_code_and_acts() -> None:
    """Refuse code made of text, and acts on the machine, from now on. For a worker that has imported what it needs."""
    sympy: Any = sys.modules["sympy"]

    def parse_number(text: str, *_: Any, **__: Any) -> Any:
        if _INTEGER.fullmatch(text):
            return sympy.Integer(int(text))
        if _DECIMAL.fullmatch(text):
            return sympy.Float(text)
        raise Refused("a judge does not evaluate text")

    for name, module in list(sys.modules.items()):
        if name.startswith(("sympy", "math_verify", "latex2sympy2_extended")) and "parse_expr" in vars(module):
            vars(module)["parse_expr"] = parse_number
    _install(lambda _code: False)


def refuse_all_but_formulas() -> None:
    """As `refuse_code_and_acts`, but code that is a formula is allowed.

    A formula names functions, numbers and symbols of sympy, or single letters; it holds no code of its own (`lambda`,
    a comprehension) and no other attribute. For scorers that evaluate the answer where their own verdict is made: code
    that ran there could write that verdict, and all later ones.
    """
    sympy: Any = sys.modules["sympy"]
    known = {name for name, value in vars(sympy).items() if isinstance(value, sympy.FunctionClass)}
    known |= {"sympy", "Integer", "Float", "Rational", "Symbol", "sqrt", "ln", "root", "cbrt", "pi", "oo"}

    def is_formula(code: CodeType) -> bool:
        names_known = all(name in known or len(name) == 1 for name in code.co_names)
        return names_known and not any(isinstance(constant, CodeType) for constant in code.co_consts)

    _install(is_formula)


def _install(is_allowed: Callable[[CodeType], bool]) -> None:
    def refuse(event: str, args: tuple[Any, ...]) -> None:
        if event == "exec":
            if _is_of_text(args[0]) and not is_allowed(args[0]):
                raise Refused("a judge does not run code made of text")
        elif event == "open":
            mode, flags = args[1], args[2]
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3):
                raise Refused("a judge does not write files")
        elif event.startswith(_REFUSED) and event not in _ALLOWED:
            raise Refused(f"a judge does not do {event}")

    sys.dont_write_bytecode = True
    sys.addaudithook(refuse)


def _is_of_text(code: CodeType) -> bool:
    from_text = code.co_filename.startswith("<") and not code.co_filename.startswith("<frozen ")
    caller = sys._getframe(2).f_code.co_filename  # pyright: ignore[reportPrivateUsage]
    return from_text and not caller.endswith(_TRUSTED_CALLER)
