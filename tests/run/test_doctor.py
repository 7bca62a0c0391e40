"""`pekoe doctor`: what fits, and the largest budget that does."""

import json
import re
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from pekoe.config import RLConfig, SFTConfig, dump_config, load_config
from pekoe.core import UserError
from pekoe.core.hardware import DEVICES
from pekoe.core.roofline import Ceilings, sampling_flops
from pekoe.model import read_spec
from pekoe.run import doctor, hardware
from pekoe.run.doctor import GIB, USABLE, environment, examine, forecast, min_step_time, step_summary
from tests.fuzz_settings import call as command


@pytest.fixture
def tree(tiny_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "num_steps": 1,
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tiny_dir / "model"), "device": "cpu"},
        "data": {"train": str(tiny_dir / "train.jsonl"), "max_prompt_tokens": 16},
        "rollout": {"max_new_tokens": 48},
        "engine": {"kv_gib": 0.1},
        "train": {"token_budget": 65536},
    }


def test_the_largest_budget_fits_and_a_larger_one_does_not(tree: dict[str, Any]):
    memory = 2 * GIB
    found = forecast(load_config(tree), memory_bytes=memory)
    assert found.fits
    assert found.largest_budget > 65536
    at = forecast(load_config(tree, [f"train.token_budget={found.largest_budget}"]), memory_bytes=memory)
    assert 0.95 * USABLE * memory < at.total < 1.01 * USABLE * memory
    above = forecast(load_config(tree, [f"train.token_budget={2 * found.largest_budget}"]), memory_bytes=memory)
    assert not above.fits
    assert above.largest_budget == pytest.approx(found.largest_budget, rel=0.05)


def test_every_part_of_a_recipe_counts(tree: dict[str, Any]):
    def parts(*overrides: str) -> dict[str, int]:
        return forecast(load_config(tree, overrides), memory_bytes=GIB).parts

    plain = parts()
    assert plain["KV cache"] == 512 * 64 * 256  # sequences, tokens, bytes
    assert "reference model" not in plain
    assert parts("algo.kl=0.1")["reference model"] == plain["weights"]
    assert parts("algo.kl=0.1", "model.dtype=bfloat16")["reference model"] == plain["weights"] // 2
    assert "KV cache" not in parts("engine.backend='vllm'", "engine.server.urls=['http://127.0.0.1:1']")
    assert parts("verify.workers=3")["judges"] == 3 * doctor.JUDGE
    assert "copies of the weights" not in plain
    assert parts("rollout.max_lag=1")["copies of the weights"] == 2 * plain["weights"]
    sft = {key: tree[key] for key in ("run", "model", "train")} | {"data": {"train": "demos.jsonl"}}
    alone, shared = (forecast(load_config(sft, kind=SFTConfig), n, GIB).parts for n in (1, 2))
    assert shared["weights"] == alone["weights"] // 2
    assert shared["gathered by FSDP"] > 0


