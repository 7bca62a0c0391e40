"""Every recipe in the repository loads, as the command that its name or its head says."""

import re
from pathlib import Path

import pytest

from pekoe.config import EvalConfig, RLConfig, SFTConfig, dump_config, load_config
from pekoe.config.base import flatten, read_toml, shipped_recipes, start_of_recipe
from pekoe.config.recipes import COMMANDS
from pekoe.core import UserError
from pekoe.engine.servers.vllm import check_args

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


ALGORITHMS = ("ppo", "grpo", "dr-grpo", "rloo", "dapo")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_recipe_loads_as_the_command_that_its_head_says(name: str, tmp_path: Path):
    (words,) = {
        tuple(line.split()) for line in re.findall(rf"^# .*pekoe(?:\.cli)? ((?:rl|sft|eval|curate) .*?\b{name})(?=$| )",
        (RECIPES / f"{name}.toml").read_text(), re.MULTILINE)
    }  # fmt: skip
    kind, (recipe, *more) = COMMANDS[words[0]], words[1:]
    config = load_config(recipe, more, kind)
    again = tmp_path / "again.toml"
    again.write_text(dump_config(config))
    assert load_config(again, kind=kind) == config
    said = start_of_recipe(name, Path("own.toml")).split()
    assert said[said.index(words[0]) :] == [*words[:-1], "own.toml"]


def test_an_algorithm_alone_is_no_recipe(tmp_path: Path):
    with pytest.raises(UserError, match=r"grpo sets keys of another recipe, .*: pekoe rl laptop grpo$"):
        load_config("grpo")
    (tmp_path / "own.toml").write_text("num_steps = 3\n")
    with pytest.raises(UserError, match=r"missing key 'data'\.$"):
        load_config(tmp_path / "own.toml")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_changes_any_recipe_and_nothing_else(name: str):
    laptop, changed = load_config("laptop"), load_config("laptop", [name])
    own = flatten(read_toml(Path(name)))
    assert {key.partition(".")[0] for key in own} <= {"algo", "rollout"}
    assert flatten(changed.model_dump()) == flatten(laptop.model_dump()) | own
    head = (RECIPES / f"{name}.toml").read_text().partition("\n[")[0]
    assert "arXiv:" in head
    assert load_config("laptop", [name, "algo.kl=0.5"]).algo.kl == 0.5  # in the order of the words


def test_the_releases_algorithm_is_the_default():
    assert load_config("laptop", ["ppo"]) == load_config("laptop")
    assert load_config("boba-7b", ["ppo"]) == load_config("boba-7b")


def test_algorithms_differ_in_what_their_papers_change():
    algos = {name: load_config("laptop", [name]).algo for name in ALGORITHMS}
    assert {name: (algo.advantage, algo.normalise) for name, algo in algos.items()} == {
        "ppo": ("global", "token"),
        "grpo": ("grpo", "sequence"),
        "dr-grpo": ("dr_grpo", "max_length"),
        "rloo": ("rloo", "max_length"),
        "dapo": ("grpo", "token"),
    }
    assert (algos["dapo"].clip_low, algos["dapo"].clip_high, algos["grpo"].kl) == (0.2, 0.28, 0.04)
    assert load_config("laptop", ["dapo"]).rollout.dynamic_rounds > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["laptpo"],
            "laptpo: expected a recipe (a TOML file, or a name of `pekoe recipe`), found none. Did you mean 'laptop'",
        ),
        (["recipes-elsewhere/grpo.toml"], "found none. Did you mean 'grpo', which comes with Pekoe?"),
        (["laptop", "gpro"], "override 'gpro': expected section.key=value, or a recipe. Did you mean 'grpo'?"),
        (["laptop", "mine.toml"], "mine.toml: expected a recipe"),
        (["grpo"], "missing key 'num_steps'"),
    ],
)
def test_recipes_that_are_not_there(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_config(words[0], words[1:])
    assert message in str(caught.value)


def test_a_recipe_of_another_command_is_said_to_be_one():
    with pytest.raises(UserError, match=r"^laptop: expected a recipe of `pekoe sft`, got one of `pekoe rl`$"):
        load_config("laptop", [], SFTConfig)
    with pytest.raises(UserError, match=r"^sft: expected a recipe of `pekoe rl`, got one of `pekoe sft`$"):
        load_config("sft")
    with pytest.raises(UserError, match=r"laptop: unknown key 'optim\.lrr'"):
        load_config("laptop", ["optim.lrr=1"], SFTConfig)


def test_a_file_of_ones_own_comes_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.toml").write_text("[optim]\nlr = 0.5\n")
    (tmp_path / "laptop").mkdir()  # a run directory may have a recipe's name
    assert load_config("laptop", ["more.toml"]).optim.lr == 0.5


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
