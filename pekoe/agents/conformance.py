"""Does an endpoint record what was sampled? `python -m pekoe.agents.conformance --base-url URL --key KEY --model DIR`

For any endpoint in OpenAI's form that returns token ids as vLLM does (`return_token_ids`: `prompt_token_ids`, and
`token_ids` of each choice). With --model, a directory of the same weights, ids are spelt and log-probs recomputed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

TOLERANCE = 5e-4  # of log-probs, in float32
_TURNS, _CHATS = 4, 8
_QUESTIONS = ("1+2=", "3+4=", "5+6=", "7+8=")
_TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class Result:
    """Of one check. `passed` None: it could not be made here."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Reference:
    """The same weights here: what ids spell, and the log-probs [L] that the model gives each token after the first."""

    spell: Callable[[Sequence[int]], str]
    logprobs: Callable[[Sequence[int]], Sequence[float]]


class _Failed(Exception):
    pass


class _Skipped(Exception):
    pass


class Suite:
    """The checks, on a client whose address ends in /v1."""

    def __init__(
        self, client: httpx.Client, name: str, reference: Reference | None = None, max_tokens: int = 24
    ) -> None:
        self._client, self._name, self._reference, self._most = client, name, reference, max_tokens

    def run(self) -> list[Result]:
        """All checks, in order."""
        checks = {
            "returns the ids that it sampled": self._ids,
            "log-probs are those of a reference forward": self._logprobs,
            "a growing chat is one sequence": partial(self._grown, None),
            "so it is with tools": partial(self._grown, [_TOOL]),
            "an edited chat is another sequence": self._edited,
            "many chats at once are as one alone": self._together,
            "a stream has what one answer has": self._streamed,
            "wrong requests are refused": self._refused,
        }
        return [self._checked(name, check) for name, check in checks.items()]

    def _checked(self, name: str, check: Callable[[], str]) -> Result:
        try:
            return Result(name, True, check())
        except _Skipped as why:
            return Result(name, None, str(why))
        except (_Failed, httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            return Result(name, False, str(error) if isinstance(error, _Failed) else repr(error))

    # Asking

    def _ask(self, messages: Sequence[Any], **more: Any) -> Any:
        body = {"model": self._name, "messages": messages, "max_tokens": self._most, "temperature": 1.0, "top_p": 1.0}
        body |= {"logprobs": True, "return_token_ids": True}
        answer = self._client.post("chat/completions", json=body | more)
        if answer.status_code != 200:
            raise _Failed(f"expected status 200, got {answer.status_code}: {answer.text[:200]}")
        return answer.json()

    def _parts(self, answer: Any) -> tuple[list[int], list[int]]:
        """The ids of the context, and those sampled."""
        prompt = answer.get("prompt_token_ids")
        sampled = answer["choices"][0].get("token_ids")
        if not isinstance(prompt, list) or not isinstance(sampled, list) or not prompt or not sampled:
            raise _Failed("expected prompt_token_ids and choices[0].token_ids, got none")
        return prompt, sampled

    def _chat(self, questions: Sequence[str], **more: Any) -> list[Any]:
        """The answers to questions of one chat, each put back as it came."""
        messages: list[Any] = []
        answers: list[Any] = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            answers.append(self._ask(messages, **more))
            said = answers[-1]["choices"][0]["message"]
            messages.append({key: value for key, value in said.items() if value is not None} | {"role": "assistant"})
            for call in said.get("tool_calls") or ():
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": "3"})
        return answers

    # Checks

    def _ids(self) -> str:
        prompt, sampled = self._parts(answer := self._ask([{"role": "user", "content": _QUESTIONS[0]}]))
        usage, choice = answer["usage"], answer["choices"][0]
        if (usage["prompt_tokens"], usage["completion_tokens"]) != (len(prompt), len(sampled)):
            raise _Failed(f"expected as many ids as usage counts, got {len(prompt)} and {len(sampled)}, and {usage}")
        entries = choice["logprobs"]["content"]
        if len(entries) != len(sampled):
            raise _Failed(f"expected a log-prob for each of {len(sampled)} ids, got {len(entries)}")
        if self._reference is None:
            return f"{len(sampled)} ids; without --model their text is not compared"
        text, said = self._reference.spell(sampled), choice["message"].get("content") or ""
        if said.strip() not in text:
            raise _Failed(f"expected ids that spell the answer {said!r}, got {text!r}")
        return f"{len(sampled)} ids, which spell the answer"

    def _logprobs(self) -> str:
        if self._reference is None:
            raise _Skipped("needs --model, a directory of the same weights")
        worst = 0.0
        for answer in self._chat(_QUESTIONS[:2]):
            prompt, sampled = self._parts(answer)
            ours = self._reference.logprobs([*prompt, *sampled])[len(prompt) :]
            theirs = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]
            gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
            worst = max([worst, *(gap if math.isfinite(gap) else math.inf for gap in gaps)])
        if worst > TOLERANCE:
            raise _Failed(f"expected differences up to {TOLERANCE:g}, got {worst:.1e}")
        return f"largest difference {worst:.1e}"

    def _grown(self, tools: list[Any] | None) -> str:
        try:
            answers = self._chat(_QUESTIONS[:_TURNS], **({"tools": tools} if tools else {}))
        except _Failed as error:
            if tools and "400: " in str(error) and "tools" in str(error):
                raise _Skipped(f"the model takes no tools: {error}") from None
            raise
        self._is_one(answers)
        calls = sum(len(answer["choices"][0]["message"].get("tool_calls") or ()) for answer in answers)
        return f"{len(answers)} turns" + (f", {calls} calls" if tools else "")

    def _is_one(self, answers: Sequence[Any]) -> None:
        for turn, (before, after) in enumerate(pairwise(answers), 2):
            known, context = [*self._parts(before)[0], *self._parts(before)[1]], self._parts(after)[0]
            if context[: len(known)] != known:
                at = next(
                    (i for i, pair in enumerate(zip(known, context, strict=False)) if len(set(pair)) > 1), len(context)
                )
                raise _Failed(
                    f"turn {turn}: expected a context that begins with the {len(known)} ids of the turn before, "
                    f"got another id at {at}"
                )

    def _edited(self) -> str:
        first = self._ask([{"role": "user", "content": _QUESTIONS[0]}])
        known = [*self._parts(first)[0], *self._parts(first)[1]]
        said = first["choices"][0]["message"].get("content") or ""
        edited = {"role": "assistant", "content": f"7{said}"}
        again = self._ask([{"role": "user", "content": _QUESTIONS[0]}, edited, {"role": "user", "content": "1+1="}])
        if self._parts(again)[0][: len(known)] == known:
            raise _Failed("expected a context with the edited answer, got the sampled one")
        return "its context has the edit"

    def _together(self) -> str:
        greedy = {"temperature": 0.0}
        alone = [self._parts(answer)[1] for answer in self._chat(_QUESTIONS[:2], **greedy)]
        with ThreadPoolExecutor(_CHATS) as threads:
            futures = [threads.submit(self._chat, _QUESTIONS[:2], **greedy) for _ in range(_CHATS)]
            chats = [future.result() for future in futures]
        for chat in chats:
            self._is_one(chat)
            if [self._parts(answer)[1] for answer in chat] != alone:
                raise _Failed("expected the greedy answers of one chat alone, got others in a crowd")
        return f"{_CHATS} chats of 2 turns"

    def _streamed(self) -> str:
        question = {"role": "user", "content": _QUESTIONS[1]}
        whole = self._ask([question], temperature=0.0)["choices"][0]["message"].get("content") or ""
        body = {"model": self._name, "messages": [question], "max_tokens": self._most, "temperature": 0.0}
        text, ended = "", False
        with self._client.stream("POST", "chat/completions", json=body | {"stream": True}) as stream:
            for line in stream.iter_lines():
                data = line.removeprefix("data:").strip()
                ended = ended or data == "[DONE]"
                for choice in json.loads(data)["choices"] if data.startswith("{") else ():
                    text += choice["delta"].get("content") or ""
        if text != whole or not ended:
            raise _Failed(f"expected {whole!r} and [DONE], got {text!r}{'' if ended else ' without it'}")
        return f"{len(text)} characters"

    def _refused(self) -> str:
        bad = {"no JSON": b"{", "no messages": b'{"model": "m", "messages": []}', "no object": b"[]"}
        for what, content in bad.items():
            status = self._client.post("chat/completions", content=content).status_code
            if not 400 <= status < 500:
                raise _Failed(f"{what}: expected a status from 400 to 499, got {status}")
        return f"{len(bad)} of {len(bad)}"