def test_what_does_not_fit_is_said_with_what_would(tree: dict[str, Any], tmp_path: Path):
    recipe = tmp_path / "rl.toml"
    recipe.write_text(dump_config(load_config(tree, kind=RLConfig)))
    lines, fault = examine(str(recipe), [], 1, 2 * GIB)
    assert fault is None
    assert "it fits; the largest train.token_budget that does is about" in lines[-1]
    _, fault = examine(str(recipe), ["train.token_budget=1000000"], 1, 2 * GIB)
    assert fault is not None
    assert "train.token_budget: expected at most" in fault
    assert fault.endswith("which fits, got 1000000")
    _, fault = examine(str(recipe), [], 1, GIB // 2)
    assert fault is not None
    assert "no train.token_budget fits the longest sequence, 64 tokens at each process" in fault


def test_a_gpu_that_is_not_here_needs_its_memory(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = load_config(tree, ["model.device='cuda'", "model.dtype='bfloat16'"])
    with pytest.raises(UserError, match="expected --memory-gib for a GPU"):
        forecast(config)
    found = forecast(config, memory_bytes=80 * GIB)
    assert found.fits
    assert "copy for checkpoints" not in found.parts  # in the host's memory


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_LIMIT", tmp_path / "max")
    monkeypatch.setattr(doctor, "_USED", tmp_path / "current")
    (tmp_path / "max").write_text("max\n")
    assert doctor.available_bytes("cpu") > 2**20
    (tmp_path / "max").write_text(f"{2**20}\n")
    (tmp_path / "current").write_text(f"{2**18}\n")
    assert doctor.available_bytes("cpu") == 2**20 - 2**18


def test_the_environment_names_what_matters():
    found = dict(environment())
    assert {"Python", "torch", "cores", "disk", "GPUs", "cluster", "report", "vLLM", "SGLang"} <= set(found)


def test_what_is_absent_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def nothing_but_pekoe(name: str) -> str:
        if name == "pekoe":
            return "1"
        raise PackageNotFoundError

    monkeypatch.setattr(doctor, "version", nothing_but_pekoe)
    monkeypatch.chdir(tmp_path)
    found = dict(environment())
    assert found["cluster"] == "absent: pip install 'pekoe[cluster]'"
    assert found["vLLM"].startswith(
        "absent here: python -m venv .venv-vllm && .venv-vllm/bin/python -m pip install vllm"
    )


def test_a_machines_ceilings_are_those_of_a_product_and_a_copy():
    found = hardware.describe(torch.device("cpu"), torch.float32)
    size, a = 1024, torch.randn(1024, 1024)
    start = time.perf_counter()
    torch.mm(a, a)
    slower = 2 * size**3 / (time.perf_counter() - start)
    assert found["flop_s"] > slower / 20  # the fastest of some is hardly slower than one, on a busy machine too
    assert 1e8 < found["byte_s"] < 1e13
    assert found["dtype"] == "float32"
    assert found["versions"]["torch"] == torch.__version__
    assert "flop_s" not in hardware.describe()


def test_the_arithmetic_of_a_step_and_the_time_that_is_left(recipe: dict[str, Any], tmp_path: Path):
    config = load_config(recipe | {"num_steps": 30, "run": {"dir": str(tmp_path)}})
    spec, _ = read_spec(Path(config.model.path))
    said = step_summary(config, spec)
    assert "4 prompts x 4 = 16 responses of at most 12 tokens: at most 192 are sampled" in said[1]
    assert "4 optimizer steps of at most 80 tokens, 3 or more responses a micro-batch" in said[2]
    assert len(said) == 3
    steps = [{"event": "step", "step": i, "step_s": 6.0} for i in (1, 2)]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert "about 2.8 minutes for the 28 that are left" in step_summary(config, spec)[3]


def test_the_least_time_of_a_step_is_its_arithmetic(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    config = load_config(recipe | {"num_steps": 1, "run": {"dir": "r"}})
    spec, _ = read_spec(Path(config.model.path))
    prompt, new, n = config.data.max_prompt_tokens, config.rollout.max_new_tokens, config.rollout.samples_per_prompt
    sampled = config.rollout.prompts_per_step * sampling_flops(spec, [(prompt, [new] * n)]).total
    monkeypatch.setattr(doctor, "measure_ceilings", lambda *_: Ceilings(flop_s=sampled / 2, byte_s=1.0))
    said = min_step_time(config, spec)
    sampling, training = map(float, re.findall(r"([\d.]+) s to", said))
    assert sampling == 2.0
    assert 4.0 < training < 12.0  # three passes over every token, where sampling computes a prompt once for all
    assert f"at least {sampling + training:.2g} s here" in said


def test_a_clusters_placement_is_said_before_anything_starts(tree: dict[str, Any], tmp_path: Path):
    from pekoe.ray import plan

    tree["cluster"] = {"generation": {"engines": 2}, "training": {"ranks": 3}}
    file = tmp_path / "cluster.toml"
    file.write_text(tomli_w.dumps(tree))
    lines, fault = examine(str(file), [], 1, 24 * GIB, plan)
    assert fault is None
    assert "engine 0, engine 1, rank 0, rank 1, rank 2" in lines[3]
    assert lines[4] == "of 3 training ranks, each:"
    assert not any("KV cache" in line for line in lines)
    with pytest.raises(UserError, match=r"room for rank 0 \(1 CPU, 1 GPU\) on one node, got none"):
        examine(str(file), ["cluster.training.gpus_per_rank=1"], 1, None, plan)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.token_budget=2147483647"],
        ["rollout.samples_per_prompt=65536", "rollout.prompts_per_step=1000000000"],
        ["--memory-gib", "1e6", "--processes", "1000000"],
    ],
)
def test_large_numbers_are_predicted_at_once(tree: dict[str, Any], tmp_path: Path, arguments: list[str]):
    file = tmp_path / "large.toml"
    file.write_text(tomli_w.dumps(tree))
    start = time.monotonic()
    status, message = command(["doctor", str(file), "model.device=cpu", "--memory-gib", "64", *arguments])
    assert status in (0, 2), message
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("memory", ["inf", "nan", "1e300", "1e7"])
def test_a_memory_that_cannot_be_meant(memory: str):
    status, message = command(["doctor", "--memory-gib", memory])
    assert status == 2
    assert "--memory-gib" in message


def test_fewer_processes_than_replicas(tree: dict[str, Any]):
    sft = {key: tree[key] for key in ("run", "model", "train")} | {"data": {"train": "demos.jsonl"}}
    with pytest.raises(UserError, match=r"expected at least .*, 2, got 1; nearest: --processes 2"):
        forecast(load_config(sft, ["parallel.replicas=2"], SFTConfig), memory_bytes=GIB)


GPU = ["model.device='cuda'", "model.dtype='bfloat16'"]


def test_on_a_gpu_engine_and_trainer_take_turns(tree: dict[str, Any]):
    """KV fills what weights and moments leave, and counts beside training only where both go on at once."""
    del tree["engine"]
    alone = forecast(load_config(tree, [*GPU, "engine.max_running=1000000"]), memory_bytes=2 * GIB)
    assert alone.turns
    kv, copies = alone.parts["KV cache"], alone.parts["weights laid out for decoding"]
    kept = alone.parts["weights"] + alone.parts["Adam's moments"] + alone.parts["Python and torch"]
    assert kept + kv + copies == pytest.approx(USABLE * 2 * GIB, rel=0.01)
    assert alone.total == kept + max(kv + copies, alone.parts["gradients"] + alone.parts["forward and backward"])
    assert alone.fits
    both = forecast(load_config(tree, [*GPU, "engine.max_running=1000000", "rollout.max_lag=1"]), memory_bytes=2 * GIB)
    assert not both.turns
    assert both.total == sum(both.parts.values()) <= USABLE * 2 * GIB
    assert both.parts["KV cache"] < kv - both.parts["forward and backward"]
    given = forecast(load_config(tree, [*GPU, "engine.kv_gib=0.25"]), memory_bytes=2 * GIB)
    assert given.parts["KV cache"] <= GIB // 4
    assert forecast(load_config(tree), memory_bytes=2 * GIB).parts["KV cache"] == 512 * 64 * 256  # a CPU's is as it was


def test_kv_that_holds_no_sequence_is_refused_with_what_would(tree: dict[str, Any], tmp_path: Path):
    tree["engine"] = {"kv_tokens": 32}
    file = tmp_path / "rl.toml"
    file.write_text(tomli_w.dumps(tree))
    _, fault = examine(str(file), [], 1, 2 * GIB)
    assert fault == (
        "engine.kv_tokens: expected KV of the longest sequence, 64 tokens, got room for 32; "
        "nearest: engine.kv_tokens=64"
    )
    assert examine(str(file), ["engine.kv_tokens=64"], 1, 2 * GIB)[1] is None


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A recipe of a known model that is not here."""
    tree: dict[str, Any] = {
        "num_steps": 1,
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path / "llama-7b")},
        "data": {"train": "none.jsonl", "max_prompt_tokens": 128},
        "rollout": {"max_new_tokens": 128},
        "train": {"token_budget": 256},
    }
    file = tmp_path / "rl.toml"
    file.write_text(tomli_w.dumps(tree))
    return file


def test_a_device_and_a_model_that_are_not_here(known: Path):
    lines, fault = examine(str(known), ["model.lora.rank=8", "model.dtype=bfloat16"], 1, None, device="H100")
    assert fault is None
    assert lines[0].endswith("llama-7b is not here: the shape is llama-7b's, by its name")
    assert lines[1].startswith("llama of 6,738.4M parameters")  # as its makers say: 6.7B
    assert any(line == "on one h100: 74.5 GiB (NVIDIA H100 data sheet (2023), SXM)" for line in lines)
    assert any("at the data sheet's 989,500 GFLOP/s" in line for line in lines)
    assert any(line.startswith("KV cache") and "while it samples: " in line for line in lines)


def test_what_would_fit_a_device_is_named_and_does(known: Path):
    """12 bytes of weights and moments for each of 6.7B parameters are beyond 20 GiB; an adapter on bfloat16 is not."""
    _, fault = examine(str(known), [], 1, 20 * GIB, device="h100")
    assert fault is not None
    changes = fault.partition("; nearest: ")[2].split()
    assert "model.lora.rank=32" in changes
    assert examine(str(known), changes, 1, 20 * GIB, device="h100")[1] is None
    longer = [*changes, "rollout.max_new_tokens=8000", "train.token_budget=8192"]
    _, fault = examine(str(known), longer, 1, 20 * GIB, device="h100")
    assert fault is not None
    changes = [*changes, *fault.partition("; nearest: ")[2].split()]
    assert any(change.startswith("rollout.max_new_tokens=") for change in changes)
    assert examine(str(known), changes, 1, 20 * GIB, device="h100")[1] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["laptop", "--device", "h10"], "doctor --device: expected a device, got 'h10'. Did you mean 'h100'"),
        (["--device", "h100"], "doctor --device: expected a recipe, whose memory is predicted there, or --gpu"),
    ],
)
def test_devices_that_are_not_known(words: list[str], message: str):
    status, said = command(["doctor", *words])
    assert status == 2
    assert message in " ".join(said.split())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("recipe", "device"), [("one-gpu-1.5b", "h100"), ("one-gpu-7b-lora", "h100"), ("one-gpu-7b-lora", "l40s"),
    ("one-gpu-7b-lora", "rtx-4090"), ("eight-gpu-7b", "h100")]
)  # fmt: skip
def test_recipes_of_few_gpus_fit_as_their_heads_say(recipe: str, device: str, repository: Path):
    head = (repository / "recipes" / f"{recipe}.toml").read_text().partition("\n\n")[0]
    size = round(DEVICES[device].memory_bytes / 1e9)
    changes = re.findall(rf"^#   {size} GB: (.*)$", head, re.MULTILINE)
    _, fault = examine(recipe, changes[0].split() if changes else [], 1, None, device=device)
    assert fault is None
