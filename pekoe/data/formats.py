"""The layouts of problem sets. A row's columns tell its layout; each is read into a `Problem`.

Most sets are a column that is the prompt and one that is the answer: PROMPTS and ANSWERS list their names. `_LAYOUTS`
has those that need more: text that is put together, kinds of their own, references inside of objects.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from string import ascii_uppercase
from typing import Any, NamedTuple

from pekoe.core.errors import nearest
from pekoe.core.types import Problem
from pekoe.data import rows
from pekoe.data.rows import MAX_CHARS, Malformed, Messages, Row, cut, text_of

# What a column means, by its name in lower case; of several the first counts.
PROMPTS = ("prompt", "question", "problem", "query", "instruction", "input", "messages")
ANSWERS = (
    *("answer", "answers", "ground_truth", "final_answer", "gold", "label", "target"),
    *("solution", "completion", "response", "output"),
)
# Those that may be a worked solution, and its prompt if it is one with this prompt alone.
_WORKED = {"solution": None, "completion": None, "response": None, "output": None, "answer": "question"}
MAX_UID_CHARS = 500
MAX_PLAIN_CHARS = 300  # of an answer in such a column; longer texts, and sentences, must mark theirs
_SENTENCE = re.compile(r"[^\W\d_]{2}\.(\s|$)|([^\W\d_]+ ){3}.*\.\s*$")
# DAPO's prompts begin and end so, and ask for `Answer: x`; every judge here reads the box.
_DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.",
    'Remember to put your answer on its own line after "Answer:".',
)
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")


@dataclass(slots=True)
class Seen:
    """What was understood of a source, row by row."""

    unit: str = ":"  # of its rows, see `sources.Place`
    layouts: Counter[str] = field(default_factory=Counter[str])
    unread: Counter[str] = field(default_factory=Counter[str])  # columns

    def add(self, layout: str, row: Row, unit: str) -> None:
        self.unit = unit
        self.layouts[layout] += 1
        self.unread.update(row.unread)

    def notes(self, source: str) -> list[str]:
        """A line on columns that are not read, with the nearest name of one that would be."""
        hints = {column: get_close_matches(column, _KNOWN, 1, 0.8) for column in sorted(self.unread)[:100]}
        lines = [
            f"{one!r} (is {hint[0]!r} meant?)" if hint and hint != [one] else repr(one) for one, hint in hints.items()
        ]
        return [f"{source}: columns that are not read: {cut(', '.join(lines))}"] if lines else []


class Layout(NamedTuple):
    name: str
    columns: set[str]  # that tell it
    read: Callable[[Row], Problem]
    claims: Callable[[Row], bool] = lambda _: True  # of a row that has these columns


def parse_problem(
    value: Any, columns: Mapping[Any, str] | None = None, seen: Seen | None = None, unit: str = ":"
) -> Problem:
    """Read one row: by `columns` (see `Row.take`), or in any layout in `_LAYOUTS`. `seen` keeps what was understood.

    Raises Malformed, with the nearest name for a misspelt column.
    """
    if isinstance(value, list):
        if len(value) < 2:
            raise Malformed(f"expected two turns (human, assistant), got {len(value)}")
        value = {"0": value[0], "1": value[1]}
    row = Row(rows.expect(value, dict, "row"))
    layout = next((layout for layout in _LAYOUTS if layout.columns <= row.keys() and layout.claims(row)), None)
    if columns or layout is None or "kind" in row:
        row.take(columns or {})
        name, problem = _two_columns(row)
    else:
        name, problem = layout.name, layout.read(row)
    if seen is not None:
        seen.add(name, row, unit)
    return problem


def pair_of(row: Row, prompts: Sequence[str], answers: Sequence[str]) -> tuple[str, str]:
    """The columns of a row that are its prompt and its answer, by lists of their names.

    Raises Malformed where there is none, and for two that are the same by their names.
    """
    names = {key.lower() for key in row}
    for first, second in (("prompt", "messages"), ("answer", "answers")):
        if {first, second} <= names and first in (*prompts[:1], *answers[:1]):
            raise Malformed(f"expected one of {first!r} and {second!r}, got both; columns = {{...}} names one")
    prompt, answer = row.find(prompts), row.find(answers)
    if prompt is None or answer is None:
        expected = [f"a prompt ({', '.join(prompts)})"] * (prompt is None)
        expected += [f"an answer ({', '.join(answers)})"] * (answer is None)
        unknown = [key for key in row if len(key) < 50 and key.lower() not in _KNOWN][:20]
        hints = [f" For {key!r}:{hint}" for key in unknown if "Did" in (hint := nearest(key, {*prompts, *answers}))]
        raise Malformed(
            f"expected {' and '.join(expected)}, got the columns {row.shown}.{''.join(hints)} `columns` in the recipe "
            "says which columns have other names, such as data.columns.prompt=NAME"
        )
    return prompt, answer


def prompt_text(row: Row, column: str) -> Messages:
    """The prompt of a row: messages, plain text, or a question. Alpaca's `input` follows its `instruction`."""
    if isinstance(row[column], list) or column.lower() in ("prompt", "messages"):
        return rows.prompt_of(row[column])
    text = text_of(row, column)
    context = row.find(["input"]) if column.lower() == "instruction" else None
    if context is not None and str(row[context] or "").strip():
        text = f"{text}\n\n{row[context]}"
    return rows.question(text)


