"""Runs with an adapter: what is trained, written, sampled from, compared with, and gone on with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pekoe.cli import app
from pekoe.config import RLConfig, SFTConfig, load_config
from pekoe.core.errors import Interrupted, RunError, UserError
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.engine import EmbeddedEngine
from pekoe.engine.buckets import buckets
from pekoe.model import load_model, read_spec
from pekoe.model.lora import adapted_layers
from pekoe.model.peft import read_weights
from pekoe.run.build import RLParts, make_trainer, open_model
from pekoe.run.replay import replay_run
from pekoe.run.sft import run_sft
from pekoe.train import Trainer
from pekoe.weights import LocalSender
from tests.run.conftest import stop_after_responses
from tests.run.test_rl import engine_of, steps_of
from tests.run.test_sft import tree as tree  # a recipe of sft
from tests.train.test_trainer import make_samples

Build = Callable[..., RLConfig]
Train = Callable[..., None]


@pytest.fixture
def recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    recipe["model"] |= {"lora": {"rank": 4, "alpha": 8.0}}
    recipe["optim"] = {"lr": 1e-2}
    return recipe


def trainer_of(parts: RLParts) -> Trainer:
    assert isinstance(parts.trainer, Trainer)
    return parts.trainer


def adapter_of(config: RLConfig) -> dict[str, torch.Tensor]:
    return read_weights(Path(config.run.dir) / "model")[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_trains_the_adapter_alone(build: Build, train: Train, tiny_dir: Path, dtype: str):
    config = build("algo.kl=0.1", "algo.minibatches=1", f"model.dtype={dtype}")
    before: dict[str, torch.Tensor] = {}
    parts_seen: list[RLParts] = []

    def look(parts: RLParts) -> None:
        parts_seen.append(parts)
        before.update({name: p.clone() for name, p in trainer_of(parts).model.named_parameters()})

    train(config, look)
    trainer = trainer_of(parts_seen[0])
    assert trainer.reference is None  # no second copy
    for name, parameter in trainer.model.named_parameters():
        factor = ".lora_" in name
        assert parameter.dtype is (torch.float32 if factor else getattr(torch, dtype))
        assert parameter.requires_grad == factor
        assert torch.equal(parameter, before[name]) != factor, name
    for step in steps_of(config):  # I1 and I4, on the very run
        assert step["logprob_diff_max"] <= (1e-4 if dtype == "float32" else 0.1)
        assert step["sync_canary_diff"] <= (1e-4 if dtype == "float32" else 0.1)
        assert step["reference_kl"] >= 0
    assert steps_of(config)[0]["reference_kl"] == 0  # B is zero: the model is its reference
    assert steps_of(config)[-1]["reference_kl"] > 0
    run = Path(config.run.dir)
    files = {path.name for path in (run / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "config.json" not in files
    saved = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(adapter_of(config)) == saved
    adapter = sum(tensor.numel() for tensor in adapter_of(config).values())
    assert adapter == config.model.adapter_parameters(trainer.model.spec)  # as FLOPs and memory count it
    assert set(trainer.state_dict()["model"]) == saved  # what a checkpoint holds of the weights
    assert read_spec(run / "model") == read_spec(tiny_dir / "model")


@pytest.mark.parametrize("stop_after", [3, 40])
def test_a_resumed_run_has_the_same_bits(build: Build, train: Train, tmp_path: Path, stop_after: int):
    unbroken, broken = (build("num_steps=4", "algo.kl=0.1", f"run.dir={tmp_path / name}") for name in "ab")
    train(unbroken)
    with pytest.raises(Interrupted):
        train(broken, stop_after_responses(stop_after))
    train(broken)
    expected = adapter_of(unbroken)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_of(broken).items())
    losses = [[step["loss"] for step in steps_of(config)] for config in (unbroken, broken)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("lag", ["rollout.max_lag=1", "rollout.max_lag=0"])
def test_copies_for_sampling_ahead_share_the_base_and_repeat(build: Build, train: Train, lag: str):
    config = build("num_steps=4", lag)
    seen: list[Any] = []
    train(config, lambda parts: seen.extend((trainer_of(parts), engine_of(parts))))
    trained, sampled = seen[0].model, seen[1].model
    ours, theirs = (adapted_layers(model)["model.layers.0.mlp.up_proj"] for model in (trained, sampled))
    assert ours.base_layer.weight.data_ptr() == theirs.base_layer.weight.data_ptr()
    assert (ours.lora_B.weight.data_ptr() == theirs.lora_B.weight.data_ptr()) == (lag[-1] == "0")
    again = replay_run(Path(config.run.dir), NoProgress())
    assert again.same
    assert again.same_weights


@pytest.mark.parametrize("lag", [0, 1])
def test_i4_a_stale_adapter_stops_the_run(build: Build, train: Train, lag: int):
    def meddle(parts: RLParts) -> None:
        engine = engine_of(parts)
        update = engine.update_weights

        kept: list[Any] = []

        def stale(source: Any, version: int) -> None:
            kept.append(deepcopy(source))
            update(kept[0], version)

        engine.update_weights = stale

    with pytest.raises(RunError, match="weight sync"):
        train(build("num_steps=6", f"rollout.max_lag={lag}"), meddle)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_with_weights_of_its_own_takes_the_adapter(build: Build, tmp_path: Path, dtype: str):
    """From a directory, as Ray's do with cluster.sync = "disk"; and what a broadcast brings is the adapter alone."""
    config = build(f"model.dtype={dtype}")
    (model, _, compute), (own, _, _) = (open_model(config.model, config.run.seed) for _ in range(2))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.weight.normal_(0, 0.05)
    sender = LocalSender(model, compute, lambda samples: [])
    with closing(EmbeddedEngine(own, config.engine, 24, compute, owns_model=True)) as engine:
        num_bytes = sender.write(tmp_path / "new", ["embedded"], True)
        assert num_bytes == (tmp_path / "new" / "adapter_model.safetensors").stat().st_size
        assert engine.checksums() != sender.checksums("embedded")
        engine.update_weights(tmp_path / "new", 1)
        assert engine.checksums() == sender.checksums("embedded")
        before, after = (adapted_layers(m)["model.layers.0.mlp.up_proj"] for m in (own, engine.model))
        assert before.base_layer.weight.data_ptr() == after.base_layer.weight.data_ptr()
    assert {name for part in buckets(model) for name, _ in part} == set(read_weights(tmp_path / "new")[0])


