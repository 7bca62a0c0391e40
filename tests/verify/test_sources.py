"""The digest of a reward's source: what decides moves it, and nothing else does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pekoe.verify.sources import source_digest


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "reward.py").write_text(
        "import json\nfrom .parts import score\nimport beside\n\ndef f(r, g): return score(r)\n"
    )
    (folder / "parts.py").write_text("def score(r): return len(r)\n")
    (tmp_path / "beside.py").write_text("X = 1\n")
    (tmp_path / "other.py").write_text("Y = 1\n")
    return tmp_path


def test_a_change_of_what_is_imported_moves_it(package: Path):
    before = source_digest("own.reward:f")
    assert len(before) == 16
    assert source_digest("own.reward:g") == before  # of the module
    for name in ("own/reward.py", "own/parts.py", "own/__init__.py", "beside.py"):
        file = package / name
        text = file.read_text()
        file.write_text(text + "Z = 2\n")
        assert source_digest("own.reward:f") != before, name
        file.write_text("# a comment\n\n" + text)
        assert source_digest("own.reward:f") == before, name
        file.write_text(text)


def test_what_is_not_imported_does_not_count(package: Path):
    before = source_digest("own.reward:f")
    (package / "other.py").write_text("Y = 2\n")
    assert source_digest("own.reward:f") == before
    assert source_digest("no_such_module:f") == ""


def test_nothing_is_imported(package: Path):
    (package / "own" / "parts.py").write_text("raise SystemExit\n")
    source_digest("own.reward:f")
    assert "own" not in sys.modules
    (package / "own" / "parts.py").write_text("no python\n")  # the judge says so
    source_digest("own.reward:f")
