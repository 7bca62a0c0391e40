"""Data as people have it: each layout from a file of three rows, each kind of file, and each mistake's message."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from pekoe.config.data import ProblemSection
from pekoe.core.errors import UserError
from pekoe.data import Tokenizer, gather_problems, read_demonstrations, read_problems
from pekoe.data.formats import Seen, parse_problem

N = range(3)
QUESTIONS, ANSWERS = [f"What is {n} + {n}?" for n in N], [str(2 * n) for n in N]


def rows(**columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [{name: of(n) for name, of in columns.items()} for n in N]


def question(n: int) -> str:
    return QUESTIONS[n]


def answer(n: int) -> str:
    return ANSWERS[n]


def chat(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTIONS[n]}]


# What people have -> its rows. Each is read as the three questions and answers above.
LAYOUTS: dict[str, list[Any]] = {
    "prompt, answer": rows(prompt=question, answer=answer),
    "question, answer": rows(question=question, answer=answer),
    "question, answer as GSM8K": rows(question=question, answer=lambda n: f"So it is\n#### {ANSWERS[n]}"),
    "problem, solution": rows(problem=question, solution=answer),
    "problem, solution worked out": rows(problem=question, solution=lambda n: f"So\nit is $\\boxed{{{ANSWERS[n]}}}$."),
    "problem, answer": rows(problem=question, answer=lambda n: 2 * n, solution=lambda n: "Add.\nDone."),
    "prompt, solution (TRL)": rows(prompt=question, solution=lambda n: f"$\\boxed{{{ANSWERS[n]}}}$"),
    "prompt, completion (TRL)": rows(prompt=question, completion=answer),
    "messages, solution (TRL)": rows(prompt=chat, solution=answer),
    "prompt, ground_truth": rows(prompt=question, ground_truth=answer),
    "input, label": rows(input=question, label=lambda n: 2 * n),
    "Alpaca": rows(instruction=question, input=lambda n: "", output=answer),
    "Problem, Answer": rows(ID=str, Problem=question, Answer=lambda n: 2.0 * n),
    "Question, Answer worked out": rows(Question=question, Answer=lambda n: f"Add them.\n#### {ANSWERS[n]}"),
    "input, target": rows(input=question, target=answer),
    "verl": rows(
        data_source=lambda n: "own",
        prompt=chat,
        reward_model=lambda n: {"style": "rule", "ground_truth": ANSWERS[n]},
        extra_info=lambda n: {"index": n},
    ),
    "extra columns": rows(prompt=question, answer=answer, difficulty=float, tags=lambda n: ["easy"]),
    "answers that are null in some rows": rows(
        prompt=question, answer=answer, answers=lambda n: None, kind=lambda n: None
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in LAYOUTS[layout]))
    problems = read_problems(path).problems
    assert [problem.messages[-1]["content"] for problem in problems] == QUESTIONS
    assert [problem.gold for problem in problems] == ANSWERS
    assert {problem.kind for problem in problems} == {"math"}
    assert {problem.messages[-1]["role"] for problem in problems} <= {"user", "prompt"}


TURNS = [[("human", "Hi"), ("gpt", "Hello"), ("human", QUESTIONS[n]), ("gpt", ANSWERS[n])] for n in N]
DEMONSTRATIONS: dict[str, list[Any]] = {
    "prompt, response": rows(prompt=question, response=answer),
    "prompt, completion (TRL)": rows(prompt=question, completion=answer),
    "messages, completion (TRL)": rows(
        prompt=chat, completion=lambda n: [{"role": "assistant", "content": ANSWERS[n]}]
    ),
    "messages": rows(messages=lambda n: [*chat(n), {"role": "assistant", "content": ANSWERS[n]}], source=str),
    "question, answer": rows(question=question, answer=answer),
    "problem, solution": rows(problem=question, solution=answer, answer=lambda n: "0"),
    "Alpaca": rows(instruction=question, input=lambda n: "", output=answer),
    "Alpaca with an input": rows(instruction=lambda n: "Add.", input=lambda n: f"{n} and {n}", output=answer),
    "Alpaca with an Input": rows(Instruction=lambda n: "Add.", Input=lambda n: f"{n} and {n}", Output=answer),
    "ShareGPT": rows(
        conversations=lambda n: [{"from": name, "value": text} for name, text in TURNS[n]],
        id=str,
    ),
}


@pytest.mark.parametrize("layout", DEMONSTRATIONS)
def test_layouts_of_demonstrations(tmp_path: Path, layout: str):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(DEMONSTRATIONS[layout]))
    read = read_demonstrations(path).demonstrations
    assert [each.response for each in read] == ANSWERS
    texts = [f"Add.\n\n{n} and {n}" for n in N] if layout.startswith("Alpaca with an") else QUESTIONS
    assert [each.messages[-1]["content"] for each in read] == texts
    assert len(read[0].messages) == (3 if layout == "ShareGPT" else 1)


PLAIN = rows(question=question, answer=answer)
LINES = "".join(json.dumps(row) + "\n" for row in PLAIN).encode()
CSV = b"\xef\xbb\xbfquestion,answer,note\n" + "".join(f'"{QUESTIONS[n]}",{ANSWERS[n]},\n' for n in N).encode()
FILES: dict[str, bytes] = {
    "data.jsonl": LINES,
    "data.json": json.dumps(PLAIN, indent=2).encode(),
    "array.jsonl": json.dumps(PLAIN).encode(),
    "indented.jsonl": json.dumps(PLAIN, indent=1).encode(),
    "lines.json": LINES,
    "wrapped.json": json.dumps({"version": 1, "data": PLAIN}).encode(),
    "empty.json": json.dumps({"data": [], "train": PLAIN}).encode(),
    "data.csv": CSV,
    "semicolons.csv": CSV.replace(b'?",', b'?";').replace(b",", b";"),
    "data.tsv": CSV.replace(b'?",', b'?"\t').replace(b",", b"\t"),
    "data.jsonl.gz": gzip.compress(LINES),
    "data.jsonl.bz2": bz2.compress(LINES),
    "data.json.xz": lzma.compress(json.dumps(PLAIN).encode()),
    "data.jsonl.zst": zstandard.compress(LINES[:50]) + zstandard.compress(LINES[50:]),
    "data.csv.zst": zstandard.compress(CSV),
    "no_suffix": LINES,
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    problems = read_problems(path).problems
    assert [problem.messages[0]["content"] for problem in problems] == QUESTIONS
    assert [problem.gold for problem in problems] == ANSWERS


def test_parquet_and_saved_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets", reason="pip install 'pekoe[data]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_list(PLAIN)
    table.to_parquet(str(tmp_path / "data.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"dev": table, "test": table}).save_to_disk(str(tmp_path / "others"))
    for name in ("data.parquet", "saved", "splits", "splits/train"):
        assert [problem.gold for problem in read_problems(tmp_path / name).problems] == ANSWERS, name
    assert len(read_problems(tmp_path / "splits/test").problems) == 1
    with pytest.raises(UserError, match=r"others: expected a split 'train', got \['dev', 'test'\]; name one: .*/SPLIT"):
        read_problems(tmp_path / "others")


def test_values_that_json_has_not(tmp_path: Path):
    """Parquet's dates, decimals, bytes and short floats become text and numbers as they are written."""
    arrow = pytest.importorskip("pyarrow", reason="pip install 'pekoe[data]'")
    import pyarrow.parquet as parquet

    values = {
        "2026-01-31T12:00:00+00:00": arrow.array([datetime(2026, 1, 31, 12, tzinfo=UTC)]),
        "0.1": arrow.array([np.float32(0.1)]),
        "0.2": arrow.array([np.float16(0.2)]),
        "0.30000000000000004": arrow.array([0.1 + 0.2]),
        "12.5": arrow.array([Decimal("12.50")]),
        "5": arrow.array([Decimal("5.00")]),
        "x²": arrow.array(["x²".encode()]),
        "7": arrow.array([7], arrow.int8()),
    }
    for expected, column in values.items():
        parquet.write_table(arrow.table({"prompt": ["q"], "answer": column}), tmp_path / "a.parquet")
        assert read_problems(tmp_path / "a.parquet").problems[0].gold == expected
    nested = arrow.array([{"ground_truth": [0.1]}], arrow.struct({"ground_truth": arrow.list_(arrow.float32())}))
    parquet.write_table(arrow.table({"prompt": ["q"], "reward_model": nested}), tmp_path / "b.parquet")
    assert read_problems(tmp_path / "b.parquet").problems[0].gold == "0.1"
    parquet.write_table(arrow.table({"prompt": ["q"], "answer": [b"\xff"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet, row 1: 'answer': expected text, got 1 bytes that are not UTF-8"):
        read_problems(tmp_path / "c.parquet")


def test_a_column_that_json_has_not_is_an_error_only_where_it_is_read(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow", reason="pip install 'pekoe[data]'")
    import pyarrow.parquet as parquet

    columns = {
        "prompt": ["1+1="],
        "answer": ["2"],
        "image": [{"bytes": b"\x89PNG", "path": "a.png"}],
        "took": arrow.array([timedelta(seconds=1)]),
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table(columns), path)
    assert read_problems(path).problems[0].gold == "2"
    for column, reason in (("image", "expected text, got 4 bytes"), ("took", "expected text, .*got a timedelta")):
        with pytest.raises(UserError, match=rf"a\.parquet, row 1: '{column}': {reason}"):
            read_problems(path, columns={"answer": column})
    problems, report = gather_problems(ProblemSection(train=str(path)), 0, None, keep_rows=True)
    assert problems[0].row == {"prompt": "1+1=", "answer": "2"}
    assert report.seen[str(path)].unread == {}


def test_columns_by_name(tmp_path: Path):
    path = tmp_path / "own.jsonl"
    own = rows(q=question, a=lambda n: {"gold": [ANSWERS[n]]}, key=lambda n: f"k{n}", question=lambda n: "another")
    path.write_text("".join(json.dumps(row) + "\n" for row in own))
    problems = read_problems(path, columns={"prompt": "q", "answer": "a.gold", "uid": "key"}).problems
    assert [problem.gold for problem in problems] == ANSWERS
    assert [problem.uid for problem in problems] == ["k0", "k1", "k2"]
    assert problems[0].messages == ({"role": "prompt", "content": QUESTIONS[0]},)
    with pytest.raises(UserError, match=r"own\.jsonl:1: expected the column 'qq' \(columns\.prompt\), got 'q', 'a'"):
        read_problems(path, columns={"prompt": "qq"})
    with pytest.raises(UserError, match=r"expected the column 'a\.golds'"):
        read_problems(path, columns={"answer": "a.golds"})
    read = read_demonstrations(path, columns={"prompt": "q", "response": "key"}).demonstrations
    assert read[1].response == "k1"


def test_columns_decide_between_two_that_would_do():
    row = {"prompt": "p", "messages": [{"role": "user", "content": "m"}], "answer": "1", "answers": ["2"]}
    with pytest.raises(ValueError, match="expected one of 'prompt' and 'messages', got both"):
        parse_problem(row)
    with pytest.raises(ValueError, match="expected one of 'answer' and 'answers', got both"):
        parse_problem(row, {"prompt": "prompt"})
    first = parse_problem(row, {"prompt": "prompt", "answer": "answer"})
    assert (first.messages[0]["content"], first.gold) == ("p", "1")
    second = parse_problem(row, {"prompt": "messages", "answer": "answers"})
    assert (second.messages[0]["content"], second.gold) == ("m", "2")


def test_columns_take_the_place_of_names_in_any_case():
    row = {"prompt": "p", "Answer": "why", "gold": "2"}
    assert parse_problem(row, {"answer": "gold"}).gold == "2"
    row = {"Messages": [{"role": "user", "content": "m"}], "q": "p", "answer": "2"}
    assert parse_problem(row, {"prompt": "q"}).messages[0]["content"] == "p"
    assert parse_problem({"Prompt": "p", "ANSWER": "2"}, {"prompt": "Prompt", "answer": "ANSWER"}).gold == "2"


def test_a_sentence_is_an_answer_where_its_column_may_be_one():
    """`answer` in any case; a column of solutions has to mark its answer."""
    assert parse_problem({"Question": "q", "Answer": "Mr. Smith"}).gold == "Mr. Smith"
    assert parse_problem({"Prompt": "q", "Answers": ["1", "2"]}).gold == ["1", "2"]
    with pytest.raises(ValueError, match="expected a short answer"):
        parse_problem({"Question": "q", "Solution": "Mr. Smith"})
    with pytest.raises(ValueError, match="expected a short answer"):
        parse_problem({"problem": "q", "solution": "Three and four make seven, so it is 7."})
    assert parse_problem({"problem": "q", "solution": "about 7.5 km"}).gold == "about 7.5 km"


def test_the_choices_of_arc():
    row = {"id": "Mercury_1", "question": "q", "choices": {"text": ["w", "x"], "label": ["A", "B"]}, "answerKey": "B"}
    problem = parse_problem(row)
    assert (problem.uid, problem.gold, problem.kind) == ("Mercury_1", "B", "choice")
    assert problem.messages[0]["content"] == "q\nOptions:\n(A) w\n(B) x"
    numbers = row | {"choices": {"text": ["2", "1"], "label": ["1", "2"]}, "answerKey": "1"}
    assert parse_problem(numbers).gold == "A"  # the label, not the text
    with pytest.raises(ValueError, match=r"expected one of 2 to 26 choices \['w', 'x'\], got 'E'"):
        parse_problem(row | {"answerKey": "E"})


def test_a_kind_is_never_ignored():
    """A layout with a kind of its own does not hide the one that a row asks for."""
    row = {"question": "q", "choices": ["a", "b"], "answer": {"any": 1}, "kind": "function:m:f"}
    assert (parse_problem(row).kind, parse_problem(row).gold) == ("function:m:f", {"any": 1})
    assert parse_problem({"question": "q", "choices": ["a", "b"], "answer": 1}).gold == "B"
    assert parse_problem({"question": "q", "choices": {"text": ["x", "y"]}, "answer": "A"}).gold == "A"


def test_columns_that_are_not_read_are_said():
    seen = Seen()
    for n in N:
        parse_problem(
            {"prompt": QUESTIONS[n], "answer": "1", "knd": "math", "difficulty": n, "level": None}, None, seen
        )
    assert seen.layouts == {"prompt, answer": 3}
    (note,) = seen.notes("a.jsonl")
    assert note == "a.jsonl: columns that are not read: 'difficulty', 'knd' (is 'kind' meant?)"


DEEP = '{"a":' * 5000 + "1" + "}" * 5000
MISTAKES: dict[str, tuple[str, bytes | str, str]] = {
    "broken line": (
        "a.jsonl",
        '{"prompt": "p", "answer": 1}\n{"prompt": "p", "answer":}\n',
        r"a\.jsonl:2: expected JSON, ",
    ),
    "text": (
        "a.jsonl",
        "prompt,answer\np,1\n",
        r"a\.jsonl:1: expected JSON, got 'prompt,answer' \(Expecting value at ",
    ),
    "pretty objects": ("a.jsonl", '{\n"a": 1\n}\n{\n"b": 1\n}', r"several values over many lines: jq -c \. .*a\.jsonl"),
    "unfinished array": ("a.json", '[\n{"prompt": "p"},\n', r"a\.json:3: expected a JSON array, got: Expecting value"),
    "no columns": (
        "a.csv",
        "q,a\n1,2\n",
        r"a\.csv:2: expected a prompt \(prompt, question.* the columns 'q', 'a'.*data\.columns\.prompt=NAME",
    ),
    "cells": ("a.csv", "prompt,answer\np,1\nq,2,3\n", r"a\.csv:3: expected at most 2 cells, as in the first line"),
    "lines": ("a.csv", 'prompt,answer\n"p\nq",1\n\n"r\n",\n', r"a\.csv:5: expected an answer .* the columns 'prompt'"),
    "twice": ("a.csv", "prompt,prompt\np,1\n", r"a\.csv:1: expected columns of different names"),
    "quote": ("a.csv", 'prompt,answer\n"p,1\n', r"a\.csv:2: expected an answer"),
    "not gzip": ("a.jsonl.gz", LINES, r"a\.jsonl\.gz: expected a file that can be read, got: Not a gzipped file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(LINES)[:-9], r"got: Compressed file ended before"),
    "cut zst": ("a.jsonl.zst", zstandard.compress(LINES)[:-3], r"got: it ends in the middle of a frame"),
    "not zst": ("a.jsonl.zst", LINES, r"a\.jsonl\.zst: expected a file that can be read, got: "),
    "a bomb": ("a.jsonl.zst", zstandard.compress(b" " * (65 << 20)), r"at most 100 times its size \(or 64 MiB\), got "),
    "deep": (
        "a.jsonl",
        f'{{"prompt": "p", "answer": "1", "x": {DEEP}}}',
        r"a\.jsonl:1: expected (values nested|JSON, got va)",
    ),
    "worked solutions": (
        "a.jsonl",
        '{"prompt": "p", "completion": [{"role": "assistant", "content": "1"}]}',
        r"answer: expected a string, got a message, as rows of pekoe sft have",
    ),
    "deep enough": ("a.jsonl", f'{{"prompt": "p", "answer": {"[" * 200}{"]" * 200}}}', "nested at most 100 deep"),
    "deep inside": (
        "a.jsonl",
        json.dumps({"prompt": "p", "query_id": "q", "task": "code", "input_output": DEEP}),
        r"a\.jsonl:1: 'input_output': expected JSON, got values nested too deeply",
    ),
    "kind": (
        "a.jsonl",
        '{"uid": "x", "prompt": "p", "answer": "1", "kind": 5}',
        r":1: 'kind': expected a string, .*\(uid 'x'\)",
    ),
    "digits": ("a.jsonl", f'{{"prompt": "p", "answer": 1{"0" * 5000}}}', r"a\.jsonl:1: expected JSON, got Exceeds"),
    "a prompt": ("a.jsonl", json.dumps({"prompt": "p" * 4_000_001, "answer": "1"}), "at most 4,000,000 characters"),
    "the same twice": (
        "a.jsonl",
        '{"prompt": "p", "answer": "1"}\n' * 2,
        r"a\.jsonl:2: expected another problem, got that of row 1 again.*data\.dedup = 'exact'",
    ),
    "a uid twice": (
        "a.jsonl",
        '{"uid": "u", "prompt": "p", "answer": "1"}\n{"uid": "u", "prompt": "q", "answer": "1"}',
        r"a\.jsonl:2: uid 'u': expected a name of its own, got that of row 1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path: Path, mistake: str):
    name, content, message = MISTAKES[mistake]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_problems(tmp_path / name)


def test_several_bad_rows_are_named(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "anser": n}) + "\n" for n in range(25)))
    with pytest.raises(UserError) as caught:
        read_problems(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:10]] == [f"{path}:{n}" for n in range(1, 11)]
    assert lines[10:] == ["and 15 more; 25 rows that cannot be used"]


def test_parquet_that_unpacks_to_far_more(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow", reason="pip install 'pekoe[data]'")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    text = "x" * (1 << 20)
    parquet.write_table(
        arrow.table({"prompt": [text] * 70, "answer": ["1"] * 70}), path, use_dictionary=False, compression="zstd"
    )
    with pytest.raises(UserError, match=r"a\.parquet: expected a file that unpacks to at most 100 times its size"):
        read_problems(path)
    parquet.write_table(
        arrow.table({"prompt": [text] * 300, "answer": ["1"] * 300}), path, compression="zstd"
    )  # one text, named often
    with pytest.raises(UserError, match=r"a\.parquet: expected a file that unpacks to at most 100 times its size"):
        read_problems(path)


def test_a_line_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pekoe.data.rows.MAX_ROW_CHARS", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p" * 99, "answer": "1"}))
    with pytest.raises(UserError, match=r"a\.jsonl:1: expected at most 100 characters, got [\d]+"):
        read_problems(tmp_path / "a.jsonl")


def test_parquet_whose_statistics_are_damaged(tmp_path: Path):
    """Arrow ends the process where one asks it for such a column's metadata."""
    arrow = pytest.importorskip("pyarrow", reason="pip install 'pekoe[data]'")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"prompt": ["1+1="], "answer": ["2"]}), path)
    data = path.read_bytes()
    texts, numbers = b"\x15\x0c\x25", b"\x15\x0a\x25"  # the types of a column's values, in its metadata
    assert data.count(texts) == 2
    path.write_bytes(data.replace(texts, numbers))
    with pytest.raises(UserError, match=r"a\.parquet: expected a Parquet file, got: .*does not support DOUBLE"):
        read_problems(path)


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"openai/gsm8k: expected a file of problems.*'hf:openai/gsm8k' reads it"):
        read_problems("openai/gsm8k")
    with pytest.raises(UserError, match=r"no such file or directory\.$"):
        read_problems("openai/gsm8k.jsonl")
    with pytest.raises(UserError, match=r"hf download Qwen/Qwen3-0\.6B --local-dir Qwen/Qwen3-0\.6B"):
        Tokenizer.load("Qwen/Qwen3-0.6B")
    with pytest.raises(UserError, match="expected a file, or a directory of datasets' save_to_disk"):
        read_problems(tmp_path)
