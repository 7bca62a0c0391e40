"""Runs of RL on families of transformers: the loop's invariants hold as for our own decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pekoe.config import RLConfig
from pekoe.core.errors import Interrupted, UserError
from pekoe.core.progress import NoProgress
from pekoe.core.records import read_records, record_of, write_records
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
@pytest.mark.parametrize("routing", ["rollout.replay_routing=false", "rollout.replay_routing=true"])
def test_a_resumed_run_has_the_same_bits(
    lag: str, routing: str, family_run: Callable[[str], Path], build: Build, train: Train, tmp_path: Path
):
    family_run("gpt_oss")
    unbroken, broken = (build("num_steps=4", lag, routing, f"run.dir={tmp_path / name}") for name in "ab")
    train(unbroken)
    with pytest.raises(Interrupted):
        train(broken, stop_after_responses(40))
    train(broken)
    first, second = (load_model(Path(config.run.dir) / "model") for config in (unbroken, broken))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    losses = [[step["loss"] for step in steps_of(config)] for config in (unbroken, broken)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("schedule", [(), ("rollout.max_lag=1", "rollout.during_update=go_on")])
def test_a_run_that_replays_routing(
    schedule: tuple[str, ...], family_run: Callable[[str], Path], build: Build, train: Train
):
    """The experts are in the rollouts of every step, and training again from them gives the same bits."""
    family_run("qwen3_moe")
    config = build("rollout.replay_routing=true", "algo.proximal=recompute", *schedule)
    train(config)
    for step in steps_of(config):
        for line in read_records(Path(config.run.dir), step["step"]):
            size = len(line["prompt_tokens"]) + len(line["tokens"])
            assert line["routing"].shape == (size, 2, 2)
            assert line["routing"][:-1].max() < 4
        if not schedule:
            assert step["logprob_diff_max"] <= 1e-4
    again = replay_run(Path(config.run.dir), NoProgress())
    assert again.same
    assert again.same_weights


def test_other_experts_than_recorded_train_otherwise(family_run: Callable[[str], Path], build: Build, train: Train):
    """Training again depends on the experts in the file: with those of another step's rows it gives another loss."""
    family_run("qwen3_moe")
    config = build("rollout.replay_routing=true", "num_steps=1")
    train(config)
    folder = Path(config.run.dir)
    lines = read_records(folder, 1)
    for line in lines:
        line["routing"][:-1] = 3 - line["routing"][:-1]
    records = [record_of(line) for line in lines]
    arrays = ("prompt_tokens", "tokens", "logprobs", "routing")
    write_records(
        folder / "rollouts" / "step-000001",
        [{name: value for name, value in line.items() if name not in (*arrays, "spans")} for line in lines],
        records,
    )
    assert replay_run(folder, NoProgress()).differing == [1]


def test_replaying_a_dense_models_routing_is_refused(build: Build, train: Train):
    with pytest.raises(UserError, match=r"rollout\.replay_routing: expected false for qwen\d?, which has no experts"):
        train(build("rollout.replay_routing=true"))
