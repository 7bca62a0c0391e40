"""`pekoe report` as a command."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pekoe.cli import app
from pekoe.core.errors import UserError


def test_it_writes_one_file_into_the_run_or_to_the_path_given(run_dir: Path, tmp_path: Path):
    answer = CliRunner().invoke(app, ["report", str(run_dir)])
    assert answer.exit_code == 0, answer.output
    assert (run_dir / "report.html").stat().st_size < 8e6
    assert f"{run_dir / 'report.html'}: " in answer.output
    other = tmp_path / "r.html"
    assert CliRunner().invoke(app, ["report", str(run_dir), str(run_dir), "--out", str(other)]).exit_code == 0
    assert other.is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "expected a run directory with journal.jsonl in it, got nothing there"),
        (["nowhere", "--live"], "expected a run directory"),
        (["RUN", "--out", "no/such/folder.html"], "--out: expected a file that can be written"),
    ],
)
def test_a_wrong_path_is_one_message(run_dir: Path, words: list[str], message: str):
    answer = CliRunner().invoke(app, ["report", *(str(run_dir) if word == "RUN" else word for word in words)])
    assert isinstance(answer.exception, UserError)
    assert message in str(answer.exception)
