"""Kinds that need no worker: choices, logic puzzles, countdown."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pekoe.core.types import Verdict
from pekoe.data import read_problems
from pekoe.verify.kinds import find_verifier

KNIGHTS = {"Zoey": "knight", "Ann": "knave"}
GRID = {"header": ["House", "Name", "Pet"], "rows": [["1", "Eric", "cat"], ["2", "Ann", "dog"]]}
HOUSES = {"House 1": {"Name": "Eric", "Pet": "cat"}, "House 2": {"Name": "Ann", "Pet": "dog"}}
NUMBERS = {"numbers": [3, 5, 5, 7], "target": 20}


def judge(kind: str, answer: str, gold: Any) -> Verdict:
    verdict = find_verifier(kind).prepare(answer, gold)
    assert isinstance(verdict, Verdict)
    return verdict


CASES: list[tuple[str, Any, str, str]] = [
    ("choice", "C", r"\boxed{C}", "correct"),
    ("choice", "(C)", r"\boxed{(C)}", "correct"),
    ("choice", "C", r"\boxed{\text{C}}", "correct"),
    ("choice", "C", r"\boxed{\textbf{(C)}}", "correct"),
    ("choice", "C", r"\boxed{C. 17 cats}", "correct"),
    ("choice", "C", r"\boxed{C) cats}", "correct"),
    ("choice", "C", r"\boxed{\text{Option C}}", "correct"),
    ("choice", "C", "The answer is (C).", "correct"),
    ("choice", "C", r"\boxed{D}", "wrong"),
    ("choice", "C", r"\boxed{C} no: \boxed{D}", "wrong"),
    ("choice", "C", r"\boxed{C or D}", "unparsed"),
    ("choice", "C", r"\boxed{C, D}", "unparsed"),
    ("choice", "C", r"\boxed{A cat}", "unparsed"),
    ("choice", "C", r"\boxed{17}", "unparsed"),
    ("choice", "C", "perhaps", "unparsed"),
    ("choice", "17", r"\boxed{C}", "fault"),
    ("logic", KNIGHTS, r"\boxed{\text{(1) Zoey is a knight (2) Ann is a knave}}", "correct"),
    ("logic", KNIGHTS, "<answer>\n(1) zoey is a knight\n(2) Ann is a  knave\n</answer>", "correct"),
    ("logic", KNIGHTS, r"\boxed{Zoey: knight, Ann: knave}", "correct"),
    ("logic", KNIGHTS, '<answer>{"Ann": "Knave", "Zoey": "Knight"}</answer>', "correct"),
    ("logic", KNIGHTS, r"\boxed{Zoey is a knave, Ann is a knave}", "wrong"),
    ("logic", KNIGHTS, r"\boxed{Zoey is a knight}", "wrong"),
    ("logic", KNIGHTS, r"\boxed{Zoey is a knight, Ann is a knave, Ann is a knight}", "unparsed"),
    ("logic", KNIGHTS, r"\boxed{all of them}", "unparsed"),
    ("logic", KNIGHTS, "Zoey is a knight, Ann is a knave", "unparsed"),
    ("logic", "knight", r"\boxed{Zoey is a knight}", "fault"),
    ("logic", GRID, f"<answer>{json.dumps(HOUSES)}</answer>", "correct"),
    ("logic", GRID, f"<answer>```json\n{json.dumps({'solution': HOUSES})}\n```</answer>", "correct"),
    ("logic", GRID, f"<answer>{json.dumps(GRID)}</answer>", "correct"),
    ("logic", GRID, f"<answer>{json.dumps(HOUSES | {'House 2': HOUSES['House 1']})}</answer>", "wrong"),
    ("logic", GRID, r"\boxed{Eric has the cat}", "unparsed"),
    ("countdown", NUMBERS, r"\boxed{5 * 5 - 7 + 3 - 1}", "wrong"),
    ("countdown", NUMBERS, r"\boxed{3 + 5 + 5 + 7}", "correct"),
    ("countdown", NUMBERS, r"\boxed{5 \times (7 - 3)}", "correct"),
    ("countdown", NUMBERS, r"<answer>5 * (7 - 3) = 20</answer>", "correct"),
    ("countdown", NUMBERS, r"\boxed{5 * (7 - 3) = 21}", "wrong"),
    ("countdown", NUMBERS, r"\boxed{5 * 5 - 5}", "wrong"),
    ("countdown", NUMBERS, r"\boxed{20}", "wrong"),
    ("countdown", NUMBERS, r"\boxed{3 / (5 - 5)}", "wrong"),
    ("countdown", NUMBERS, r"\boxed{\frac{7 + 3}{5} * 5 + 5}", "wrong"),
    ("countdown", NUMBERS | {"use_all": True}, r"\boxed{5 * (7 - 3)}", "wrong"),
    ("countdown", NUMBERS | {"numbers": [1, 3, 7], "target": "1/3"}, r"\boxed{1/3}", "correct"),
    ("countdown", NUMBERS, r"\boxed{__import__('os').getcwd()}", "unparsed"),
    ("countdown", NUMBERS, r"\boxed{5 ** 7 ** 7}", "unparsed"),
    ("countdown", NUMBERS, "five times four", "unparsed"),
    ("countdown", {"numbers": [1]}, r"\boxed{1}", "fault"),
]


@pytest.mark.parametrize(("kind", "gold", "answer", "label"), CASES)
def test_verdict(kind: str, gold: Any, answer: str, label: str):
    assert judge(kind, answer, gold).label == label


@pytest.mark.parametrize(("kind", "gold"), [("choice", "C"), ("logic", KNIGHTS), ("countdown", NUMBERS)])
@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 50_000,
        r"\boxed{" * 50_000 + "1",
        r"\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
        "a is " * 10**5,
        "a" * 19_000,
        "a " * 9_000,
    ],
)
def test_hostile_answers_cost_little(kind: str, gold: Any, text: str):
    start = time.perf_counter()
    assert judge(kind, text, gold).label in ("unparsed", "wrong")
    assert judge(kind, rf"\boxed{{{text}}}", gold).label in ("unparsed", "wrong")
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("people", [3, 4, 5])
def test_logic_rls_own_solutions_are_right(shared_dir: Path, people: int):
    pandas = pytest.importorskip("pandas")
    path = shared_dir / f"data/problems/knights_knaves/{people}ppl_test.parquet"
    if not path.is_file():
        pytest.skip(f"no {path}")
    problems = read_problems(path).problems
    rows = pandas.read_parquet(path)
    assert len(problems) == len(rows) == 100
    for problem, text in zip(problems, rows["solution_text_format"], strict=True):
        assert judge("logic", f"<think>...</think><answer>{text}</answer>", problem.gold).label == "correct"
        swapped = text.replace("knight", "?").replace("knave", "knight").replace("?", "knave")
        assert judge("logic", f"<answer>{swapped}</answer>", problem.gold).label == "wrong"
