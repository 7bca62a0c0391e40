"""No answer runs code. The first test shows why: without the audit hook, math-verify's LaTeX path does."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pekoe.verify import JudgePool

Run = Callable[..., subprocess.CompletedProcess[str]]


def in_letters(code: str) -> str:
    """Python that evaluates `code`, written with letters, digits, + and parentheses: all the grammar lets through."""
    return "eval(" + "+".join(f"chr({ord(character)})" for character in code) + ")"


def bomb(code: str) -> str:
    return r"\sum_{n=0}^{\infty} \frac{x_{(1)if(" + in_letters(code) + r")else(2)}^n}{n!}"


def attacks(path: Path) -> list[str]:
    code = f"open({str(path)!r}, 'w')"
    return [
        bomb(code),
        code,
        in_letters(code),
        f"exec({code!r})",
        f"S({code!r})",
        f"__import__('os').system('touch {path}')",
        rf"\text{{__import__('os').system('touch {path}')}}",
        rf"\operatorname{{{in_letters(code)}}}(1)",
        f"1 and {in_letters(code)}",
    ]


DECIDE = """
import sys
from pathlib import Path
from pekoe.verify.kinds import math
from pekoe.verify.audit_hook import refuse_code_and_acts
math.warm_up()
if sys.argv[1] == "hooked":
    refuse_code_and_acts()
_, verify = math._library()  # beside the judge, which leaves no words to math-verify
values = [math._Side(text, "", "").value for text in ("\\\\pi", Path("attack").read_text())]
print(math._attempt(verify, *values))
"""


@pytest.mark.parametrize("how", ["hooked", "open"])
def test_only_the_hook_stands_between_an_answer_and_eval(run_script: Run, tmp_path: Path, how: str):
    (tmp_path / "attack").write_text(bomb("open('PWNED', 'w')"))
    done = run_script(DECIDE, how)
    assert done.returncode == 0, done.stderr
    # If the open one stops making the file, a new version has closed the hole: say so in audit_hook.py.
    assert (tmp_path / "PWNED").exists() == (how == "open")


def test_nothing_an_answer_holds_is_executed(pool: JudgePool):
    path = Path(tempfile.gettempdir()) / f"P{os.getpid()}"  # a short name: spelt in chr(...), a long one takes long
    golds = ["7", r"\pi", "x + 1"]
    try:
        verdicts = pool.judge_many((rf"\boxed{{{attack}}}", gold, "math") for attack in attacks(path) for gold in golds)
        assert {verdict.label for verdict in verdicts} <= {"wrong", "unparsed"}
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


REFUSED = """
import importlib, os, socket, subprocess, sys
import math_verify, sympy
from sympy.parsing.sympy_parser import parse_expr
from pekoe.verify.audit_hook import Refused, refuse_code_and_acts
refuse_code_and_acts()
tries = [
    lambda: eval("1 + 1"), lambda: exec("x = 1"), lambda: os.system("true"), lambda: subprocess.run(["true"]),
    lambda: os.fork(), lambda: os.execv("/bin/true", ["true"]), lambda: socket.socket(), lambda: open("file", "w"),
    lambda: open("script.py", "a"), lambda: os.open("file", os.O_CREAT | os.O_WRONLY), lambda: os.remove("script.py"),
    lambda: os.kill(os.getpid(), 0), lambda: parse_expr("x"), lambda: sympy.sympify("x + 1"),
    lambda: sympy.lambdify(sympy.Symbol("x"), sympy.Symbol("x")), lambda: math_verify.parser.parse_expr("1 + 1"),
]
for number, attempt in enumerate(tries):
    try:
        attempt()
    except Refused:
        continue
    print("not refused:", number)
assert open("script.py").read(4) and importlib.import_module("colorsys")
assert sympy.sympify("12") == 12 and float(sympy.sympify("-1.5e3")) == -1500.0
assert sympy.simplify("0") == 0
x, y = sympy.symbols("x y")
assert sympy.factor(x**2 - y**2) == (x - y) * (x + y)
print("done")
"""


def test_what_is_refused_and_what_still_works(run_script: Run):
    done = run_script(REFUSED)
    assert done.stdout == "done\n", done.stderr
