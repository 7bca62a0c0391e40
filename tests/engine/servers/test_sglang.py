"""SGLang's API as we speak it, held against requests and answers recorded from a real server."""

import asyncio
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from pekoe.config.engine import ServerSection
from pekoe.core.errors import RunError
from pekoe.core.types import Request, SamplingParams
from pekoe.engine.base import BroadcastGroup
from pekoe.engine.servers import sglang
from pekoe.engine.servers.client import ServerOptions
from pekoe.engine.servers.sglang import SGLangClient
from pekoe.model import Decoder
from pekoe.weights.checksums import SGLangChecksums, checksums_of

URL = "http://127.0.0.1:1"
GROUP = BroadcastGroup("weight_update_group", "127.0.0.1", 49409, 2, "gloo", 10.0)
CONTRACTS = json.loads(Path(__file__).with_name("contracts").joinpath("sglang.json").read_text())
"""Requests that SGLang 0.5.23 took on a CPU, with its answers, by name."""


def recorded(name: str) -> dict[str, Any]:
    return copy.deepcopy(CONTRACTS[name])


def request(params: SamplingParams | None = None, sample: int = 0) -> Request:
    return Request("p", 0, sample, np.arange(32), params or SamplingParams())


def options_of(make_model: Callable[..., Decoder], **changes: Any) -> ServerOptions:
    given: dict[str, Any] = {
        "model": Path("/models/m"),
        "config": ServerSection(python="/opt/sglang/bin/python", args=("--tp-size", "2")),
        "spec": make_model().spec,
        "max_sequence_tokens": 100,
        "kv_tokens": 4096,
        "max_running": 32,
        "dtype": "float32",
        "device": "cpu",
    }
    return ServerOptions(**(given | changes))


class Recording:
    """A client whose requests are answered from `answers` (by path; others: success), and kept."""

    def __init__(self, options: ServerOptions, answers: dict[str, tuple[int, Any]]) -> None:
        self.options, self.answers = options, answers
        self.requests: list[dict[str, Any]] = []

    def run(self, call: Callable[[SGLangClient], Any]) -> Any:
        def handle(request: httpx.Request) -> httpx.Response:
            body = json.loads(request.content) if request.content else None
            self.requests.append({"method": request.method, "path": request.url.path, "json": body})
            status, content = self.answers.get(request.url.path, (200, {"success": True}))
            return httpx.Response(status, content=b"" if content in (None, "") else json.dumps(content).encode())

        async def main() -> Any:
            client = SGLangClient(self.options, URL, transport=httpx.MockTransport(handle))
            try:
                return await call(client)
            finally:
                await client.close()

        return asyncio.run(main())


@pytest.fixture
def record(make_model: Callable[..., Decoder]) -> Callable[..., Recording]:
    return lambda **answers: Recording(options_of(make_model), {"/" + k: v for k, v in answers.items()})


def test_every_request_is_one_that_a_real_server_took(record: Callable[..., Recording]):
    tensors = [("model.norm.weight", torch.zeros(128)), ("lm_head.weight", torch.zeros(4, 2, dtype=torch.bfloat16))]
    calls: list[tuple[Callable[[SGLangClient], Any], str]] = [
        (lambda b: b.abort(["req-77"]), "abort_request_rid"),
        (lambda b: b.pause("abort"), "pause_generation_abort"),
        (lambda b: b.pause("keep"), "pause_generation_retract"),
        (lambda b: b.resume(), "continue_generation"),
        (lambda b: b.flush(), "flush_cache"),
        (lambda b: b.join_group(GROUP), "init_weights_update_group_gloo"),
        (lambda b: b.load(Path("/w"), 3), "update_weights_from_disk_paused_retract"),
        (lambda b: b.set_version(3), "update_weight_version"),
        (lambda b: b.receive(GROUP, [tensors], 3), "begin_weight_update"),
        (lambda b: b.receive(GROUP, [tensors], 3), "update_weights_from_distributed"),
        (lambda b: b.receive(GROUP, [tensors], 3), "end_weight_update"),
        (lambda b: b.sample(request(SamplingParams(stop_token_ids=(7,))), "r"), "generate_n16"),
    ]
    for call, name in calls:
        real = recorded(name)
        recording = record(generate=(200, good()))
        recording.run(call)
        sent = next(r for r in recording.requests if r["path"] == real["request"]["path"])
        assert sent["method"] == real["request"]["method"]
        ours, theirs = sent["json"], real["request"]["json"]
        if name == "init_weights_update_group_gloo" or name.startswith(
            ("abort", "pause", "continue", "flush", "begin")
        ):
            assert ours == theirs, name
        else:
            more = {"abort_all_requests", "sampling_seed", "min_p", "repetition_penalty"}
            assert shape(ours, more) <= shape(theirs), name


