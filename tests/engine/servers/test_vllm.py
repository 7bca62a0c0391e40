"""What `VLLMClient` sends and how it reads the answers, against recorded ones; no server."""

import asyncio
import copy
import importlib
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import httpx
import numpy as np
import pytest
import torch

from pekoe.config.engine import ServerSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Request, SamplingParams
from pekoe.engine.base import BroadcastGroup
from pekoe.engine.checksum import checksum
from pekoe.engine.servers import vllm
from pekoe.engine.servers.client import Answer, ServerOptions, TransportError
from pekoe.engine.servers.vllm import VLLMClient, check_args

CONTRACTS = json.loads(Path(__file__).with_name("contracts").joinpath("vllm.json").read_text())
"""Requests that vLLM 0.32 took on a CPU, with its answers, by name."""
Route = Callable[[httpx.Request], httpx.Response]


def contract(name: str) -> dict[str, Any]:
    return copy.deepcopy(CONTRACTS[name])


def make_client(answer: Route, **server: Any) -> VLLMClient:
    spec = ModelSpec("qwen2", 512, 128, 4, 4, 2, 32, 384, 4096)
    config = ServerSection(python="/opt/vllm/bin/python", **server)
    options = ServerOptions(Path("/models/m"), config, spec, 1000, 1000, 512, "float32", "cpu")
    return VLLMClient(options, "http://127.0.0.1:1", transport=httpx.MockTransport(answer))


def path_of(request: httpx.Request) -> str:
    return request.url.raw_path.decode()


class Recorded:
    """Answers with what a real server answered; keeps what it was asked."""

    def __init__(self, *contracts: dict[str, Any]) -> None:
        self.answers = {c["request"]["path"]: (c["status"], c["response"]) for c in contracts}
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((path_of(request), json.loads(request.content) if request.content else None))
        status, content = self.answers[path_of(request)]
        return httpx.Response(status, json=content)


def server_info(**changes: Any) -> dict[str, Any]:
    """The part that is read of what a server says of itself (as vLLM 0.32 does)."""
    model = {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32", "max_model_len": 1000}
    return {"vllm_config": {"model_config": model | changes}}


def sample(client: VLLMClient, params: SamplingParams, tokens: list[int], index: int = 0) -> Answer:
    return asyncio.run(client.sample(Request("p", 0, index, np.array(tokens), params), "r1"))


# Sampling


def test_a_sample_is_asked_for_and_read_as_recorded():
    recorded = contract("generate_greedy")
    choice = recorded["response"]["choices"][0]
    choice["weight_versions"] = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 6}]
    recorded["response"]["request_id"] = "generate-tokens-r1"
    server = Recorded(recorded)
    request = recorded["request"]["json"]
    answer = sample(
        make_client(server), SamplingParams(temperature=0, max_new_tokens=6, stop_token_ids=(9,)), request["token_ids"]
    )
    assert answer.tokens == choice["token_ids"]
    assert answer.logprobs == [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert answer.finish == "length"
    assert answer.versions == [(3, 0), (4, 2)]
    assert (answer.rid, answer.num_prompt_tokens) == ("r1", 32)
    ((path, asked),) = server.asked
    assert path == recorded["request"]["path"]
    assert asked["token_ids"] == request["token_ids"]
    assert asked["request_id"] == "r1"
    sampling = asked["sampling_params"]
    for name in ("temperature", "max_tokens", "ignore_eos", "logprobs"):
        assert sampling[name] == request["sampling_params"][name]
    assert sampling["stop_token_ids"] == [9]
    assert "n" not in sampling  # one request a sample, each with its own seed


def test_every_parameter_sent_is_one_that_vllm_knows():
    """It ignores what it does not know, as recorded; so ours are listed here against its SamplingParams."""
    assert contract("generate_error_bad")["status"] == 200
    known = {
        *("temperature", "top_p", "top_k", "min_tokens", "max_tokens", "stop_token_ids"),
        *("ignore_eos", "seed", "logprobs", "detokenize"),
    }
    server = Recorded(contract("generate_after_reload") | {"status": 500})
    with pytest.raises(RunError):
        sample(make_client(server), SamplingParams(), [1])
    assert set(server.asked[0][1]["sampling_params"]) == known


def test_seeds_are_of_63_bits_and_differ_by_sample():
    server = Recorded(contract("generate_greedy") | {"status": 400})
    for index in (0, 1, 0):
        with pytest.raises(RunError):
            sample(make_client(server), SamplingParams(n=2), [1], index)
    seeds = [asked["sampling_params"]["seed"] for _, asked in server.asked]
    assert seeds[0] == seeds[2] != seeds[1]
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    "change",
    [
        {"finish_reason": "error"},
        {"token_ids": [1, 2, 3, 4, 5, 6]},
        {"logprobs": None},
        {"weight_versions": [{"version": "default", "start": 0, "end": 6}]},
    ],
)
def test_an_answer_that_is_not_understood_is_an_error(change: dict[str, Any]):
    recorded = contract("generate_greedy")
    recorded["response"]["request_id"] = "generate-tokens-r1"
    choice, tokens = recorded["response"]["choices"][0], recorded["request"]["json"]["token_ids"]
    choice["weight_versions"] = [{"version": "3", "start": 0, "end": 6}]
    sample(make_client(Recorded(recorded)), SamplingParams(), tokens)
    choice |= change
    with pytest.raises(RunError, match="http://127"):
        sample(make_client(Recorded(recorded)), SamplingParams(), tokens)