def _two_columns(row: Row) -> tuple[str, Problem]:
    """A column with the prompt and one with the answer; `uid`, `kind` and `pass_rate` where there are any.

    A kind other than math owns its gold's shape.
    """
    prompt, answer = pair_of(row, PROMPTS, ANSWERS)
    messages, value = prompt_text(row, prompt), row[answer]
    kind = text_of(row, "kind") if "kind" in row else "math"
    if answer.lower() == "answers":
        gold = _golds(value)
    elif kind != "math":
        gold = value
    elif isinstance(value, list):
        gold = _golds(value)
    elif answer.lower() in _WORKED and _WORKED[answer.lower()] in (None, prompt.lower()):
        gold = _worked(rows.answer_text(value), answer)
    else:
        gold = rows.answer_text(value) if prompt.lower() in ("prompt", "messages") else _golds([value])
    problem = _problem(messages, gold, row.get("uid", row.get("unique_id")), kind)
    rate = row.get("pass_rate")
    if rate is not None:
        if type(rate) not in (int, float) or not 0 <= rate <= 1:
            raise Malformed(f"'pass_rate': expected a number from 0 to 1, got {rate!r}")
        problem = replace(problem, pass_rate=float(rate))
    return f"{prompt}, {answer}", problem


def _worked(text: str, column: str) -> str:
    """The answer that ends a worked solution: behind GSM8K's ####, or in the last box. A short text is the answer."""
    _, mark, last = text.rpartition("####")
    if mark:
        gold = rows.answer_text(last)
        return gold.replace(",", "") if _THOUSANDS.fullmatch(gold) else gold
    if (boxed := reference_box(text)) is not None:
        return boxed
    if len(text) > MAX_PLAIN_CHARS or "\n" in text or (column.lower() != "answer" and _SENTENCE.search(text)):
        raise Malformed(
            f"{column!r}: expected a short answer, or a worked one with '#### x' at its end or a \\boxed{{}} answer, "
            f"got neither: {text[:40]!r}"
        )
    return text


def _areal(row: Row) -> Problem:
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
    tests = rows.expect(rows.loads(text, "'input_output': "), dict, "'input_output'")
    if tests.get("fn_name"):
        raise Malformed("'input_output': expected tests of input and output, got calls of a function (fn_name)")
    inputs, outputs = (rows.expect(tests.get(key), list, f"'input_output' {key}") for key in ("inputs", "outputs"))
    if len(inputs) != len(outputs):
        raise Malformed(f"'input_output': expected as many outputs as inputs, got {len(outputs)} and {len(inputs)}")
    return {"inputs": [str(value) for value in inputs], "outputs": [str(value) for value in outputs]}


def _dapo(row: Row) -> Problem:
    """DAPO and verl: `prompt` (messages, or text), `reward_model.ground_truth`, `extra_info.index`.

    DAPO's instruction to write `Answer: x` is removed, because the judges read boxes.
    """
    truth = rows.expect(row["reward_model"], dict, "'reward_model'").get("ground_truth")
    index = rows.expect(row.get("extra_info") or {}, dict, "'extra_info'").get("index")
    uid = index if isinstance(index, str) else None  # verl numbers each split from 0: an int names no problem
    messages = rows.prompt_of(row.get("prompt"))
    content = messages[-1]["content"].strip()
    if content.startswith(_DAPO[0]):
        content = content.removeprefix(_DAPO[0]).removesuffix(_DAPO[1]).strip()
        messages = (*messages[:-1], {**messages[-1], "content": content})
    return _problem(messages, _golds(truth, alone=True), uid)


