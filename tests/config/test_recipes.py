"""Every recipe in the repository loads, as the command that its name or its head says."""

from pathlib import Path

import pytest

from pekoe.config import CurateConfig, EvalConfig, RLConfig, SFTConfig, dump_config, load_config
from pekoe.engine.servers.vllm import check_args

KINDS = {"rl": RLConfig, "sft": SFTConfig, "eval": EvalConfig, "curate": CurateConfig}
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_loads_as_the_command_that_its_head_says(path: Path, tmp_path: Path):
    said = [line.split() for line in path.read_text().splitlines() if f"recipes/{path.name}" in line]
    kinds = {
        words[words.index(command) + 1] for words in said for command in ("pekoe", "pekoe.cli") if command in words
    }
    (kind,) = kinds & KINDS.keys()
    config = load_config(path, kind=KINDS[kind])
    again = tmp_path / "again.toml"
    again.write_text(dump_config(config))
    assert load_config(again, kind=KINDS[kind]) == config


def test_the_evaluation_of_the_release():
    config = load_config(RECIPES / "eval-aime.toml", kind=EvalConfig)
    assert (config.eval.samples, config.eval.temperature, config.eval.top_p) == (32, 0.6, 0.95)
    check_args(config.engine.server.args, "cuda")  # flags that vLLM has today


@pytest.mark.parametrize("size", ["1.5b", "7b", "32b"])
def test_the_releases_reinforcement_learning(size: str):
    config = load_config(RECIPES / f"boba-{size}.toml", kind=RLConfig)
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
    config = load_config(RECIPES / "boba-sft-32b.toml", kind=SFTConfig)
    optim = config.optim
    assert (config.sft.epochs, config.sft.batch_size, config.train.token_budget) == (200, 64, 32_768)
    assert (optim.lr, optim.warmup_fraction, optim.weight_decay, optim.schedule) == (1e-5, 0.03, 0.1, "constant")
