"""The layouts of public problem sets. A row's keys tell its layout; each is read into a `Problem`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from pekoe.core.errors import nearest
from pekoe.core.types import Problem
from pekoe.data import rows
from pekoe.data.rows import Malformed, Messages, text_of

NATIVE_KEYS = {"uid", "prompt", "messages", "answer", "answers", "kind", "pass_rate"}
# DAPO's prompts begin and end so, and ask for `Answer: x`; every judge here reads the box.
_DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.",
    'Remember to put your answer on its own line after "Answer:".',
)
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")


def parse_problem(value: Any) -> Problem:
    """Read one row of any layout in `_LAYOUTS`. Raises Malformed, with the nearest key for a misspelt one."""
    if isinstance(value, list):
        return _open_reasoner_zero(value)
    row = rows.expect(value, dict, "row")
    for keys, read in _LAYOUTS:
        if keys <= row.keys():
            return read(row)
    hints = "".join(f" For {key!r}:{nearest(key, NATIVE_KEYS)}" for key in row if key not in NATIVE_KEYS)
    raise Malformed(f"expected 'prompt' or 'messages', and 'answer' or 'answers'; got keys {sorted(row)}.{hints}")


def _native(row: dict[str, Any]) -> Problem:
    """`{"uid", "prompt" | "messages", "answer" | "answers", "kind"}`; a kind other than math owns its gold's shape."""
    rows.closed(row, NATIVE_KEYS)
    kind = text_of(row, "kind") if "kind" in row else "math"
    if rows.one_of(row, "answer", "answers") == "answers":
        gold: Any = _golds(row["answers"])
    else:
        gold = rows.answer_text(row["answer"]) if kind == "math" else row["answer"]
    problem, rate = _problem(rows.prompt_of(row), gold, row.get("uid"), kind), row.get("pass_rate")
    if rate is None:
        return problem
    if type(rate) not in (int, float) or not 0 <= rate <= 1:
        raise Malformed(f"'pass_rate': expected a number from 0 to 1, got {rate!r}")
    return replace(problem, pass_rate=float(rate))


def _areal(row: dict[str, Any]) -> Problem:
    """AReaL: `prompt` with the chat's markers inside, `query_id`, `task`; `solutions`, or for code `input_output`."""
    task = row.get("task", "math")
    messages = ({"role": rows.RAW, "content": text_of(row, "prompt")},)
    if task == "code":
        return _problem(messages, _input_output(text_of(row, "input_output")), row.get("query_id"), "code")
    if task != "math":
        raise Malformed(f"'task': expected 'math' or 'code', got {task!r}")
    return _problem(messages, _golds(row.get("solutions")), row.get("query_id"))


def _input_output(text: str) -> dict[str, list[str]]:
    """Tests of a program as APPS has them: a JSON object of `inputs` and `outputs`."""
    try:
        tests = rows.expect(json.loads(text), dict, "'input_output'")
    except ValueError as error:
        raise Malformed(f"'input_output': expected JSON, got {error}") from None
    if tests.get("fn_name"):
        raise Malformed("'input_output': expected tests of input and output, got calls of a function (fn_name)")
    inputs, outputs = (rows.expect(tests.get(key), list, f"'input_output' {key}") for key in ("inputs", "outputs"))
    if len(inputs) != len(outputs):
        raise Malformed(f"'input_output': expected as many outputs as inputs, got {len(outputs)} and {len(inputs)}")
    return {"inputs": [str(value) for value in inputs], "outputs": [str(value) for value in outputs]}


def _gsm8k(row: dict[str, Any]) -> Problem:
    """GSM8K: `question`, and an `answer` that is worked out and ends with `#### x`."""
    _, mark, last = text_of(row, "answer").rpartition("####")
    if not mark:
        raise Malformed("'answer': expected '#### x' at its end, got none")
    gold = rows.answer_text(last)
    return _problem(text_of(row, "question"), gold.replace(",", "") if _THOUSANDS.fullmatch(gold) else gold)


def _math(row: dict[str, Any]) -> Problem:
    """MATH: `problem`, and `answer` or a worked `solution` whose last box is the answer."""
    gold = _golds(row["answer"], alone=True) if "answer" in row else reference_box(text_of(row, "solution"))
    if gold is None:
        raise Malformed("'solution': expected a \\boxed{} answer, got none")
    return _problem(text_of(row, "problem"), gold, row.get("unique_id"))


