"""vLLM's real server: what it samples is what the model says, whatever route the weights took."""

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pekoe.core.errors import RunError
from pekoe.core.types import Prompt, Rollout, SamplingParams
from pekoe.engine import transfer
from pekoe.engine.servers.vllm import VLLMEngine
from pekoe.model import Decoder, PackedAttention

MakePrompt = Callable[..., Prompt]
Factory = Callable[..., VLLMEngine]
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


@torch.no_grad()
def reference(model: Decoder, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
    """Log-probs [R] by one packed forward over prompt and response."""
    payload = rollout.payload.resolve()
    tokens = torch.from_numpy(np.concatenate([payload.prompt_tokens, payload.tokens]))
    logits = model.logits(model(tokens, torch.arange(len(tokens)), PackedAttention([0, len(tokens)])))
    start = len(payload.prompt_tokens)
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs[torch.arange(start, len(tokens)) - 1, tokens[start:]].numpy()


def difference(model: Decoder, rollout: Rollout, temperature: float = 1.0) -> float:
    return float(np.abs(rollout.payload.resolve().logprobs - reference(model, rollout, temperature)).max())


def difference_by_version(models: dict[int, Decoder], rollout: Rollout) -> float:
    """Each token against the model of its own version."""
    ends = [start for _, start in rollout.versions[1:]] + [rollout.num_tokens]
    got = rollout.payload.resolve().logprobs
    worst = 0.0
    for (version, start), end in zip(rollout.versions, ends, strict=True):
        worst = max(worst, float(np.abs(got - reference(models[version], rollout))[start:end].max()))
    return worst


def responses(rollouts: list[Rollout]) -> dict[tuple[str, int], list[int]]:
    return {(r.uid, r.sample_index): r.payload.resolve().tokens.tolist() for r in rollouts}


def wait_running(engine: VLLMEngine, limit_s: float = 10) -> None:
    """Until the server samples, or has had time to end before that was seen."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        metrics = engine._loop.run(engine._backend.get(engine.servers[0], "/metrics"))
        if re.search(r"^vllm:num_requests_running{.*} [1-9]\d*\.0$", metrics, re.MULTILINE):
            return
        time.sleep(0.01)


def kill_engine_core(group: int) -> None:
    """The process that samples, behind the one that answers."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(place.name)) == group and "EngineCore" in (place / "cmdline").read_text():
                os.kill(int(place.name), signal.SIGKILL)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_the_models_at_the_sampling_temperature(
    engine: VLLMEngine, models: list[Decoder], make_prompt: MakePrompt, temperature: float
):
    prompts = [make_prompt(f"p{i}", length, VOCAB) for i, length in enumerate([1, 31, 32, 33, 100])]
    params = SamplingParams(n=3, max_new_tokens=24, temperature=temperature, stop_token_ids=tuple(range(12)))
    rollouts = list(engine.generate(prompts, params))
    assert max(difference(models[0], r, temperature or 1.0) for r in rollouts) <= 1e-4
    if temperature:
        assert {r.finish_reason for r in rollouts} == {"stop", "length"}


def test_a_group_computes_its_prompt_once(engine: VLLMEngine, make_prompt: MakePrompt):
    prompt = make_prompt("p", 32 * 3 + 1, VOCAB)
    rollouts = list(engine.generate([prompt], SamplingParams(n=16, max_new_tokens=4)))
    assert len(rollouts) == 16
    assert engine.stats().num_prefill_tokens == 97 + 15  # and the last token, which is in no full block, each
    assert engine.stats().num_cached_tokens == 96 * 15


def test_samples_differ_and_repeat(engine: VLLMEngine, make_prompt: MakePrompt):
    prompts = [make_prompt(f"p{i}", 20, VOCAB) for i in range(2)]
    params = SamplingParams(n=4, max_new_tokens=16, seed=5)
    first = responses(list(engine.generate(prompts, params)))
    assert len({tuple(tokens) for tokens in first.values()}) == 8
    assert responses(list(engine.generate(prompts, params))) == first
    other = SamplingParams(n=4, max_new_tokens=16, seed=6)
    assert responses(list(engine.generate(prompts, other))) != first


def test_evaluation_may_truncate(engine: VLLMEngine, models: list[Decoder], make_prompt: MakePrompt):
    prompt = make_prompt("p", 20, VOCAB)
    params = SamplingParams(n=8, max_new_tokens=16, top_k=2, stream="eval")
    for rollout in engine.generate([prompt], params):
        payload = rollout.payload.resolve()
        tokens = torch.from_numpy(np.concatenate([prompt.tokens, payload.tokens]))
        with torch.no_grad():
            logits = models[0].logits(models[0](tokens, torch.arange(36), PackedAttention([0, 36])))
        best = logits[19:35].topk(2).indices
        assert (best == tokens[20:, None]).any(-1).all()


def test_abort_of_one_and_of_all(engine: VLLMEngine, models: list[Decoder], make_prompt: MakePrompt):
    prompts = [make_prompt(f"p{i}", 20, VOCAB) for i in range(3)]
    for _ in range(8):  # on a busy machine the responses may end before the abort comes: try again
        running = engine.generate(prompts, SamplingParams(n=2, max_new_tokens=2500))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(wait_running, engine)
            aborting = pool.submit(engine.abort, ["p1"])
            rollouts = [next(running) for _ in range(2)]
            aborting.result(timeout=60)
        first = {(r.uid, r.finish_reason) for r in rollouts}
        engine.abort()
        rest = list(running)
        rollouts += rest
        assert len(rollouts) == 6
        for rollout in rollouts:
            assert (rollout.num_tokens < 2500) == (rollout.finish_reason == "abort")
            assert not rollout.num_tokens or difference(models[0], rollout) <= 1e-4
        if first == {("p1", "abort")} and {r.finish_reason for r in rest} == {"abort"}:
            return
    raise AssertionError("no abort met a response in the middle")


@pytest.mark.parametrize("route", ["disk", "shm", "broadcast"])
def test_updates_reach_every_parameter(
    vllm_engine_factory: Factory, models: list[Decoder], make_prompt: MakePrompt, route: str, monkeypatch
):
    monkeypatch.setattr(transfer.buckets, "__defaults__", (100_000, None))  # several, one ending within a fused weight
    with contextlib.closing(vllm_engine_factory(models[0], sync=route)) as engine:
        for version, model in enumerate([models[1], models[2], models[1]], 1):
            engine.update_weights(model, version)
            rollouts = list(engine.generate([make_prompt("p", 70, VOCAB)], SamplingParams(n=4, max_new_tokens=16)))
            assert {r.versions for r in rollouts} == {((version, 0),)}
            assert max(difference(model, r) for r in rollouts) <= 1e-4
            assert engine.holds(model) is True
    assert not list(transfer.SHARED_MEMORY.glob(f"pekoe-weights-{os.getpid()}-*"))


def test_a_single_changed_weight_is_seen(vllm_engine_factory: Factory, models: list[Decoder]):
    with contextlib.closing(vllm_engine_factory(models[0])) as engine:
        for name in ("model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"):
            weight = models[0].get_parameter(name)
            old = weight.detach().clone()
            with torch.no_grad():
                weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
            try:
                assert engine.holds(models[0]) is False
                assert name in engine.events[-1]
            finally:
                with torch.no_grad():
                    weight.copy_(old)
        assert engine.holds(models[0]) is True


def test_a_head_left_stale_would_be_seen(engine: VLLMEngine, models: list[Decoder]):
    """vLLM's own reload leaves a tied head packed as it was: what the extension mends."""
    server, backend = engine.servers[0], engine._backend
    model = engine._log_dir / "model"
    transfer.save_model(models[1], model)
    arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
    engine._loop.run(backend.post(server, "/collective_rpc", arguments))
    assert engine.holds(models[1]) is False
    assert engine.events[-1].endswith("in lm_head.weight")


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_update_in_the_middle(vllm_engine_factory: Factory, models: list[Decoder], make_prompt: MakePrompt, mode: str):
    prompts = [make_prompt(f"p{i}", 70, VOCAB) for i in range(3)]
    weights: dict[int, Decoder] = {}
    with contextlib.closing(vllm_engine_factory(models[0], during_update=mode)) as engine:
        for version in range(1, 8):  # on a busy machine the responses may end before the update begins: try again
            weights |= {version - 1: models[(version - 1) % 2], version: models[version % 2]}
            running = engine.generate(prompts, SamplingParams(n=2, max_new_tokens=1500))
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                pool.submit(wait_running, engine)
                updating = pool.submit(engine.update_weights, weights[version], version)
                rollouts = list(running)
                updating.result(timeout=60)
            assert len(rollouts) == 6
            assert engine.version == version
            assert max(difference_by_version(weights, r) for r in rollouts if r.num_tokens) <= 2e-4
            in_the_middle = {
                "keep": {r.finish_reason for r in rollouts} == {"length"}
                and any([v for v, _ in r.versions] == [version - 1, version] for r in rollouts),
                "abort": "abort" in {r.finish_reason for r in rollouts},
            }
            if in_the_middle[mode]:
                return
    raise AssertionError("no update met a response in the middle")


def test_a_launched_server_takes_the_releases_flags_dies_and_leaves_nothing(
    vllm_launch: Callable[..., VLLMEngine], models: list[Decoder], make_prompt: MakePrompt
):
    before = set(os.listdir("/dev/shm"))
    flags = [
        "--enforce-eager",
        "--no-enable-chunked-prefill",
        "--disable-custom-all-reduce",
        "--disable-sliding-window",
    ]
    engine = vllm_launch(models[0], args=flags, sync="shm")
    try:
        server = engine.servers[0]
        engine.update_weights(models[1], 1)
        (rollout,) = engine.generate([make_prompt("p", 70, VOCAB)], SamplingParams(max_new_tokens=16))
        assert difference(models[1], rollout) <= 1e-4
        running = engine.generate([make_prompt("p", 70, VOCAB)], SamplingParams(n=2, max_new_tokens=3000))
        threading.Timer(1.0, kill_engine_core, [server.process.pid]).start()
        with pytest.raises(RunError, match="expected a server that serves at version 1, got none"):
            list(running)
        assert not engine.health()
    finally:
        engine.close()
    assert server.process is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(server.url.rpartition(":")[2]))) != 0
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith(("pekoe", "psm_"))} == set()
