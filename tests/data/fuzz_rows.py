"""Hostile data: rows of every layout, damaged, in files of every kind, damaged too. Only a UserError may come of them.

    python -m tests.data.fuzz_rows [--seconds 60] [--seed 0]

A trial depends on the seed and its number alone. The program ends at the first traceback with that number (exit status
1), or says how many trials held. A row takes part in what a command does with it before a response is sampled: it is
read as a problem and as a demonstration, its kind is looked up, its reference is read, its prompt becomes tokens.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import zstandard

from pekoe.config.data import ProblemSection
from pekoe.config.recipes import VerifySection
from pekoe.core.errors import UserError
from pekoe.core.progress import NoProgress
from pekoe.data import Tokenizer, gather_problems, read_demonstrations
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.run.judging import check_kinds
from pekoe.verify.references import read_references
from tests.fuzzing import main

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS: list[Any] = [
    {"uid": "u", "prompt": "1+1=", "answer": "2", "kind": "math", "pass_rate": 0.5},
    {"messages": [USER], "answers": ["1", 2.0]},
    {"prompt": "p", "answer": {"inputs": ["1"], "outputs": ["2"]}, "kind": "code"},
    {"prompt": "p", "answer": "A", "kind": "choice"},
    {"prompt": "p", "answer": {"question": "q", "answer": "1", "metadata": {}}, "kind": "gym:chain_sum"},
    {"prompt": "p", "answer": "1", "kind": "function:rewards:score"},
    {"prompt": "p", "query_id": "q", "task": "math", "solutions": ["\\boxed{2}"]},
    {"prompt": "p", "query_id": "q", "task": "code", "input_output": '{"inputs": ["1"], "outputs": ["3"]}'},
    {"question": "q", "answer": "so\n#### 1,234"},
    {"problem": "p", "solution": "$\\boxed{\\frac{1}{2}}$"},
    {"Body": "b", "Question": "q", "Answer": 2.0, "ID": "i"},
    {"prompt": [USER], "reward_model": {"ground_truth": "34"}, "extra_info": {"index": "9a"}},
    {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "\\boxed{1}"}]},
    {"quiz": "q", "names": ["A"], "solution": [True]},
    {"id": "z", "puzzle": "p", "solution": {"header": ["House"], "rows": [["1"]]}},
    {"question": "q", "choices": ["x", "y"], "answer": "y"},
    {"input": "p\n(A) x", "target": "(A)"},
    {"nums": [1, 2], "target": 3},
    {"Question": "q", "Correct Answer": "r", **{f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)}},
    [{"from": "human", "value": "q"}, {"from": "assistant", "ground_truth": {"value": "5"}}],
    {"instruction": "i", "input": "", "output": "o"},
    {"messages": [USER, ASSISTANT]},
    {"prompt": [USER], "completion": [ASSISTANT]},
]
KEYS = sorted({key for row in ROWS if isinstance(row, dict) for key in row} | {"", "a.b", "from", "value", "role"})


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


VALUES: list[Callable[[random.Random], Any]] = [
    lambda _: None,
    lambda draw: draw.choice([True, False, 0, -1, 5, 2**63, 10**310, 10**4000, 0.1, -0.0, 1e308, 5e-324]),
    lambda draw: draw.choice([float("nan"), float("inf"), -float("inf")]),
    lambda draw: draw.choice(["", " ", "\0", "\ud800", "\u2028", "\x85", "#### ", "\\boxed{", "\\boxed{}", "}" * 99]),
    lambda draw: draw.choice(["1e10000000", "9" * 5000, "1/0", "(A)", "____", "[[", '{"inputs": 1}', "\\frac" * 500]),
    lambda draw: draw.choice(["math", "code", "choice", "logic", "countdown", "gym:", "gym:x", "function:a:b", ":"]),
    lambda draw: "x" * draw.choice([10, 1000, 100_000]),
    lambda draw: nested(draw.choice([1, 2, 50, 150])),
    lambda draw: json.dumps(nested(100)),
    lambda draw: draw.choice(
        [[], {}, [[]], [None], [{}], [USER], {"role": "user"}, [USER, USER], {"ground_truth": []}]
    ),
    lambda draw: draw.choice(
        [{"header": [], "rows": []}, {"text": ["a"]}, {"from": 1}, ["a", 1, None], list(range(30))]
    ),
    lambda draw: draw.choice(
        [date(1, 1, 1), datetime(2026, 1, 1, tzinfo=UTC), Decimal("0.10"), Decimal("NaN"), b"\xff"]
    ),
]


def damaged(row: Any, draw: random.Random) -> Any:
    """A copy of a row with some of its values, at any depth, replaced, dropped, doubled or renamed."""
    if draw.random() < 0.02:
        return draw.choice(VALUES)(draw)
    if isinstance(row, dict):
        items = [(key, damaged(value, draw)) for key, value in row.items() if draw.random() > 0.05]
        if draw.random() < 0.2:
            items.append((draw.choice(KEYS), draw.choice(VALUES)(draw)))
        return {draw.choice(KEYS) if draw.random() < 0.03 else key: value for key, value in items}
    if isinstance(row, list):
        items = [damaged(item, draw) for item in row for _ in range(draw.choice([0, 1, 1, 1, 1, 1, 2]))]
        return items
    return draw.choice(VALUES)(draw) if draw.random() < 0.25 else row


def written(rows: list[Any], draw: random.Random, folder: Path) -> Path:
    """A file of the rows, in a form and a compression by chance."""
    forms = ["jsonl", "jsonl", "json", "csv", "parquet"]
    form = draw.choice(forms)
    if form == "parquet" and (data := parquet_bytes(rows)) is not None:
        pass
    elif form == "csv":
        tables = [row for row in rows if isinstance(row, dict)]
        text, names = io.StringIO(), list(dict.fromkeys(key for row in tables for key in row))
        writer = csv.writer(
            text, delimiter=draw.choice(",;\t"), quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        )
        writer.writerow(names)
        writer.writerows([str(row.get(name, "")) for name in names] + ["x"] * (draw.random() < 0.05) for row in tables)
        data = text.getvalue().encode(errors="surrogatepass")
    else:
        form = "json" if form == "json" else "jsonl"
        lines = [json.dumps(row, default=str, ensure_ascii=draw.random() < 0.8) for row in rows]
        text = "[" + ",\n".join(lines) + "]" if form == "json" else "\n".join(lines)
        data = text.encode(errors="surrogatepass")
    packings = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    suffix = draw.choice(["", "", "", *packings]) if form != "parquet" else ""
    data = broken(packings[suffix](broken(data, draw)), draw)
    path = folder / f"data.{form}{suffix}"
    path.write_bytes(data)
    return path


def broken(data: bytes, draw: random.Random) -> bytes:
    """Mostly the data; else with bytes flipped, cut, doubled or put in."""
    if draw.random() > 0.12 or not data:
        return data
    at = draw.randrange(len(data))
    end = at + draw.choice([1, 5, 100, len(data)])
    part = draw.choice(
        [b"", b"\0", b"\xff", b"{", b'"', b"\n", bytes([draw.randrange(256)]), b"[" * 5000, data[at:end] * 2]
    )
    return data[:at] + part + data[end:]


def parquet_bytes(rows: list[Any]) -> bytes | None:
    """None where Arrow has no type for the rows together."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        buffer = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist([row for row in rows if isinstance(row, dict)]), buffer)
        return buffer.getvalue()
    except Exception:
        return None