def _dapo(row: dict[str, Any]) -> Problem:
    """DAPO and verl: `prompt` (messages, or text), `reward_model.ground_truth`, `extra_info.index`.

    DAPO's instruction to write `Answer: x` is removed, because the judges read boxes.
    """
    truth = rows.expect(row["reward_model"], dict, "'reward_model'").get("ground_truth")
    index = rows.expect(row.get("extra_info") or {}, dict, "'extra_info'").get("index")
    uid = index if isinstance(index, str) else None  # verl numbers each split from 0: an int names no problem
    messages = rows.prompt_of({"prompt": row.get("prompt")})
    content = messages[-1]["content"].strip()
    if content.startswith(_DAPO[0]):
        content = content.removeprefix(_DAPO[0]).removesuffix(_DAPO[1]).strip()
        messages = (*messages[:-1], {**messages[-1], "content": content})
    return _problem(messages, _golds(truth, alone=True), uid)


def _open_reasoner_zero(turns: list[Any]) -> Problem:
    """Open-Reasoner-Zero: `[{"from": "human", "value"}, {"from": "assistant", "ground_truth": {"value"}}]`."""
    if len(turns) < 2:
        raise Malformed(f"expected two turns (human, assistant), got {len(turns)}")
    human, assistant = (rows.expect(turn, dict, "turn") for turn in turns[:2])
    truth = rows.expect(assistant.get("ground_truth"), dict, "'ground_truth'")
    return _problem(text_of(human, "value"), _golds(truth.get("value"), alone=True))


def _svamp(row: dict[str, Any]) -> Problem:
    """SVAMP: `Body`, `Question`, a numeric `Answer`, `ID`."""
    text = f"{text_of(row, 'Body').strip()} {text_of(row, 'Question').strip()}"
    return _problem(text, rows.answer_text(row["Answer"]), row.get("ID"))


def _light_r1(row: dict[str, Any]) -> Problem:
    """Light-R1: `conversations`, a user's turn and an assistant's, whose last box is the answer."""
    turns = [rows.expect(turn, dict, "turn") for turn in rows.expect(row["conversations"], list, "'conversations'")]
    human = next((turn for turn in turns if turn.get("from") in ("human", "user")), {})
    gold = reference_box(text_of(turns[-1], "value"))
    if gold is None or turns[-1].get("from") not in ("assistant", "gpt"):
        raise Malformed("'conversations': expected an assistant's turn with a \\boxed{} answer at the end, got none")
    return _problem(text_of(human, "value"), gold)


def _knights_knaves(row: dict[str, Any]) -> Problem:
    """Logic-RL's knights and knaves: `quiz`, `names`, `solution` (true: a knight). Its `prompt` is one model's."""
    names, knights = (rows.expect(row[key], list, repr(key)) for key in ("names", "solution"))
    if len(names) != len(knights) or not all(isinstance(value, bool) for value in knights):
        raise Malformed(f"'solution': expected true or false for each of {len(names)} names, got {knights}")
    gold = {str(name): "knight" if knight else "knave" for name, knight in zip(names, knights, strict=True)}
    return _problem(text_of(row, "quiz"), gold, kind="logic")


def _zebra_grid(row: dict[str, Any]) -> Problem:
    """ZebraLogic's grids: `puzzle`, and `solution` with `header` and `rows` (which the public copy may hide)."""
    grid = rows.expect(row["solution"], dict, "'solution'")
    header, lines = (rows.expect(grid.get(key), list, f"'solution.{key}'") for key in ("header", "rows"))
    if any("___" in rows.expect(line, list, "'solution.rows'") for line in lines):
        raise Malformed("'solution': expected the solved grid, got one with its cells hidden (___)")
    return _problem(text_of(row, "puzzle"), {"header": header, "rows": lines}, row.get("id"), "logic")


def _zebra_choice(row: dict[str, Any]) -> Problem:
    """ZebraLogic's questions: `puzzle`, `question`, `choices`, `answer` (one of the choices)."""
    text = f"{text_of(row, 'puzzle').strip()}\n\n{text_of(row, 'question').strip()}"
    return _choice(text, rows.expect(row["choices"], list, "'choices'"), row["answer"], row.get("id"))


def _gpqa(row: dict[str, Any]) -> Problem:
    """GPQA: `Question`, `Correct Answer`, `Incorrect Answer 1` to 3, put in an order that depends on the text alone."""
    text, right = text_of(row, "Question").strip(), text_of(row, "Correct Answer").strip()
    options = [right, *(text_of(row, f"Incorrect Answer {i}").strip() for i in (1, 2, 3))]
    options.sort(key=lambda option: hashlib.sha256(f"{text}\n{option}".encode()).digest())
    return _choice(text, options, right, row.get("Record ID"))