def test_an_answer_to_another_request_is_an_error():
    recorded = contract("generate_greedy")
    recorded["response"]["choices"][0]["weight_versions"] = [{"version": "3", "start": 0, "end": 6}]
    tokens = recorded["request"]["json"]["token_ids"]
    with pytest.raises(RunError, match=r"to request 'r1' of 32 prompt tokens.*it answers acc8eaf8cf32280a"):
        sample(make_client(Recorded(recorded)), SamplingParams(), tokens)
    recorded["response"]["request_id"] = "generate-tokens-r1"
    with pytest.raises(RunError, match="it answers r1 with 32 prompt tokens"):
        sample(make_client(Recorded(recorded)), SamplingParams(), tokens[1:])


@pytest.mark.parametrize("results", [None, [], [5], [{"a": "b"}], [{"a": [1]}]])
def test_checksums_that_are_none_are_an_error(results: Any):
    client = make_client(lambda _: httpx.Response(200, json={"results": results}))
    with pytest.raises(RunError, match="http://127"):
        asyncio.run(client.checksums())


def test_a_dead_engine_behind_a_live_server_is_no_answer():
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    error = {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}}
    client = make_client(lambda _: httpx.Response(500, json=error))
    with pytest.raises(TransportError, match="EngineCore"):
        sample(client, SamplingParams(), [1])


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(top_p=0.9), "rollout.top_p: expected 1.0 "),
        (SamplingParams(top_k=5), "rollout.top_k: expected 0 "),
        (SamplingParams(min_new_tokens=2, stop_token_ids=(1,)), "rollout.min_new_tokens: expected 0 "),
        (SamplingParams(temperature=0.001), "nearest: 0.01"),
    ],
)
def test_what_would_give_wrong_logprobs_is_refused(params: SamplingParams, name: str):
    with pytest.raises(UserError, match=name):
        make_client(lambda _: httpx.Response(500)).check_params(params)


def test_evaluation_may_truncate_and_ban():
    params = SamplingParams(top_p=0.9, top_k=5, min_new_tokens=2, stop_token_ids=(1,), stream="eval")
    client = make_client(lambda _: httpx.Response(500))
    client.check_params(params)
    client.check_params(SamplingParams(min_new_tokens=2, stop_token_ids=()))  # nothing to ban


def test_abort_names_requests_as_vllm_does():
    recorded = contract("abort_requests")
    server = Recorded(recorded)
    client = make_client(server)
    rid = recorded["request"]["json"]["request_ids"][0].removeprefix("generate-tokens-")
    asyncio.run(client.abort([rid]))
    assert server.asked == [(recorded["request"]["path"], recorded["request"]["json"])]


def test_abort_of_none_does_not_abort_all():
    server = Recorded({"request": {"path": "/abort_requests"}, "status": 200, "response": {"aborted": 3}})
    client = make_client(server)
    asyncio.run(client.abort([]))
    assert server.asked == []


# Starting


