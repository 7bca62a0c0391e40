"""`pekoe rl` through real servers, by the command line: a few steps on a tiny model, each proven; nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.core.records import read_records
from pekoe.core.types import Problem
from pekoe.data.problems import write_problems
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.engine import SGLangEngine
from pekoe.model import Decoder, load_model, save_model
from pekoe.run.replay import replay_run
from pekoe.weights.checksums import SGLangChecksums, checksums_of
from tests.servers.common import attached_to
from tests.servers.test_sglang_server import SHAPE as SGLANG_SHAPE
from tests.servers.test_sglang_server import group_members
from tests.servers.vllm_fixture import START_LIMIT_S, vllm_python

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

OURS = uuid.uuid4().hex
# Heads that vLLM knows, sizes that SGLang does not pad. Of its 64 tokens the tokenizer knows 24.
SHAPE = SGLANG_SHAPE | {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32}


@pytest.fixture
def lay_out(tmp_path: Path, make_model: Callable[..., Decoder]) -> Callable[..., Path]:
    """Writes a model, problems and a recipe whose [engine] is the given one; returns the recipe."""

    def write(engine: EngineSection, shape: dict[str, Any], **more: Any) -> Path:
        model = make_model(scale=2.0, **shape)
        model.assets = dict(make_char_tokenizer("0123456789+=\\{}boxed"))
        save_model(model, tmp_path / "model")
        problems = [Problem(f"{a}", ({"role": "user", "content": f"{a}+1="},), str(a + 1)) for a in range(8)]
        write_problems(tmp_path / "train.jsonl", problems)
        recipe: dict[str, Any] = {
            "num_steps": 2,
            "run": {"dir": str(tmp_path / "run"), "threads": 1},
            "model": {"path": str(tmp_path / "model"), "device": "cpu"},
            "data": {"train": str(tmp_path / "train.jsonl"), "max_prompt_tokens": 8},
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 24},
            "optim": {"lr": 1e-2},
            "train": {"token_budget": 64},
            "verify": {"workers": 1, "random": True},
            "engine": engine.model_dump(exclude_none=True),
        } | more
        (tmp_path / "rl.toml").write_text(tomli_w.dumps(recipe))
        return tmp_path / "rl.toml"

    return write


def pekoe(*words: str) -> str:
    """What the command prints. It leaves no weights in shared memory."""
    command = [sys.executable, "-m", "pekoe.cli", *words]
    marked = os.environ | {"PEKOE_TEST_RUN": OURS}  # whatever it starts has this, too
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=marked) as process:
        try:
            printed, errors = process.communicate(timeout=START_LIMIT_S + 60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert not list(Path("/dev/shm").glob(f"pekoe-weights-{process.pid}-*"))
    return printed


def assert_proven(recipe: Path, route: str, num_steps: int = 2) -> list[dict[str, Any]]:
    """The journal's proofs, and that training changed what was sampled from. Returns the steps."""
    run = recipe.parent / "run"
    steps = [event for event in read_lines(run / "journal.jsonl") if event["event"] == "step"]
    assert [step["step"] for step in steps] == list(range(1, num_steps + 1))
    assert [step["sync_checksum"] for step in steps] == ["equal", *["skipped"] * (num_steps - 1)]
    for step in steps:
        assert step["logprob_diff_max"] <= 5e-4  # I1
        assert step["sync_canary_diff"] <= 5e-4  # I4
        assert step["sync_route"] == route
        assert step["sync_bytes"] > 100_000
        lines = read_records(run, step["step"])
        assert len(lines) == 16
        assert {tuple(map(tuple, line["versions"])) for line in lines} == {((step["step"] - 1, 0),)}
    before, after = (load_model(place / "model").get_parameter("model.norm.weight") for place in (recipe.parent, run))
    assert not torch.equal(before, after)
    assert not list((run / "logs").glob("weights/*"))
    return steps


def assert_nothing_left() -> None:
    """No process that this test's commands started, or that those started. (Servers' own shared memory: see their
    engines' tests.)"""
    mark = f"PEKOE_TEST_RUN={OURS}".encode()
    end = time.monotonic() + 15  # of a server that was killed, the guard takes down the rest
    while left := [process for process in Path("/proc").glob("[0-9]*") if mark in environment(process)]:
        assert time.monotonic() < end, [(process / "cmdline").read_bytes() for process in left]
        time.sleep(0.2)