def load_reference(folder: Path) -> Reference:
    """From a model directory."""
    import torch

    from pekoe.data.tokenizer import Tokenizer
    from pekoe.model import load_model
    from pekoe.model.attention import PackedAttention

    model, tokenizer = load_model(str(folder), torch.float32, "cpu"), Tokenizer.load(folder)

    @torch.no_grad()
    def logprobs(tokens: Sequence[int]) -> list[float]:
        ids = torch.tensor(tokens)
        hidden = model(ids, torch.arange(len(ids)), PackedAttention([0, len(ids)]))
        values = torch.log_softmax(model.logits(hidden).float(), -1)
        return [0.0, *values[:-1].gather(1, ids[1:, None])[:, 0].tolist()]

    return Reference(tokenizer.decode, logprobs)


def table(results: Sequence[Result]) -> str:
    """A line for each check."""
    words = {True: "pass", False: "FAIL", None: "skip"}
    width = max(len(result.name) for result in results)
    return "\n".join(f"{words[one.passed]}  {one.name:<{width}}  {one.detail}" for one in results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m pekoe.agents.conformance", description=__doc__)
    parser.add_argument("--base-url", required=True, help="of the endpoint, with /v1")
    parser.add_argument("--key", default="none", help="of the endpoint")
    parser.add_argument("--name", default="model", help="of the model, where the endpoint asks for it")
    parser.add_argument("--model", type=Path, help="a directory of the same weights, to recompute log-probs")
    parser.add_argument("--max-tokens", type=int, default=24, help="of an answer")
    given = parser.parse_args(arguments)
    reference = load_reference(given.model) if given.model else None
    headers = {"authorization": f"Bearer {given.key}"}
    with httpx.Client(base_url=f"{given.base_url.rstrip('/')}/", headers=headers, timeout=600) as client:
        results = Suite(client, given.name, reference, given.max_tokens).run()
    print(table(results))
    return int(any(result.passed is False for result in results))


if __name__ == "__main__":
    sys.exit(main())
