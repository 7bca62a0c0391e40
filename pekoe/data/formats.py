"""The layouts in which the field publishes its problems, each told by its keys and turned into a `Problem`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from pekoe.core.errors import nearest
from pekoe.core.types import Problem
from pekoe.data import rows
from pekoe.data.rows import Malformed, Messages, text_of

NATIVE_KEYS = {"uid", "prompt", "messages", "answer", "answers", "kind"}
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")


def parse_problem(value: Any) -> Problem:
    """One row of any layout we know. Raises Malformed, with the nearest key for a misspelt one."""
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
    return _problem(rows.prompt_of(row), gold, row.get("uid"), kind)


def _areal(row: dict[str, Any]) -> Problem:
    """AReaL: `prompt` with the chat's markers inside, `query_id`, `task`, `solutions`."""
    if row.get("task", "math") != "math":
        raise Malformed(f"'task': expected 'math', got {row['task']!r}")
    messages = ({"role": rows.RAW, "content": text_of(row, "prompt")},)
    return _problem(messages, _golds(row.get("solutions")), row.get("query_id"))


def _gsm8k(row: dict[str, Any]) -> Problem:
    """GSM8K: `question`, and an `answer` that is worked out and ends with `#### x`."""
    _, mark, last = text_of(row, "answer").rpartition("####")
    if not mark:
        raise Malformed("'answer': expected '#### x' at its end, got none")
    gold = rows.answer_text(last)
    return _problem(
        rows.question(text_of(row, "question")), gold.replace(",", "") if _THOUSANDS.fullmatch(gold) else gold
    )


def _math(row: dict[str, Any]) -> Problem:
    """MATH: `problem`, and `answer` or a worked `solution` whose last box is the answer."""
    gold = _golds(row["answer"], alone=True) if "answer" in row else last_boxed(text_of(row, "solution"))
    if gold is None:
        raise Malformed("'solution': expected a \\boxed{} answer, got none")
    return _problem(rows.question(text_of(row, "problem")), gold, row.get("unique_id"))


def _dapo(row: dict[str, Any]) -> Problem:
    """DAPO and verl: `prompt` (messages), `reward_model.ground_truth`, `extra_info.index`."""
    truth = rows.expect(row["reward_model"], dict, "'reward_model'").get("ground_truth")
    index = rows.expect(row.get("extra_info") or {}, dict, "'extra_info'").get("index")
    uid = index if isinstance(index, str) else None  # verl numbers each split from 0: an int names no problem
    return _problem(rows.prompt_of({"prompt": row.get("prompt")}), _golds(truth, alone=True), uid)


def _open_reasoner_zero(turns: list[Any]) -> Problem:
    """Open-Reasoner-Zero: `[{"from": "human", "value"}, {"from": "assistant", "ground_truth": {"value"}}]`."""
    if len(turns) < 2:
        raise Malformed(f"expected two turns (human, assistant), got {len(turns)}")
    human, assistant = (rows.expect(turn, dict, "turn") for turn in turns[:2])
    truth = rows.expect(assistant.get("ground_truth"), dict, "'ground_truth'")
    return _problem(rows.question(text_of(human, "value")), _golds(truth.get("value"), alone=True))


def _svamp(row: dict[str, Any]) -> Problem:
    """SVAMP: `Body`, `Question`, a numeric `Answer`, `ID`."""
    text = f"{text_of(row, 'Body').strip()} {text_of(row, 'Question').strip()}"
    return _problem(rows.question(text), rows.answer_text(row["Answer"]), row.get("ID"))


# The first layout whose keys are all there is the row's. Native comes last: its keys are the commonest.
_LAYOUTS: tuple[tuple[set[str], Callable[[dict[str, Any]], Problem]], ...] = (
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


def _problem(messages: Messages, gold: Any, uid: Any = None, kind: str = "math") -> Problem:
    if messages[-1]["role"] == "assistant":
        raise Malformed("messages: expected the last turn to be the user's, got the assistant's")
    if not any(message["content"].strip() for message in messages):
        raise Malformed("messages: expected text, got nothing but empty strings")
    if uid is None:  # a name that depends on the content alone
        content = json.dumps([messages, gold, kind], sort_keys=True, ensure_ascii=False)
        uid = hashlib.sha256(content.encode()).hexdigest()[:16]
    elif isinstance(uid, bool) or not isinstance(uid, str | int) or uid == "":
        raise Malformed(f"uid: expected a string or a whole number, got {uid!r}")
    return Problem(str(uid), messages, gold, kind)


def _golds(values: Any, alone: bool = False) -> str | list[str]:
    """One answer, or a list of which any may match. `alone`: it need not be in an array. Boxes are taken off."""
    if alone and not isinstance(values, list):
        values = [values]
    golds = [_unboxed(rows.answer_text(value)) for value in rows.expect(values, list, "answers")]
    return golds[0] if len(golds) == 1 else golds


def _unboxed(text: str) -> str:
    inner = last_boxed(text)
    return inner if inner and text == f"\\boxed{{{inner}}}" else text


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` (or `\fbox{...}`) holds, braces nested; None where there is none or it never closes.

    MATH also writes `\boxed 5`: there the answer ends at the next space or `$`.
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
