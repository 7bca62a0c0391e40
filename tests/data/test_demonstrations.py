from __future__ import annotations

import json
from pathlib import Path

import pytest

from pekoe.core.errors import UserError
from pekoe.data import Demonstration, read_demonstrations, write_demonstrations

USER = {"role": "user", "content": "1+1="}
ANSWER = {"role": "assistant", "content": "2"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_reads_responses_and_dialogues(tmp_path: Path):
    path = write(
        tmp_path / "sft.jsonl",
        {"prompt": "1+1=", "response": "2"},
        {"messages": [USER], "response": "\\boxed{2}"},
        {"messages": [USER, ANSWER, USER, ANSWER]},
    )
    assert read_demonstrations(path).demonstrations == (
        Demonstration(({"role": "prompt", "content": "1+1="},), "2"),
        Demonstration((USER,), "\\boxed{2}"),
        Demonstration((USER, ANSWER, USER), "2"),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "reponse": "r"}, "For 'reponse': Did you mean 'response'?"),
        (
            {"prompt": "p"},
            "expected an answer (response, completion, output, solution, answer), got the columns 'prompt'",
        ),
        ({"prompt": "p", "response": ""}, "'response': expected a string with something in it"),
        ({"messages": [USER]}, "expected a prompt and an assistant's turn at the end, got 'user'"),
        ({"messages": [ANSWER]}, "expected a prompt and an assistant's turn"),
        ({"messages": [USER, ANSWER], "response": "r"}, "expected the user's turn before 'response'"),
        ({"response": "r"}, "expected a prompt (prompt, question, problem, query, instruction, input, messages)"),
    ],
)
def test_malformed_rows(tmp_path: Path, row: dict[str, object], message: str):
    path = write(tmp_path / "sft.jsonl", {"prompt": "p", "response": "r"}, row)
    with pytest.raises(UserError) as caught:
        read_demonstrations(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    file = read_demonstrations(path, skip_malformed=True)
    assert len(file.demonstrations) == 1
    assert file.skipped[0][0] == 2


def test_what_is_written_is_read_back(tmp_path: Path):
    demonstrations = (
        Demonstration(({"role": "prompt", "content": "p\n"},), " r\u2028"),
        Demonstration((USER, ANSWER, USER), "2"),
        Demonstration(({"role": "raw", "content": "<|user|>"},), "2"),
    )
    write_demonstrations(tmp_path / "sft.jsonl", demonstrations)
    assert read_demonstrations(tmp_path / "sft.jsonl").demonstrations == demonstrations
