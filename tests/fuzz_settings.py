"""Every setting with odd values: each is taken, or refused with one clear message and status 2.

A program: `python -m tests.fuzz_settings --seconds 300 --seed 1`; its short form is a test. Settings are given as users
give them, `section.key=value` on the command line of `rl`, `sft`, `eval` and `curate` with --dry-run, and of `doctor`.
With --run, commands run whole, each in a process with limits; what takes longer than these counts as taken.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

from pekoe import cli
from pekoe.config.keys import keys_of
from pekoe.config.recipes import COMMANDS, dump_config, load_config
from pekoe.core.errors import UserError

from .fuzz_models import make_directory
from .fuzzing import ODD, Cases, fault_of, main

RUN_LIMIT_S, RUN_MEMORY_BYTES = 20, 6 << 30
# Values as the command line has them, which TOML has no other way to say.
TEXTS = [
    "nan",
    "-inf",
    "[" * 5_000,
    "{a=" * 500,
    "{" + "a." * 3_000 + "a=1}",
    "1" * 5_000,
    "0x" + "f" * 50,
    "1979-05-27",
    "''",
    "'''",
    "=",
    "\ufeff1",
]


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """A small recipe of each command, in order."""
    make_directory(folder / "model")
    rows = [{"uid": f"{a}", "prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    demonstrations = [{"prompt": f"{a}+{a}=", "response": f"\\boxed{{{2 * a}}}"} for a in range(5)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demonstrations))
    model = {"path": str(folder / "model"), "device": "cpu"}
    data = {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 8}
    small: dict[str, Any] = {"engine": {"block_tokens": 4, "kv_gib": 0.01}, "verify": {"workers": 1, "random": True}}
    run: dict[str, Any] = {"model": model, "run": {"dir": str(folder / "run"), "threads": 1}}
    return {
        "rl": {
            **run,
            **small,
            "num_steps": 1,
            "data": data,
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8},
            "train": {"token_budget": 64},
        },
        "sft": {**run, "data": {"train": str(folder / "sft.jsonl")}, "train": {"token_budget": 64}},
        "eval": {**small, "model": model, "eval": {"data": data["train"], "samples": 2, "max_new_tokens": 8}},
        "curate": {**small, "model": model, "data": data, "out": str(folder / "out"), "curate": {"samples": 2}},
    }


def text_of(value: Any) -> str:
    """A value as TOML writes it, where it can."""
    if isinstance(value, bool | list | dict):
        with contextlib.suppress(ValueError, RecursionError):
            return json.dumps(value, ensure_ascii=False).replace(": ", " = ").replace("null", '""')
    return str(value)


def call(arguments: list[str]) -> tuple[int, str]:
    """The status of a command, and what it wrote to stderr. Other exceptions than SystemExit go through."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["pekoe", *arguments]),
        mock.patch.dict("os.environ"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stopped:
            return int(stopped.code or 0), err.getvalue()
    return 0, err.getvalue()


def check(arguments: list[str]) -> None:
    """Run a command; raise what it refuses, and AssertionError where it ends as it should not."""
    status, message = call(arguments)
    if status == 2:
        raise UserError(message)
    assert status == 0, f"status {status}: {message[-500:]}"


def run_whole(arguments: list[str], folder: Path) -> None:
    """As `check`, in a process of its own. Status 1 with a message is right, too: a run that fails."""
    log = folder / "log"
    child = os.fork()
    if child == 0:
        status = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.setpgid(0, 0)
            os.chdir(folder)  # names of files that are not absolute
            resource.setrlimit(resource.RLIMIT_AS, (RUN_MEMORY_BYTES, RUN_MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
            sys.argv = ["pekoe", *arguments]
            cli.main()
            status = 0
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = _wait(child)
    text = log.read_text(errors="replace")
    if status == 2:
        raise UserError(text[-3000:])
    wrong = status is not None and status not in (0, 1)
    assert not wrong, f"status {status}: {text[-700:]}"
    assert "Traceback" not in text, f"status {status}: {text[-700:]}"
    assert status != 1 or "pekoe: " in text, f"status 1 without a message: {text[-700:]}"


def _wait(child: int) -> int | None:
    """Its status, negative for a signal; None where it was ended for its time."""
    end = time.monotonic() + RUN_LIMIT_S
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.05)


def fuzz(seconds: float, seed: int, whole: bool = False) -> Cases:
    """Cases for so long, from `seed` on."""
    cases = Cases()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        trees = recipes(folder)
        files = {name: folder / f"{name}.toml" for name in trees}
        for name, file in files.items():
            file.write_text(dump_config(load_config(trees[name], (), COMMANDS[name])))
            cases.in_order(f"{name} in order", lambda name=name, file=file: check([name, str(file), "--dry-run"]))
        keys = {name: [key.name.replace("[]", "") for key in keys_of(kind)] for name, kind in COMMANDS.items()}
        for names in keys.values():
            names += ["xyz", "algo.xyz"]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            seed += 1
            draw = random.Random(seed)
            name = draw.choice(list(COMMANDS))
            settings = [_setting(draw, keys[name]) for _ in range(1 if draw.random() < 0.8 else 2)]
            arguments = [str(files[name]), *settings]
            what = f"seed {seed}: {name} {' '.join(settings)[:200]!r}"
            if not cases.run(what, lambda name=name, arguments=arguments: check([name, *arguments, "--dry-run"])):
                continue
            if whole:
                cases.run(what, lambda name=name, arguments=arguments: run_whole([name, *arguments], folder))
            elif name in ("rl", "sft"):
                more = ["--memory-gib", draw.choice(["1", "1e9", "inf", "nan", "1e300"])] if seed % 4 else []
                cases.run(f"doctor, {what} {more}", lambda a=arguments, m=more: _doctor([*a, *m]))
    return cases


def _setting(draw: random.Random, keys: list[str]) -> str:
    value = draw.choice(TEXTS) if draw.random() < 0.15 else text_of(draw.choice(ODD))
    return f"{draw.choice(keys)}={value}"


def _doctor(arguments: list[str]) -> None:
    status, message = call(["doctor", *arguments])
    assert status in (0, 2), f"status {status}: {message[-500:]}"
    assert status == 0 or not fault_of(message), fault_of(message)


if __name__ == "__main__":
    whole = "--run" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--run"]
    sys.exit(main(__doc__, lambda seconds, seed, _: fuzz(seconds, seed, whole).end()))
