"""Programs of OpenAI's package talk with the model through the endpoint, and every answer is recorded as sampled."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from pekoe.core.errors import RunError
from pekoe.core.types import Completion, Record
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.engine.pool import EnginePool
from tests.agents.sampling import text_tokenizer
from tests.agents.scripted import KEY, HeldSampler, ScriptedSampler, Serving, serving

QUESTION: Any = {"role": "user", "content": "1+2="}
TOOL: Any = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = 'so <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}\n</tool_call>'


def until(what: Callable[[], bool], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served(engine: EmbeddedEngine, tokenizers: Any) -> Iterator[Serving]:
    with serving(engine, tokenizers["append"], engine.max_sequence_tokens) as one:
        yield one


@pytest.fixture
def client(served: Serving, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    """With a session of its own."""
    with openai.OpenAI(base_url=served.url, api_key=f"{KEY}.{request.node.name}", max_retries=0) as one:
        yield one


def to(one: Serving, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=one.url, api_key=KEY, **({"max_retries": 0} | more))


def record_of(client: openai.OpenAI) -> Any:
    return httpx.get(f"{client.base_url}session", headers={"x-api-key": client.api_key}).json()


class TestChat:
    IDS: Any = {"return_token_ids": True}  # noqa: RUF012

    def test_a_growing_chat_is_one_sequence_of_the_sampled_ids(self, client, logprobs_of):
        messages: list[Any] = [QUESTION]
        answer = choice = None
        for _ in range(3):
            answer = client.chat.completions.create(
                model="gpt-4o", messages=messages, logprobs=True, max_tokens=6, extra_body=self.IDS
            )
            choice = answer.choices[0]
            assert answer.model == "gpt-4o"
            assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)
            assert answer.usage.completion_tokens == len(choice.token_ids) == len(choice.logprobs.content)
            messages += [choice.message.model_dump(), QUESTION]
        record = record_of(client)
        (branch,) = record["branches"]
        whole = [*answer.prompt_token_ids, *choice.token_ids]
        assert record["turns"] == 3
        assert branch["tokens"] == whole
        said = [one.logprob for one in choice.logprobs.content]
        assert branch["logprobs"][-len(said) :] == said
        mask = np.array(branch["loss_mask"])
        gap = np.abs(logprobs_of(np.array(whole)).numpy() - branch["logprobs"])[mask]
        assert mask.sum() > len(said)
        assert gap.max() <= 1e-4

    def test_an_edited_chat_is_a_branch(self, client):
        first = client.chat.completions.create(model="m", messages=[QUESTION], max_tokens=5).choices[0].message
        other: Any = {"role": "assistant", "content": f"1{first.content}"}
        client.chat.completions.create(model="m", messages=[QUESTION, other, QUESTION], max_tokens=5)
        assert len(record_of(client)["branches"]) == 2

    def test_sessions_are_apart(self, served, client):
        client.chat.completions.create(model="m", messages=[QUESTION])
        other = client.with_options(api_key=f"{KEY}.another")
        assert (record_of(client)["turns"], record_of(other)["turns"]) == (1, 0)

    def test_a_seed_gives_the_same_answers_again_in_any_session(self, client):
        def ask(client: openai.OpenAI, **more: Any) -> list[str]:
            answer = client.chat.completions.create(model="m", messages=[QUESTION], n=3, temperature=1.0, **more)
            return [choice.message.content for choice in answer.choices]

        seeded = ask(client, seed=7)
        assert len(set(seeded)) == 3
        assert ask(client.with_options(api_key=f"{KEY}.again"), seed=7) == seeded
        assert ask(client, seed=8) != seeded
        assert ask(client) != ask(client)

    def test_greedy_answers_do_not_depend_on_the_seed(self, client):
        ask = client.chat.completions.create
        texts = {ask(model="m", messages=[QUESTION], temperature=0, seed=i).choices[0].message.content for i in (1, 2)}
        assert len(texts) == 1

    def test_stop_texts_end_an_answer_before_them(self, client):
        ask: Any = lambda **more: client.chat.completions.create(  # noqa: E731
            model="m", messages=[QUESTION], seed=3, temperature=1.0, max_tokens=20, **more
        ).choices[0]
        whole = ask().message.content
        stop = whole[2:4]
        cut = ask(stop=[stop, "never said"])
        assert cut.finish_reason == "stop"
        assert cut.message.content == whole[: whole.find(stop)]

    def test_a_stream_has_what_one_answer_has(self, client):
        given: Any = {"model": "m", "messages": [QUESTION], "seed": 5, "n": 2, "temperature": 1.0, "logprobs": True}
        whole = client.chat.completions.create(**given)
        texts, ends, logprobs, usage = ["", ""], ["", ""], [0, 0], None
        with client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}) as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    ends[choice.index] = choice.finish_reason or ends[choice.index]
                    logprobs[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
                usage = chunk.usage
        assert texts == [choice.message.content for choice in whole.choices]
        assert ends == [choice.finish_reason for choice in whole.choices]
        assert sum(logprobs) == usage.completion_tokens == whole.usage.completion_tokens

    def test_the_asynchronous_client_asks_for_many_at_once(self, served, client):
        async def all_of_them() -> set[str | None]:
            async with openai.AsyncOpenAI(base_url=served.url, api_key=f"{KEY}.many", max_retries=0) as many:
                answers = [many.chat.completions.create(model="m", messages=[QUESTION]) for _ in range(16)]
                return {answer.choices[0].message.content for answer in await asyncio.gather(*answers)}

        assert len(asyncio.run(all_of_them())) > 8

    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["tiny"]


class TestCompletions:
    def test_texts_and_ids(self, client, tokenizers):
        ids = tokenizers["append"].encode("1+2=")
        given: Any = {"model": "m", "seed": 1, "max_tokens": 8, "temperature": 1.0}
        text = client.completions.create(prompt="1+2=", logprobs=1, **given)
        both = client.completions.create(prompt=["1+2=", "7"], n=2, **given)
        from_ids = client.completions.create(prompt=ids, extra_body={"return_token_ids": True}, **given)
        assert from_ids.choices[0].prompt_token_ids == ids
        assert text.choices[0].text == from_ids.choices[0].text == both.choices[0].text
        assert len({choice.text for choice in both.choices}) == 4
        assert both.usage.prompt_tokens == len(ids) + 1
        logprobs = text.choices[0].logprobs
        assert "".join(logprobs.tokens).startswith(text.choices[0].text)
        assert len(logprobs.token_logprobs) == text.usage.completion_tokens
        with client.completions.create(prompt=[ids], stream=True, **given) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == text.choices[0].text

    def test_a_text_that_goes_on_from_an_answer_extends_its_sequence(self, client):
        said = client.completions.create(model="m", prompt="1+2=", max_tokens=4, temperature=1.0, seed=11).choices[0]
        client.completions.create(model="m", prompt=f"1+2={said.text}+", max_tokens=4)
        assert len(record_of(client)["branches"]) == 1 + (said.finish_reason == "stop")


class TestTools:
    def test_a_call_its_result_and_the_answer_are_one_sequence(self):
        tokenizer = text_tokenizer()
        sampler = ScriptedSampler(tokenizer, CALL, "it is 3")
        with serving(sampler, tokenizer) as one, to(one) as client:
            messages: list[Any] = [QUESTION]
            first = client.chat.completions.create(model="m", messages=messages, tools=[TOOL], max_tokens=99)
            message = first.choices[0].message
            call = (message.tool_calls or [])[0]
            assert first.choices[0].finish_reason == "tool_calls"
            assert (message.content, call.function.name) == ("so", "add")
            assert json.loads(call.function.arguments) == {"a": 1, "b": [2, "é"]}
            messages += [message, {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "3"}]}]
            last = client.chat.completions.create(model="m", messages=messages, tools=[TOOL])
            assert last.choices[0].message.content == "it is 3"
            assert last.choices[0].finish_reason == "stop"
            (branch,) = record_of(client)["branches"]
        assert tokenizer.decode(branch["tokens"]) == (
            f"<|user|>add<|user|>u1+2=<|assistant|>{CALL}<|end|><|user|>t3<|assistant|>it is 3<|end|>"
        )
        assert sum(branch["loss_mask"]) == len(CALL) + 1 + len("it is 3") + 1

    def test_a_call_that_is_streamed(self):
        tokenizer = text_tokenizer()
        with serving(ScriptedSampler(tokenizer, CALL), tokenizer) as one, to(one) as client:
            given: Any = {"model": "m", "messages": [QUESTION], "tools": [TOOL], "max_tokens": 99}
            with client.chat.completions.stream(**given) as stream:
                choice = stream.get_final_completion().choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls
        assert json.loads(choice.message.tool_calls[0].function.arguments)["a"] == 1

    def test_a_malformed_call_is_text(self):
        tokenizer, text = text_tokenizer(), '<tool_call>{"name": "add", "arg'
        with serving(ScriptedSampler(tokenizer, text), tokenizer) as one, to(one) as client:
            answer = client.chat.completions.create(model="m", messages=[QUESTION], tools=[TOOL], max_tokens=99)
        assert answer.choices[0].message.content == text
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.tool_calls is None

    def test_reasoning_is_kept_apart(self):
        tokenizer = text_tokenizer()
        sampler = ScriptedSampler(tokenizer, "<think>\nhm\n</think>\n\n3")
        with serving(sampler, tokenizer) as one, to(one) as client:
            message = client.chat.completions.create(model="m", messages=[QUESTION], max_tokens=99).choices[0].message
        assert (message.content, message.reasoning_content) == ("3", "hm")

    def test_a_template_without_tools_refuses_them(self, client):
        with pytest.raises(openai.BadRequestError, match="chat template shows it none"):
            client.chat.completions.create(model="m", messages=[QUESTION], tools=[TOOL])


class TestErrors:
    @pytest.mark.parametrize("key", ["wrong", f"{KEY}x", f"{KEY}.", KEY[:-1], "é"])
    def test_a_wrong_key(self, served, key):
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
            openai.OpenAI(base_url=served.url, api_key=key, max_retries=0).chat.completions.create(
                model="m", messages=[QUESTION]
            )
        got = httpx.post(f"{served.url}/chat/completions", json={}, headers={"x-api-key": key.encode()})
        assert (got.status_code, got.json()["error"]["code"]) == (401, "invalid_api_key")

    def test_none_at_all(self, served):
        for path in ("/v1/models", "/v1/session"):
            assert httpx.get(served.host + path).status_code == 401
        assert httpx.post(f"{served.url}/completions", json={"prompt": "1"}).status_code == 401
        assert httpx.get(f"{served.host}/health").status_code == 200

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"messages": []}, "expected a list of at least one message"),
            ({"messages": "hello"}, "messages: expected a list of messages"),
            ({"messages": [{"role": "robot", "content": "1"}]}, "a role among"),
            ({"messages": [7]}, "a role among"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text alone"),
            ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "tool_calls"),
            ({"messages": [{"role": "user", "content": "UNKNOWN"}]}, "vocabulary"),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, "expected"),
            ({"messages": [{"role": "user", "content": "1" * 600}]}, "leaves no room"),
            ({"temperature": "hot"}, "temperature: expected a number from 0 to 2"),
            ({"temperature": -1}, "temperature: expected a number from 0 to 2"),
            ({"top_p": 0}, "top_p"),
            ({"n": 0}, "n: expected a whole number from 1 to 128"),
            ({"n": True}, "n: expected"),
            ({"max_tokens": 0}, "max_tokens: expected a whole number"),
            ({"stop": [1]}, "stop: expected texts"),
            ({"stream": "yes"}, "stream: expected true or false"),
            ({"frequency_penalty": 1}, "frequency_penalty"),
            ({"logit_bias": {"5": 1}}, "logit_bias"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"top_logprobs": 3}, "top_logprobs"),
            ({"tools": {}}, "tools: expected a list"),
            ({"tools": [{"type": "function"}]}, "tools[0]: expected"),
            ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 7}}]}, "JSON schema"),
            ({"tool_choice": "required", "tools": [TOOL]}, "tool_choice"),
            ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ],
    )
    def test_a_request_that_is_wrong(self, served, changes, message):
        body = json.dumps({"model": "m", "messages": [QUESTION]} | changes)
        got = httpx.post(f"{served.url}/chat/completions", content=body, headers=served.headers)
        assert got.status_code == 400, got.text
        assert message in got.json()["error"]["message"]

    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"n": NaN}', b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000]
    )
    def test_a_body_that_is_no_json(self, served, body):
        got = httpx.post(f"{served.url}/chat/completions", content=body, headers=served.headers)
        assert got.status_code == 400
        assert "body: expected a JSON object" in got.json()["error"]["message"]

    @pytest.mark.parametrize("prompt", [[], "", [[]], [1.5], [-1], [[1], "x", None], [10**6], {"a": 1}, ["1"] * 200])
    def test_a_prompt_that_is_none(self, served, prompt):
        got = httpx.post(f"{served.url}/completions", json={"prompt": prompt}, headers=served.headers)
        assert got.status_code == 400
        assert "expected" in got.json()["error"]["message"]

    def test_keys_without_effect_are_named(self, served):
        body = {"messages": [QUESTION], "max_tokens": 2, "top_k": 3, "ignore_eos": False, "user": "me"}
        got = httpx.post(f"{served.url}/chat/completions", json=body, headers=served.headers)
        assert got.headers["x-pekoe-ignored"] == "ignore_eos, top_k"

    @pytest.mark.parametrize(("path", "status"), [("/v1/embeddings", 404), ("/v1/models", 405), ("/", 404)])
    def test_another_route(self, served, path, status):
        got = httpx.post(served.host + path, headers=served.headers)
        assert got.status_code == status
        assert "/v1/chat/completions" in got.json()["error"]["message"]

    def test_what_is_too_large(self, engine, tokenizers):
        with serving(engine, tokenizers["append"], body_bytes=10_000) as one:
            for content in (b"x" * 20_000, iter([b"x" * 6_000] * 3), b"x" * 2_000_000):
                got = httpx.post(f"{one.url}/chat/completions", content=content, headers=one.headers)
                assert got.status_code == 413
            with to(one) as client, pytest.raises(openai.APIStatusError, match="at most 10,000 bytes"):
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": "1" * 20_000}])

    def test_a_body_that_does_not_end(self, engine, tokenizers):
        with (
            serving(engine, tokenizers["append"], read_s=0.3) as one,
            socket.create_connection(("127.0.0.1", one.endpoint.port)) as line,
        ):
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
            line.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
            assert line.recv(1000).startswith(b"HTTP/1.1 408")

    def test_engines_that_fail(self, tokenizers):
        sampler = HeldSampler()
        with serving(sampler, tokenizers["append"]) as one, to(one, timeout=20) as client:
            fail = threading.Thread(
                target=lambda: (until(lambda: bool(sampler.held)), sampler.held[0].set_exception(RunError("no power")))
            )
            fail.start()
            with pytest.raises(openai.InternalServerError, match="no power") as failed:
                client.chat.completions.create(model="m", messages=[QUESTION])
            fail.join()
            assert failed.value.status_code == 503
            assert any("no power" in line for line in one.lines)


def completion(sampler: HeldSampler) -> Completion:
    record = Record.of(np.array([1]), np.array([5, 3]), np.zeros(2, np.float32))
    return Completion(2, "stop", ((0, 0),), record)


class TestLoad:
    def test_more_than_it_takes_is_refused_and_taken_later(self, tokenizers):
        sampler = HeldSampler()
        with serving(sampler, tokenizers["append"], at_once=2) as one, to(one, timeout=20) as client:
            with pytest.raises(openai.BadRequestError, match="at most 2 answers at once, got 3"):
                client.chat.completions.create(model="m", messages=[QUESTION], n=3)
            first = threading.Thread(target=lambda: client.chat.completions.create(model="m", messages=[QUESTION], n=2))
            first.start()
            until(lambda: len(sampler.held) == 2)
            with pytest.raises(openai.RateLimitError, match="ask again later") as refused:
                client.chat.completions.create(model="m", messages=[QUESTION])
            assert refused.value.response.headers["retry-after"] == "1"
            for future in sampler.held:
                future.set_result(completion(sampler))
            first.join()
            late = client.with_options(max_retries=5)
            end = threading.Thread(
                target=lambda: (until(lambda: len(sampler.held) == 3), sampler.held[2].set_result(completion(sampler)))
            )
            end.start()
            assert late.chat.completions.create(model="m", messages=[QUESTION]).choices[0].finish_reason == "stop"
            end.join()
            assert one.endpoint.num_sampling == 0

    @pytest.mark.parametrize("stream", [False, True])
    def test_an_answer_is_not_sampled_to_its_end_when_its_client_goes(self, tokenizers, stream):
        sampler = HeldSampler()
        with serving(sampler, tokenizers["append"]) as one, to(one, timeout=0.3) as client:
            with pytest.raises(openai.APITimeoutError):
                client.chat.completions.create(model="m", messages=[QUESTION], n=2, stream=stream)
            until(lambda: len(sampler.held) == 2 and all(future.cancelled() for future in sampler.held))
            until(lambda: one.endpoint.num_sampling == 0)
            assert record_of(client.with_options(timeout=20))["turns"] == 0

    def test_of_a_pool_whose_engine_drops_the_request(self, model, engine, tokenizers):
        class Starter:
            name, kind = "an engine", "embedded"

            def start(self) -> EmbeddedEngine:
                return EmbeddedEngine(model, max_sequence_tokens=512)

        pool = EnginePool([Starter()], start_limit_s=60, serving_at_once=True)
        try:
            pool.wait_started()
            inner = pool.members[0].engine
            with serving(pool, tokenizers["none"], 512) as one, to(one, timeout=0.2) as client:
                with pytest.raises(openai.APITimeoutError):
                    client.completions.create(
                        model="m", prompt="1", max_tokens=500, temperature=1, n=64, extra_body={"top_k": 1}
                    )
                until(lambda: not inner._unfinished and not pool._unfinished())
                inner.check_integrity()
                again = client.with_options(timeout=60).completions.create(model="m", prompt="1", max_tokens=3)
                assert again.usage.completion_tokens > 0
        finally:
            pool.close()

    def test_a_client_that_does_not_read_harms_nobody(self):
        tokenizer = text_tokenizer()
        sampler = ScriptedSampler(tokenizer, "x" * 400_000)
        with serving(sampler, tokenizer, read_s=1.0) as one:
            body = json.dumps({"messages": [QUESTION], "n": 4, "max_tokens": 10**6, "stream": True})
            with socket.create_connection(("127.0.0.1", one.endpoint.port)) as line:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
                line.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
                until(lambda: len(sampler.asked) == 4)
                assert httpx.get(f"{one.host}/health", timeout=20).status_code == 200
                until(lambda: one.endpoint.num_sampling == 0 and not one.endpoint._server.server_state.tasks)

    def test_a_publish_in_the_middle_shows_in_the_versions(self, make_model, tokenizers):
        models = [make_model(seed=i, vocab_size=tokenizers["none"].vocab_size, max_positions=512) for i in (0, 1)]
        engine = EmbeddedEngine(models[0])
        try:
            with serving(engine, tokenizers["none"], 512) as one, to(one) as client:
                got: list[Any] = []
                ask = threading.Thread(
                    target=lambda: got.append(
                        client.completions.create(
                            model="m", prompt="1", n=32, max_tokens=400, extra_body={"return_token_ids": True}
                        )
                    )
                )
                ask.start()
                until(lambda: engine.stats().num_decode_tokens > 40)
                engine.update_weights(models[1], 7)
                ask.join()
            versions = [choice.versions for choice in got[0].choices]
            assert any([version for version, _ in one] == [0, 7] for one in versions)
        finally:
            engine.close()

    def test_the_port_that_is_taken_is_named(self, served, engine, tokenizers):
        from pekoe.agents.endpoint import Endpoint
        from pekoe.core.errors import UserError
        from pekoe.engine.async_thread import AsyncThread

        thread = AsyncThread("endpoint")
        try:
            with pytest.raises(UserError, match=f"free port.*{served.endpoint.port}"):
                Endpoint(tokenizers["append"], served.sessions, "m").start(thread, port=served.endpoint.port)
        finally:
            thread.stop()
