from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pekoe.core.errors import UserError
from pekoe.core.types import Problem
from pekoe.data import read_problems, write_problems
from pekoe.data.formats import reference_box

NATIVE = {"uid": "a", "prompt": "1+1=", "answer": "2", "kind": "math"}
File = Callable[..., Path]


@pytest.fixture
def file(tmp_path: Path) -> File:
    """Write rows (or raw bytes) to a file."""

    def write(*rows: Any, name: str = "problems.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines))
        return path

    return write


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


LAYOUTS = {
    "native": (NATIVE, Problem("a", ({"role": "prompt", "content": "1+1="},), "2")),
    "native messages": (
        {
            "uid": 7,
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "answers": ["1", 2.0],
        },
        Problem("7", ({"role": "system", "content": "s"}, *user("u")), ["1", "2"]),
    ),
    "native of another kind": (
        {"uid": "c", "prompt": "p", "answer": {"cases": [1]}, "kind": "code"},
        Problem("c", ({"role": "prompt", "content": "p"},), {"cases": [1]}, "code"),
    ),
    "areal": (
        {
            "prompt": "<|User|>1+1?<|Assistant|><think>\n",
            "query_id": "q",
            "task": "math",
            "solutions": ["\\boxed{2}", "2.0"],
        },
        Problem("q", ({"role": "raw", "content": "<|User|>1+1?<|Assistant|><think>\n"},), ["2", "2.0"]),
    ),
    "areal code": (
        {
            "prompt": "p",
            "query_id": "c1",
            "task": "code",
            "input_output": '{"inputs": ["1", 2], "outputs": ["3", "4"]}',
        },
        Problem("c1", ({"role": "raw", "content": "p"},), {"inputs": ["1", "2"], "outputs": ["3", "4"]}, "code"),
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "1000 + 234 = <<1000+234=1234>>1234\n#### 1,234"},
        Problem("?", user("How many?"), "1234"),
    ),
    "svamp": (
        {"Body": "Two apples.", "Question": "How many?", "Answer": 2.0, "ID": "chal-1", "Type": "x"},
        Problem("chal-1", user("Two apples. How many?"), "2"),
    ),
    "math solution": (
        {
            "problem": "Solve.",
            "level": "Level 1",
            "solution": "$\\boxed{1}$, no, $\\boxed{\\frac{1}{2}}$.",
            "unique_id": "m",
        },
        Problem("m", user("Solve."), "\\frac{1}{2}"),
    ),
    "math answer": (
        {"problem": "Solve.", "answer": 3, "solution": "\\boxed{4}", "unique_id": "m"},
        Problem("m", user("Solve."), "3"),
    ),
    "dapo": (
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": "Solve."}],
            "reward_model": {"ground_truth": "34", "style": "rule"},
            "extra_info": {"index": "9a9b"},
        },
        Problem("9a9b", user("Solve."), "34"),
    ),
    "dapo's instruction": (
        {
            "prompt": [
                {
                    "role": "user",
                    "content": "Solve the following math problem step by step. The last line of your response should "
                    "be of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
                    'Solve.\n\nRemember to put your answer on its own line after "Answer:".',
                }
            ],
            "reward_model": {"ground_truth": "34"},
            "extra_info": {"index": "9a9c"},
        },
        Problem("9a9c", user("Solve."), "34"),
    ),
    "dapo as text": (
        {"prompt": "Solve!", "solution": "34", "reward_model": {"ground_truth": "34"}, "extra_info": {"index": "9a9d"}},
        Problem("9a9d", ({"role": "prompt", "content": "Solve!"},), "34"),
    ),
    "light-r1": (
        {
            "conversations": [
                {"from": "user", "value": "Solve it."},
                {"from": "assistant", "value": "<think>\\boxed{1}</think> \\boxed{x^{2}}"},
            ]
        },
        Problem("?", user("Solve it."), "x^{2}"),
    ),
    "knights and knaves": (
        {
            "quiz": "Zoey and Oliver: who?",
            "names": ["Zoey", "Oliver"],
            "solution": [True, False],
            "prompt": [{"role": "user", "content": "<|im_start|>system"}],
            "reward_model": {"ground_truth": {"statements": "..."}},
        },
        Problem("?", user("Zoey and Oliver: who?"), {"Zoey": "knight", "Oliver": "knave"}, "logic"),
    ),
    "zebra grid": (
        {"id": "z1", "puzzle": "Houses.", "solution": {"header": ["House", "Name"], "rows": [["1", "Eric"]]}},
        Problem("z1", user("Houses."), {"header": ["House", "Name"], "rows": [["1", "Eric"]]}, "logic"),
    ),
    "zebra question": (
        {"id": "z2", "puzzle": "Houses.", "question": "Who?", "choices": ["Eric", "Bob"], "answer": "Bob"},
        Problem("z2", user("Houses.\n\nWho?\nOptions:\n(A) Eric\n(B) Bob"), "B", "choice"),
    ),
    "big-bench-hard": (
        {"input": "Which?\nOptions:\n(A) x\n(B) y", "target": "(B)"},
        Problem("?", user("Which?\nOptions:\n(A) x\n(B) y"), "B", "choice"),
    ),
    "countdown": (
        {"target": 98, "nums": [44, 19, 35]},
        Problem(
            "?",
            user(
                "Make 98 out of the numbers 44, 19, 35 with +, -, *, / and parentheses, using each number at most "
                "once. Answer with the expression."
            ),
            {"numbers": [44, 19, 35], "target": 98},
            "countdown",
        ),
    ),
    "open reasoner zero": (
        [{"from": "human", "value": "Solve."}, {"from": "assistant", "ground_truth": {"value": "\\boxed{x^{2}}"}}],
        Problem("?", user("Solve."), "x^{2}"),
    ),
    "open reasoner zero, columns": (
        {"0": {"from": "human", "value": "Solve."}, "1": {"from": "assistant", "ground_truth": {"value": "5"}}},
        Problem("?", user("Solve."), "5"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_every_layout(file: File, layout: str):
    row, expected = LAYOUTS[layout]
    (problem,) = read_problems(file(row)).problems
    assert (problem.messages, problem.gold, problem.kind) == (expected.messages, expected.gold, expected.kind)
    if expected.uid != "?":  # else a hash of the content
        assert problem.uid == expected.uid


def test_layouts_may_be_mixed_and_blank_lines_left(file: File):
    rows = [row for row, _ in LAYOUTS.values() if not isinstance(row, dict) or row.get("unique_id") != "m"]
    path = file(b"\xef\xbb\xbf" + json.dumps(rows[0]).encode(), b"", *rows[1:], b"  ", b"")
    assert len(read_problems(path).problems) == len(rows)


def test_a_json_file_is_one_array(file: File):
    rows = [LAYOUTS["open reasoner zero"][0], NATIVE]
    assert len(read_problems(file(rows, name="orz.json")).problems) == 2
    with pytest.raises(UserError, match=r"bad\.json, item 2: expected an answer .* \(uid 'b'\)"):
        read_problems(file([NATIVE, {"uid": "b", "prompt": "p"}], name="bad.json"))
    assert len(read_problems(file(NATIVE, NATIVE | {"uid": "b"}, name="lines.json")).problems) == 2


def test_a_json_file_may_hold_examples(file: File):
    examples = [LAYOUTS["big-bench-hard"][0], {"input": "Other?\n(A) x", "target": "(A)"}]
    path = file({"canary": "text", "examples": examples}, name="task.json")
    assert [problem.gold for problem in read_problems(path).problems] == ["B", "A"]


def test_gpqa_options_are_shuffled_by_their_text(file: File):
    rows = [
        {"Question": f"Q{i}?", "Correct Answer": "right", **{f"Incorrect Answer {j}": f"wrong {j}" for j in (1, 2, 3)}}
        for i in range(40)
    ]
    problems = read_problems(file(*rows)).problems
    assert {problem.gold for problem in problems} == {"A", "B", "C", "D"}
    assert all(f"({problem.gold}) right" in problem.messages[0]["content"] for problem in problems)
    assert read_problems(file(*rows[::-1])).problems == problems[::-1]


def test_uid_depends_on_the_content_alone(file: File):
    row = {"question": "How many?", "answer": "#### 5"}
    (first,) = read_problems(file(row)).problems
    (moved, other) = read_problems(
        file({"answer": "so\n#### 5", "question": "How many?"}, {**row, "answer": "#### 6"})
    ).problems
    assert first.uid == moved.uid == "1d46fcf2937b3124"
    assert other.uid != first.uid


MALFORMED = {
    "not JSON": (
        b"{'uid': 1}",
        "expected JSON, got \"{'uid': 1}\" (Expecting property name enclosed in double quotes at character 2)",
    ),
    "not an object": (b"3", "row: expected an object, got the number 3"),
    "misspelt answer": ({"uid": "b", "prompt": "p", "anwser": "1"}, "For 'anwser': Did you mean 'answer'?"),
    "misspelt prompt": ({"promt": "p", "answer": "1"}, "For 'promt': Did you mean 'prompt'?"),
    "no answer": ({"prompt": "p"}, "expected an answer (answer, answers, ground_truth, final_answer, gold, label"),
    "two answers": ({**NATIVE, "uid": "b", "answers": ["2"]}, "expected one of 'answer' and 'answers', got both"),
    "two prompts": ({**NATIVE, "uid": "b", "messages": []}, "expected one of 'prompt' and 'messages', got both"),
    "empty prompt": ({"prompt": " ", "answer": "1"}, "'prompt': expected a string with something in it"),
    "answer is null": ({"prompt": "p", "answer": None}, "got the columns 'prompt', 'answer' (null)"),
    "answer is true": ({"prompt": "p", "answer": True}, "answer: expected a string, got a boolean"),
    "answer is NaN": (b'{"prompt": "p", "answer": NaN}', "answer: expected a string, got the number nan"),
    "answers empty": ({"prompt": "p", "answers": []}, "answers: expected an array with something in it, got an empty"),
    "answers a string": ({"prompt": "p", "answers": "1"}, "answers: expected an array, got a string"),
    "uid": ({**NATIVE, "uid": [1]}, "uid: expected a string or a whole number, got [1]"),
    "role": ({"messages": [{"role": "usr", "content": ""}], "answer": "1"}, "got 'usr'. Did you mean 'user'?"),
    "content": (
        {"messages": [{"role": "user", "content": 1}], "answer": "1"},
        "'content': expected a string, got the number 1",
    ),
    "assistant last": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "1"},
        "expected the last turn to be the user's",
    ),
    "raw in a dialogue": (
        {"messages": [{"role": "raw", "content": "a"}, {"role": "user", "content": "b"}], "answer": "1"},
        "expected 'raw' only in a conversation of one message",
    ),
    "gsm8k without ####": ({"question": "q", "answer": "2 + 3\nis 5"}, "or a worked one with '#### x' at its end"),
    "gsm8k with nothing behind": (
        {"question": "q", "answer": "5 ####"},
        "answer: expected a string with something in it",
    ),
    "math without a box": (
        {"problem": "p", "solution": "so " * 101},
        "'solution': expected a short answer, or a worked",
    ),
    "areal code": (
        {"prompt": "p", "query_id": "q", "task": "code", "input_output": '{"inputs": ["1"], "outputs": []}'},
        "'input_output' outputs: expected an array",
    ),
    "areal function": (
        {"prompt": "p", "query_id": "q", "task": "code", "input_output": '{"fn_name": "f"}'},
        "expected tests of input and output, got calls of a function",
    ),
    "areal task": ({"prompt": "p", "query_id": "q", "task": "game"}, "'task': expected 'math' or 'code', got 'game'"),
    "areal no solutions": ({"prompt": "p", "query_id": "q", "task": "math"}, "answers: expected an array, got"),
    "dapo": ({"prompt": "p", "reward_model": "rule"}, "'reward_model': expected an object, got a string"),
    "orz": ([{"from": "human", "value": "v"}], "expected two turns (human, assistant), got 1"),
    "surrogate": (b'{"prompt": "\\ud800", "answer": "1"}', "half of a surrogate pair"),
    "deep": (b"[" * 100_000, "expected JSON, got"),
    "light-r1 without a box": (
        {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "5"}]},
        "expected an assistant's turn with a \\boxed{} answer",
    ),
    "knights without roles": (
        {"quiz": "q", "names": ["A", "B"], "solution": [True]},
        "'solution': expected true or false for each of 2 names, got [True]",
    ),
    "zebra hidden": (
        {"puzzle": "p", "solution": {"header": ["House"], "rows": [["___"]]}},
        "expected the solved grid, got one with its cells hidden",
    ),
    "choice not offered": (
        {"puzzle": "p", "question": "q", "choices": ["x", "y"], "answer": "z"},
        "answer: expected one of 2 to 26 choices ['x', 'y'], got 'z'",
    ),
    "countdown of text": ({"target": "98", "nums": [1, 2]}, "expected whole numbers, got [1, 2], '98'"),
    "same uid": (NATIVE, "uid 'a': expected a name of its own, got that of row 1"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_rows_are_refused_with_their_place_or_skipped(file: File, case: str):
    row, message = MALFORMED[case]
    path = file(NATIVE, b"", row, {**NATIVE, "uid": "last"})
    with pytest.raises(UserError) as caught:
        read_problems(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    read = read_problems(path, skip_malformed=True)
    assert [problem.uid for problem in read.problems] == ["a", "last"]
    ((line, reason),) = read.skipped
    assert line == 3
    assert message in reason


def test_files_that_cannot_be_used(file: File, tmp_path: Path):
    with pytest.raises(UserError, match="expected at least one row, got an empty file"):
        read_problems(file(b"\n"))
    with pytest.raises(UserError, match=r"got 2 malformed ones \(row 1: row: expected an object"):
        read_problems(file(1, 2), skip_malformed=True)
    with pytest.raises(UserError, match=r"prblems\.jsonl: expected a file of problems.*Did you mean 'problems\.jsonl'"):
        read_problems(tmp_path / "prblems.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_problems(tmp_path / "nowhere" / "problems.jsonl")
    with pytest.raises(UserError, match="directory"):
        read_problems(tmp_path)
    with pytest.raises(UserError, match=r":2: expected UTF-8 text, got byte 0xff at offset \d+ .*Parquet"):
        read_problems(file(NATIVE, b"\xff"))


def test_only_a_newline_ends_a_row(file: File):
    (problem,) = read_problems(file('{"prompt": "a\u2028b\x85", "answer": "1"}'.encode())).problems
    assert problem.messages[0]["content"] == "a\u2028b\x85"


TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
MESSAGES = st.one_of(
    st.builds(lambda role, text: ({"role": role, "content": text},), st.sampled_from(["prompt", "raw", "user"]), TEXT),
    st.builds(
        lambda system, text: ({"role": "system", "content": system}, *user(text)),
        st.text(st.characters(codec="utf-8")),
        TEXT,
    ),
)
ANSWER = TEXT.map(str.strip)
MATH = st.builds(Problem, TEXT, MESSAGES, ANSWER | st.lists(ANSWER.filter(lambda a: "boxed" not in a), min_size=2))
OTHER = st.builds(
    Problem, TEXT, MESSAGES, st.dictionaries(TEXT, st.integers()) | st.lists(st.integers()), st.just("code")
)


@given(st.lists(MATH | OTHER, min_size=1, max_size=5, unique_by=lambda problem: problem.uid))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_back(tmp_path: Path, problems: list[Problem]):
    write_problems(tmp_path / "out.jsonl", problems)
    assert list(read_problems(tmp_path / "out.jsonl").problems) == problems
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_writing_fails_whole(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    write_problems(path, [Problem("a", user("q"), "1")])
    before = path.read_bytes()
    with pytest.raises(UserError, match="cannot write"):
        write_problems(tmp_path / "absent" / "out.jsonl", [])
    with pytest.raises(TypeError):
        write_problems(path, [Problem("b", user("q"), object())])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{ 5 }", "5"),
        ("\\boxed  {5}", "5"),
        ("\\boxed 5$ so", "5"),
        ("\\fbox{7}", "7"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\text{a\\}b}}", "\\text{a\\}b}"),
        ("\\boxed{1", None),
        ("\\boxed{1}} \\boxed{2", None),
        ("\\boxed{}", None),
        ("\\boxedfoo{1}", None),
        ("none", None),
    ],
)
def test_reference_box(text: str, inside: str | None):
    assert reference_box(text) == inside


