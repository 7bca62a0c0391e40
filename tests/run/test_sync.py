"""I4: after a sync every engine holds exactly the trainer's version, and one that does not stops the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pekoe.config import RLConfig
from pekoe.config.engine import EngineSection
from pekoe.config.recipes import OptimSection
from pekoe.core import RunError, UserError
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.core.types import Prompt, Rollout, SamplingParams
from pekoe.engine import EmbeddedEngine, RemoteEngine, SGLangEngine
from pekoe.model import Decoder, load_model, save_model
from pekoe.run.build import RLParts, build_rl, open_engine
from pekoe.run.interrupt import Stop
from pekoe.run.rl import run_rl
from pekoe.run.run_dir import read_rollouts
from pekoe.run.sync import WeightSync
from pekoe.train import Trainer
from tests.run.hosted import URLS, Hosted

ROUTES = ["disk", "shm", "broadcast"]


@pytest.fixture
def trainer(make_model: Callable[..., Decoder]) -> Trainer:
    return Trainer(make_model(), OptimSection(), token_budget=64, total_updates=1)


@pytest.fixture
def canary(make_prompt: Callable[..., Prompt]) -> Prompt:
    return make_prompt("canary", 9)


def learn(trainer: Trainer) -> None:
    """Other weights, as after an optimizer step."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)


class Copying(EmbeddedEngine):
    """Takes weights from a directory: they are its own, not the trainer's."""

    def __init__(self, model: Decoder, place: Path) -> None:
        super().__init__(copy.deepcopy(model))
        self.place = place

    def update_weights(self, source: Any, version: int) -> None:
        save_model(source, self.place / str(version))
        super().update_weights(self.place / str(version), version)


# In process


def test_in_process_nothing_is_copied(trainer: Trainer, canary: Prompt):
    sync = WeightSync(trainer, EmbeddedEngine(trainer.model), canary)
    for version in range(3):
        report = sync(version)
        assert (report.version, report.route, report.copied_bytes, report.checksum) == (version, "alias", 0, "equal")
        assert report.canary_diff <= 1e-4
        learn(trainer)


def test_weights_from_a_directory(trainer: Trainer, canary: Prompt, tmp_path: Path):
    engine = Copying(trainer.model, tmp_path)
    sync = WeightSync(trainer, engine, canary, "disk")
    for version in range(2):
        learn(trainer)
        report = sync(version)
        assert report.checksum == "equal"
        assert report.canary_diff <= 1e-4
        assert engine.model is not trainer.model


def test_stale_weights_are_seen_by_the_canary(trainer: Trainer, canary: Prompt, monkeypatch: pytest.MonkeyPatch):
    engine = EmbeddedEngine(copy.deepcopy(trainer.model))
    monkeypatch.setattr(engine, "holds", lambda model: None)
    monkeypatch.setattr(engine, "update_weights", lambda model, version: setattr(engine, "_version", version))
    sync = WeightSync(trainer, engine, canary)
    assert sync(0).checksum == "unknown"
    learn(trainer)
    with pytest.raises(RunError, match=r"expected the engine at version 1 with log-probs within 0\.001"):
        sync(1)


def test_a_single_wrong_number_is_seen_by_the_checksum(trainer: Trainer, canary: Prompt, tmp_path: Path):
    engine = Copying(trainer.model, tmp_path)
    sync = WeightSync(trainer, engine, canary, "disk")
    sync(0)
    with torch.no_grad():
        weight = engine.model.get_parameter("model.norm.weight")
        weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    engine.update_weights = lambda source, version: setattr(engine, "_version", version)  # type: ignore[method-assign]
    with pytest.raises(RunError, match="version 1 to hold the trainer's parameters bit by bit"):
        sync(1)


def test_a_wrong_version_is_seen(trainer: Trainer, canary: Prompt, monkeypatch: pytest.MonkeyPatch):
    engine = EmbeddedEngine(trainer.model)
    update = engine.update_weights
    monkeypatch.setattr(engine, "update_weights", lambda model, version: update(model, version + 1))
    with pytest.raises(RunError, match=r"at version 4 .* got version 5"):
        WeightSync(trainer, engine, canary)(4)