def _open_reasoner_zero(row: Row) -> Problem:
    """Open-Reasoner-Zero: `[{"from": "human", "value"}, {"from": "assistant", "ground_truth": {"value"}}]`."""
    human, assistant = (rows.expect(row[key], dict, "turn") for key in "01")
    truth = rows.expect(assistant.get("ground_truth"), dict, "'ground_truth'")
    return _problem(text_of(human, "value"), _golds(truth.get("value"), alone=True))


def _svamp(row: Row) -> Problem:
    """SVAMP: `Body`, `Question`, a numeric `Answer`, `ID`."""
    text = f"{text_of(row, 'Body').strip()} {text_of(row, 'Question').strip()}"
    return _problem(text, rows.answer_text(row["Answer"]), row.get("ID"))


def _light_r1(row: Row) -> Problem:
    """Light-R1: `conversations`, a user's turn and an assistant's, whose last box is the answer."""
    turns = [rows.expect(turn, dict, "turn") for turn in rows.expect(row["conversations"], list, "'conversations'")]
    human = next((turn for turn in turns if turn.get("from") in ("human", "user")), {})
    gold = reference_box(text_of(turns[-1], "value"))
    if gold is None or turns[-1].get("from") not in ("assistant", "gpt"):
        raise Malformed("'conversations': expected an assistant's turn with a \\boxed{} answer at the end, got none")
    return _problem(text_of(human, "value"), gold)


def _knights_knaves(row: Row) -> Problem:
    """Logic-RL's knights and knaves: `quiz`, `names`, `solution` (true: a knight). Its `prompt` is one model's."""
    names, knights = (rows.expect(row[key], list, repr(key)) for key in ("names", "solution"))
    if len(names) != len(knights) or not all(isinstance(value, bool) for value in knights):
        raise Malformed(f"'solution': expected true or false for each of {len(names)} names, got {knights}")
    gold = {str(name): "knight" if knight else "knave" for name, knight in zip(names, knights, strict=True)}
    return _problem(text_of(row, "quiz"), gold, kind="logic")


def _zebra_grid(row: Row) -> Problem:
    """ZebraLogic's grids: `puzzle`, and `solution` with `header` and `rows` (which the public copy may hide)."""
    grid = rows.expect(row["solution"], dict, "'solution'")
    header, lines = (rows.expect(grid.get(key), list, f"'solution.{key}'") for key in ("header", "rows"))
    if any("___" in rows.expect(line, list, "'solution.rows'") for line in lines):
        raise Malformed("'solution': expected the solved grid, got one with its cells hidden (___)")
    return _problem(text_of(row, "puzzle"), {"header": header, "rows": lines}, row.get("id"), "logic")


def _listed_choices(row: Row) -> Problem:
    """`question`, `choices`, `answer`: a choice, its letter, or its number from 0 (MMLU). ZebraLogic adds `puzzle`.

    ARC: `choices` is {"text": [...], "label": [...]}, and `answerKey` is a label, such as "A" or "1".
    """
    question, options, labels = text_of(row, "question").strip(), row["choices"], None
    answer = row["answerKey" if "answerKey" in row else "answer"]
    if isinstance(options, dict):
        options, labels = options.get("text"), options.get("label")
    options = rows.expect(options, list, "'choices'")
    if isinstance(labels, list) and answer in labels[: len(options)]:
        answer = options[labels.index(answer)]
    elif answer not in options:
        letter = ascii_uppercase.find(answer) if isinstance(answer, str) and len(answer) == 1 else -1
        number = answer if type(answer) is int else letter
        answer = options[number] if 0 <= number < len(options) else answer
    text = f"{text_of(row, 'puzzle').strip()}\n\n{question}" if "puzzle" in row else question
    uid = row.get("uid", row.get("id") if {"puzzle", "answerKey"} & row.keys() else None)
    return _choice(text, options, answer, uid)