def environment(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def test_sglang_launched_by_shared_memory(lay_out: Callable[..., Path], sglang_section: Callable[..., EngineSection]):
    recipe = lay_out(sglang_section(sync="shm"), SHAPE)
    printed = pekoe("rl", str(recipe))
    assert "starting 1 sglang server, weights by shm" in printed
    assert_proven(recipe, "shm")
    assert (recipe.parent / "run" / "logs" / "sglang-server-0.log").stat().st_size > 0
    assert_nothing_left()


@pytest.mark.long
def test_sglang_attached_by_disk_and_evaluated(
    lay_out: Callable[..., Path],
    make_model: Callable[..., Decoder],
    sglang_section: Callable[..., EngineSection],
    sglang_launched: Callable[[Decoder], SGLangEngine],
):
    """A server that runs already, on other weights: it is given the run's, and goes on afterwards."""
    launched = sglang_launched(make_model(seed=5, scale=2.0, **SGLANG_SHAPE))
    recipe = lay_out(sglang_section(**attached_to(launched), sync="disk"), SGLANG_SHAPE)
    assert "attaching to 1 sglang server, weights by disk" in pekoe("rl", str(recipe))
    assert_proven(recipe, "disk")
    assert launched.process is not None
    assert group_members(launched.process.pid)
    words = ["eval.samples=2", "eval.max_new_tokens=12", "max_prompt_tokens=8", "engine.backend=sglang"]
    words += [f'engine.server.urls=["{launched.url}"]', "engine.server.key_env=PEKOE_TEST_KEY", "run.threads=1"]
    model, data = recipe.parent / "run" / "model", recipe.parent / "train.jsonl"
    printed = pekoe("eval", *words, "--model", str(model), "--data", str(data))
    assert json.loads(printed[printed.index("{") :])["num_problems"] == 8
    assert launched.checksums() == checksums_of(load_model(model), SGLangChecksums(torch.float32))


def test_vllm_launched_by_broadcast(lay_out: Callable[..., Path]):
    server = {"python": vllm_python(), "start_limit_s": START_LIMIT_S, "sync": "broadcast"}
    engine = EngineSection.model_validate({"backend": "vllm", "server": server, "kv_tokens": 4096})
    recipe = lay_out(engine, SHAPE)
    assert "starting 1 vllm server, weights by broadcast" in pekoe("rl", str(recipe))
    assert_proven(recipe, "broadcast")
    assert (recipe.parent / "run" / "logs" / "vllm-server-0.log").stat().st_size > 0
    assert_nothing_left()


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
def test_a_step_of_a_real_model(lay_out: Callable[..., Path], request: pytest.FixtureRequest, backend: str):
    """SmolLM2-135M-Instruct: larger logits than random weights give."""
    real = os.environ.get("PEKOE_SMOLLM2")
    if not real:
        pytest.skip("PEKOE_SMOLLM2 names no directory of SmolLM2-135M-Instruct: make test-smollm2 makes one")
    if backend == "sglang":
        engine = request.getfixturevalue("sglang_section")(sync="shm")
    else:
        server = {"python": vllm_python(), "start_limit_s": START_LIMIT_S, "sync": "shm"}
        engine = EngineSection.model_validate({"backend": "vllm", "server": server, "kv_tokens": 4096})
    recipe = lay_out(engine, SHAPE, num_steps=1, train={"token_budget": 128}, optim={"lr": 1e-5})
    pekoe("rl", str(recipe), f"model.path={real}", "data.max_prompt_tokens=64")
    events = read_lines(recipe.parent / "run" / "journal.jsonl")
    (step,) = (event for event in events if event["event"] == "step")
    assert step["logprob_diff_max"] <= 5e-4  # I1
    assert step["sync_canary_diff"] <= 5e-4  # I4
    assert step["sync_checksum"] == "equal"
    assert step["sync_bytes"] > 500_000_000
    assert_nothing_left()


SIZES = {"prompts_per_step": 8, "samples_per_prompt": 8, "max_new_tokens": 64}
LAGGING: dict[str, Any] = {
    "num_steps": 5,
    "rollout": SIZES | {"max_lag": 1, "during_update": "go_on"},
    "train": {"token_budget": 128},
    "optim": {"lr": 1e-3},  # faster, and all responses become short or long
}


@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.long)])
def test_vllm_takes_the_adapter_alone(lay_out: Callable[..., Path], lag: int):
    """At each step, from a file; while responses are under way, too, where sampling is ahead."""
    server = {"python": vllm_python(), "start_limit_s": START_LIMIT_S, "sync": "shm", "max_requests": 4}
    engine = EngineSection.model_validate({"backend": "vllm", "server": server, "kv_tokens": 32 * 512})
    recipe = lay_out(engine, SHAPE, **(LAGGING if lag else {"num_steps": 3}))
    pekoe("rl", str(recipe), "model.lora.rank=4", "model.lora.alpha=8.0", "algo.kl=0.01")
    run = recipe.parent / "run"
    steps = [event for event in read_lines(run / "journal.jsonl") if event["event"] == "step"]
    whole = (recipe.parent / "model" / "model.safetensors").stat().st_size
    adapter = (run / "model" / "adapter_model.safetensors").stat().st_size
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    for step in steps[lag:]:
        assert step["sync_canary_diff"] <= 5e-4  # I4
        assert step["sync_bytes"] == adapter < whole / 3
    again = replay_run(run, NoProgress())
    assert again.same_weights
    assert max(again.logprob_diffs.values()) <= 5e-4  # I1, by version
    if not lag:
        assert max(step["logprob_diff_max"] for step in steps) <= 5e-4
        assert [step["sync_checksum"] for step in steps] == ["equal", "skipped", "skipped"]  # of the base
    assert_nothing_left()


