"""vLLM's real server: what it samples is what the model says, whatever route the weights took."""

import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pekoe.core.types import Completion, Request, SamplingParams
from pekoe.engine.base import EngineLost
from pekoe.engine.servers import VLLMEngine
from pekoe.model import Decoder, PackedAttention, save_model
from pekoe.weights.transport import SHARED_MEMORY
from tests.servers.common import off, off_by_version, results, sample, until, update, wrong_parameters

Factory = Callable[..., VLLMEngine]
Ask = Callable[..., list[Request]]
pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
VOCAB = 128


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Decoder]) -> list[Decoder]:
    """Three sets of weights for one shape, with tied embeddings. Their distributions are peaked, not degenerate."""
    shape = {"vocab_size": VOCAB, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "max_positions": 4096}
    return [make_model(seed, scale=1.5, **shape) for seed in range(3)]


@pytest.fixture
def engine(vllm_engine_factory: Factory, models: list[Decoder]) -> Iterator[VLLMEngine]:
    with contextlib.closing(vllm_engine_factory(models[0])) as engine:
        yield engine


@pytest.fixture
def ask(make_requests: Callable[..., list[Request]]) -> Ask:
    """ask(params, *lengths): groups of prompts of these lengths, p0 and up."""
    return lambda params, *sizes: [
        request for i, size in enumerate(sizes) for request in make_requests(f"p{i}", size, params, vocab=VOCAB)
    ]


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


def wait_running(engine: VLLMEngine) -> None:
    def running() -> bool:
        metrics = engine._thread.run(engine._client.get("/metrics"))
        return re.search(r"^vllm:num_requests_running{.*} [1-9]\d*\.0$", metrics, re.MULTILINE) is not None

    until(running)