def test_log_probs_that_are_no_numbers_are_not_close(trainer: Trainer, canary: Prompt, monkeypatch: pytest.MonkeyPatch):
    engine = EmbeddedEngine(trainer.model)
    generate = engine.generate

    def spoilt(prompts: list[Prompt], params: SamplingParams) -> Iterator[Rollout]:
        for rollout in generate(prompts, replace(params, n=2)):
            payload = rollout.payload.resolve()
            factor = np.float32("nan") if rollout.sample_index else np.float32(1)
            yield replace(rollout, payload=replace(payload, logprobs=payload.logprobs * factor))

    monkeypatch.setattr(engine, "generate", spoilt)
    with pytest.raises(RunError, match="got version 0 and nan"):
        WeightSync(trainer, engine, canary)(0)


def test_the_checksum_comes_with_the_first_two_and_then_as_often_as_asked(trainer: Trainer, canary: Prompt):
    sync = WeightSync(trainer, EmbeddedEngine(trainer.model), canary, checksum_every=3)
    due = [sync(version).checksum == "equal" for version in range(8)]
    assert due == [True, True, False, True, False, False, True, False]


# Through servers


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> type[Hosted]:
    for name in ("deaf", "off_by_a_bit", "ahead"):
        monkeypatch.setattr(Hosted, name, set())
    monkeypatch.setattr(SGLangEngine, "backend_class", Hosted)
    return Hosted


@pytest.fixture
def open_servers(hosted: type[Hosted], trainer: Trainer, tmp_path: Path) -> Iterator[Callable[..., SGLangEngine]]:
    with ExitStack() as stack:

        def make(route: str = "disk") -> SGLangEngine:
            save_model(trainer.model, tmp_path / "model")
            config = EngineSection.model_validate({"backend": "sglang", "server": {"urls": URLS, "sync": route}})
            engine = SGLangEngine(tmp_path / "model", config, trainer.model.spec, 64, tmp_path / "logs")
            stack.callback(engine.close)
            return engine

        yield make


@pytest.mark.parametrize("route", ROUTES)
def test_every_server_is_proven(
    open_servers: Callable[..., RemoteEngine], trainer: Trainer, canary: Prompt, route: Any, tmp_path: Path
):
    engine = open_servers(route)
    sync = WeightSync(trainer, engine, canary, route, checksum_every=5)
    size = sum(p.nbytes for p in trainer.model.parameters())
    for version in range(3):
        learn(trainer)
        report = sync(version)
        assert report.canary_diff <= 1e-4
        assert report.route == route
        assert report.copied_bytes == (2 * size if route == "broadcast" else size)
        assert report.checksum == ("equal" if version < 2 else "skipped")
        assert engine._backend.probed == list(URLS)
        engine._backend.probed.clear()
    assert not list((tmp_path / "logs").glob("weights/*"))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stale", URLS)
def test_one_stale_server_is_seen(
    open_servers: Callable[..., RemoteEngine], trainer: Trainer, canary: Prompt, route: Any, stale: str
):
    sync = WeightSync(trainer, open_servers(route), canary, route)
    sync(0)
    learn(trainer)
    Hosted.deaf.add(stale)
    with pytest.raises(RunError, match="expected the engine at version 1 with log-probs within"):
        sync(1)


@pytest.mark.parametrize("wrong", URLS)
def test_one_number_at_one_server_is_seen(
    open_servers: Callable[..., RemoteEngine], trainer: Trainer, canary: Prompt, wrong: str
):
    engine = open_servers()
    sync = WeightSync(trainer, engine, canary, "disk")
    sync(0)
    Hosted.off_by_a_bit.add(wrong)
    with pytest.raises(RunError, match="bit by bit"):
        sync(1)
    assert (
        engine.events[-1] == f"{wrong} holds other weights than it should in model.layers.1.self_attn.qkv_proj.weight"
    )


def test_a_server_that_samples_under_another_version_is_seen(
    open_servers: Callable[..., RemoteEngine], trainer: Trainer, canary: Prompt
):
    engine = open_servers()
    Hosted.ahead.add(URLS[1])
    sync = WeightSync(trainer, engine, canary, "disk")
    sync(0)  # goes on without it
    assert [server.state for server in engine.servers] == ["serving", "stale"]
    assert "expected tokens of versions 0 to 0, got [1]" in engine.events[0]
    Hosted.ahead.add(URLS[0])
    with pytest.raises(RunError, match="expected a server that serves at version 1, got none"):
        sync(1)


def test_a_server_that_is_lost_is_not_asked(
    open_servers: Callable[..., RemoteEngine], trainer: Trainer, canary: Prompt
):
    engine = open_servers()
    sync = WeightSync(trainer, engine, canary, "disk")
    engine.servers[0].state = "dead"
    engine._backend.reachable = lambda server: refuse(server.url == URLS[0])
    assert sync(0).checksum == "equal"
    assert engine._backend.probed == [URLS[1]]


