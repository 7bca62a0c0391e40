"""The journal: append-only, heard by listeners, cut back on resume, tolerant of a torn last line."""

from pathlib import Path
from typing import Any

from pekoe.core.journal import Journal, JsonLines, read_lines


def test_listeners_hear_what_is_written(tmp_path: Path):
    heard: list[dict[str, Any]] = []
    journal = Journal(tmp_path / "run" / "journal.jsonl", (heard.append,))
    journal.write("step", step=1, reward=0.5)
    journal.close()
    assert heard == list(read_lines(tmp_path / "run" / "journal.jsonl"))
    assert heard[0]["event"] == "step"


def test_cut_moves_later_lines_to_the_discarded_file(tmp_path: Path):
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.append({"n": 1})
    offset = lines.sync()
    lines.append({"n": 2})
    lines.append({"n": 3})
    assert lines.cut(offset, tmp_path / "discarded" / "a.jsonl") > 0
    lines.append({"n": 4})
    lines.close()
    assert [line["n"] for line in read_lines(tmp_path / "a.jsonl")] == [1, 4]
    assert [line["n"] for line in read_lines(tmp_path / "discarded" / "a.jsonl")] == [2, 3]


def test_a_torn_last_line_is_dropped(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"n":1}\n{"n":')
    assert [line["n"] for line in read_lines(file)] == [1]
