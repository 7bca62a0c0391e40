"""Functions of the user's own, by their names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pekoe.core import UserError
from pekoe.core.functions import load_function


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_functions.py").write_text("def twice(x):\n    return 2 * x\n\nnumber = 1\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "broken_functions.py").write_text("import no_such_module\n")


def test_a_function_of_the_current_directory():
    before = list(sys.path)
    assert load_function("mine_functions:twice", "a.key")(4) == 8
    assert sys.path == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "mine_functions:twise",
            r"^a.key: expected a function in .*mine_functions.py, got 'twise'. Did you mean 'twice'",
        ),
        ("mine_functions:number", r"expected a function in .*, got 'number'"),
        ("no_functions:f", r"^a.key: expected a module that Python can import, got no_functions: ModuleNotFoundError"),
        ("exits:f", r"^a.key: expected a module that Python can import, got exits: SystemExit\(0\)"),
        ("broken_functions:f", r"got broken_functions: ModuleNotFoundError\(\"No module named 'no_such_module'\"\)"),
    ],
)
def test_mistakes(path: str, message: str):
    with pytest.raises(UserError, match=message):
        load_function(path, "a.key")
