"""`pekoe data`: what a user sees of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pekoe.cli import app
from pekoe.core import UserError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shown(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", *words])
    if isinstance(result.exception, UserError):
        raise result.exception
    return result.exit_code, result.stdout


def save(name: str, *rows: dict[str, Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_problems_as_they_are_read():
    rows = [{"question": f"{n}+1=", "answer": str(n + 1), "level": n} for n in range(4)]
    file = save("own.jsonl", *rows, {"question": "9+9="}, {"question": "1+1", "answer": "3 + * 4"}, rows[0])
    status, text = shown(file)
    assert status == 1
    head, *examples, bad = text.rstrip().split("\n\n")
    assert head.splitlines() == [
        "own.jsonl: 7 rows; layout: question, answer (6)",
        "own.jsonl: columns that are not read: 'level'",
        "kinds: math (5)",
        "prompts: 3 to 4 characters (--model DIR counts tokens), median 4, 95 % at most 4",
    ]
    assert [example.splitlines()[1:] for example in examples] == [
        [f"{n}+1=", f"--- answer: '{n + 1}'"] for n in range(3)
    ]
    assert [line.split(": ")[0] for line in bad.splitlines()] == ["own.jsonl:5", "own.jsonl:7", "own.jsonl:6"]
    assert "the reference '3 + * 4' cannot be parsed" in bad
    assert "got that of row 1 again" in bad


def test_a_kind_without_a_judge_is_a_bad_row():
    file = save("own.jsonl", *({"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(2)),
                {"prompt": "p", "answer": "x =", "kind": "maths"}, {"prompt": "q", "answer": "3 + * 4"})  # fmt: skip
    status, text = shown(file)
    assert status == 1
    assert text.startswith("own.jsonl: 4 rows; layout: prompt, answer (4)\nkinds: math (3), maths (1)\n")
    bad = text.rstrip().split("\n\n")[-1].splitlines()
    assert bad[0] == "own.jsonl:3: judge: unknown kind 'maths'. Did you mean 'math'?"
    assert bad[1].startswith("own.jsonl:4: the reference '3 + * 4' cannot be parsed")


def test_a_recipe_is_no_file_of_rows():
    recipe = """[[data.sources]]\nname = "a"\npath = "hf:a/b"\n"""
    Path("mine.toml").write_text(recipe)
    for words, got in (
        ("mine.toml", "mine.toml; nearest: pekoe data hf:a/b"),
        ("laptop", "laptop; nearest: pekoe data "),
    ):
        with pytest.raises(UserError, match=rf"expected a file of rows, .*, got the recipe {got}"):
            shown(words)
    with pytest.raises(UserError, match=r"none\.toml: expected a file of problems, got no such file"):
        shown("none.toml")
    assert shown(save("laptop", {"question": "1+1=", "answer": 2}))[0] == 0  # a file of one's own


def test_with_a_model_prompts_are_as_it_sees_them(tiny_dir: Path):
    file = save("own.jsonl", {"q": "1+1=", "a": 2})
    columns = ["data.columns.prompt=q", "data.columns.answer=a"]
    status, text = shown(file, *columns, "--model", str(tiny_dir / "model"))
    assert status == 0
    assert "prompts: 6 to 6 tokens, median 6" in text
    assert "\n<user>1+1=<assistant>\n--- answer: '2'" in text or "1+1=" in text
    with pytest.raises(
        UserError, match=r"own\.jsonl: expected at least one row, got 1 malformed ones \(row 1: expected a"
    ):
        shown(file)
    with pytest.raises(UserError, match=r"unknown key 'data\.colums'\. Did you mean 'columns'"):
        shown(file, "data.colums.prompt=q")


def test_worked_solutions(tiny_dir: Path):
    turns = [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]
    file = save("sft.jsonl", {"conversations": turns, "id": 1, "kind": "math"}, {"conversations": turns[:1]})
    status, text = shown(file, "--sft", "--model", str(tiny_dir / "model"))
    assert status == 1
    assert "sft.jsonl: 2 rows; layout: ShareGPT (1)" in text
    assert "columns that are not read: 'id' (is 'uid' meant?), 'kind'\n" in text
    assert "responses: 1 to 1 tokens" in text
    assert "--- response\n2" in text
    assert "sft.jsonl:2: 'conversations': expected a prompt and an assistant's turn at the end, got 'user'" in text
