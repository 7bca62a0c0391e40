"""The judge beside graders of the field on labelled answers, and how fast it judges long responses.

    make bench-verify                                        (some ten minutes on two cores)
    python benchmarks/bench_verify.py --graders minerva --cases FILE.jsonl ... --out

Cases are lines {"gold", "response", "response_boxed"?, "label"} (true, false; null is not scored). FN: a right answer
rejected; FP: a wrong one accepted. Every grader gets the same responses, one at a time in a process of its own, which
is killed and replaced after 15 s; that counts as a rejection. Throughput: 8,192 responses of 32,768 characters (8K
tokens or so) ending in the cases' own boxes, judged by two workers, nothing remembered from one to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rollout_report as report
from rich.table import Table

from pekoe.verify import JudgePool

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared/data/verifier"
GRADERS = ("math-verify", "prime-math", "minerva")
LIMIT_S, START_LIMIT_S = 15.0, 120.0
NUM_LONG, LONG_CHARS = 8192, 32_768
Case = dict[str, Any]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", type=Path, default=sorted(DATA.glob("*.jsonl")))
    parser.add_argument("--graders", nargs="*", choices=GRADERS, default=list(GRADERS))
    parser.add_argument("--responses", type=int, default=NUM_LONG, help="of the throughput run; 0: none")
    parser.add_argument("--out", nargs="?", const="", help="results as JSON (benchmarks/results/verify_...)")
    args = parser.parse_args(argv)
    args.device = "cpu"
    if not args.cases:
        parser.error(f"no labelled cases in {DATA}; name some with --cases")
    return args


class Grader:
    """One grader's process, started again whenever it has been killed."""

    def __init__(self, name: str, python: str, place: str) -> None:
        self._command = [python, str(HERE / "verify_grader.py"), name, place]
        self._process: subprocess.Popen[bytes] | None = None

    def grade(self, gold: Any, response: str) -> bool | None:
        """Its answer, or None where it gave none in time."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"gold": gold, "response": response}).encode() + b"\n")
            process.stdin.flush()
            return self._answer(LIMIT_S)["correct"]
        except (OSError, TimeoutError):
            self.close()
            return None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answer(START_LIMIT_S)
        return self._process

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            raise TimeoutError
        line = self._process.stdout.readline()
        if not line:
            raise BrokenPipeError
        return json.loads(line)


def graded(name: str, python: str, cases: Sequence[Case]) -> Iterator[tuple[bool | None, float]]:
    """Whether each case was accepted, and the seconds that this took."""
    with tempfile.TemporaryDirectory() as place:
        kind = {"pekoe": "math", "pekoe, boxes or not": "math-unboxed"}.get(name)
        pool = JudgePool(num_workers=1, time_limit_s=LIMIT_S, memo_size=0) if kind else None
        grader = None if pool else Grader(name, python, place)
        if pool:
            pool.submit(r"\boxed{x+1}", "1+x").result()  # started
        try:
            for case in cases:
                start = time.perf_counter()
                if pool and kind:
                    yield pool.submit(case["response"], case["gold"], kind).result().label == "correct", _since(start)
                elif grader:
                    yield grader.grade(case["gold"], case["response"]), _since(start)
        finally:
            (pool or grader).close()  # type: ignore[union-attr]


def _since(start: float) -> float:
    return time.perf_counter() - start


def errors(cases: Sequence[Case], accepted: Sequence[bool | None]) -> dict[str, int]:
    labels = [case["label"] for case in cases]
    return {
        "right": labels.count(True),
        "wrong": labels.count(False),
        "fn": sum(label is True and not yes for label, yes in zip(labels, accepted, strict=True)),
        "fp": sum(label is False and bool(yes) for label, yes in zip(labels, accepted, strict=True)),
        "killed": sum(yes is None for yes in accepted),
    }


def read_cases(path: Path) -> list[Case]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line | {"response": line.get("response_boxed") or line["response"]} for line in lines]


def throughput(cases: Sequence[Case], number: int) -> dict[str, float]:
    filling = "We compute $a_1 + a_2 = 3$ and go on with the next term, \\{which\\} is larger. "
    honest = [case for case in cases if case["label"] is not None and len(case["response"]) < 10_000]
    body = (filling * (LONG_CHARS // len(filling) + 1))[:LONG_CHARS]
    items = [
        (body + case["response"], case["gold"], "math") for i in range(number) for case in [honest[i % len(honest)]]
    ]
    with JudgePool(num_workers=2, memo_size=0) as pool:
        pool.judge_many([(r"\boxed{x+1}", "1+x", "math")] * 2)  # started
        start = time.perf_counter()
        pool.judge_many(items)
        return {"responses": number, "characters": len(body), "seconds": _since(start)}


def show(results: report.Result) -> None:
    table = Table(title="Errors on labelled answers: FN / FP (killed after 15 s)")
    columns = list(results["graders"])
    for name in ("cases", "right/wrong", *columns):
        table.add_column(name, justify="left" if name == "cases" else "right")
    for file in [*results["files"], "together"]:
        row = [results["graders"][name][file] for name in columns]
        cells = [f"{one['fn']} / {one['fp']}" + (f" ({one['killed']})" if one["killed"] else "") for one in row]
        table.add_row(file, f"{row[0]['right']}/{row[0]['wrong']}", *cells)
    cells = [" ".join(f"{1000 * s:.3g}" for s in results["graders"][name]["seconds"]) for name in columns]
    table.add_row("ms: median, 99 %, most", "", *cells)
    report.CONSOLE.print(table)
    if long := results.get("throughput"):
        rate = f"{long['responses']:,} responses of {long['characters']:,} characters: {long['seconds']:.1f} s"
        report.CONSOLE.print(rate, highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    python = os.environ.get("PEKOE_GRADERS_PYTHON") or str(HERE.parent / ".venv-graders/bin/python")
    results: report.Result = report.about("bench-verify", args) | {
        "args": {},
        "files": [path.stem for path in args.cases],
    }
    by_file = {path.stem: read_cases(path) for path in args.cases}
    cases = [case for file in by_file.values() for case in file]
    results["graders"] = {}
    for name in ("pekoe", "pekoe, boxes or not", *args.graders):
        if name in GRADERS and not os.access(python, os.X_OK):
            report.CONSOLE.print(f"without {name}: {python} is not there (make .venv-graders/.stamp)")
            continue
        accepted, seconds = zip(*graded(name, python, cases), strict=True)
        found: dict[str, Any] = {"together": errors(cases, accepted)}
        rest = list(accepted)
        for file, its in by_file.items():
            found[file], rest = errors(its, rest[: len(its)]), rest[len(its) :]
        ordered = sorted(seconds)
        found["seconds"] = [statistics.median(ordered), ordered[int(0.99 * len(ordered))], ordered[-1]]
        results["graders"][name] = found
        report.CONSOLE.print(f"{name}: {found['together']}", highlight=False)
    if args.responses:
        results["throughput"] = throughput(cases, args.responses)
    show(results)
    if args.out is not None:
        out = Path(args.out) if args.out else report.default_out(args, "verify")
        report.write(results, out)
        report.CONSOLE.print(str(out), highlight=False)


if __name__ == "__main__":
    sys.exit(main())
