"""Runs the parts of `pekoe doctor --gpu` one after another, and says what became of each.

Each part is a process of its own, forked from one that has imported everything and touched no device: it can be ended
at its limit, and a part that leaves the device unusable fails alone. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from pekoe.core.errors import UserError, nearest
from pekoe.core.words import counted

_HERE = "pekoe.run.first_hour"
_IMPORT_S = 300.0  # until a process has imported what it needs

# (module, seconds that it may take, what it proves)
PARTS: dict[str, tuple[str, float, str]] = {
    "machine": ("speeds", 60, "the device, and the rates of a matrix product and of its memory"),
    "kernels": ("proofs", 180, "paged attention: the kernels against plain torch"),
    "varlen": ("proofs", 120, "attention of packed documents, forward and backward, against its definition"),
    "i1": ("proofs", 120, "the engine's log-probs are the trainer's, through updates (I1)"),
    "training": ("proofs", 120, "a packed batch is one by one (I2); bf16 beside float32"),
    "graphs": ("proofs", 120, "decoding by CUDA graphs equals decoding without, also after an update"),
    "lora": ("proofs", 120, "adapters: only they learn, the engine samples with them, merged they give the same"),
    "publish": ("publish", 120, "engines hold the trainer's weights, and one that does not is found out (I4)"),
    "broadcast": ("publish", 180, "weights from one process to another: NCCL between two GPUs"),
    "colocate": ("publish", 120, "an engine gives its memory back while others train, and goes on"),
    "memory": ("speeds", 180, "the memory of a training step, predicted and measured"),
    "decode": ("speeds", 240, "tokens/s of decoding, and its share of what arithmetic and memory allow"),
    "prefix": ("speeds", 120, "a prompt that many samples share, beside as many prompts"),
    "mfu": ("speeds", 300, "training: share of the device's FLOP/s at sequences of 2K, 8K and 27K tokens"),
    "demo": ("publish", 600, "the demo: SFT, then RL on verified answers, on the device"),
}

Status = Literal["PASS", "FAIL", "SKIP"]


@dataclass(slots=True)
class Outcome:
    """What became of a part. Example: Outcome("i1", "PASS", 2.1, [{"name": "bf16 mean", "value": 0.004, ...}])."""

    part: str
    status: Status = "PASS"
    seconds: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    why: str = ""  # it failed, or was skipped
    output: str = ""  # the end of what a failed part wrote, with its traceback


def prove(device: str, chosen: str | None, out: Path | None, say: Callable[[str], object]) -> bool:
    """Run the parts, and write their outcomes to `out`. Returns whether none failed.

    Args:
        device: "cuda", or "cpu", where sizes are small.
        chosen: names of parts, with commas; None: all.
        say: is given the lines of a table as they become known.
    """
    names = _names(chosen)
    if device not in ("cuda", "cpu"):
        raise UserError(
            f"doctor --gpu --device: expected 'cuda' or 'cpu', got {device!r}.{nearest(device, ('cuda', 'cpu'))}"
        )
    if device == "cuda":
        _require_cuda()
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"doctor --json: expected a file in a directory that is there, got {out}")
    outcomes: list[Outcome] = []
    for outcome in run_parts(device, names):
        outcomes.append(outcome)
        say("\n".join(lines_of(outcome)))
    count = {status: sum(o.status == status for o in outcomes) for status in ("PASS", "FAIL", "SKIP")}
    seconds = sum(o.seconds for o in outcomes)
    say(f"{counted(len(outcomes), 'part')} in {seconds:.0f} s: " + ", ".join(f"{n} {s}" for s, n in count.items() if n))
    if out is not None:
        record = {
            "command": "pekoe doctor --gpu",
            "device": device,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions(),
            "parts": [asdict(outcome) for outcome in outcomes],
        }
        partial = out.with_name(f".{out.name}")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(out)
    return not count["FAIL"]


def _names(chosen: str | None) -> list[str]:
    if chosen is None:
        return list(PARTS)
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            raise UserError(f"doctor --parts: expected names of parts, got {name!r}.{nearest(name, PARTS)}")
    if not names:
        raise UserError(f"doctor --parts: expected names of parts, got none. Valid: {', '.join(PARTS)}.")
    return [name for name in PARTS if name in names]


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "doctor --gpu: expected a CUDA device, found none on this machine; nearest: --device cpu, which runs the "
            "same parts at small sizes"
        )


def versions() -> dict[str, str]:
    """Of Python, and of the packages that decide what is measured."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in ("pekoe", "torch", "triton", "numpy", "numba"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def run_parts(device: str, names: list[str], limits: dict[str, float] | None = None) -> Iterator[Outcome]:
    """The outcome of each part, when it has ended. `limits`: in place of the parts' own."""
    context = get_context("forkserver")
    context.set_forkserver_preload(sorted({_module(name) for name in names}))
    for name in names:
        limit = (limits or {}).get(name, PARTS[name][1])
        function = f"{_module(name)}:{name}"
        with tempfile.TemporaryDirectory(prefix="pekoe-gpu-") as folder:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(function, device, folder, theirs))
            process.start()
            theirs.close()
            outcome = Outcome(name)
            ended = _listen(ours, outcome, _IMPORT_S, _IMPORT_S)
            start = time.monotonic()
            while not ended:
                ended = _listen(ours, outcome, max(0.0, start + limit - time.monotonic()), limit)
            outcome.seconds = round(time.monotonic() - start, 2)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # what it started, too
            process.join()
            if outcome.status == "PASS" and not all(figure["ok"] for figure in outcome.figures):
                outcome.status, outcome.why = "FAIL", "a figure is not as expected"
            if outcome.status == "FAIL":
                outcome.output = _end_of(Path(folder) / "output", outcome.output)
        yield outcome


