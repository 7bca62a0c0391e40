"""Programs of Anthropic's package, and of OpenAI's with the responses API, run as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.agents.sampling import text_tokenizer
from tests.agents.scripted import KEY, ScriptedSampler, Serving, serving

CALL = '<think>hm</think>so <tool_call>{"name": "add", "arguments": {"a": 1, "b": "é"}}</tool_call>'
SCHEMA: Any = {"type": "object", "properties": {"a": {"type": "integer"}}}
DONE = f"<|user|>add<|user|>sbe brief<|user|>u1+2=<|assistant|>{CALL}<|end|><|user|>t3<|assistant|>it is 3<|end|>"


@pytest.fixture
def one() -> Iterator[Serving]:
    """The model calls a tool, and then answers."""
    tokenizer = text_tokenizer()
    with serving(ScriptedSampler(tokenizer, CALL, "it is 3"), tokenizer, 400) as serving_one:
        yield serving_one


def text_of_record(one: Serving) -> str:
    """Of the one sequence of the session."""
    (branch,) = httpx.get(f"{one.url}/session", headers=one.headers).json()["branches"]
    sampled = len(CALL) + 1 + len("it is 3") + 1
    assert sum(branch["loss_mask"]) == sampled
    return text_tokenizer().decode(branch["tokens"])


class TestAnthropic:
    TOOL: Any = {"name": "add", "description": "adds", "input_schema": SCHEMA}  # noqa: RUF012

    def client(self, one: Serving, **more: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=one.host, api_key=KEY, **({"max_retries": 0} | more))

    @pytest.mark.parametrize("streamed", [False, True])
    def test_a_tool_over_two_turns_is_one_sequence(self, one, streamed):
        messages: list[Any] = [{"role": "user", "content": "1+2="}]
        given: Any = {"model": "claude", "max_tokens": 120, "tools": [self.TOOL], "system": "be brief"}

        def ask(client: anthropic.Anthropic) -> Any:
            if not streamed:
                return client.messages.create(messages=messages, **given)
            with client.messages.stream(messages=messages, **given) as stream:
                return stream.get_final_message()

        with self.client(one) as client:
            first = ask(client)
            thought, text, call = first.content
            assert (thought.thinking, text.text, call.name, call.input) == ("hm", "so", "add", {"a": 1, "b": "é"})
            assert (first.stop_reason, first.model) == ("tool_use", "claude")
            assert first.usage.output_tokens == len(CALL) + 1
            result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "3"}]}
            messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
            last = ask(client)
        assert (last.content[0].text, last.stop_reason) == ("it is 3", "end_turn")
        assert text_of_record(one) == DONE

    def test_what_is_cut_says_so(self, one):
        with self.client(one) as client:
            answer = client.messages.create(model="m", max_tokens=3, messages=[{"role": "user", "content": "1"}])
        assert answer.stop_reason == "max_tokens"

    def test_the_address_of_openai_serves_too(self, one):
        with anthropic.Anthropic(base_url=one.url, api_key=KEY) as client:
            assert client.messages.create(model="m", max_tokens=3, messages=[{"role": "user", "content": "1"}]).content

    def test_a_wrong_key(self, one):
        with (
            anthropic.Anthropic(base_url=one.host, api_key="wrong", max_retries=0) as client,
            pytest.raises(anthropic.AuthenticationError, match="expected the endpoint's"),
        ):
            client.messages.create(model="m", max_tokens=3, messages=[{"role": "user", "content": "1"}])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"messages": []}, "at least one message"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
                "type text or tool_result",
            ),
            ({"messages": [7]}, "a role among"),
            ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "tool_calls"),
            ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "of your own"),
            ({"tools": [{"name": "f", "input_schema": 7}]}, "JSON schema"),
            ({"tool_choice": {"type": "any"}}, "tool_choice"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"messages": [{"role": "user", "content": "1" * 500}]}, "leaves no room"),
        ],
    )
    def test_a_request_that_is_wrong(self, one, changes, message):
        body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "1"}]} | changes
        got = httpx.post(f"{one.url}/messages", content=json.dumps(body), headers={"x-api-key": KEY})
        assert (got.status_code, got.json()["type"]) == (400, "error")
        assert message in got.json()["error"]["message"]


class TestResponses:
    TOOL: Any = {"type": "function", "name": "add", "description": "adds", "parameters": SCHEMA}  # noqa: RUF012

    @pytest.mark.parametrize("streamed", [False, True])
    def test_a_tool_over_two_turns_is_one_sequence(self, one, streamed):
        items: list[Any] = [{"role": "user", "content": "1+2="}]
        given: Any = {"model": "m", "tools": [self.TOOL], "instructions": "be brief", "max_output_tokens": 120}

        def ask(client: openai.OpenAI) -> Any:
            if not streamed:
                return client.responses.create(input=items, **given)
            with client.responses.stream(input=items, **given) as stream:
                return stream.get_final_response()

        with openai.OpenAI(base_url=one.url, api_key=KEY, max_retries=0) as client:
            first = ask(client)
            thought, said, call = first.output
            assert (thought.content[0].text, said.content[0].text, call.name) == ("hm", "so", "add")
            assert json.loads(call.arguments) == {"a": 1, "b": "é"}
            assert first.usage.output_tokens == len(CALL) + 1
            items += [item.model_dump(exclude_none=True) for item in first.output]
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": "3"})
            last = ask(client)
        assert (last.output_text, last.status) == ("it is 3", "completed")
        assert text_of_record(one) == DONE

    def test_what_is_cut_says_so(self, one):
        with openai.OpenAI(base_url=one.url, api_key=KEY, max_retries=0) as client:
            answer = client.responses.create(model="m", input="1", max_output_tokens=3)
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"previous_response_id": "resp_1"}, "send the whole conversation"),
            ({"input": []}, "at least one message"),
            ({"input": [{"type": "computer_call"}]}, "an item of type message"),
            ({"input": [7]}, "input[0]: expected an item"),
            ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "text alone"),
            ({"tools": [{"type": "web_search"}]}, "tools[0]"),
            ({"text": {"format": {"type": "json_object"}}}, "text.format"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"background": True}, "background"),
        ],
    )
    def test_a_request_that_is_wrong(self, one, changes, message):
        body = json.dumps({"model": "m", "input": "1"} | changes)
        got = httpx.post(f"{one.url}/responses", content=body, headers=one.headers)
        assert got.status_code == 400
        assert message in got.json()["error"]["message"]
