"""Agents of a framework run against the endpoint as they are: `pip install openai-agents` (the extra `frameworks`)."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.agents.sampling import text_tokenizer
from tests.agents.scripted import KEY, ScriptedSampler, serving
from tests.agents.test_endpoint import record_of, to

agents = pytest.importorskip("agents", reason="the extra `frameworks` brings openai-agents")

CALL = 'so <tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
WRONG = '<tool_call>{"name": "add", "arguments": {"a": "one"}}</tool_call>'


def play(api: str, streamed: bool, *texts: str) -> tuple[str, list[tuple[int, int]], str, list[str]]:
    """The agent's answer, the tool's calls, the text of the session's one sequence, and what was streamed."""
    agents.set_tracing_disabled(True)
    called: list[tuple[int, int]] = []
    heard: list[str] = []

    @agents.function_tool
    def add(a: int, b: int) -> str:
        """Adds two numbers."""
        called.append((a, b))
        return str(a + b)

    async def run(url: str) -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            kind = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
            model = kind("m", openai_client=client)
            settings = agents.ModelSettings(max_tokens=200)
            agent = agents.Agent(
                name="adder", instructions="be brief", tools=[add], model=model, model_settings=settings
            )
            if not streamed:
                return (await agents.Runner.run(agent, "1+2=")).final_output
            result = agents.Runner.run_streamed(agent, "1+2=")
            async for event in result.stream_events():
                if getattr(getattr(event, "data", None), "type", "") == "response.output_text.delta":
                    heard.append(event.data.delta)
            return result.final_output

    tokenizer = text_tokenizer()
    with serving(ScriptedSampler(tokenizer, *texts), tokenizer) as one:
        answer = asyncio.run(run(one.url))
        with to(one) as client:
            (branch,) = record_of(client)["branches"]
    assert sum(branch["loss_mask"]) == sum(len(text) + 1 for text in texts)
    return answer, called, tokenizer.decode(branch["tokens"]), heard


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("api", ["chat", "responses"])
class TestOpenAIAgents:
    def test_a_tool_over_two_turns_is_one_sequence(self, api, streamed):
        answer, called, text, heard = play(api, streamed, CALL, "it is 3")
        assert (answer, called) == ("it is 3", [(1, 2)])
        asked = "<|user|>add<|user|>sbe brief<|user|>u1+2="
        assert text == f"{asked}<|assistant|>{CALL}<|end|><|user|>t3<|assistant|>it is 3<|end|>"
        assert not streamed or "".join(heard) == "soit is 3"

    def test_arguments_that_are_wrong_are_answered_and_the_agent_goes_on(self, api, streamed):
        answer, called, text, _ = play(api, streamed, WRONG, CALL, "it is 3")
        assert (answer, called) == ("it is 3", [(1, 2)])
        told: Any = text.split(WRONG)[1]
        assert "<|user|>t" in told
