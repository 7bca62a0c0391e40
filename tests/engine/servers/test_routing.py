"""Experts of tokens from servers: asked for, read, checked as everything that comes over a socket."""

from __future__ import annotations

import asyncio
import io
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pekoe.config.engine import EngineSection, ServerSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.spec import FamilySpec, LayerShape
from pekoe.core.types import Request, SamplingParams
from pekoe.engine.base import requests_of
from pekoe.engine.servers import SGLangEngine
from pekoe.engine.servers.client import Answer, ServerOptions
from pekoe.engine.servers.sglang import SGLangClient
from pekoe.engine.servers.vllm import VLLMClient
from tests.engine.servers.fake_sglang import FakeSGLang
from tests.engine.servers.test_vllm import Recorded, contract, server_info

# The first of three layers has no experts; a token goes to two of four.
SPEC = FamilySpec(
    *("deepseek_v3", 32, 32, 3, 4, 2, 8, 48, 128),
    num_experts=4,
    experts_per_token=2,
    mixtures=("model.layers.1.mlp", "model.layers.2.mlp"),
    shapes=(LayerShape(4, 2, 8, 8),) * 3,
)
EXPERTS = [0, 0, 3, 1, 2, 0]
ASKED = SamplingParams(n=2, max_new_tokens=6, routing=True)
Make = Callable[..., SGLangEngine]


@pytest.fixture
def server() -> Iterator[FakeSGLang]:
    server = FakeSGLang()
    server.experts = EXPERTS
    yield server
    server.die()


@pytest.fixture
def make(server: FakeSGLang, tmp_path: Path) -> Make:
    def engine(routing: bool = True) -> SGLangEngine:
        limits = {"start_limit_s": 10.0, "request_limit_s": 20.0, "urls": (server.url,)}
        config = EngineSection.model_validate({"backend": "sglang", "server": limits})
        return SGLangEngine(tmp_path, config, SPEC, 100, tmp_path / "logs", url=server.url, routing=routing)

    return engine


def requests(params: SamplingParams = ASKED) -> list[Request]:
    return requests_of("p", 0, np.arange(5), params)


def test_sglang_is_asked_and_the_experts_are_recorded(server: FakeSGLang, make: Make):
    with closing(make()) as engine:
        records = [future.result(20).handle.resolve() for future in engine.submit(requests())]
        plain = [f.result(20).handle.resolve() for f in engine.submit(requests(SamplingParams(max_new_tokens=6)))]
    for record in records:
        assert record.routing is not None
        assert record.routing.dtype == np.uint8
        assert record.routing[:-1].tolist() == [[[3, 1], [2, 0]]] * 10
        assert (record.routing[-1] == 255).all()
    assert [record.routing for record in plain] == [None]
    bodies: list[Any] = [body for path, body in server.requests if path == "/generate"]
    asked = [body.get("return_routed_experts") for body in bodies if body["sampling_params"]["max_new_tokens"]]
    assert asked == [True, True, None]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([], "expected 60 experts of 10 tokens, got 0"),
        ([0, 0, 3, 1], "expected 60 experts of 10 tokens, got 40"),
        ([0, 0, 0, 0, 0, 0], "got expert 0 for every token and layer"),
        ([0, 0, 3, 1, 2, 2], "expected 2 different experts of 4"),
        ([0, 0, 3, 4, 2, 0], "expected 2 different experts of 4"),
        ([0, 0, 3, -1, 2, 0], "expected 2 different experts of 4"),
    ],
)
def test_experts_that_cannot_be_are_an_error(server: FakeSGLang, make: Make, experts: list[int], message: str):
    server.experts = experts
    with closing(make()) as engine, pytest.raises(RunError, match=message):
        engine.submit(requests())[0].result(20)


def test_a_server_that_gives_none_is_an_error_but_for_what_was_aborted(server: FakeSGLang, make: Make):
    with closing(make()) as engine:
        server.experts = None
        with pytest.raises(RunError, match="expected 60 experts of 10 tokens, got 0"):
            engine.submit(requests())[0].result(20)
        server.token_s = 0.05
        futures = engine.submit(requests(SamplingParams(max_new_tokens=60, routing=True)))
        while not server.running:
            pass
        engine.abort()
        completion = futures[0].result(20)
        assert completion.finish == "abort"
        assert completion.handle.resolve().routing is None