TOKENIZER = Tokenizer(make_char_tokenizer("0123456789+-=()qap \\{}boxed"))
VERIFY = VerifySection(functions=("rewards:score",))


def refused(problems: Any, places: Any) -> dict[int, str]:
    """What `pekoe rl` looks at before it asks a judge's worker."""
    check_kinds(problems, VERIFY, places)
    pairs = [(problem.gold, problem.kind) for problem in problems]
    return read_references(pairs, VERIFY.functions, NoProgress()).refused


def trial(seed: int, number: int, folder: Path) -> str:
    """One file, read in both ways. Returns what came of it; what raises is a fault of Pekoe's."""
    draw = random.Random(f"{seed}/{number}")
    rows = [damaged(draw.choice(ROWS), draw) for _ in range(draw.choice([1, 3, 10]))]
    path, outcome = written(rows, draw, folder), "read"
    keys: dict[str, Any] = {"train": str(path), "skip_malformed": draw.random() < 0.7, "check": "drop"}
    if draw.random() < 0.1:
        keys["columns"] = {"prompt": draw.choice(KEYS), draw.choice(["answer", "uid", "kind"]): draw.choice(KEYS)}
    try:
        gather_problems(ProblemSection(**keys, dedup=draw.choice(["off", "exact"])), 0, TOKENIZER, refused=refused)
    except UserError as error:
        outcome = "refused"
        if len(str(error)) > 20_000:
            raise AssertionError("a message of more than 20,000 characters") from None
    with contextlib.suppress(UserError):
        read_demonstrations(path, keys["skip_malformed"])
    return outcome


def fuzz(seconds: float, seed: int, folder: Path) -> Counter[str]:
    """Trials for so long. Raises what a trial raises, with its number in a note."""
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            outcomes[trial(seed, outcomes.total(), folder)] += 1
        except BaseException as error:
            error.add_note(f"trial {outcomes.total()} of seed {seed}")
            raise
    print(dict(outcomes), file=sys.stderr)
    return outcomes


def problems(seconds: float, seed: int, folder: Path) -> list[str]:
    """None: the first problem is raised."""
    fuzz(seconds, seed, folder)
    return []


if __name__ == "__main__":
    sys.exit(main(__doc__, problems))