def test_the_command_line():
    client = make_client(lambda _: httpx.Response(500), args=("--disable-sliding-window",))
    argv, env = client.command(1234)
    assert argv[:3] == ["/opt/vllm/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert argv[-1] == "--disable-sliding-window"
    options = dict(itertools.pairwise(argv))
    assert options["--host"] == "127.0.0.1"
    assert options["--max-num-seqs"] == "512"  # engine.max_running; server.max_requests is 256
    assert options["--logprobs-mode"] == "processed_logprobs"
    assert int(options["--max-num-batched-tokens"]) >= 1000  # whole prompts: chunks with seeds kill it on CPU
    assert "--no-enable-chunked-prefill" in argv
    kv_bytes_per_token = 2 * 4 * 2 * 32 * 4
    assert 1000 * kv_bytes_per_token <= int(options["--kv-cache-memory-bytes"]) <= 1100 * kv_bytes_per_token
    assert json.loads(options["--weight-transfer-config"]) == {"backend": vllm.TRANSFER}
    assert env["VLLM_SERVER_DEV_MODE"] == "1"
    assert (Path(env["PYTHONPATH"]) / "pekoe_vllm_gloo.py").is_file()
    assert options["--middleware"] == "pekoe_vllm_key.RequireKey"


def test_nothing_passes_without_the_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PEKOE_SERVER_KEY", "s3cret")
    monkeypatch.syspath_prepend(vllm.WORKER_DIR)
    passed: list[str] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: dict[str, Any], *_: Any) -> None:
        passed.append(scope["type"])

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    guard: Any = importlib.import_module("pekoe_vllm_key").RequireKey(app)
    right, wrong = ([(b"authorization", value)] for value in (b"Bearer s3cret", b"Bearer s3creT"))
    asyncio.run(guard({"type": "lifespan"}, None, send))
    for kind in ("http", "websocket"):
        for headers in ([], wrong, right):
            asyncio.run(guard({"type": kind, "headers": headers}, None, send))
    assert passed == ["lifespan", "http", "websocket"]
    assert [m.get("status") for m in sent if m["type"] != "http.response.body"] == [401, 401, None, None]


@pytest.mark.parametrize(
    ("arg", "hint"),
    [
        ("--disable-chunked-prefill", "say --no-enable-chunked-prefill"),
        ("--use_v2_block_manager", "leave it out"),
        ("--enable-chunked-prefill=False", "nearest: --no-enable-chunked-prefill"),
        ("--enable-chunked-prefill", "on CPU"),
        ("--logprobs-mode=raw_logprobs", "which it sets"),
        ("--port", "which it sets"),
    ],
)
def test_flags_that_cannot_be_passed_on(arg: str, hint: str):
    with pytest.raises(UserError, match=hint):
        check_args(["--seed", "1", arg], "cpu")


def test_the_releases_flags_pass():
    flags = ["--enforce-eager", "--no-enable-chunked-prefill", "--disable-custom-all-reduce"]
    check_args([*flags, "--disable-sliding-window", "--max-num-seqs=4", "--enable-expert-parallel"], "cpu")
    check_args(["--enable-chunked-prefill"], "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs, got raw_logprobs"),
        ({"dtype": "torch.bfloat16"}, "--dtype float32, got torch.bfloat16"),
        ({"max_model_len": 999}, "--max-model-len at least 1000, got 999"),
    ],
)
def test_an_attached_server_that_would_be_misread_is_refused(change: dict[str, Any], message: str):
    client = make_client(lambda _: httpx.Response(200, json=server_info(**change)))
    with pytest.raises(UserError, match=message):
        asyncio.run(client.check_attached())


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(404, json={"detail": "Not Found"}),
        httpx.Response(200, html="<p>something else</p>"),
        httpx.Response(200, json={"vllm_config": {"model_config": {}}}),
        httpx.Response(200, json=server_info(max_model_len="long")),
    ],
)
def test_an_attached_server_without_development_mode_is_refused(answer: httpx.Response):
    client = make_client(lambda _: answer)
    assert asyncio.run(client.reachable())  # whoever it is
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        asyncio.run(client.check_attached())


# Weights