def test_an_engine_that_was_made_without_refuses_and_so_a_server(server: FakeSGLang, make: Make):
    with closing(make(routing=False)) as engine, pytest.raises(UserError, match="made without it"):
        engine.submit(requests())
    server.experts = None
    with pytest.raises(UserError, match="expected an SGLang server with --enable-return-routed-experts"):
        make()


def options(kind: str, device: str, routing: bool = True) -> ServerOptions:
    config = ServerSection(python=f"/opt/{kind}/bin/python")
    return ServerOptions(Path("/m"), config, SPEC, 100, 4096, 32, "float32", device, routing=routing)


@pytest.mark.parametrize(("kind", "client"), [("sglang", SGLangClient), ("vllm", VLLMClient)])
def test_a_server_is_launched_with_it(kind: str, client: type[SGLangClient] | type[VLLMClient]):
    for routing in (True, False):
        argv, _ = client(options(kind, "cuda", routing), "http://127.0.0.1:1").command(1)
        assert ("--enable-return-routed-experts" in argv) is routing


def test_vllm_returns_none_on_a_cpu():
    with pytest.raises(UserError, match=r"rollout\.replay_routing: expected false with .*'vllm' on a CPU"):
        VLLMClient(options("vllm", "cpu"), "http://127.0.0.1:1").command(1)


def vllm_client(answer: Callable[[httpx.Request], httpx.Response]) -> VLLMClient:
    return VLLMClient(options("vllm", "cuda"), "http://127.0.0.1:1", transport=httpx.MockTransport(answer))


@pytest.mark.parametrize("on", [True, False])
def test_an_attached_vllm_without_it_is_refused(on: bool):
    info = server_info()
    info["vllm_config"]["aux_output_config"] = {"enable_return_routed_experts": on}
    check = vllm_client(lambda _: httpx.Response(200, json=info)).check_attached()
    if on:
        asyncio.run(check)
    else:
        with pytest.raises(UserError, match="--enable-return-routed-experts set, got it unset"):
            asyncio.run(check)


def packed(array: Any, save: Callable[..., None] = np.save, **options: Any) -> str:
    file = io.BytesIO()
    save(file, array, **options)
    return b64encode(file.getvalue()).decode()


def vllm_answer(experts: Any) -> Answer:
    """How the client reads an answer with these experts."""
    recorded = contract("generate_greedy")
    recorded["response"]["choices"][0] |= {
        "routed_experts": experts,
        "weight_versions": [{"version": "3", "start": 0, "end": 6}],
    }
    recorded["response"]["request_id"] = "generate-tokens-r1"
    tokens = np.array(recorded["request"]["json"]["token_ids"])
    request = Request("p", 0, 0, tokens, SamplingParams(temperature=0, max_new_tokens=6, routing=True))
    return asyncio.run(vllm_client(Recorded(recorded)).sample(request, "r1"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_vllms_experts_are_read(dtype: type[np.integer[Any]]):
    rows = np.tile(np.array(EXPERTS, dtype).reshape(3, 2), (37, 1, 1))
    answer = vllm_answer(packed(rows))
    assert answer.experts is not None
    assert answer.experts.tolist() == EXPERTS * 37
    assert vllm_answer(None).experts is None


@pytest.mark.parametrize(
    "experts",
    [
        "not base64",
        b64encode(b"no numpy").decode(),
        b64encode(b"").decode(),
        5,
        packed(np.array([{}], object), allow_pickle=True),
        packed(np.zeros(3)),
        packed(np.zeros((2, 3), np.uint8, order="F")),
        packed(np.zeros(3, np.uint8), np.savez),
        b64encode(b"\x93NUMPY\x01\x00\xff\xff").decode(),
        b64encode(b"\x93NUMPY\x01\x00\x0c\x00{'descr': ( \n").decode(),
        b64encode(b"\x93NUMPY\x01\x00\x00\x23" + b"-" * 0x2300).decode(),
    ],
)
def test_what_is_no_array_of_experts_is_an_error(experts: Any):
    with pytest.raises(RunError, match="expected one response of numbered weights"):
        vllm_answer(experts)


def test_what_a_header_claims_is_not_allocated():
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,), }"
    head = head.ljust(118 - 1) + b"\n"
    claimed = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + b"123"
    answer = vllm_answer(b64encode(claimed).decode())
    assert answer.experts is not None
    assert answer.experts.size == 3