def test_sft_then_rl_on_its_merged_model(
    tree: dict[str, Any], build: Build, train: Train, tmp_path: Path, recipe: dict[str, Any], tiny_dir: Path
):
    tree["model"] |= {"lora": {"rank": 8}}
    config = load_config(tree, ["sft.epochs=15"], SFTConfig)
    run_sft(config, NoProgress())
    steps = [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step"]
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    adapter = Path(config.run.dir) / "model"
    done = CliRunner().invoke(app, ["merge", str(tiny_dir / "model"), str(tmp_path / "whole")])
    assert "got a whole model, which needs no merge" in str(done.exception)
    done = CliRunner().invoke(app, ["merge", str(adapter), str(tmp_path / "whole")])
    assert done.exit_code == 0, done.output
    for a, b in zip(load_model(tmp_path / "whole").parameters(), load_model(adapter).parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="expected a whole model as the base of an adapter, got an adapter"):
        train(build(f"model.path={adapter}", f"run.dir={tmp_path / 'refused'}"))
    train(build(f"model.path={tmp_path / 'whole'}", "num_steps=1", f"run.dir={tmp_path / 'rl'}"))
    # Full training from an adapter's directory begins with the sum.
    del recipe["model"]["lora"]
    train(build(f"model.path={adapter}", "num_steps=1", f"run.dir={tmp_path / 'full'}"))
    assert (tmp_path / "full" / "model" / "config.json").is_file()


def test_an_update_is_that_of_a_plain_reference(build: Build):
    """Adam on factors, by hand, from gradients of full weights."""
    config = build("optim.lr=1e-3", "optim.warmup_fraction=0", "optim.grad_clip=inf", "optim.weight_decay=0.1")
    model, _, dtype = open_model(config.model, config.run.seed)
    trainer = make_trainer(config, model, dtype)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.weight.normal_(0, 0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    samples = [replace(s, tokens=s.tokens % model.spec.vocab_size) for s in make_samples() if len(s) <= 60]

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor, batch: Any) -> Any:
        del entropy, batch
        return -logprobs.sum(), {}

    stats = trainer.step(samples, loss)
    gradients: list[np.ndarray[Any, Any]] = []
    o = config.optim
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moment = trainer.optimizer.state[parameter]["exp_avg"] / (1 - o.beta1)  # the gradient of the first step
            gradients.append(moment.numpy().ravel())
            expected = before[name] * (1 - o.lr * o.weight_decay) - o.lr * moment / (moment.abs() + o.eps)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-7)
        else:
            assert torch.equal(parameter, before[name])
    assert stats.grad_norm == pytest.approx(float(np.linalg.norm(np.concatenate(gradients))), rel=1e-5)