def _module(part: str) -> str:
    module = PARTS[part][0]
    return module if "." in module else f"{_HERE}.{module}"


def _listen(pipe: Connection, outcome: Outcome, wait_s: float, limit: float) -> bool:
    """Take what a part says next. Returns whether it was the last."""
    if not pipe.poll(wait_s):
        outcome.status, outcome.why = "FAIL", f"expected to end within {limit:g} s, did not"
        return True
    try:
        kind, content = pipe.recv()
    except EOFError:
        outcome.status, outcome.why = "FAIL", "its process died"
        return True
    if kind in ("begin", "figure"):
        outcome.figures += content
        return False
    if kind == "skip":
        outcome.status, outcome.why = "SKIP", content
    elif kind == "error":
        outcome.status, (outcome.why, outcome.output) = "FAIL", content
    return True


def _run(function: str, device: str, folder: str, pipe: Connection) -> None:
    """In the part's process: send its figures, then how it ended."""
    os.setsid()
    log = os.open(Path(folder) / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    site, (module, name) = import_module(f"{_HERE}.site"), function.split(":")
    part = getattr(import_module(module), name)
    pipe.send(("begin", []))
    try:
        for figure in part(site.Site.of(device, Path(folder))):
            pipe.send(("figure", [asdict(figure)]))
        pipe.send(("end", None))
    except site.Skip as skip:
        pipe.send(("skip", str(skip)))
    except BaseException as error:
        pipe.send(("error", (f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc())))
    finally:
        pipe.close()


def _end_of(log: Path, trace: str) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return (text + trace)[-4000:]


def lines_of(outcome: Outcome) -> list[str]:
    """A part's rows of the table."""
    lines = [f"{outcome.status}  {outcome.part:<10}{outcome.seconds:6.1f} s  {outcome.why or PARTS[outcome.part][2]}"]
    for figure in outcome.figures:
        value = figure["value"]
        text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
        expected = f"  ({figure['expected']})" if figure["expected"] else ""
        lines.append(f"      {figure['name']:<58} {text}{expected}{'' if figure['ok'] else '  <-- not so'}")
    return lines + [f"      | {line}" for line in outcome.output[-1500:].splitlines()]
