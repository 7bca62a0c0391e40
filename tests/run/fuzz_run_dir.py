"""Run directories damaged at random: each goes on to the same bits, or is refused with one message (exit status 2; 1
where a write failed).

A program: `python -m tests.run.fuzz_run_dir --seconds 300 --seed 1`; its short form is a test. A run of two steps with
two checkpoints, one that samples ahead and one that does not, is copied, one of its files is damaged (bytes changed,
cut, emptied, removed, replaced by another file or by a directory, lengthened; foreign files), and the same command goes
on to a third step. Where the message names a way back (`--from STEP`), that is taken, too; then the report is made.
What breaks the promise is printed with its seed, and the status is 1.
"""

from __future__ import annotations

import random
import re
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from pekoe.config import RLConfig, load_config
from pekoe.core import RunError, UserError
from pekoe.core.progress import NoProgress
from pekoe.core.roofline import Ceilings
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Problem
from pekoe.data.problems import write_problems
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.model import Decoder, save_model
from pekoe.report.history import drawn, read_history
from pekoe.report.page import render
from pekoe.run import hardware
from pekoe.run.build import build_rl
from pekoe.run.interrupt import Stop
from pekoe.run.rl import run_rl
from pekoe.run.run_dir import exported_model
from tests.fuzzing import fault_of, main

Damage = Callable[[random.Random, Path], object]
FOREIGN = (
    *("rollouts/step-abc.jsonl.zst", "rollouts/step-000009.jsonl.zst", "rollouts/step-000001.7.jsonl.zst"),
    *("checkpoints/step-abc", "checkpoints/step-3", "checkpoints/step-000004", "checkpoints/.partial-step-000003/x"),
    *("model/README.md", "model/.cache/x", "model-latest/x", "discarded", "exported.json", ".model.old/x"),
)


def flip(rng: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes() or b" ")
    for _ in range(rng.choice([1, 4, 40])):
        data[rng.randrange(len(data))] ^= rng.choice([1, 0x20, 0xFF])
    file.write_bytes(data)


def cut(rng: random.Random, file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data) + 1)])


def remove_line(rng: random.Random, file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(line for line in lines if rng.random() < 0.8))


def empty(rng: random.Random, file: Path) -> None:
    file.write_bytes(b"")


def remove(rng: random.Random, file: Path) -> None:
    file.unlink()