def _big_bench_hard(row: dict[str, Any]) -> Problem:
    """BIG-Bench-Hard's tasks with options: `input`, which lists them, and `target`, such as `(A)`."""
    target = re.fullmatch(r"\(([A-Z])\)", text_of(row, "target").strip())
    if not target:
        raise Malformed(f"'target': expected an option such as '(A)', got {row['target']!r}")
    return _problem(text_of(row, "input"), target[1], kind="choice")


def _choice(text: str, options: list[str], right: Any, uid: Any) -> Problem:
    if right not in options or not 2 <= len(options) <= 26:
        raise Malformed(f"answer: expected one of 2 to 26 choices {options}, got {right!r}")
    listed = (f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    return _problem("\n".join([text, "Options:", *listed]), ascii_uppercase[options.index(right)], uid, "choice")


def _countdown(row: dict[str, Any]) -> Problem:
    """Countdown (TinyZero): `nums` and the `target` to be made of them. The rows hold no text: it is written here."""
    numbers, target = rows.expect(row["nums"], list, "'nums'"), row["target"]
    if not all(type(value) is int for value in (*numbers, target)):
        raise Malformed(f"'nums', 'target': expected whole numbers, got {numbers}, {target!r}")
    text = (
        f"Make {target} out of the numbers {', '.join(map(str, numbers))} with +, -, *, / and parentheses, "
        "using each number at most once. Answer with the expression."
    )
    return _problem(text, {"numbers": numbers, "target": target}, kind="countdown")


# The first layout whose keys are all there is the row's. Native comes last: its keys are the commonest.
_LAYOUTS: tuple[tuple[set[str], Callable[[dict[str, Any]], Problem]], ...] = (
    ({"quiz", "names", "solution"}, _knights_knaves),
    ({"puzzle", "question", "choices", "answer"}, _zebra_choice),
    ({"puzzle", "solution"}, _zebra_grid),
    ({"Question", "Correct Answer"}, _gpqa),
    ({"input", "target"}, _big_bench_hard),
    ({"nums", "target"}, _countdown),
    ({"conversations"}, _light_r1),
    ({"0", "1"}, lambda row: _open_reasoner_zero([row["0"], row["1"]])),
    ({"reward_model"}, _dapo),
    ({"prompt", "solutions"}, _areal),
    ({"prompt", "query_id"}, _areal),
    ({"question", "answer"}, _gsm8k),
    ({"Body", "Question", "Answer"}, _svamp),
    ({"problem", "answer"}, _math),
    ({"problem", "solution"}, _math),
    ({"prompt"}, _native),
    ({"messages"}, _native),
)


def _problem(prompt: Messages | str, gold: Any, uid: Any = None, kind: str = "math") -> Problem:
    """A problem of these messages, or of a text that is the user's one turn."""
    messages = rows.question(prompt) if isinstance(prompt, str) else prompt
    if messages[-1]["role"] == "assistant":
        raise Malformed("messages: expected the last turn to be the user's, got the assistant's")
    if not any(message["content"].strip() for message in messages):
        raise Malformed("messages: expected text, got nothing but empty strings")
    if uid is None:  # a name that depends on the content alone
        content = json.dumps([messages, gold, kind], sort_keys=True, ensure_ascii=False)
        uid = hashlib.sha256(content.encode()).hexdigest()[:16]
    if type(uid) not in (str, int) or uid == "":
        raise Malformed(f"uid: expected a string or a whole number, got {uid!r}")
    return Problem(str(uid), messages, gold, kind)


def _golds(values: Any, alone: bool = False) -> str | list[str]:
    """One answer, or a list of which any may match. `alone`: it need not be in an array. Boxes are removed."""
    if alone and not isinstance(values, list):
        values = [values]
    golds: list[str] = []
    for value in rows.expect(values, list, "answers"):
        text = rows.answer_text(value)
        inner = reference_box(text)
        golds.append(inner if inner and text == f"\\boxed{{{inner}}}" else text)
    return golds[0] if len(golds) == 1 else golds


def reference_box(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` of a reference solution, braces nested.

    None without a box, and where the last one never closes: unlike a response (`verify.extract`), a solution that ends
    in a broken box has no answer. MATH also writes `\boxed 5`: there the answer ends at the next space or `$`.
    """
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?:\s*(?=\{)|\s+)", text))
    if not boxes:
        return None
    body, depth = text[boxes[-1].end() :], 0
    if not body.startswith("{"):
        return re.split(r"[\s$]", body, maxsplit=1)[0] or None
    for token in re.finditer(r"\\.|[{}]", body, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return body[1 : token.start()].strip() or None
    return None
