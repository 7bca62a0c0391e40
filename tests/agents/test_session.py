"""I11: a trained token is one that an engine sampled, with its log-prob, in the context that it was given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pekoe.agents.answers import Parsed, Plain, ToolCall
from pekoe.agents.session import Dispatcher, EpisodeLimit, Limits, Session
from pekoe.core.records import spans_of
from pekoe.core.types import IntArray, SamplingParams
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine.embedded import EmbeddedEngine
from tests.agents.sampling import TEMPLATES, RecordingSampler

QUESTION = {"role": "user", "content": "1+2="}


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


@pytest.fixture
def sampler(engine: EmbeddedEngine) -> RecordingSampler:
    return RecordingSampler(engine)


def make(sampler: RecordingSampler, tokenizer: Tokenizer, new_tokens: int = 6, **more: Any) -> Session:
    return Session(Dispatcher(sampler), tokenizer, SamplingParams(max_new_tokens=new_tokens), "p", **more)


def check(
    session: Session,
    sampler: RecordingSampler,
    logprobs_of: Callable[[IntArray], torch.Tensor],
    tolerance: float = 1e-4,
) -> None:
    """Each turn is trained on once, in its context, with its log-probs; nothing else is; the model agrees."""
    records = [branch.handle.resolve() for branch in session.trajectory().branches]
    covered, worst = [np.zeros(len(record.tokens), np.int64) for record in records], 0.0
    turns = session.turns
    for turn in turns:
        whole, start = np.concatenate([turn.context, turn.completion.tokens]), len(turn.context)
        places = [
            i
            for i, r in enumerate(records)
            if np.array_equal(r.tokens[: len(whole)], whole)
            and np.array_equal(r.logprobs[start : len(whole)], turn.completion.logprobs)
            and r.loss_mask[start : len(whole)].all()
            and not covered[i][start : len(whole)].any()
        ]
        covered[places[0]][start : len(whole)] += 1
    for record, times in zip(records, covered, strict=True):
        assert np.array_equal(times, record.loss_mask)
        assert sum(context + own for context, own in spans_of(record)) == len(record.tokens)
        gap = logprobs_of(record.tokens).numpy() - record.logprobs
        worst = max(worst, float(np.abs(gap[record.loss_mask]).max()))
    sampled = [(request.tokens.tolist(), future.result()) for request, future in sampler.asked]
    for turn in turns:
        tokens, size = turn.completion.tokens.tolist(), turn.completion.num_tokens
        same = [c for context, c in sampled if context == turn.context.tolist() and c.tokens[:size].tolist() == tokens]
        assert any(np.array_equal(c.logprobs[:size], turn.completion.logprobs) for c in same)
    assert worst <= tolerance


def test_a_growing_chat_is_one_sequence_of_the_sampled_ids(sampler, tokenizers, logprobs_of):
    session = make(sampler, tokenizers["append"])

    async def chat() -> None:
        messages: list[Any] = [QUESTION]
        for _ in range(4):
            reply = await session.complete(messages)
            messages += [reply.message, {"role": "tool", "content": "7"}]

    run(chat())
    (branch,) = session.trajectory().branches
    assert session.stats.num_turns == 4
    assert session.stats.num_tool_calls == 3
    assert branch.num_tokens == sum(turn.completion.num_tokens for turn in session.turns)
    check(session, sampler, logprobs_of)


def test_an_edited_chat_branches_and_what_stands_in_its_context_is_not_trained_on_again(
    sampler, tokenizers, logprobs_of
):
    session = make(sampler, tokenizers["append"])

    async def chat() -> None:
        first = await session.complete([QUESTION])
        await session.complete([QUESTION, first.message, QUESTION])
        await session.complete([QUESTION, first.message, {"role": "user", "content": "no"}])
        await session.complete([QUESTION, {"role": "assistant", "content": "3"}, QUESTION])
        await session.complete([QUESTION])

    run(chat())
    assert len(session.trajectory().branches) == 4
    check(session, sampler, logprobs_of)


def test_a_single_answer_has_the_bits_of_an_engine_that_is_asked_for_one(engine, sampler, tokenizers):
    tokenizer, params = tokenizers["append"], SamplingParams(max_new_tokens=20, seed=4)
    session = Session(Dispatcher(sampler), tokenizer, params, "prompt-0", prompt=[QUESTION])
    reply = run(session.complete([QUESTION]))
    ((alone,),) = engine.generate([tokenizer.encode_prompt([QUESTION]).tolist()], params)
    assert reply.tokens.tolist() == alone.tokens.tolist()
    (branch,) = session.trajectory().branches
    assert branch.handle.resolve().logprobs.tolist() == alone.handle.resolve().logprobs.tolist()


def test_the_same_question_again_is_another_sample_and_a_later_run_draws_the_same(sampler, tokenizers):
    async def ask(delays: tuple[float, ...]) -> list[list[int]]:
        session = make(sampler, tokenizers["append"], 30, prompt=[QUESTION])

        async def one(number: int, delay: float) -> list[int]:
            await asyncio.sleep(delay)
            return (await session.complete([QUESTION, {"role": "user", "content": str(number)}])).tokens.tolist()

        again = [(await session.complete([QUESTION])).tokens.tolist() for _ in range(3)]
        return again + await asyncio.gather(*(one(i, delay) for i, delay in enumerate(delays)))

    first, second = run(ask((0.0, 0.02))), run(ask((0.02, 0.0)))
    assert first == second
    assert len({tuple(tokens) for tokens in first}) == 5


def test_an_answer_that_was_read_is_known_again_and_its_own_ids_stand(sampler, tokenizers, logprobs_of):
    class AlwaysCalls(Plain):
        def whole(self, text: str, tools: Any, in_thought: bool) -> Parsed:
            return Parsed("", "", (ToolCall("call-1", "add", '{"a": 1, "b": 2}'),))

    session = make(sampler, tokenizers["append"], parser=AlwaysCalls())

    async def chat() -> None:
        reply = await session.complete([QUESTION])
        call = {"id": "other", "type": "function", "function": {"name": "add", "arguments": '{"b":2,"a":1}'}}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        await session.complete([QUESTION, said, {"role": "tool", "content": "3"}])
        assert reply.message["tool_calls"][0]["function"]["name"] == "add"

    run(chat())
    assert len(session.trajectory().branches) == 1
    check(session, sampler, logprobs_of)


def test_an_answer_ends_before_a_stop_text_and_the_rest_is_no_part_of_it(sampler, tokenizers, logprobs_of):
    session = make(sampler, tokenizers["append"], 40)

    async def chat() -> None:
        whole = await session.complete([QUESTION])
        assert len(whole.text) > 5
        fresh = make(sampler, tokenizers["append"], 40)
        reply = await fresh.complete([QUESTION], stop=[whole.text[4]])
        assert reply.text == whole.text[: whole.text.index(whole.text[4])]
        assert reply.tokens.tolist() == whole.tokens[: len(reply.tokens)].tolist()
        assert tokenizers["append"].decode(reply.tokens).startswith(reply.text + whole.text[4])
        await fresh.complete([QUESTION, reply.message, QUESTION])
        check(fresh, sampler, logprobs_of)

    run(chat())


def test_limits_are_named(sampler, tokenizers):
    async def ask(limits: Limits) -> None:
        session, messages = make(sampler, tokenizers["append"], 5, limits=limits), [QUESTION]
        for _ in range(3):
            reply = await session.complete(messages)
            messages = [*messages, reply.message, QUESTION]

    with pytest.raises(EpisodeLimit, match=r"rollout\.max_turns = 2"):
        run(ask(Limits(max_turns=2)))
    with pytest.raises(EpisodeLimit, match=r"rollout\.max_new_tokens = 4"):
        run(ask(Limits(max_new_tokens=4)))


ACTIONS = ("ask", "tool", "retry", "edit", "forge", "cut", "stop", "parallel", "begin")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 7)), max_size=7))
def test_i11_whatever_a_conversation_does(
    engine, tokenizers, logprobs_of, template: str, actions: list[tuple[str, int]]
):
    sampler = RecordingSampler(engine)
    session = make(sampler, tokenizers[template])
    first = QUESTION if tokenizers[template].has_chat_template else {**QUESTION, "role": "prompt"}

    async def chat() -> None:
        messages: list[Any] = [first]
        for action, number in actions:
            more: dict[str, Any] = {}
            if action in ("ask", "tool"):
                messages.append({"role": "user" if action == "ask" else "tool", "content": f"{number}"})
            elif action == "edit":
                at = number % len(messages)
                messages[at] = {**messages[at], "content": messages[at]["content"] + "="}
            elif action == "forge":
                messages += [{"role": "assistant", "content": f"a={number}"}, QUESTION]
            elif action == "cut":
                more["max_tokens"] = 1 + number % 3
            elif action == "stop":
                more["stop"] = ["a", "1", "=", "e"]
            elif action == "begin":
                messages = [first]
            if action == "parallel":
                await asyncio.gather(
                    *(session.complete([*messages, {"role": "user", "content": str(i % 2)}]) for i in range(3))
                )
            else:
                reply = await session.complete(messages, **more)
                messages.append(reply.message)

    run(chat())
    if session.turns:
        check(session, sampler, logprobs_of)