def as_directory(rng: random.Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


def lengthen(rng: random.Random, file: Path) -> None:
    tail = rng.choice([b"\0" * 500, b"\n", b"{}\n", b"[1]\n", b"[" * 50_000 + b"\n", b'{"event": "step"}\n', b"\xff"])
    file.write_bytes(file.read_bytes() + tail)


def other_content(rng: random.Random, file: Path) -> None:
    run = next(folder for folder in file.parents if (folder / "journal.jsonl").exists())
    shutil.copyfile(rng.choice(sorted(path for path in run.rglob("*") if path.is_file())), file.with_name("other"))
    file.with_name("other").replace(file)


DAMAGES: tuple[Damage, ...] = (flip, flip, flip, cut, remove_line, empty, remove, as_directory, lengthen, other_content)


class Fuzz:
    """The runs to be damaged, and what they come to. `folder` is scratch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outcomes, self.problems = folder, Counter[str](), list[str]()
        files = make_char_tokenizer("0123456789+=\\{}boxed")
        spec: dict[str, Any] = {"family": "qwen2", "vocab_size": Tokenizer(files).vocab_size, "max_positions": 64}
        spec |= {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
        model = Decoder(ModelSpec(**spec, intermediate_size=16, qkv_bias=True, tied_embeddings=True))
        model.init_weights(0)
        model.assets = dict(files)
        save_model(model, folder / "model")
        numbers = [(a, b) for a in range(4) for b in range(3)]
        write_problems(
            folder / "train.jsonl",
            [Problem(f"{a}+{b}", ({"role": "user", "content": f"{a}+{b}="},), str(a + b)) for a, b in numbers],
        )
        self.wholes: list[dict[str, bytes]] = []
        for lag in (0, 1):
            self.train(self.recipe(folder / f"begun-{lag}", lag, 2))
            self.train(self.recipe(folder / f"whole-{lag}", lag, 3))
            self.wholes.append(self.bits(folder / f"whole-{lag}"))

    def recipe(self, run: Path, lag: int, num_steps: int) -> RLConfig:
        tree: dict[str, Any] = {
            "num_steps": num_steps,
            "run": {"dir": str(run), "threads": 1},
            "model": {"path": str(self.folder / "model"), "device": "cpu"},
            "data": {"train": str(self.folder / "train.jsonl"), "max_prompt_tokens": 8},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4, "max_lag": lag},
            "optim": {"lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
            "algo": {"minibatches": 1},
            "train": {"token_budget": 64, "save_every": 1, "keep_checkpoints": 2},
            "verify": {"workers": 1, "random": True},
            "engine": {"block_tokens": 4},
        }
        if lag:
            tree["algo"] |= {"proximal": "recompute"}
        return load_config(tree)

    def train(self, config: RLConfig, from_step: int | None = None) -> None:
        with ExitStack() as stack:
            run_rl(build_rl(config, NoProgress(), Stop(), stack, from_step))

    def bits(self, run: Path) -> dict[str, bytes]:
        """What must come out alike: the model, and what became of each prompt."""
        model = (exported_model(run)[0] / "model.safetensors").read_bytes()
        return {"model": model, "ledger": (run / "ledger.jsonl").read_bytes()}

    def trial(self, seed: int) -> None:
        """One directory: damaged, gone on with, gone back in where the message says how, and reported on."""
        rng = random.Random(seed)
        lag, run = rng.randrange(2), self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.folder / f"begun-{lag}", run)
        what = self.damage(rng, run)
        config = self.recipe(run, lag, 3)
        from_step: int | None = None
        for _ in range(4):
            try:
                self.train(config, from_step)
            except UserError as error:
                self.outcomes["refused"] += 1
                if fault := fault_of(str(error)):
                    self.problems.append(f"seed {seed} ({what}): {fault}")
                if (way := re.search(r"--from (\d+) ", str(error))) is None or from_step == int(way[1]):
                    break
                from_step = int(way[1])
            except RunError as error:  # a write that fails, such as where a directory is in the way
                self.outcomes["failed"] += 1
                if fault := fault_of(str(error)):
                    self.problems.append(f"seed {seed} ({what}): {fault}")
                break
            except BaseException:
                self.problems.append(f"seed {seed} ({what}): {traceback.format_exc()}")
                break
            else:
                self.outcomes["went on" if from_step is None else "went back"] += 1
                now = self.bits(run)
                # A ledger's own lines are not trusted to be whole: only the file's length is compared at the start.
                names = ["model"] if "ledger" in what else ["model", "ledger"]
                self.problems += [
                    f"seed {seed} ({what}): another {name}" for name in names if now[name] != self.wholes[lag][name]
                ]
                break
        self.report(run, f"seed {seed} ({what})")

    def damage(self, rng: random.Random, run: Path) -> str:
        if rng.random() < 0.15:
            path = run / rng.choice(FOREIGN)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(rng.randbytes(20))
            return f"a foreign {path.relative_to(run)}"
        files = sorted(path for path in run.rglob("*") if path.is_file() and path.relative_to(run).parts[0] != "logs")
        small = [path for path in files if path.parent == run or "step-000002" in path.parts]
        file, act = rng.choice(small if rng.random() < 0.7 else files), rng.choice(DAMAGES)
        act(rng, file)
        return f"{act.__name__} {file.relative_to(run)}"

    def report(self, run: Path, where: str) -> None:
        try:
            with drawn(run):
                render([read_history(run)])
        except UserError:
            self.outcomes["no report"] += 1
        except BaseException:
            self.problems.append(f"{where}: report: {traceback.format_exc()}")


def fuzz(seconds: float, seed: int, folder: Path, at_least: int = 1) -> list[str]:
    """Damage directories for `seconds`; returns what broke the promise."""
    measured = mock.patch.object(hardware, "measure_ceilings", return_value=Ceilings(flop_s=1e9, byte_s=1e9))
    with measured, mock.patch("pekoe.report.page.get_plotlyjs", return_value=""):
        part = Fuzz(folder)
        begin, first = time.monotonic(), seed
        while time.monotonic() < begin + seconds or seed < first + at_least:
            part.trial(seed)
            seed += 1
    print(f"{seed - first} directories, {dict(part.outcomes)}")
    return part.problems


if __name__ == "__main__":
    sys.exit(main(__doc__, fuzz))