@pytest.mark.parametrize(
    ("name", "num", "first"), [("gsm8k/train", 7473, "72"), ("gsm8k/test", 1319, "18"), ("svamp/test", 1000, "145")]
)
def test_reads_the_real_files(shared_dir: Path, name: str, num: int, first: str):
    path = shared_dir / "data/problems" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {name}.jsonl in the shared data")
    problems = read_problems(path).problems
    assert len(problems) == num
    assert problems[0].gold == first
    odd = [problem.gold for problem in problems if not str(problem.gold).replace("-", "").replace(".", "").isdigit()]
    assert odd == []


def test_reads_big_bench_hard(shared_dir: Path):
    problems = read_problems(shared_dir / "data/problems/bbh/logical_deduction_three_objects.json").problems
    assert len(problems) == 250
    assert {(problem.kind, problem.gold) for problem in problems} == {("choice", letter) for letter in "ABC"}


@pytest.mark.parametrize(("name", "num"), [("3ppl_train", 900), ("4ppl_test", 100), ("5ppl_test", 100)])
def test_reads_knights_and_knaves(shared_dir: Path, name: str, num: int):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install 'pekoe[data]'")
    path = shared_dir / "data/problems/knights_knaves" / f"{name}.parquet"
    problems = read_problems(path).problems
    assert len(problems) == num
    assert {problem.kind for problem in problems} == {"logic"}
    for problem in problems:
        text = problem.messages[0]["content"]
        assert problem.messages[0]["role"] == "user"
        assert "im_start" not in text
        assert len(problem.gold) == int(name[0])
        assert all(person in text for person in problem.gold)
        assert set(problem.gold.values()) <= {"knight", "knave"}
