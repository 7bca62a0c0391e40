from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pekoe.core.errors import RunError, UserError
from pekoe.data import read_demonstrations, read_problems

ROWS = [{"question": f"{n} + {n}?", "answer": f"#### {2 * n}"} for n in range(3)]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install 'pekoe[data]'")
    import pyarrow.parquet as pq

    pq.write_table(arrow.Table.from_pylist(rows), path)
    return path


def test_parquet_reads_as_jsonl_does(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert read_problems(parquet(tmp_path / "p.parquet", ROWS)) == read_problems(tmp_path / "p.jsonl")


def test_parquet_demonstrations(tmp_path: Path):
    path = parquet(tmp_path / "d.parquet", [{"prompt": "1+1=", "response": "2"}])
    assert [each.response for each in read_demonstrations(path).demonstrations] == ["2"]


def test_a_malformed_row_of_parquet_has_a_number(tmp_path: Path):
    path = parquet(tmp_path / "p.parquet", [ROWS[0], {"question": "q", "answer": " "}])
    with pytest.raises(UserError, match=r"p\.parquet, row 2: answer: expected a string with something in it"):
        read_problems(path)
    assert [row for row, _ in read_problems(path, skip_malformed=True).skipped] == [2]


def test_what_is_no_parquet_file(tmp_path: Path):
    pytest.importorskip("pyarrow")
    (tmp_path / "p.parquet").write_text("{}")
    with pytest.raises(UserError, match=r"p\.parquet: expected a Parquet file, got: .*"):
        read_problems(tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"Did you mean 'p\.parquet'"):
        read_problems(tmp_path / "q.parquet")


@pytest.mark.parametrize(("library", "source"), [("pyarrow", "p.parquet"), ("datasets", "hf:owner/name")])
def test_an_absent_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str, source: str):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(tmp_path)
    Path("p.parquet").touch()
    with pytest.raises(UserError, match=rf"expected the library '{library}'.*pip install 'pekoe\[data\]'"):
        read_problems(source)


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """A stand-in for `datasets`: what it was asked for."""
        asked: list[Any] = []

        def load_dataset(path: str, name: str | None, split: str) -> Any:
            asked.append((path, name, split))
            if path == "owner/away":
                raise ConnectionError("Couldn't reach the hub\nlong story")
            if path == "owner/absent":
                raise FileNotFoundError("Dataset 'owner/absent' doesn't exist on the Hub")
            return real.Dataset.from_list(ROWS)

        real = pytest.importorskip("datasets", reason="pip install 'pekoe[data]'")
        monkeypatch.setattr(real, "load_dataset", load_dataset)
        return asked

    @pytest.mark.parametrize(
        ("source", "call"),
        [
            ("hf:owner/name", ("owner/name", None, "train")),
            ("hf:owner/name:test", ("owner/name", None, "test")),
            ("hf:owner/name/main:train[:10%]", ("owner/name", "main", "train[:10%]")),
        ],
    )
    def test_names(self, asked: list[Any], source: str, call: Any):
        assert [problem.gold for problem in read_problems(source).problems] == ["0", "2", "4"]
        assert asked == [call]

    @pytest.mark.parametrize("source", ["hf:name", "hf:/name", "hf:owner/", "hf:a/b/c/d", "hf:"])
    def test_what_is_no_name(self, asked: list[Any], source: str):
        with pytest.raises(UserError, match=r"expected hf:OWNER/NAME\[/CONFIG\]\[:SPLIT\]"):
            read_problems(source)
        assert asked == []

    def test_failures_are_one_line(self, asked: list[Any]):
        with pytest.raises(
            RunError, match=r"^hf:owner/away: cannot be loaded: ConnectionError: Couldn't reach the hub$"
        ):
            read_problems("hf:owner/away")
        with pytest.raises(UserError, match="hf:owner/absent: cannot be loaded"):
            read_problems("hf:owner/absent")


def test_the_real_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory beside us has the form of a hub's name: `datasets` reads it by the same call, without a network."""
    datasets = pytest.importorskip("datasets", reason="pip install 'pekoe[data]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "test.jsonl").write_text(json.dumps(ROWS[2]))
    assert [problem.gold for problem in read_problems("hf:owner/name").problems] == ["0", "2", "4"]
    assert [problem.gold for problem in read_problems("hf:owner/name:test").problems] == ["4"]
    with pytest.raises(UserError, match="hf:owner/name:dev: cannot be loaded"):
        read_problems("hf:owner/name:dev")
    with pytest.raises((UserError, RunError), match="hf:owner/nothing: cannot be loaded") as caught:
        read_problems("hf:owner/nothing")
    assert "\n" not in str(caught.value)
