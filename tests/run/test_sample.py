"""What a model says: to a prompt, to rows with and without answers, in a chat."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pekoe.cli import app
from pekoe.config import EvalConfig, load_config
from pekoe.core.errors import UserError
from pekoe.core.progress import NoProgress
from pekoe.run.sample import NO_ANSWER, chat, prompt_problem, read_prompts, show_responses


def config_of(tiny_dir: Path, *overrides: str) -> EvalConfig:
    tree = {
        "run": {"threads": 1},
        "model": {"path": str(tiny_dir / "model"), "device": "cpu"},
        "eval": {"data": "-", "samples": 2, "max_new_tokens": 6},
        "verify": {"workers": 1, "random": True},
    }
    return load_config(tree, overrides, EvalConfig)


def test_a_prompt_and_as_json(tiny_dir: Path):
    said: list[str] = []
    show_responses(config_of(tiny_dir), [prompt_problem("1+2=")], NoProgress(), said.append)
    assert said[0] == "── 1+2="
    assert len(said) == 3
    assert "token" in said[1]
    lines: list[str] = []
    show_responses(config_of(tiny_dir), [prompt_problem("1+2=")], NoProgress(), lines.append, as_json=True)
    rows = [json.loads(line) for line in lines]
    assert [(row["sample"], row["prompt"]) for row in rows] == [(0, "1+2="), (1, "1+2=")]
    assert said[1].startswith(rows[0]["response"])
    assert "label" not in rows[0]
    with pytest.raises(UserError, match="expected fewer tokens than the model's 64 positions, got 72"):
        show_responses(config_of(tiny_dir), [prompt_problem("1" * 70)], NoProgress(), said.append)


def test_rows_are_judged_where_they_have_an_answer(tiny_dir: Path, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"uid": "a", "prompt": "1+2=", "answer": "3"}\n{"prompt": "1+3="}\n{"question": "1+4="}\n')
    problems = read_prompts(str(file))
    assert [problem.kind for problem in problems] == ["math", NO_ANSWER, NO_ANSWER]
    lines: list[str] = []
    show_responses(config_of(tiny_dir, "eval.samples=1"), problems, NoProgress(), lines.append, as_json=True)
    first, second, third = map(json.loads, lines)
    assert first["label"] in ("correct", "wrong")
    assert "label" not in second
    assert third["prompt"] == "1+4="
    file.write_text('{"promt": "1+2="}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:1: expected a prompt"):
        read_prompts(str(file))


def test_lines_of_standard_input_are_prompts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+2=\n\n1+3=\n"))
    assert [problem.messages[0]["content"] for problem in read_prompts("-")] == ["1+2=", "1+3="]


def test_a_chat_goes_on_after_a_question_that_is_too_long(tiny_dir: Path):
    said: list[str] = []
    chat(config_of(tiny_dir), ["1+2=", "", "1" * 70, "1+3="], NoProgress(), said.append)
    assert len(said) == 4
    assert said[1] == "   [a new conversation]"
    assert "expected fewer tokens" in said[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1+2="], 'expected --model DIR, and "PROMPT" or --data FILE or neither'),
        (["--model", "m", "1+2=", "1+3="], "expected --model DIR"),
        (["--model", "m", "1+2=", "temperature=1"], "and keys such as eval.temperature=0.6"),
        (["--model", "m", "1+2=", "--data", "f"], "expected --model DIR"),
        (["--model", "nowhere", "1+2=", "eval.temprature=1"], "Did you mean 'temperature'"),
    ],
)
def test_a_wrong_call_is_one_message(words: list[str], message: str):
    answer = CliRunner().invoke(app, ["sample", *words])
    assert isinstance(answer.exception, UserError)
    assert message in str(answer.exception)


def test_a_run_directory_has_its_model_inside(tmp_path: Path):
    (tmp_path / "model").mkdir()
    answer = CliRunner().invoke(app, ["sample", "--model", str(tmp_path), "1+2="])
    assert str(answer.exception).endswith(f"Did you mean {str(tmp_path / 'model')!r}?")


def test_the_command(tiny_dir: Path):
    words: list[Any] = ["sample", "--model", str(tiny_dir / "model"), "1+2=", "run.threads=1", "eval.max_new_tokens=3"]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    assert "token" in answer.stdout