def test_a_base_that_changed_under_a_checkpoint(build: Build, train: Train, tiny_dir: Path, tmp_path: Path):
    shutil.copytree(tiny_dir / "model", tmp_path / "base")
    config = build(f"model.path={tmp_path / 'base'}", "num_steps=2")
    train(config)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(UserError, match="expected the base that the adapter was trained on, sha256"):
        train(build(f"model.path={tmp_path / 'base'}", "num_steps=3"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lora.targets=['q_prj']", "got 'q_prj'. Did you mean 'q_proj'"),
        ("model.lora.rank=64", "got 64; nearest: 16"),
        ("model.lora.rank=5", "holds a run with model.lora.rank = 4, got 5"),
    ],
)
def test_mistakes(build: Build, train: Train, override: str, message: str):
    if override.endswith("5"):
        train(build("num_steps=2"))
    with pytest.raises(UserError, match=message):
        train(build(override))


def test_the_rate_is_ten_times_that_of_full_training(recipe: dict[str, Any], tree: dict[str, Any]):
    for start in (recipe, tree):
        start["model"]["lora"] = {}
    del recipe["optim"]
    assert load_config(recipe).optim.lr == pytest.approx(2e-4)
    assert load_config(recipe, ["optim.eps=1e-8"]).optim.lr == pytest.approx(2e-4)
    assert load_config(recipe, ["optim.lr=1e-6"]).optim.lr == 1e-6
    del tree["optim"]
    found = load_config(tree, [], SFTConfig).optim
    assert (found.lr, found.weight_decay) == (pytest.approx(1e-4), 0.1)


@pytest.mark.slow
def test_a_publish_and_a_step_take_less(recipe: dict[str, Any], tmp_path: Path):
    """What `pekoe doctor` says: fewer bytes of state, and of a publish."""
    import tomli_w

    from pekoe.run.doctor import examine

    parts: list[dict[str, float]] = []
    for name in ("adapter", "whole"):
        (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(recipe))
        lines, _ = examine(str(tmp_path / f"{name}.toml"), ["algo.kl=0.1"], 1, 2**34)
        sizes = [line for line in lines if line.endswith("iB") and not line.startswith("an adapter")]
        parts.append({line[:29].strip(): float(line[29:].split()[0]) for line in sizes})
        said = " ".join(lines)
        assert ("an adapter of 0.00M parameters: a publish to vLLM is" in said) == (name == "adapter")
        recipe["model"].pop("lora", None)
    adapter, whole = parts
    assert adapter["Adam's moments"] < whole["Adam's moments"] / 2
    assert "reference model" in whole
    assert "reference model" not in adapter