async def refuse(it: bool) -> bool:
    return not it


# A run


def parts_of(config: RLConfig, stack: ExitStack) -> RLParts:
    return build_rl(config, NoProgress(), Stop(), stack)


@pytest.mark.parametrize("route", ROUTES)
def test_the_same_loop_on_servers(build: Callable[..., RLConfig], hosted: type[Hosted], route: str, tiny_dir: Path):
    config = build(
        *("num_steps=2", "engine.backend=sglang", f'engine.server.urls=["{URLS[0]}", "{URLS[1]}"]'),
        *(f"engine.server.sync={route}", f"eval.data={tiny_dir / 'held_out.jsonl'}", "eval.every=2", "eval.samples=2"),
    )
    with ExitStack() as stack:
        run_rl(parts_of(config, stack))
    run = Path(config.run.dir)
    events = list(read_lines(run / "journal.jsonl"))
    steps = [event for event in events if event["event"] == "step"]
    assert [step["step"] for step in steps] == [1, 2]
    assert [step["sync_checksum"] for step in steps] == ["equal", "skipped"]
    for step in steps:
        assert step["logprob_diff_max"] <= 1e-4  # I1, for this backend too
        assert step["sync_canary_diff"] <= 1e-4
        assert step["sync_route"] == route
        assert step["sync_bytes"] > 0
        assert step["seconds"]["sync"] > 0
        lines = read_rollouts(run, step["step"])
        assert {tuple(map(tuple, line["versions"])) for line in lines} == {((step["step"] - 1, 0),)}
    assert [event["step"] for event in events if event["event"] == "eval"] == [0, 2]
    before, after = (load_model(place / "model").get_parameter("model.norm.weight") for place in (tiny_dir, run))
    assert not torch.equal(before, after)


def test_a_resumed_run_brings_the_checkpoints_weights(build: Callable[..., RLConfig], hosted: type[Hosted]):
    words = ["engine.backend=sglang", f'engine.server.urls=["{URLS[0]}"]', "train.save_every=1"]
    for number in (1, 2):
        config = build(f"num_steps={number}", *words)
        with ExitStack() as stack:
            run_rl(parts_of(config, stack))
    lines = read_rollouts(Path(config.run.dir), 2)
    assert {tuple(map(tuple, line["versions"])) for line in lines} == {((1, 0),)}


def test_what_servers_cannot_do_is_refused_before_any_is_started(
    build: Callable[..., RLConfig], monkeypatch: pytest.MonkeyPatch, tiny_dir: Path
):
    monkeypatch.setattr("pekoe.engine.servers.remote.ServerProcess", None)  # would fail
    launched = ["engine.server.python=python3"]
    for backend, words, message in [
        ("sglang", ["rollout.min_new_tokens=2"], "min_new_tokens: expected 0 with SGLang"),
        ("vllm", ["rollout.top_p=0.9"], r"rollout.top_p: expected 1.0 with engine.backend = 'vllm', got 0.9"),
        ("vllm", ["rollout.top_k=5"], "rollout.top_k: expected 0"),
        ("vllm", ["rollout.min_new_tokens=2"], "rollout.min_new_tokens: expected 0"),
        ("vllm", ["rollout.temperature=0.001"], "temperature: expected 0 or at least 0.01"),
        (
            "vllm",
            [f"eval.data={tiny_dir / 'held_out.jsonl'}", "eval.every=1", "eval.temperature=0.001"],
            "temperature: expected 0 or at least 0.01",
        ),
        ("vllm", ['engine.server.args=["--swap-space=4"]'], "expected flags of today's vLLM, got --swap-space"),
        (
            "vllm",
            ["engine.kv_tokens=19"],
            "engine.kv_tokens: expected room for the longest sequence, 20 tokens, got 19",
        ),
    ]:
        with ExitStack() as stack, pytest.raises(UserError, match=message):
            parts_of(build(f"engine.backend={backend}", *launched, *words), stack)


def test_servers_on_gpus_are_told_theirs(
    build: Callable[..., RLConfig], make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    config = build("engine.backend=vllm", "engine.server.python=python3", "engine.server.count=2")
    model, on_gpu = make_model(), SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(model, "parameters", lambda: iter([on_gpu]))
    with pytest.raises(UserError, match=r'gpus: expected the GPUs of each of 2 servers.* nearest: \["0", "1"\]'):
        open_engine(config, model, 20, [], tmp_path, NoProgress())
