"""Every key, as the command line lists it, and what is said of one that is not a key."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from pekoe.config import EvalConfig, RLConfig, SFTConfig, load_config
from pekoe.config.base import flatten
from pekoe.config.keys import describe, keys_of, show_config
from pekoe.config.names import NAMES, WITHOUT_KEY
from pekoe.config.recipes import COMMANDS, Config
from pekoe.core import UserError

RECIPE: dict[str, Any] = {"run": {"dir": "x"}, "model": {"path": "m"}, "data": {"train": "t"}}
RL = RECIPE | {"num_steps": 3}


def test_a_key_has_its_type_default_and_meaning():
    keys = {key.name: key for key in keys_of(RLConfig)}
    assert (keys["optim.lr"].type, keys["optim.lr"].default) == ("number, above 0", "2e-05")
    assert keys["model.path"].default == "required"
    assert (keys["engine.kv_tokens"].type, keys["engine.kv_tokens"].default) == ("whole number, at least 16", "absent")
    assert keys["model.device"].type == '"cpu", "cuda" or "auto"'
    assert keys["data.sources[].weight"].type == "number, above 0, at most 10,000"
    assert keys["engine.server.env"].type == "table of text"
    assert keys["run.threads"].type == "whole number, at least 1, at most 1,024"  # bounds of an optional alias
    assert keys["cluster.training.ranks"].default == "1"
    assert keys["verify.score_range"].default == "[0.0, 1.0]"
    assert "warm-up" in keys["optim.lr"].meaning


@pytest.mark.parametrize("kind", COMMANDS.values())
def test_no_key_is_without_a_meaning(kind: type[Config]):
    assert [key.name for key in keys_of(kind) if not key.meaning or "\n" in key.form] == []


def test_defaults_are_those_of_the_command():
    sft = {key.name: key.default for key in keys_of(SFTConfig)}
    assert (sft["optim.lr"], sft["optim.weight_decay"], sft["train.token_budget"]) == ("1e-05", "0.1", "32768")


def test_every_key_of_a_resolved_recipe_is_listed():
    flat = flatten(
        load_config(RL, ["cluster.training.ranks=1", "engine.server.env.A=b", "model.lora.rank=4"]).model_dump()
    )
    listed = {key.name for key in keys_of(RLConfig) if "[]" not in key.name and not key.type.startswith("table")}
    assert flat.keys() - {"engine.server.env.A"} == listed - {"cluster", "model.lora"}


def test_a_section_a_key_and_another_commands_section():
    text = describe(COMMANDS, "optim")
    assert text.startswith("optim.lr: number, above 0; default 2e-05\n    Learning rate")
    assert "optimizer" not in describe(COMMANDS, "optim.beta1")
    assert describe(COMMANDS, "data.sources").count("data.sources[].") == 6
    assert describe(COMMANDS, "sft.epochs").startswith("sft.epochs: whole number")
    with pytest.raises(
        UserError, match=r"keys: unknown key 'num_generations'. Did you mean 'rollout.samples_per_prompt'"
    ):
        describe(COMMANDS, "num_generations")


def test_a_name_that_was_printed_is_one():
    for key in keys_of(RLConfig):
        assert describe(COMMANDS, key.name).startswith(f"{key.name}: "), key


def test_what_differs_between_commands_is_shown():
    lr = "    " + "Learning rate at the end of warm-up; `schedule` says how it goes on."
    assert describe(COMMANDS, "optim.lr").splitlines() == [
        *("optim.lr: number, above 0; default 2e-05", lr),
        *("of pekoe sft:", "optim.lr: number, above 0; default 1e-05", lr),
    ]
    lines = describe(COMMANDS, "optim").splitlines()
    sft = lines[lines.index("of pekoe sft:") :]
    assert [line.partition(":")[0] for line in sft if line.startswith("optim.")] == [
        *("optim.lr", "optim.warmup_fraction", "optim.weight_decay"),
    ]
    assert "of pekoe" not in describe(COMMANDS, "run.seed")
    assert "of pekoe" not in describe(COMMANDS)


def test_a_dry_run_shows_what_is_absent_and_reads_back():
    config = load_config(RL, ['engine.server.env={A="b"}'])
    text = show_config(config)
    for key in ("cluster", "threads", "kv_tokens", "wandb", "every"):
        assert f"# {key} is absent\n" in text
    assert load_config(tomllib.loads(text)) == config
    mixed = RL | {"data": {"sources": [{"name": "a", "path": "b"}]}}
    assert load_config(tomllib.loads(show_config(load_config(mixed)))) == load_config(mixed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_generations=8", "unknown key 'num_generations'. Did you mean 'rollout.samples_per_prompt'?"),
        ("learning_rate=1e-5", "unknown key 'learning_rate'. Did you mean 'optim.lr'?"),
        ("optim.learning_rate=1e-5", "unknown key 'optim.learning_rate'. Did you mean 'optim.lr'?"),
        ("beta=0.1", "unknown key 'beta'. Did you mean 'algo.kl' (k3"),
        ("algo.beta=0.1", "unknown key 'algo.beta'. Did you mean 'algo.kl' (k3"),
        ("rollout.n=8", "unknown key 'rollout.n'. Did you mean 'rollout.samples_per_prompt'?"),
        ("n=8", "unknown key 'n'. Did you mean 'rollout.samples_per_prompt'?"),
        ("actor_rollout_ref.rollout.n=8", "'actor_rollout_ref.rollout.n'. Did you mean 'rollout.samples_per_prompt'?"),
        ("optim.epsilon=1e-8", "Did you mean 'optim.eps'?"),
        ("epsilon=0.1", "Did you mean 'algo.clip_low'?"),
        ("actor.ppo_mini_batch_size=8", "Did you mean 'algo.minibatches' (a number of them, not their size)?"),
        ("temperature=0.5", "unknown key 'temperature'. Did you mean 'rollout.temperature'?"),
        ("algo.lr=1", "unknown key 'algo.lr'. Did you mean 'optim.lr'?"),
        ("optim.lrr=1", "unknown key 'optim.lrr'. Did you mean 'lr'?"),
        ("custom_reward_function.path=a.py", "Did you mean 'verify.reward' (MODULE:NAME)?"),
        ("custom_reward_function.name=score", "Did you mean 'verify.reward' (MODULE:NAME)?"),
        ("actor_rollout_ref.model.path=m", "Did you mean 'model.path' (a directory, not a name)?"),
        ("actor_rollout_ref.rollout.val_kwargs.n=4", "Did you mean 'eval.samples'?"),
        ("actor_rollout_ref.rollout.val_kwargs.temperature=1", "Did you mean 'eval.temperature'?"),
        ("actor_rollout_ref.rollout.temperature=1", "Did you mean 'rollout.temperature'?"),
        ("trainer.total_epochs=3", "Did you mean 'num_steps' (ours are rollout batches"),
        ("trainer.save_freq=3", "unknown key 'trainer.save_freq'. Did you mean 'train.save_every'?"),
        ("trainer={save_every=3}", "unknown key 'trainer'. Did you mean 'train'?"),
        ("max_tokens=3", "Did you mean 'rollout.max_new_tokens'?"),
        ("actor_rollout_ref.actor.use_kl_loss=true", "Did you mean 'algo.kl'"),
        ("data.path=x", "Did you mean 'data.train'?"),
        ("batch_size=8", "Did you mean 'rollout.prompts_per_step' (prompts"),
        ("packing=true", "unknown key 'packing'. There is none: responses are always packed"),
        ("logging_steps=1", "unknown key 'logging_steps'. There is none: every step is printed"),
        ("actor_rollout_ref.actor.ppo_epochs=1", "There is none: a response is trained on once"),
        ("algorithm.gamma=1", "There is none: both are 1"),
        ("data.columns.question=x", "recipe: data.columns.question: expected 'prompt', 'answer', 'uid' or 'kind', got"),
        ("xyz.q=1", "unknown key 'xyz.q'. Valid: "),
        ("xyz={" + "a." * 3000 + "a=1}", "expected a value that TOML can have: tables and arrays nested more than 16"),
    ],
)
def test_what_an_unknown_key_may_mean(override: str, message: str):
    with pytest.raises(UserError) as caught:
        load_config(RL, [override])
    assert message in str(caught.value)


def test_another_command_has_another_key_for_it():
    evaluation = {"model": {"path": "m"}, "eval": {"data": "d"}}
    with pytest.raises(UserError, match=r"Did you mean 'eval.samples'\?"):
        load_config(evaluation, ["num_generations=8"], EvalConfig)


def test_a_setting_without_a_key_is_none_of_ours():
    ours = {key.name.rpartition(".")[2] for kind in COMMANDS.values() for key in keys_of(kind)}
    theirs = {name for row in NAMES for name in f"{row.trl}, {row.verl}, {row.also}".split(", ")}
    assert {name for names in WITHOUT_KEY for name in names} & (ours | theirs) == set()


def test_the_table_of_names_names_keys():
    keys = {key.name for kind in COMMANDS.values() for key in keys_of(kind)}
    assert {row.ours for row in NAMES} <= keys
    assert all(row.trl or row.verl for row in NAMES)