@pytest.mark.long
def test_sglang_takes_an_adapters_sum(lay_out: Callable[..., Path], sglang_section: Callable[..., EngineSection]):
    recipe = lay_out(sglang_section(sync="shm"), SHAPE)
    pekoe("rl", str(recipe), "model.lora.rank=4", "model.lora.alpha=8.0")
    steps = [event for event in read_lines(recipe.parent / "run" / "journal.jsonl") if event["event"] == "step"]
    for step in steps:
        assert step["logprob_diff_max"] <= 5e-4
        assert step["sync_canary_diff"] <= 5e-4
        assert step["sync_bytes"] > 100_000
    assert steps[0]["sync_checksum"] == "equal"  # of the sum
    assert_nothing_left()


def assert_swapped_in_flight(recipe: Path, num_steps: int) -> None:
    """Weights came while responses were under way; every token is of the version that it says (I1), none is older than
    the bound, and training from the records gives the run's weights."""
    run = recipe.parent / "run"
    steps = [read_records(run, step) for step in range(1, num_steps + 1)]
    spans = [[tuple(version for version, _ in line["versions"]) for line in lines] for lines in steps]
    assert {len(each) for each in spans} == {64}
    met = [{version for span in each for version in span} for each in spans]
    assert all(versions <= {max(0, step - 1), step} for step, versions in enumerate(met))
    # Not at every step: on a busy machine training may take longer than sampling.
    assert any(len(span) == 2 for each in spans for span in each)
    again = replay_run(run, NoProgress())
    assert again.same, str(again)
    assert again.same_weights
    assert set(again.logprob_diffs) == set[int]().union(*met)
    assert max(again.logprob_diffs.values()) <= 5e-4
    assert_nothing_left()


AT_A_TIME = 4  # requests, in the order of their steps: when a step has been trained on, the next is half sampled


@pytest.mark.long
def test_sglang_goes_on_sampling_while_the_weights_change(
    lay_out: Callable[..., Path], sglang_section: Callable[..., EngineSection]
):
    recipe = lay_out(sglang_section(sync="shm", max_requests=AT_A_TIME), SHAPE, **LAGGING)
    pekoe("rl", str(recipe))
    assert_swapped_in_flight(recipe, 5)


def test_vllm_goes_on_sampling_while_the_weights_change(lay_out: Callable[..., Path]):
    server = {
        "python": vllm_python(),
        "start_limit_s": START_LIMIT_S,
        "sync": "broadcast",
        "max_requests": AT_A_TIME,
    }
    engine = EngineSection.model_validate({"backend": "vllm", "server": server, "kv_tokens": 32 * 512})
    recipe = lay_out(engine, SHAPE, **LAGGING)
    pekoe("rl", str(recipe))
    assert_swapped_in_flight(recipe, 5)


def cluster_of(ranks: int = 2, **more: Any) -> dict[str, Any]:
    """A section `cluster` with an embedded engine and a server."""
    return {"generation": {"engines": 2, "servers": 1}, "training": {"ranks": ranks}, **more}


@pytest.mark.cluster
def test_vllm_beside_an_embedded_engine_in_a_cluster(lay_out: Callable[..., Path]):
    """Two ranks shard the weights; the server is killed in the middle of the run."""
    server = {"python": vllm_python(), "start_limit_s": START_LIMIT_S}
    engine = EngineSection.model_validate({"backend": "vllm", "server": server, "kv_tokens": 4096})
    recipe = lay_out(engine, SHAPE, cluster=cluster_of(), num_steps=9)
    killed = threading.Thread(target=kill_once_there, args=(recipe,), daemon=True)
    killed.start()
    printed = pekoe("rl", str(recipe))
    killed.join(1)
    assert not killed.is_alive()
    assert "engine 1 is lost" in printed
    steps = assert_proven(recipe, "broadcast", num_steps=9)
    assert steps[0]["num_engines"] == 2
    ledger = [(line["uid"], line["draw"]) for line in read_lines(recipe.parent / "run" / "ledger.jsonl")]
    assert len(ledger) == len(set(ledger)) == 9 * 4
    assert_nothing_left()


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.parametrize(("sync", "colocate"), [("broadcast", True), ("disk", False)])
def test_sglang_beside_an_embedded_engine_in_a_cluster(
    lay_out: Callable[..., Path], sglang_section: Callable[..., EngineSection], sync: str, colocate: bool
):
    recipe = lay_out(sglang_section(), SHAPE, cluster=cluster_of(sync=sync, colocate=colocate))
    pekoe("rl", str(recipe))
    steps = assert_proven(recipe, sync)
    assert {step["num_engines"] for step in steps} == {2}
    assert_nothing_left()


def kill_once_there(recipe: Path) -> None:
    """Kill the server of this test's run, once it has sampled something."""
    journal = recipe.parent / "run" / "journal.jsonl"
    while not journal.exists() or b'"step":2,"num_prompts"' not in journal.read_bytes():
        time.sleep(0.05)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if "process_guard.py" in command and str(recipe.parent) in command:
                for child in process.children():
                    if "process_guard.py" not in " ".join(child.cmdline()):
                        child.kill()
