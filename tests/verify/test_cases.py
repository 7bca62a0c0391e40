"""Files of responses: what is read as it is, and what the summary counts."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from pekoe.cli import app
from pekoe.core.errors import UserError
from pekoe.core.types import Label, Verdict
from pekoe.verify import judge
from pekoe.verify.cases import COLUMNS, error_cells, read_cases


def read(tmp_path: Path, *rows: Any) -> list[dict[str, Any]]:
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_cases(tmp_path / "cases.jsonl")


def test_what_pekoe_writes_is_read_again(tmp_path: Path):
    cases = read(
        tmp_path,
        {"response": "a", "gold": "1"},
        {"id": "x", "text": "b", "answer": 2, "label": "correct"},  # of rollouts, of problems
        {"uid": "p", "sample": 3, "response": 7, "answers": ["1", 2], "label": "unparsed"},  # of `pekoe eval`
        {"response": "", "gold": "1", "label": "fault"},
        {"response": "", "gold": "1", "label": 1},
        {"response": "", "gold": "1", "label": 0},
    )
    assert [case["id"] for case in cases] == [1, "x", "p/3", 4, 5, 6]
    assert [case["response"] for case in cases] == ["a", "b", "7", "", "", ""]
    assert [case["gold"] for case in cases] == ["1", 2, ["1", 2], "1", "1", "1"]
    labels = [case.get("label") for case in cases]
    assert labels == [None, True, False, None, True, False]
    assert all(label is None or type(label) is bool for label in labels)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"response": "a"}, r"cases.jsonl:1: expected the key 'gold', got \['response'\]"),
        ([1], "expected the key 'response'"),
        ({"response": ["a"], "gold": "1"}, "response: expected text"),
        ({"response": "a", "gold": "1", "label": "right"}, "label: expected true, false, null or a verdict's"),
    ],
)
def test_a_line_that_cannot_be_used(tmp_path: Path, row: Any, said: str):
    with pytest.raises(UserError, match=said):
        read(tmp_path, row)


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch):
    data = SimpleNamespace(buffer=io.BytesIO(b'{"response": "a", "gold": "1"}\n{"response": "b"}\n'))
    monkeypatch.setattr(sys, "stdin", data)
    with pytest.raises(UserError, match="standard input:2: expected the key 'gold'"):
        read_cases(Path("-"))


@pytest.mark.parametrize(("gold", "label"), [(5, "correct"), (5.0, "correct"), ([4, 5], "correct"), (6, "wrong")])
def test_an_integer_is_a_number(gold: Any, label: Label):
    assert judge("\\boxed{5}", gold).label == label


def test_the_summary_counts_what_could_not_be_judged():
    labels: list[bool | None] = [True, True, True, False, False, None, None]
    verdicts: list[Label] = ["correct", "fault", "unparsed", "correct", "fault", "fault", "wrong"]
    cases = [{"label": label} for label in labels]
    cells = error_cells(cases, [Verdict(label) for label in verdicts])
    row = dict(zip(COLUMNS, cells, strict=True))
    assert row["right"] == "2"  # that were judged
    assert row["FN"] == "1 (50.0%)"  # the response without an answer; a FAULT rejects nothing
    assert row["FP"] == "1 (100.0%)"
    assert (row["FAULT"], row["unparsed"], row["no label"]) == ("3", "1", "2")


@pytest.mark.parametrize(("gold", "status"), [("0.5", 0), ({"not": "text"}, 1)])
def test_faults_alone_make_the_summary_fail(tmp_path: Path, gold: Any, status: int):
    read(tmp_path, {"response": "\\boxed{3}", "gold": gold, "label": True})
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "cases.jsonl"), "--summary"])
    assert done.exit_code == status, done.output
    assert ("1 response could not be judged (FAULT); the first: the reference must be text" in done.output) == (
        status == 1
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