def shape(body: Any, without: set[str] = frozenset()) -> set[tuple[str, str]]:  # pyright: ignore[reportArgumentType]
    """Every key of a request, with the type of its value."""
    found: set[tuple[str, str]] = set()
    for key, value in body.items():
        if key in without:
            continue
        kind = type(value[0]).__name__ if isinstance(value, list) and value else type(value).__name__
        found.add((key, kind))
        if isinstance(value, dict):
            found |= shape(value, without)
    return found


def test_what_a_sample_asks_for(record: Callable[..., Recording]):
    recording = record(generate=(200, good()))

    def ask(params: SamplingParams, index: int = 0) -> dict[str, Any]:
        recording.run(lambda b: b.sample(request(params, index), "r"))
        body = recording.requests[-1]["json"]
        assert body["input_ids"] == list(range(32))
        assert (body["rid"], body["return_logprob"]) == ("r", True)
        return body["sampling_params"]

    plain = ask(SamplingParams(max_new_tokens=9))
    assert plain["ignore_eos"] is True  # there is nothing to stop at
    assert "stop_token_ids" not in plain
    assert (plain["temperature"], plain["top_p"], plain["top_k"], plain["max_new_tokens"]) == (1.0, 1.0, -1, 9)
    more = ask(SamplingParams(stop_token_ids=(3, 7), top_k=5, temperature=0), index=1)
    assert more["ignore_eos"] is False  # it would switch stop tokens off
    assert (more["stop_token_ids"], more["top_k"], more["temperature"]) == ([3, 7], 5, 0)
    assert ask(SamplingParams(top_p=0.9))["top_p"] == 0.9
    assert more["sampling_seed"] != plain["sampling_seed"]
    assert all(0 <= each["sampling_seed"] < 2**31 for each in (plain, more))


@pytest.mark.parametrize(
    ("name", "reason", "versions"),
    [
        ("generate_stop_token", "stop", None),
        ("generate_temp0.5", "length", None),
        ("generate_after_disk_update", "length", None),
    ],
)
def test_recorded_answers_are_understood(name: str, reason: str, versions: Any):
    content = recorded(name)["response"]
    for span in content["meta_info"]["weight_versions"]:
        span["version"] = "4"  # the recording's tags were words
    answer = SGLangClient.parse(content)
    assert (answer.rid, answer.num_prompt_tokens) == (content["meta_info"]["id"], 32)
    assert answer.finish == reason
    assert answer.tokens == content["output_ids"]
    assert len(answer.logprobs) == len(answer.tokens)
    assert answer.versions == [(4, 0)]
    if reason == "stop":
        assert answer.tokens[-1] == content["meta_info"]["finish_reason"]["matched"]


def good() -> dict[str, Any]:
    meta = {
        "id": "r",
        "prompt_tokens": 32,
        "finish_reason": {"type": "length", "length": 3},
        "output_token_logprobs": [[-1.0, 4, None], [-2.0, 5, None], [-3.0, 6, None]],
        "weight_versions": [{"version": "1", "start": 0, "end": 2}, {"version": "2", "start": 2, "end": 3}],
        "cached_tokens": 2,
    }
    return {"output_ids": [4, 5, 6], "meta_info": meta}


def test_versions_of_tokens():
    answer = SGLangClient.parse(good())
    assert (answer.versions, answer.num_cached_tokens) == ([(1, 0), (2, 2)], 2)


def test_an_abort_in_the_queue_has_no_tokens():
    finish = {"type": "abort", "message": "Abort in waiting queue"}
    answer = SGLangClient.parse({"output_ids": [], "meta_info": {"finish_reason": finish}})
    assert (answer.tokens, answer.finish) == ([], "abort")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("output_ids"),
        lambda c: c["output_ids"].pop(),
        lambda c: c["meta_info"].update(finish_reason=None),
        lambda c: c["meta_info"].update(finish_reason={"type": "tired"}),
        lambda c: c["meta_info"].update(finish_reason={"type": "stop", "matched": "NaN happened"}),
        lambda c: c["meta_info"].update(
            finish_reason={"type": "abort", "message": "out of memory", "status_code": 500}
        ),
        lambda c: c["meta_info"]["output_token_logprobs"].reverse(),
        lambda c: c["meta_info"].update(weight_versions=None),
        lambda c: c["meta_info"]["weight_versions"][0].update(version="default"),
        lambda c: c["meta_info"]["weight_versions"][0].update(end=1),
        lambda c: c["meta_info"]["weight_versions"][1].update(end=4),
        lambda c: c["meta_info"].pop("cached_tokens"),
        lambda c: c["meta_info"]["output_token_logprobs"][0].__setitem__(0, None),
        lambda c: c["meta_info"]["output_token_logprobs"][0].__setitem__(0, "-1.0"),
        lambda c: c["meta_info"].update(id="another"),
        lambda c: c["meta_info"].update(prompt_tokens=31),
        lambda c: c["meta_info"].update(cached_tokens=33),
        lambda c: c.update(output_ids=[4, 5, 2**64]),
        lambda c: c.update(meta_info=[]),
        lambda c: c.update(output_ids="456"),
        lambda c: c["meta_info"]["weight_versions"][0].update(version=1.5),
    ],
)
def test_an_unexpected_answer_is_an_error(record: Callable[..., Recording], change: Callable[[Any], Any]):
    content = good()
    SGLangClient.parse(content)
    change(content)
    with pytest.raises(RunError, match="expected one response of numbered weights"):
        record(generate=(200, content)).run(lambda b: b.sample(request(), "r"))


