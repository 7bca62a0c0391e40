"""Runs of RL on families of transformers: the loop's invariants hold as for our own decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pekoe.config import RLConfig
from pekoe.core.errors import Interrupted
from pekoe.core.progress import NoProgress
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.model import load_model, read_spec, save_model
from pekoe.run.doctor import forecast, step_summary
from pekoe.run.replay import replay_run
from tests.families.configs import make
from tests.run.conftest import ALPHABET, stop_after_responses
from tests.run.conftest import build as build
from tests.run.conftest import recipe as recipe
from tests.run.conftest import tiny_dir as tiny_dir
from tests.run.conftest import train as train
from tests.run.test_rl import steps_of

Build = Callable[..., RLConfig]
Train = Callable[..., None]


@pytest.fixture
def family_run(recipe: dict[str, Any], tmp_path: Path) -> Callable[[str], Path]:
    """family_run(family): let the recipe train a tiny model of it, with the tokenizer of the tiny task."""

    def prepare(family: str) -> Path:
        files = make_char_tokenizer(ALPHABET)
        make(family, vocab_size=Tokenizer(files).vocab_size).save_pretrained(tmp_path / "bare")
        model = load_model(tmp_path / "bare", implementation="transformers")
        model.assets = dict(files)
        save_model(model, tmp_path / "start")
        recipe["model"] |= {"path": str(tmp_path / "start"), "implementation": "transformers"}
        return tmp_path / "start"

    return prepare


@pytest.mark.parametrize(
    "family", ["qwen3_moe", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma3_text", "gpt_oss", "qwen2"))]
)
def test_a_run_holds_its_invariants(family: str, family_run: Callable[[str], Path], build: Build, train: Train):
    start = family_run(family)
    config = build("algo.kl=0.1")
    said = step_summary(config, read_spec(start, "transformers")[0])
    assert ("2 of 4 experts" in said[0]) == (family in ("qwen3_moe", "gpt_oss"))
    assert forecast(config).fits
    train(config)
    for step in steps_of(config):  # I1 and I4
        assert step["logprob_diff_max"] <= 1e-4
        assert step["sync_canary_diff"] <= 1e-4
        assert step["reference_kl"] >= 0
        assert ("expert_entropy" in step) == (family in ("qwen3_moe", "gpt_oss"))
    again = replay_run(Path(config.run.dir), NoProgress())
    assert again.same
    assert again.same_weights
    loaded: Any = AutoModelForCausalLM.from_pretrained(Path(config.run.dir) / "model", output_loading_info=True)
    written, found = loaded
    assert not any(found.values())
    before = AutoModelForCausalLM.from_pretrained(start)
    changed = [not torch.equal(p, q) for p, q in zip(written.parameters(), before.parameters(), strict=True)]
    assert sum(changed) > 0.8 * len(changed)


@pytest.mark.slow
@pytest.mark.parametrize("lag", ["rollout.max_lag=0", "rollout.max_lag=1"])
def test_a_resumed_run_has_the_same_bits(
    lag: str, family_run: Callable[[str], Path], build: Build, train: Train, tmp_path: Path
):
    family_run("gpt_oss")
    unbroken, broken = (build("num_steps=4", lag, f"run.dir={tmp_path / name}") for name in "ab")
    train(unbroken)
    with pytest.raises(Interrupted):
        train(broken, stop_after_responses(40))
    train(broken)
    first, second = (load_model(Path(config.run.dir) / "model") for config in (unbroken, broken))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    losses = [[step["loss"] for step in steps_of(config)] for config in (unbroken, broken)]
    assert losses[0] == losses[1]
