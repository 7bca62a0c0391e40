"""Children of a process that has imported torch and Pekoe: that takes seconds, and is done once for all of them."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.multiprocessing

from pekoe import cli
from pekoe.run.hardware import measure_ceilings

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
for name in ("run.build", "run.curate", "run.evaluate", "run.rl", "run.sft", "train.parallel"):  # which commands import
    importlib.import_module(f"pekoe.{name}")
LIMIT_S = 120
measure_ceilings(torch.device("cpu"), torch.float32)  # which children find done, too


class Child:
    """A call in a child, with what tests use of `subprocess.Popen`. What it prints goes to files in `folder`, or to a
    terminal."""

    def __init__(
        self,
        folder: Path,
        call: Callable[..., object],
        *args: Any,
        environment: Mapping[str, str] | None = None,
        terminal: Path | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._printed = (terminal, terminal) if terminal else (folder / "stdout", folder / "stderr")
        self._process = CONTEXT.Process(target=_run, args=(call, args, self._printed, dict(environment or {})))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = LIMIT_S) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"a child ran for more than {timeout} s"
        return self._process.exitcode

    def communicate(self, timeout: float = LIMIT_S) -> tuple[str, str]:
        self.wait(timeout)
        stdout, stderr = (file.read_text() for file in self._printed)
        return stdout, stderr

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def spawn(call: Callable[..., object], number: int, *args: Any) -> None:
    """`call(rank, *args)` in so many processes at once. Raises what one of them raises."""
    torch.multiprocessing.start_processes(call, args, number, start_method="forkserver")


def command(folder: Path, *words: str, **options: Any) -> Child:
    """`pekoe WORDS`, with the options of `Child`."""
    return Child(folder, _command, words, **options)


def _command(words: Sequence[str]) -> None:
    sys.argv = ["pekoe", *words]
    cli.main()


def _run(
    call: Callable[..., object], args: Sequence[Any], printed: Sequence[Path], environment: dict[str, str]
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that nohup started would have it ignored
    for descriptor, file in enumerate(printed, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY), descriptor)
    os.environ.update(environment)
    call(*args)
