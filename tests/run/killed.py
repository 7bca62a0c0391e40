"""A child that runs a recipe, and kills itself at a given point: by SIGKILL, so nothing is flushed, closed or told."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from pekoe.config import EvalConfig, RLConfig, SFTConfig, load_config
from pekoe.config.recipes import CurateConfig
from pekoe.core.errors import Interrupted
from pekoe.core.progress import NoProgress
from pekoe.core.roofline import Ceilings
from pekoe.run import hardware
from pekoe.run.build import build_rl
from pekoe.run.curate import run_curate
from pekoe.run.evaluate import run_eval
from pekoe.run.interrupt import Stop
from pekoe.run.rl import run_rl
from pekoe.run.sft import run_sft
from tests.forked import CONTEXT

torch.set_num_threads(1)


@dataclass(frozen=True)
class Point:
    """At the `call`-th call of `target` ("module:name.name") whose arguments `where` accepts, `act` (see `ACTS`)."""

    target: str
    call: int = 1
    act: str = "before"
    where: Callable[..., bool] = lambda *_: True


def kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")


def before(function: Callable[..., Any], *args: Any, **more: Any) -> NoReturn:
    kill()


def after(function: Callable[..., Any], *args: Any, **more: Any) -> NoReturn:
    function(*args, **more)
    kill()


def torn_line(function: Callable[..., Any], *args: Any, **more: Any) -> NoReturn:
    """Half of a line reaches the file."""
    lines = args[0]
    size = lines.path.stat().st_size
    function(*args, **more)
    os.truncate(lines.path, (size + lines.path.stat().st_size) // 2)
    kill()


def torn_bytes(function: Callable[..., Any], path: Path, data: bytes) -> NoReturn:
    function(path, data[: len(data) // 2])
    kill()


def torn_tensors(function: Callable[..., Any], *args: Any) -> NoReturn:
    function(*args)
    for file in args[1].glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    kill()


def in_backward(function: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """Gradients of the last layers are there, those of the first are not."""
    args[0].model.blocks[0].mlp.down_proj.weight.register_hook(lambda _: kill())
    return function(*args, **more)


def half_removed(function: Callable[..., Any], folder: Path, *args: Any, **more: Any) -> NoReturn:
    next(file for file in folder.rglob("*") if file.is_file()).unlink()
    kill()


def terminated(function: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """As a cluster's scheduler does it: the run is asked to stop, and goes on until it does."""
    os.kill(os.getpid(), signal.SIGTERM)
    return function(*args, **more)


def with_children(function: Callable[..., Any], *args: Any, **more: Any) -> NoReturn:
    """Writes down which processes it leaves behind."""
    function(*args, **more)
    children = psutil.Process().children(recursive=True)
    Path(args[0].config.run.dir, "children").write_text(" ".join(str(child.pid) for child in children))
    kill()


_ACTS = (before, after, torn_line, torn_bytes, torn_tensors, in_backward, half_removed, with_children, terminated)
ACTS = {act.__name__: act for act in _ACTS}


def arm(point: Point) -> None:
    module, names = point.target.split(":")
    *path, name = names.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def armed(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += point.where(*args)
        if calls == point.call and point.where(*args):
            return ACTS[point.act](function, *args, **more)
        return function(*args, **more)

    setattr(owner, name, armed)


def run(config: RLConfig | SFTConfig, points: Sequence[Point]) -> None:
    """The child's whole life."""
    # To measure the machine would take half of it.
    hardware.__dict__["measure_ceilings"] = lambda *_: Ceilings(flop_s=1e9, byte_s=1e9)
    for point in points:
        arm(point)
    if isinstance(config, SFTConfig):
        run_sft(config, NoProgress())
        return
    stop = Stop()
    try:
        with stop.listening(), ExitStack() as stack:
            run_rl(build_rl(config, NoProgress(), stop, stack))
    except Interrupted as stopped:
        sys.exit(stopped.status)


def killed_command(name: str, tree: dict[str, Any], act: str, line: int = 4) -> None:
    """`pekoe eval` or `pekoe curate` in a process that is killed at a line that it writes down (4: with curate, the
    third problem; the first line says what the file is)."""
    process = CONTEXT.Process(target=_command, args=(name, tree, act, line))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, process.exitcode


def _command(name: str, tree: dict[str, Any], act: str, line: int) -> None:
    arm(Point("pekoe.core.journal:JsonLines.append", line, act))
    if name == "eval":
        run_eval(load_config(tree, kind=EvalConfig), NoProgress())
    else:
        run_curate(load_config(tree, kind=CurateConfig), NoProgress())