def test_pause_resume_and_versions_as_recorded():
    contracts = [contract(f"untied_{name}") for name in ("pause_keep", "pause_abort", "resume")]
    info = {"request": {"path": "/server_info?config_format=json"}, "status": 200, "response": server_info()}
    server = Recorded(*contracts, contract("weight_info_after"), contract("update_weight_version"), info)
    client = make_client(server)

    async def go() -> str:
        await client.pause("keep")
        await client.pause("abort")
        await client.resume()
        await client.set_version(7)
        return await client.version()

    assert asyncio.run(go()) == "C1"
    assert [path for path, _ in server.asked[:3]] == [c["request"]["path"] for c in contracts]
    assert server.asked[3] == ("/update_weight_version", {"new_version": "7"})


def test_a_flush_that_did_not_happen_is_an_error():
    path = "/reset_prefix_cache?reset_running_requests=true"  # without it, refused while responses are in flight
    recorded = contract("reset_prefix_cache")
    recorded["request"]["path"] = path
    asyncio.run(make_client(Recorded(recorded)).flush())
    recorded["response"] = {"success": False}
    with pytest.raises(RunError, match="flushed"):
        asyncio.run(make_client(Recorded(recorded)).flush())


def test_an_update_through_a_group_as_recorded():
    names = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
    contracts = [contract(f"untied_{name}") for name in names]
    server = Recorded(*contracts)
    client = make_client(server)
    group = BroadcastGroup("g", "127.0.0.1", 37651, 2, "gloo", 10.0)
    tensors = [("a", torch.zeros(2, 3)), ("b", torch.zeros(4, dtype=torch.bfloat16))]

    async def go() -> None:
        await client.join_group(group)
        await client.receive(group, [tensors], 5)

    asyncio.run(go())
    assert [path for path, _ in server.asked] == [c["request"]["path"] for c in contracts]
    init, _, update, finish = (body for _, body in server.asked)
    assert contracts[0]["request"]["json"]["init_info"].items() <= init["init_info"].items()
    assert update["update_info"].keys() == contracts[2]["request"]["json"]["update_info"].keys()
    assert update["update_info"]["dtype_names"] == ["float32", "bfloat16"]
    assert update["update_info"]["shapes"] == [[2, 3], [4]]
    assert finish == {"weight_version": "5"}


def test_an_update_that_broke_off_does_not_stand_in_the_way():
    asked: list[str] = []
    refusal = "Worker failed with error 'start_weight_update called while a weight update is already active.'"

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(path_of(request))
        return httpx.Response(500, json={"error": {"message": refusal}}) if len(asked) == 1 else httpx.Response(200)

    group = BroadcastGroup("g", "127.0.0.1", 37651, 2, "gloo", 10.0)
    asyncio.run(make_client(answer).receive(group, [], 5))
    assert asked == ["/start_weight_update", "/finish_weight_update", "/start_weight_update", "/finish_weight_update"]


def test_a_server_without_the_extension_is_told_apart():
    error = {"error": {"message": "Worker failed with error ''CPUWorker' object has no attribute 'pekoe_load''"}}
    client = make_client(lambda _: httpx.Response(500, json=error))
    with pytest.raises(RunError, match="start it with PYTHONPATH"):
        asyncio.run(client.load(Path("/models/m"), 1))


# Checksums


def test_both_sides_compute_the_same_checksum(monkeypatch: pytest.MonkeyPatch):
    """The worker's file, loaded with stand-ins for vLLM's modules."""
    names = ["config", "lora.request", "distributed.weight_transfer.base", "distributed.weight_transfer.factory"]
    names += [f"model_executor.{name}" for name in ("layers.linear", "layers.vocab_parallel_embedding")]
    for name in ("", *names, "model_executor.model_loader.reload"):
        monkeypatch.setitem(sys.modules, f"vllm.{name}".rstrip("."), MagicMock())
    base = ModuleType("base")
    generic = type("Engine", (), {"__class_getitem__": classmethod(lambda cls, _: cls)})
    for name in ("WeightTransferInitInfo", "WeightTransferUpdateInfo"):
        setattr(base, name, type(name, (), {}))
    base.WeightTransferEngine = generic
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.base", base)
    spec = importlib.util.spec_from_file_location("pekoe_vllm_gloo", vllm.WORKER_DIR / "pekoe_vllm_gloo.py")
    worker = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pekoe_vllm_gloo", worker)
    spec.loader.exec_module(worker)
    monkeypatch.setattr(worker, "PART_NUMBERS", 100)  # the parts make no difference
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(33, 17).to(dtype)
        assert worker.checksum(tensor) == checksum(tensor)
