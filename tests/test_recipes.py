"""Every recipe loads, and the release's have the release's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pekoe.core.config import KINDS, Config, RLConfig, SFTConfig, load_config, read_toml

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


def load(path: Path) -> Config:
    tree = read_toml(path)
    kind = "rl" if "num_steps" in tree else next(name for name in ("sft", "curate", "eval") if name in tree)
    return load_config(path, kind=KINDS[kind])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_loads_and_says_what_it_is(path: Path):
    load(path)
    assert path.read_text().startswith("# ")
    if path.stem.startswith("boba"):
        assert "AReaL" in path.read_text()


@pytest.mark.parametrize("size", ["1.5b", "7b", "32b"])
def test_the_releases_reinforcement_learning(size: str):
    config = load(next(path for path in RECIPES if path.stem == f"boba-{size}"))
    assert isinstance(config, RLConfig)
    rollout, algo, optim = config.rollout, config.algo, config.optim
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, rollout.max_new_tokens) == (512, 16, 27_648)
    assert (config.data.max_prompt_tokens, config.train.token_budget, algo.minibatches) == (1024, 30_720, 4)
    assert (algo.advantage, algo.reward, algo.kl, algo.clip_low, algo.clip_high) == ("global", 5.0, 0.0, 0.2, 0.2)
    assert (optim.lr, optim.eps, optim.beta2, optim.weight_decay, optim.schedule) == (
        2e-5,
        1e-5,
        0.95,
        0.05,
        "constant",
    )


def test_the_releases_supervised_fine_tuning():
    config = load(next(path for path in RECIPES if path.stem == "boba-sft-32b"))
    assert isinstance(config, SFTConfig)
    optim = config.optim
    assert (config.sft.epochs, config.sft.batch_size, config.train.token_budget) == (200, 64, 32_768)
    assert (optim.lr, optim.warmup_fraction, optim.weight_decay, optim.schedule) == (1e-5, 0.03, 0.1, "constant")
