"""I11 through real servers: an unmodified program's two turns with a tool are one sequence, of the ids and log-probs
that the server sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.engine.servers import ServerEngine
from pekoe.model import Decoder
from tests.agents.sampling import ALPHABET, HERMES, RecordingSampler
from tests.agents.test_session import check, make, run
from tests.servers.common import logprobs_by
from tests.servers.test_rl_step import SHAPE

openai = pytest.importorskip("openai", reason="the extra `test` brings it")
pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

TOLERANCE = 5e-4
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
QUESTION: Any = {"role": "user", "content": "1+2="}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Decoder]) -> Decoder:
    return make_model(scale=2.0, **SHAPE)


@pytest.fixture(params=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest, model: Decoder) -> Iterator[ServerEngine]:
    engine = request.getfixturevalue(f"{request.param}_engine_factory")(model)
    yield engine
    engine.close()


@pytest.fixture
def tokenizer(model: Decoder) -> Tokenizer:
    """Of some of the model's tokens; the others are sampled too, and have no text."""
    tokenizer = Tokenizer(make_char_tokenizer(ALPHABET) | {"chat_template.jinja": HERMES.encode()})
    assert tokenizer.vocab_size < model.spec.vocab_size
    return tokenizer


def test_two_turns_with_a_tool(engine, model, tokenizer):
    sampler = RecordingSampler(engine)
    session = make(sampler, tokenizer, new_tokens=12)

    async def chat() -> None:
        reply = await session.complete([QUESTION], tools=[TOOL])
        await session.complete([QUESTION, reply.message, {"role": "tool", "content": "3"}], tools=[TOOL])

    run(chat())
    check(session, sampler, logprobs_by(model), TOLERANCE)
    (branch,) = session.trajectory().branches
    assert branch.num_tokens == sum(future.result().num_tokens for _, future in sampler.asked)
    assert session.stats.num_tool_calls == 1


def test_a_program_of_openai(engine, model, tokenizer):
    from tests.agents.scripted import KEY, serving

    with serving(engine, tokenizer, 512) as one, openai.OpenAI(base_url=one.url, api_key=KEY, max_retries=0) as client:
        given: Any = {"model": "m", "tools": [TOOL], "max_tokens": 12, "extra_body": {"return_token_ids": True}}
        first = client.chat.completions.create(messages=[QUESTION], **given)
        message = {"role": "assistant", "content": first.choices[0].message.content}
        messages: Any = [QUESTION, message, {"role": "tool", "tool_call_id": "1", "content": "3"}]
        second = client.chat.completions.create(messages=messages, **given)
        again = client.chat.completions.create(messages=[QUESTION], stream=True, **given)
        ids = [choice.model_extra.get("token_ids") for chunk in again for choice in chunk.choices][-1]
        record = client.get("/session", cast_to=dict[str, Any])
    assert record["turns"] == 3
    grown = [*second.prompt_token_ids, *second.choices[0].token_ids]
    assert grown[: len(first.prompt_token_ids) + len(first.choices[0].token_ids)] == [
        *first.prompt_token_ids,
        *first.choices[0].token_ids,
    ]
    by_tokens = {tuple(branch["tokens"]): branch for branch in record["branches"]}
    assert set(by_tokens) == {tuple(grown), (*first.prompt_token_ids, *ids)}
    for tokens, branch in by_tokens.items():
        gaps = np.abs(logprobs_by(model)(np.array(tokens)).numpy() - branch["logprobs"])[np.array(branch["loss_mask"])]
        assert gaps.max() <= TOLERANCE