def _gpqa(row: Row) -> Problem:
    """GPQA: `Question`, `Correct Answer`, `Incorrect Answer 1` to 3, put in an order that depends on the text alone."""
    text, right = text_of(row, "Question").strip(), text_of(row, "Correct Answer").strip()
    options = [right, *(text_of(row, f"Incorrect Answer {i}").strip() for i in (1, 2, 3))]
    options.sort(key=lambda option: hashlib.sha256(f"{text}\n{option}".encode()).digest())
    return _choice(text, options, right, row.get("Record ID"))


def _big_bench_hard(row: Row) -> Problem:
    """BIG-Bench-Hard's tasks with options: `input`, which lists them, and `target`, such as `(A)`."""
    return _problem(text_of(row, "input"), text_of(row, "target").strip()[1], kind="choice")


def _is_option(row: Row) -> bool:
    return bool(re.fullmatch(r"\([A-Z]\)", str(row.all["target"]).strip()))


def _choice(text: str, options: list[str], right: Any, uid: Any) -> Problem:
    if right not in options or not 2 <= len(options) <= 26:
        raise Malformed(f"answer: expected one of 2 to 26 choices {options}, got {right!r}")
    listed = (f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    return _problem("\n".join([text, "Options:", *listed]), ascii_uppercase[options.index(right)], uid, "choice")


def _countdown(row: Row) -> Problem:
    """Countdown (TinyZero): `nums` and the `target` to be made of them. The rows hold no text: it is written here."""
    numbers, target = rows.expect(row["nums"], list, "'nums'"), row["target"]
    if not all(type(value) is int for value in (*numbers, target)):
        raise Malformed(f"'nums', 'target': expected whole numbers, got {numbers}, {target!r}")
    text = (
        f"Make {target} out of the numbers {', '.join(map(str, numbers))} with +, -, *, / and parentheses, "
        "using each number at most once. Answer with the expression."
    )
    return _problem(text, {"numbers": numbers, "target": target}, kind="countdown")


# The first layout whose columns are all there is the row's.
_LAYOUTS = (
    Layout("knights and knaves (Logic-RL)", {"quiz", "names", "solution"}, _knights_knaves),
    Layout("choices (MMLU, ZebraLogic)", {"question", "choices", "answer"}, _listed_choices),
    Layout("choices (ARC)", {"question", "choices", "answerKey"}, _listed_choices),
    Layout("grids (ZebraLogic)", {"puzzle", "solution"}, _zebra_grid),
    Layout("GPQA", {"Question", "Correct Answer"}, _gpqa),
    Layout("BIG-Bench-Hard", {"input", "target"}, _big_bench_hard, _is_option),
    Layout("Countdown", {"nums", "target"}, _countdown),
    Layout("Light-R1", {"conversations"}, _light_r1),
    Layout("Open-Reasoner-Zero", {"0", "1"}, _open_reasoner_zero),
    Layout("verl, DAPO", {"reward_model"}, _dapo),
    Layout("AReaL", {"prompt", "solutions"}, _areal),
    Layout("AReaL", {"prompt", "query_id", "task"}, _areal),
    Layout("SVAMP", {"Body", "Question", "Answer"}, _svamp),
)
_KNOWN = {*PROMPTS, *ANSWERS, "uid", "kind", "pass_rate"}


def _problem(prompt: Messages | str, gold: Any, uid: Any = None, kind: str = "math") -> Problem:
    """A problem of these messages, or of a text that is the user's one turn."""
    messages = rows.question(prompt) if isinstance(prompt, str) else prompt
    if messages[-1]["role"] == "assistant":
        raise Malformed("messages: expected the last turn to be the user's, got the assistant's")
    if not any(message["content"].strip() for message in messages):
        raise Malformed("messages: expected text, got nothing but empty strings")
    if (size := sum(len(message["content"]) for message in messages)) > MAX_CHARS:
        raise Malformed(f"prompt: expected at most {MAX_CHARS:,} characters, got {size:,}")
    if uid is None:  # a name that depends on the content alone
        content = json.dumps([messages, gold, kind], sort_keys=True, ensure_ascii=False)
        uid = hashlib.sha256(content.encode()).hexdigest()[:16]
    if type(uid) not in (str, int) or uid == "":
        raise Malformed(f"uid: expected a string or a whole number, got {uid!r}")
    if len(str(uid)) > MAX_UID_CHARS:
        raise Malformed(f"uid: expected at most {MAX_UID_CHARS} characters, got {len(str(uid)):,}")
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
