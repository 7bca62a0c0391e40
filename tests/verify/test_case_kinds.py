from __future__ import annotations

from pathlib import Path

import pytest

from pekoe.core.errors import UserError
from pekoe.verify.cases import check_case_kinds, read_cases


def test_a_kind_is_text_or_absent(tmp_path: Path):
    path = tmp_path / "cases.jsonl"
    path.write_text('{"response": "\\\\boxed{1}", "gold": "1", "kind": null}\n')
    cases = read_cases(path)
    check_case_kinds(path, cases, "math", ())
    assert "kind" not in cases[0]
    path.write_text('{"response": "x", "gold": "1"}\n{"response": "x", "gold": "1", "kind": 5}\n')
    with pytest.raises(UserError, match=r"cases\.jsonl:2: kind: expected text, got 5"):
        read_cases(path)
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"cases\.jsonl:1: expected a JSON object, got "):
        read_cases(path)
