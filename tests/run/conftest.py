"""A tiny task that a tiny model can be run on: single digits, random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pekoe.config import RLConfig, load_config
from pekoe.core.progress import NoProgress, ProgressReporter
from pekoe.core.types import Problem, Trajectory, Verdict
from pekoe.data.problems import write_problems
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.model import Decoder, save_model
from pekoe.run.build import RLParts, build_rl
from pekoe.run.interrupt import Stop
from pekoe.run.rl import run_rl

# In an environment older than the extras `serve` and `test` that bring them.
collect_ignore = [] if find_spec("openai") and find_spec("uvicorn") else ["test_serve.py", "test_programs.py"]
ALPHABET = "0123456789+=\\{}boxed"


class Messages(NoProgress):
    """A view that keeps the messages."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Decoder]) -> Path:
    """A model directory `model` and problem files `train.jsonl`, `held_out.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    files = make_char_tokenizer(ALPHABET)
    model = make_model(vocab_size=Tokenizer(files).vocab_size, max_positions=64, scale=1.0)
    model.assets = dict(files)
    save_model(model, folder / "model")
    problems = [
        Problem(f"{a}+{b}", ({"role": "user", "content": f"{a}+{b}="},), str(a + b)) for a in range(5) for b in range(5)
    ]
    write_problems(folder / "train.jsonl", problems[:18])
    write_problems(folder / "held_out.jsonl", problems[18:])
    return folder


@pytest.fixture
def recipe(tiny_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "num_steps": 3,
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
        "model": {"path": str(tiny_dir / "model"), "device": "cpu"},
        "data": {"train": str(tiny_dir / "train.jsonl"), "max_prompt_tokens": 8},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 12},
        "optim": {"lr": 1e-3},
        "train": {"token_budget": 64, "save_every": 2},
        "verify": {"workers": 1, "random": True},  # a random model is never right: verdicts by coin teach something
        "engine": {"block_tokens": 4},
    }


@pytest.fixture
def build(recipe: dict[str, Any]):
    """Builds and runs: `build(*overrides)` gives a config; `run(config)` trains."""

    def make(*overrides: str) -> RLConfig:
        return load_config(recipe, overrides)

    return make


def stop_after_responses(number: int) -> Callable[[RLParts], None]:
    """Asks a run to stop (as Ctrl-C does) when it judges one response more."""

    def meddle(parts: RLParts) -> None:
        rollouts: Any = parts.rollouts
        submit, seen = rollouts._judge.submit, count(1)

        def counted(problem: Problem, trajectory: Trajectory) -> Future[Verdict]:
            rollouts._stop.requested |= next(seen) > number
            return submit(problem, trajectory)

        rollouts._judge.submit = counted

    return meddle


@pytest.fixture
def train():
    """Runs a config to its end; `meddle(parts)` may change the parts first."""

    def run(
        config: RLConfig, meddle: Callable[[RLParts], None] = lambda _: None, view: ProgressReporter | None = None
    ) -> None:
        stop = Stop()
        with ExitStack() as stack:
            parts = build_rl(config, view or NoProgress(), stop, stack)
            meddle(parts)
            run_rl(parts)

    return run


def checkpoint_in_name(run_dir: Path, step: int) -> None:
    """What `RunDir` looks at before a trainer loads it, and no more."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    state = {"progress": {"step": step, "order": {}}, "offsets": {"journal": 0, "ledger": 0}}
    (folder / "state.json").write_text(json.dumps(state))
