"""Sources of two environments, as users of the `verifiers` library write them: of one turn, and of several."""

from __future__ import annotations

# An agent that runs in this process; those of the library fetch their packages when they first run.
CHAT = """
import httpx
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire


class Chat(vf.Harness[vf.HarnessConfig]):
    APPENDS_SYSTEM_PROMPT = False
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        _, prompt = self.resolve_prompt(data)
        messages = prompt if isinstance(prompt, list) else [vf.UserMessage(content=prompt)]
        body = {"model": ctx.model, "messages": [message_to_wire(message) for message in messages]}
        headers = {"authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(f"{endpoint}/chat/completions", headers=headers, json=body)
        return vf.ProgramResult(int(answer.status_code != 200), "", answer.text)
"""

# A share of the answer's characters is the score.
SEVENS = (
    CHAT
    + """

def said(trace):
    return trace.branches[-1].messages[-1].content or ""


class Sevens(vf.Task[vf.TaskData]):
    @vf.reward
    async def share(self, trace) -> float:
        text = said(trace)
        return text.count("7") / max(1, len(text))


class SevensTaskset(vf.Taskset[Sevens, vf.TasksetConfig]):
    def load(self):
        for number in range(20):
            yield Sevens(vf.TaskData(prompt=f"{number}="), self.config.task)


__all__ = ["Chat", "SevensTaskset"]
"""
)

# The user says what was wrong, until it is right or asked for three times; judged over the whole.
HIGHER = (
    CHAT
    + """

class GuessData(vf.TaskData):
    number: str


class Guess(vf.Task[GuessData]):
    pass


class GuessTaskset(vf.Taskset[Guess, vf.TasksetConfig]):
    def load(self):
        for number in range(20):
            yield Guess(GuessData(prompt=f"{number}+", number=str(number % 10)), self.config.task)


class GuessConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as chat:
            segment = await chat.turn()
            for _ in range(2):
                if segment.terminated or task.data.number in segment.last_reply:
                    break
                segment = await chat.turn(f"{task.data.number}=")

    async def finalize(self, task, episode):
        (trace,) = episode.traces
        found = [task.data.number in (m.content or "") for m in trace.branches[-1].messages if m.role == "assistant"]
        trace.record_reward("found", 1 / len(found) if found and found[-1] else 0.0)


__all__ = ["Chat", "GuessTaskset", "GuessEnv"]
"""
)

BROKEN = SEVENS.replace("text = said(trace)", 'raise OSError("no power")')
TWO = HIGHER.replace(
    "agent: vf.AgentConfig = vf.AgentConfig()",
    "agent: vf.AgentConfig = vf.AgentConfig()\n    other: vf.AgentConfig = vf.AgentConfig()",
)