def kill_engine_core(group: int) -> None:
    """The process that samples, behind the one that answers."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(place.name)) == group and "EngineCore" in (place / "cmdline").read_text():
                os.kill(int(place.name), signal.SIGKILL)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_the_models_at_the_sampling_temperature(
    engine: VLLMEngine, models: list[Decoder], ask: Ask, temperature: float
):
    params = SamplingParams(n=3, max_new_tokens=24, temperature=temperature, stop_token_ids=tuple(range(12)))
    completions = sample(engine, ask(params, 1, 31, 32, 33, 100))
    assert max(off(models[0], completion, temperature or 1.0) for completion in completions) <= 1e-4
    if temperature:
        assert {completion.finish for completion in completions} == {"stop", "length"}


def test_a_group_computes_its_prompt_once(engine: VLLMEngine, ask: Ask):
    sample(engine, ask(SamplingParams(n=16, max_new_tokens=4), 32 * 3 + 1))
    assert engine.stats().num_prefill_tokens == 97 + 15  # and the last token, which is in no full block, each
    assert engine.stats().num_cached_tokens == 96 * 15


def test_samples_differ_and_repeat(engine: VLLMEngine, ask: Ask):
    params = SamplingParams(n=4, max_new_tokens=16, seed=5)
    first = tokens_of(sample(engine, ask(params, 20, 21)))
    assert len(set(map(tuple, first))) == 8
    assert tokens_of(sample(engine, ask(params, 20, 21))) == first
    assert tokens_of(sample(engine, ask(SamplingParams(n=4, max_new_tokens=16, seed=6), 20, 21))) != first


def test_evaluation_may_truncate(engine: VLLMEngine, models: list[Decoder], ask: Ask):
    for completion in sample(engine, ask(SamplingParams(n=8, max_new_tokens=16, top_k=2, stream="eval"), 20)):
        tokens = torch.from_numpy(completion.handle.resolve().tokens)
        with torch.no_grad():
            logits = models[0].logits(models[0](tokens, torch.arange(36), PackedAttention([0, 36])))
        best = logits[19:35].topk(2).indices
        assert (best == tokens[20:, None]).any(-1).all()


def test_abort_of_one_and_of_all(engine: VLLMEngine, models: list[Decoder], ask: Ask):
    futures = engine.submit(ask(SamplingParams(n=2, max_new_tokens=3900), 20, 20, 20))
    wait_running(engine)
    engine.abort(["p1"])
    assert {completion.finish for completion in results(futures[2:4])} == {"abort"}
    engine.abort()
    completions = results(futures)
    assert "abort" in {completion.finish for completion in completions[:2] + completions[4:]}
    for completion in completions:
        assert (completion.num_tokens < 3900) == (completion.finish == "abort")
        assert off(models[0], completion) <= 1e-4


def test_a_flush_beside_traffic_keeps_what_is_in_flight(engine: VLLMEngine, models: list[Decoder], ask: Ask):
    futures = engine.submit(ask(SamplingParams(n=2, max_new_tokens=1500), 70, 70))
    wait_running(engine)
    engine.flush_cache()
    for completion in results(futures):
        assert completion.finish == "length"
        assert off(models[0], completion) <= 2e-4


@pytest.mark.parametrize("route", ["disk", "shm", "broadcast"])
def test_updates_reach_every_parameter(engine: VLLMEngine, models: list[Decoder], ask: Ask, tmp_path: Path, route: str):
    for version, model in enumerate([models[1], models[2], models[1]], 1):
        update(engine, model, version, route, tmp_path)
        completions = sample(engine, ask(SamplingParams(n=4, max_new_tokens=16), 70))
        assert {completion.versions for completion in completions} == {((version, 0),)}
        assert max(off(model, completion) for completion in completions) <= 1e-4
        assert wrong_parameters(engine, model) == []
    assert not list(SHARED_MEMORY.glob(f"pekoe-weights-{os.getpid()}-*"))


def test_a_single_changed_weight_is_seen(engine: VLLMEngine, models: list[Decoder]):
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"):
        weight = models[0].get_parameter(name)
        old = weight.detach().clone()
        with torch.no_grad():
            weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
        try:
            assert name in wrong_parameters(engine, models[0])
        finally:
            with torch.no_grad():
                weight.copy_(old)
    assert wrong_parameters(engine, models[0]) == []


def test_a_head_left_stale_would_be_seen(engine: VLLMEngine, models: list[Decoder], tmp_path: Path):
    """vLLM's own reload leaves a tied head packed as it was: what the extension mends."""
    save_model(models[1], tmp_path / "model")
    arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "model")}}
    engine._thread.run(engine._client.post("/collective_rpc", arguments))
    assert wrong_parameters(engine, models[1]) == ["lm_head.weight"]


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_update_in_the_middle(vllm_engine_factory: Factory, models: list[Decoder], ask: Ask, tmp_path: Path, mode: str):
    weights = {0: models[0], 1: models[1]}
    with contextlib.closing(vllm_engine_factory(models[0], during_update=mode)) as engine:
        futures = engine.submit(ask(SamplingParams(n=2, max_new_tokens=3900), 70, 70, 70))
        wait_running(engine)
        update(engine, models[1], 1, "broadcast", tmp_path)
        completions = results(futures)
        assert engine.version == 1
        assert max(off_by_version(weights, completion) for completion in completions) <= 2e-4
        if mode == "abort":
            assert "abort" in {completion.finish for completion in completions}
        else:
            assert {completion.finish for completion in completions} == {"length"}
            assert any([version for version, _ in c.versions] == [0, 1] for c in completions)


def test_a_launched_server_takes_the_releases_flags_dies_and_leaves_nothing(
    vllm_launch: Callable[..., VLLMEngine], models: list[Decoder], ask: Ask, tmp_path: Path
):
    before = set(os.listdir("/dev/shm"))
    flags = [
        "--enforce-eager",
        "--no-enable-chunked-prefill",
        "--disable-custom-all-reduce",
        "--disable-sliding-window",
    ]
    engine = vllm_launch(models[0], args=flags)
    process, url = engine.process, engine.url
    assert process is not None
    try:
        update(engine, models[1], 1, "shm", tmp_path)
        (completion,) = sample(engine, ask(SamplingParams(max_new_tokens=16), 70))
        assert off(models[1], completion) <= 1e-4
        futures = engine.submit(ask(SamplingParams(n=2, max_new_tokens=3900), 70))
        wait_running(engine)
        kill_engine_core(process.pid)
        for future in futures:
            with pytest.raises(EngineLost, match="vLLM server 0"):
                future.result(120)
        assert not engine.health()
    finally:
        engine.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith(("pekoe", "psm_"))} == set()
