"""Recipes: closed, typed, and every mistake with where, expected, got and the nearest valid name."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from pekoe.config import EvalConfig, RLConfig, SFTConfig, dump_config, load_config
from pekoe.config.recipes import Config, ConfigSection
from pekoe.core import UserError

RECIPE: dict[str, Any] = {
    "num_steps": 3,
    "run": {"dir": "runs/x"},
    "model": {"path": "m"},
    "data": {"train": "t.jsonl"},
}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algo.minibatchs=4", "unknown key 'algo.minibatchs'. Did you mean 'minibatches'?"),
        ("algoo.minibatches=4", "unknown key 'algoo'. Did you mean 'algo'?"),
        ('rollout.temperature="hot"', "rollout.temperature: expected a valid number, got 'hot'"),
        ("rollout.temperature=hot", "rollout.temperature: expected a valid number, got 'hot'"),
        ("rollout.prompts_per_step=1.5", "rollout.prompts_per_step: expected a valid integer, got 1.5"),
        ('run.seed="1"', "run.seed: expected a valid integer, got '1'"),
        ("rollout=3", "rollout: expected"),
        ("model.device=tpu", "model.device: expected 'cpu', 'cuda' or 'auto', got 'tpu'"),
        (
            "algo.advantage=gpro",
            "algo.advantage: expected 'global', 'grpo', 'dr_grpo', 'rloo' or MODULE:NAME, .* got 'gpro'",
        ),
        ("optim.lr=-1", "optim.lr: expected greater than 0, got -1"),
        ("rollout.prompts_per_step=13", "expected a multiple of algo.minibatches (4), got 13; nearest: 12"),
        ("train.token_budget=100", "expected at least the longest sequence, .* = 2048, got 100; nearest: 2048"),
        ("algo.reward_wrong=5", "algo.reward_wrong: expected less than algo.reward (5), got 5"),
        ("algo.overlong_penalty=1", "algo.overlong_penalty: expected algo.overlong_tokens beside it"),
        ("algo.overlong_tokens=5000", "algo.overlong_tokens: expected at most rollout.max_new_tokens (1024), got 5000"),
        ("rollout.min_new_tokens=5000", "expected at most rollout.max_new_tokens (1024), got 5000"),
        ("eval.every=5", "eval.data: expected a problem file"),
        ("run.seed.x=5", "'seed' is a value, not a section"),
        ("nonsense", "override 'nonsense': expected section.key=value"),
        ("engine.kv_gib=inf", "engine.kv_gib: expected a finite number, got inf"),
        ("optim.lr=nan", "optim.lr: expected a finite number, got nan"),
        ("verify.time_limit_s=inf", "verify.time_limit_s: expected a finite number, got inf"),
        ("verify.time_limit_s=1e9", "verify.time_limit_s: expected less than or equal to 2000000, got 1000000000.0"),
        ("verify.memory_gib=1e300", "verify.memory_gib: expected less than or equal to 1000000, got 1e+300"),
        ("engine.server.start_limit_s=1e300", "start_limit_s: expected less than or equal to 2000000, got 1e+300"),
        *(
            (f"{key}={2**63}", f"{key}: expected less than or equal to {2**31 - 1}, got {2**63}")
            for key in ("num_steps", "engine.kv_tokens", "train.token_budget", "eval.every", "rollout.top_k")
        ),
        (f"run.seed={2**63}", f"run.seed: expected less than or equal to {2**63 - 1}, got {2**63}"),
        ("run.threads=100000", "run.threads: expected less than or equal to 1024, got 100000"),
        ("verify.workers=100000", "verify.workers: expected less than or equal to 1024, got 100000"),
        ("rollout.samples_per_prompt=1000000000", "samples_per_prompt: expected less than or equal to 65536, got 1000"),
        ("cluster.generation.engines=1000000", "cluster.generation.engines: expected less than or equal to 65536"),
        ('run.dir=""', "run.dir: expected the name of a file, a directory or a data set, got ''"),
        ('run.dir=" "', "run.dir: expected the name of a file, a directory or a data set, got ' '"),
        ('eval.data=""', "eval.data: expected the name of a file, a directory or a data set, got ''"),
        ("data.train=", "data.train: expected the name of a file, a directory or a data set, got ''"),
        ('run.dir="a\\u0000b"', "run.dir: expected text in UTF-8 without the character NUL, got 'a\\x00b'"),
        ("run.dir=a\udcff", "run.dir: expected text in UTF-8 without the character NUL, got 'a\\udcff'"),
        ('engine.server.args=["a\\u0000"]', "engine.server.args: expected text in UTF-8 without the character NUL"),
        ('engine.server.env={A="\\u0000"}', "engine.server.env: expected text in UTF-8 without the character NUL"),
        (f"run.seed={'[' * 5000}", "override 'run.seed=[[[[.*: expected a value that TOML can have"),
        (f"run.seed={'9' * 5000}", "override 'run.seed=9999.*: expected a value that TOML can have"),
        (f"run.seed=0x{'f' * 5000}", "run.seed: expected less than or equal to 9223372036854775807, got int too large"),
        ("a." * 5000 + "b=1", "expected at most 16 sections, got 5000"),
    ],
)
def test_mistakes(override: str, message: str):
    recipe = RECIPE | {"run": {"dir": "x", "seed": 0}}
    with pytest.raises(UserError) as caught:
        load_config(recipe, [override])
    start, _, end = message.partition(".*")
    assert start in str(caught.value)
    assert end in str(caught.value)


def test_several_mistakes_are_all_told():
    with pytest.raises(UserError) as caught:
        load_config({"run": {}, "model": {"path": "m"}, "data": {"train": "t"}})
    assert "missing key 'num_steps'" in str(caught.value)
    assert "missing key 'run.dir'" in str(caught.value)


def test_group_advantages_need_groups():
    with pytest.raises(UserError, match="samples_per_prompt: expected at least 2"):
        load_config(RECIPE, ["algo.advantage=grpo", "rollout.samples_per_prompt=1"])


def test_files(tmp_path: Path):
    (tmp_path / "laptop.toml").write_text("")
    with pytest.raises(UserError, match=r"Did you mean 'laptop.toml'"):
        load_config(tmp_path / "latop.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(UserError, match="expected TOML"):
        load_config(tmp_path / "bad.toml")


@pytest.mark.parametrize("kind", [RLConfig, SFTConfig, EvalConfig])
def test_the_resolved_config_reads_back_equal(kind: type[Config], tmp_path: Path):
    recipe = {k: v for k, v in RECIPE.items() if k in kind.model_fields}
    if kind is EvalConfig:
        recipe |= {"eval": {"data": "d.jsonl"}, "run": {}}
    config = load_config(recipe, ["run.seed=7", "model.device=cpu"], kind)
    (tmp_path / "config.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.toml", kind=kind) == config


def test_configs_are_frozen():
    config = load_config(RECIPE)
    with pytest.raises(ValueError, match="frozen"):
        config.num_steps = 5


def test_every_key_is_documented():
    def check(section: type[ConfigSection]) -> None:
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, ConfigSection):
                check(inner)
            else:
                assert field.description, f"{section.__name__}.{name} has no docstring"

    for kind in (RLConfig, SFTConfig, EvalConfig):
        check(kind)


def test_the_defaults_are_the_releases():
    """AReaL v0.2, 7B recipe (shared facts): what a recipe does not say."""
    config = load_config(RECIPE)
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (512, 16)
    assert (config.algo.reward, config.algo.clip_low, config.algo.clip_high) == (5.0, 0.2, 0.2)
    assert (config.algo.minibatches, config.algo.kl, config.algo.max_mean_ratio) == (4, 0.0, 5.0)
    optim = config.optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps) == (2e-5, 0.9, 0.95, 1e-5)
    assert (optim.weight_decay, optim.grad_clip, optim.warmup_fraction) == (0.05, 1.0, 0.001)
    assert config.train.token_budget == 30720


@pytest.mark.parametrize("key", ["optim.grad_clip", "algo.max_mean_ratio", "algo.correction_limit", "algo.clip_high"])
def test_infinity_is_refused_only_where_it_means_nothing(key: str):
    config = load_config(RECIPE, [f"{key}=inf"])
    assert load_config(tomllib.loads(dump_config(config))) == config
    with pytest.raises(UserError, match=rf"{key}: expected .*, got nan"):
        load_config(RECIPE, [f"{key}=nan"])


@pytest.mark.parametrize("text", ["run = " + "[" * 5000, "num_steps = " + "9" * 5000, "a\0 = 1", "a." * 2999 + "a = 1"])
def test_a_recipe_that_toml_cannot_hold(tmp_path: Path, text: str):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UserError, match=r"r\.toml: expected TOML, got something else"):
        load_config(tmp_path / "r.toml")


def test_a_message_has_an_end():
    with pytest.raises(UserError) as caught:
        load_config({"model": {"path": "m"}, "run": {"dir": "r"}, "data": {"sources": [0] * 2000}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "recipe: 1981 more."
    with pytest.raises(UserError, match=r"override '\[0, 0, .*….*: expected section.key=value") as caught:
        load_config({"model": {"path": "m"}}, ["[" + "0, " * 2000])
    assert len(str(caught.value)) < 500
