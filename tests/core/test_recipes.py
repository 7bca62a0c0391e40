"""Every recipe in the repository loads, as the command that its name or its head says."""

from pathlib import Path

import pytest

from pekoe.core.config import KINDS, EvalConfig, dump_config, load_config
from pekoe.engine.vllm import check_args

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