@pytest.mark.parametrize(
    "name", ["generate_error_badparam", "generate_error_toolong", "generate_error_unknown_sampling"]
)
def test_a_refusal_is_an_error_with_the_servers_words(record: Callable[..., Recording], name: str):
    real = recorded(name)
    words = real["response"]["error"]
    words = words if isinstance(words, str) else words["message"]
    with pytest.raises(RunError) as caught:
        record(generate=(real["status"], real["response"])).run(lambda b: b.sample(request(), "r"))
    assert words in str(caught.value)


def test_a_failed_update_is_an_error(record: Callable[..., Recording]):
    real = recorded("update_weights_from_disk_missing")
    recording = record(update_weights_from_disk=(real["status"], real["response"]))
    with pytest.raises(RunError, match="Failed to get weights iterator"):
        recording.run(lambda b: b.load(Path("/w"), 3))
    with pytest.raises(RunError, match="expected success"):
        record(update_weights_from_disk=(200, {"message": "?"})).run(lambda b: b.load(Path("/w"), 3))


def test_the_version_is_the_servers_own_tag(record: Callable[..., Recording]):
    real = recorded("model_info_after_disk")
    assert record(model_info=(200, real["response"])).run(lambda b: b.version()) == "B1"
    with pytest.raises(RunError, match="weight_version"):
        record(model_info=(200, {})).run(lambda b: b.version())


def test_an_update_that_broke_off_does_not_stand_in_the_way(record: Callable[..., Recording]):
    closed = recorded("end_weight_update_twice")  # no session is open: nothing to end
    recording = record(end_weight_update=(closed["status"], closed["response"]))
    with pytest.raises(RunError):  # it would be wrong at the end of this one
        recording.run(lambda b: b.receive(GROUP, [], 3))
    assert [r["path"] for r in recording.requests[:2]] == ["/end_weight_update", "/begin_weight_update"]


def test_a_flush_is_asked_for_until_it_happens(record: Callable[..., Recording], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pekoe.engine.servers.sglang._FLUSH_AGAIN_S", 0.0)
    recording = record(flush_cache=(400, recorded("flush_cache_while_running")["response"]))
    with pytest.raises(RunError, match="Flush cache failed"):
        recording.run(lambda b: b.flush())
    assert len(recording.requests) == 25


def test_the_command_line(make_model: Callable[..., Decoder]):
    argv, env = SGLangClient(options_of(make_model), URL, "a key").command(1234)
    assert env["PEKOE_SERVER_KEY"] == "a key"
    text = " ".join(argv)
    assert text.startswith(f"/opt/sglang/bin/python {sglang.LAUNCH} --model-path /models/m --host 127.0.0.1")
    assert sglang.LAUNCH.is_file()
    assert "--port 1234 --device cpu --dtype float32 --context-length 108 --max-running-requests 32" in text
    assert "--max-total-tokens 4096" in text
    assert text.endswith("--tp-size 2")
    assert env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN" not in env
    options = options_of(make_model, device="cuda", kv_tokens=None, max_sequence_tokens=128)
    argv, env = SGLangClient(options, URL).command(1)
    assert "--max-total-tokens" not in argv
    assert "SGLANG_USE_CPU_ENGINE" not in env
    assert env["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] == "1"  # 136 tokens in a model of 128 positions


def test_checksums_have_the_servers_names(make_model: Callable[..., Decoder]):
    real = recorded("weights_checker")["response"]["ranks"][0]["checksums"]
    names = {name for name in real if ".layers.0." in name or ".layers." not in name}
    model = make_model()
    ours = checksums_of(model, SGLangChecksums(torch.float32))
    assert {name for name in ours if ".layers.0." in name or ".layers." not in name} == names
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.k_proj.weight")[0, 0] += 1e-6
    changed = checksums_of(model, SGLangChecksums(torch.float32))
    assert {name for name in ours if ours[name] != changed[name]} == {"model.layers.1.self_attn.qkv_proj.weight"}
