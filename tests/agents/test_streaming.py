"""Answers are sent as they are sampled: programs of OpenAI's and Anthropic's packages see them grow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest

from pekoe.agents.answers import Ending
from pekoe.config.recipes import EngineSection
from pekoe.core.errors import RunError
from pekoe.core.types import Request, SamplingParams
from pekoe.engine.embedded import EmbeddedEngine
from tests.agents.sampling import text_tokenizer
from tests.agents.scripted import KEY, Serving, SlowSampler, serving
from tests.agents.test_endpoint import QUESTION, TOOL, record_of, to, until

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
WHOLE = f"<think>hm, é\n</think>\n\nso it is {CALL}"
STEPS = ("<think>h", "m, é\n</thi", "nk>\n\nso i", "t is <tool_c")  # each goes on from those before


class Steps:
    """An endpoint, and a sampler that tells one more of `STEPS` each time."""

    def __init__(self, one: Serving, sampler: SlowSampler) -> None:
        self.one, self.sampler, self._number, self._told = one, sampler, 0, ""

    def first(self) -> threading.Thread:
        """In a thread, since the client waits for it."""
        thread = threading.Thread(target=lambda: (until(lambda: len(self.sampler.asked) > 0), self.next()))
        thread.start()
        return thread

    def next(self) -> None:
        if self._number == len(STEPS):
            self.sampler.end(0, WHOLE)
            return
        self.sampler.tell(0, STEPS[self._number], len(self._told))
        self._told += STEPS[self._number]
        self._number += 1


@pytest.fixture
def steps() -> Iterator[Steps]:
    tokenizer = text_tokenizer()
    sampler = SlowSampler(tokenizer)
    with serving(sampler, tokenizer) as one:
        yield Steps(one, sampler)


def test_chat_completions(steps):
    with to(steps.one, timeout=20) as client:
        first = steps.first()
        given: Any = {"model": "m", "messages": [QUESTION], "tools": [TOOL], "max_tokens": 99, "logprobs": True}
        heard: list[tuple[str, str]] = []
        calls, ends, logprobs = [], [], 0
        with client.chat.completions.create(**given, stream=True) as stream:
            for chunk in stream:
                (choice,) = chunk.choices
                new = choice.delta.model_extra.get("reasoning_content", ""), choice.delta.content or ""
                calls += choice.delta.tool_calls or []
                ends += [choice.finish_reason] if choice.finish_reason else []
                logprobs += len(choice.logprobs.content) if choice.logprobs else 0
                if any(new):
                    heard.append(new)
                    steps.next()
        first.join()
        assert heard == [("h", ""), ("m, é", ""), ("", "so i"), ("", "t is")]
        assert ([call.function.name for call in calls], ends) == (["add"], ["tool_calls"])
        (branch,) = record_of(client)["branches"]
        assert sum(branch["loss_mask"]) == logprobs == len(WHOLE) + 1
        assert text_tokenizer().decode(np.array(branch["tokens"])[branch["loss_mask"]]) == f"{WHOLE}<|end|>"


def test_anthropic_messages(steps):
    with anthropic.Anthropic(base_url=steps.one.host, api_key=KEY, max_retries=0, timeout=20) as client:
        first = steps.first()
        tool: Any = {"name": "add", "input_schema": {"type": "object"}}
        messages: Any = [{"role": "user", "content": "1+2="}]
        heard: list[str] = []
        with client.messages.stream(model="m", max_tokens=99, tools=[tool], messages=messages) as stream:
            for event in stream:
                if event.type == "content_block_delta" and event.delta.type in ("text_delta", "thinking_delta"):
                    heard.append(getattr(event.delta, event.delta.type.removesuffix("_delta")))
                    steps.next()
            message = stream.get_final_message()
        first.join()
    thought, text, call = message.content
    assert heard == ["h", "m, é", "so i", "t is"]
    assert (thought.thinking, text.text, call.name, call.input) == ("hm, é", "so it is", "add", {"a": 1})
    assert (message.stop_reason, message.usage.output_tokens) == ("tool_use", len(WHOLE) + 1)
    assert message.usage.input_tokens == len(steps.sampler.asked[0][0].tokens)


def test_openai_responses(steps):
    with to(steps.one, timeout=20) as client:
        first = steps.first()
        tool: Any = {"type": "function", "name": "add", "parameters": {"type": "object"}}
        heard: list[str] = []
        done: list[str] = []
        with client.responses.stream(model="m", input="1+2=", tools=[tool], max_output_tokens=99) as stream:
            for event in stream:
                if event.type in ("response.output_text.delta", "response.reasoning_text.delta"):
                    heard.append(event.delta)
                    steps.next()
                if event.type in ("response.output_text.done", "response.reasoning_text.done"):
                    done.append(event.text)
            response = stream.get_final_response()
        first.join()
    items: Any = response.output
    thought, said, call = items
    assert heard == ["h", "m, é", "so i", "t is"]
    assert done == ["hm, é", "so it is"]
    assert (thought.content[0].text, said.content[0].text, call.name) == ("hm, é", "so it is", "add")


def test_completions_have_the_text_as_it_is(steps):
    with to(steps.one, timeout=20) as client:
        first, heard = steps.first(), list[str]()
        with client.completions.create(model="m", prompt="1", stream=True, max_tokens=99) as stream:
            for chunk in stream:
                if chunk.choices[0].text and len(heard) < len(STEPS):
                    heard.append(chunk.choices[0].text)
                    steps.next()
        first.join()
    assert heard == list(STEPS)


def test_of_an_engine_that_samples(engine, tokenizers):
    with serving(engine, tokenizers["append"], engine.max_sequence_tokens) as one, to(one) as client:
        given: Any = {"model": "m", "messages": [QUESTION], "max_tokens": 200, "seed": 2, "n": 3, "temperature": 1.0}
        given |= {"extra_body": {"return_token_ids": True}, "stop": ["77"]}
        whole = client.chat.completions.create(**given)
        texts, pieces, ids = [""] * 3, [0] * 3, [[]] * 3
        with client.chat.completions.create(**given, stream=True) as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    pieces[choice.index] += bool(choice.delta.content)
                    ids[choice.index] = (choice.model_extra or {}).get("token_ids", ids[choice.index])
        assert texts == [choice.message.content for choice in whole.choices]
        assert ids == [choice.token_ids for choice in whole.choices]
        assert max(pieces) > max(map(len, texts)) / 4
        engine.check_integrity()
        assert not engine._listening


def test_an_answer_is_sampled_to_its_stop_text_and_no_further(engine, tokenizers, monkeypatch):
    with serving(engine, tokenizers["append"], engine.max_sequence_tokens) as one, to(one) as client:
        given: Any = {"model": "m", "messages": [QUESTION], "max_tokens": 200, "seed": 3, "n": 3, "temperature": 1.0}

        def ask(**more: Any) -> tuple[list[tuple[str, str, list[int]]], int]:
            before = engine.stats().num_decode_tokens
            choices = client.chat.completions.create(**given, **more, extra_body={"return_token_ids": True}).choices
            answers = [(c.message.content or "", c.finish_reason, (c.model_extra or {})["token_ids"]) for c in choices]
            return answers, engine.stats().num_decode_tokens - before

        free, _ = ask()
        stops = [
            next(text[at : at + 2] for at in range(first, len(text)) if text[at : at + 2].isalnum())
            for (text, _, _), first in zip(free, (10, 20, 30), strict=True)
        ]
        short, num_short = ask(stop=stops)
        monkeypatch.setattr(Ending, "__call__", lambda *_: False)
        dropped, num_dropped = ask(stop=stops)
    assert short == dropped
    assert all(reason == "stop" and len(ids) < 60 for _, reason, ids in short)
    assert all(ids == whole[: len(ids)] for (_, _, ids), (_, _, whole) in zip(short, free, strict=True))
    sampled = sum(len(ids) for _, _, ids in short)
    assert sampled <= num_short <= sampled + len(short)  # one more, where the stop text is that of a stop token
    assert num_dropped == sum(len(ids) for _, _, ids in free) > 2 * num_short
    engine.check_integrity()
    assert not engine._listening


@pytest.mark.parametrize("chars", [1, 3])
def test_a_stop_text_is_seen_wherever_tokens_begin(chars):
    """Also over two pieces, and where another engine begins the answer again."""
    tokenizer = text_tokenizer()
    ids = np.array(tokenizer.encode("one, twé, three"), np.int64)
    ending = Ending(tokenizer, (), ["zzz", "é, t"], None)
    heard = [ending(at, ids[at : at + chars]) for at in range(0, len(ids), chars)]
    first = heard.index(True)
    assert "é, t" in tokenizer.decode(ids[: (first + 1) * chars])
    assert "é, t" not in tokenizer.decode(ids[: first * chars])
    again = Ending(tokenizer, (), ["é, t"], None)
    assert [again(0, ids[:5]), again(5, ids[5:8]), again(0, ids[:8]), again(8, ids[8:])] == [False, False, False, True]


def test_a_listener_ends_its_response_and_no_other(make_model, tokenizers):
    model = make_model(vocab_size=tokenizers["none"].vocab_size, max_positions=512)
    engine = EmbeddedEngine(model, EngineSection(block_tokens=4, kv_tokens=160))  # with preemption
    params = SamplingParams(max_new_tokens=60, stop_token_ids=())
    try:
        whole, ended = (
            [
                future.result()
                for future in engine.submit(
                    [Request("a", 0, i, np.array([5, 6, 7]), params, listener=ends.get(i)) for i in range(4)]
                )
            ]
            for ends in ({}, {1: lambda start, _: start >= 20, 2: lambda start, _: start >= 59})
        )
        assert [len(one.tokens) for one in ended] == [60, 21, 60, 60]
        assert [one.finish for one in ended] == ["length", "stop", "length", "length"]
        for one, other in zip(whole, ended, strict=True):
            assert other.tokens.tolist() == one.tokens[: len(other.tokens)].tolist()
        engine.check_integrity()
        assert not engine._unfinished
        assert not engine._listening
    finally:
        engine.close()


def test_tokens_are_told_of_through_preemption_and_a_publish(make_model, tokenizers):
    models = [make_model(seed=i, vocab_size=tokenizers["none"].vocab_size, max_positions=512) for i in (0, 1)]
    engine = EmbeddedEngine(models[0], EngineSection(block_tokens=4, kv_tokens=160))
    heard: dict[int, list[int]] = {i: [] for i in range(4)}

    def listen(number: int, start: int, tokens: Any) -> None:
        assert start == len(heard[number])
        heard[number] += tokens.tolist()
        if number == 0 and start == 5:
            raise RuntimeError("a listener's own")

    try:
        params = SamplingParams(max_new_tokens=80, stop_token_ids=())
        futures = engine.submit(
            [
                Request("a", 0, i, np.array([5, 6, 7]), params, listener=lambda s, t, i=i: listen(i, s, t))
                for i in range(4)
            ]
        )
        until(lambda: len(heard[0]) > 10)
        engine.update_weights(models[1], 1)
        completions = [future.result() for future in futures]
        assert [completion.tokens.tolist() for completion in completions] == list(heard.values())
        assert completions[0].versions[-1][0] == 1
        assert engine.stats().num_preemptions > 0
    finally:
        engine.close()


def test_a_client_that_goes_in_the_middle_ends_its_answer(steps):
    with to(steps.one, timeout=20) as client:
        first = steps.first()
        with client.chat.completions.create(model="m", messages=[QUESTION], n=2, stream=True) as stream:
            assert next(iter(stream)).choices[0].delta.role == "assistant"
        first.join()
        until(lambda: all(future.cancelled() for _, future in steps.sampler.asked))
        until(lambda: steps.one.endpoint.num_sampling == 0)
        assert record_of(client)["turns"] == 0


@pytest.mark.parametrize("end", ["fails", "is another"])
def test_what_goes_wrong_in_the_middle_is_told(steps, end):
    def finish() -> None:
        if end == "fails":
            steps.sampler.asked[0][1].set_exception(RunError("no power"))
        else:
            steps.sampler.end(0, "something else")

    expected = "no power" if end == "fails" else "another than its stream began with"
    with to(steps.one, timeout=20) as client:
        first = steps.first()
        stream = client.chat.completions.create(model="m", messages=[QUESTION], stream=True)
        assert not next(stream).choices[0].delta.model_extra
        assert next(stream).choices[0].delta.model_extra == {"reasoning_content": "h"}
        finish()
        with pytest.raises(openai.APIError, match=expected):
            next(stream)
        first.join()
    assert any(expected in line for line in steps.one.lines)


def test_it_is_told_to_clients_of_anthropic(steps):
    with anthropic.Anthropic(base_url=steps.one.host, api_key=KEY, max_retries=0, timeout=20) as client:
        first = steps.first()
        given: Any = {"model": "m", "max_tokens": 99, "messages": [{"role": "user", "content": "1"}]}
        with client.messages.create(**given, stream=True) as stream:
            assert [next(stream).type for _ in range(3)][-1] == "content_block_delta"
            steps.sampler.asked[0][1].set_exception(RunError("no power"))
            with pytest.raises(anthropic.APIError, match="no power"):
                next(stream)
        first.join()


def test_what_is_wrong_before_the_first_token_has_its_status(steps):
    body = {"messages": [QUESTION], "stream": True, "max_tokens": 5, "temperature": 9}
    assert httpx.post(f"{steps.one.url}/chat/completions", json=body, headers=steps.one.headers).status_code == 400
