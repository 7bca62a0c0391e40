"""OpenAI's chat completions and completions, on one reader of requests and one writer of answers each."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from pekoe.agents.answers import Delta
from pekoe.agents.session import Reply
from pekoe.agents.tools import check_tools
from pekoe.agents.wire import MAX_ANSWERS, Api, Asked, Event, Fields, Sent, Stream, read_messages, shown
from pekoe.core.errors import UserError
from pekoe.core.types import IntArray
from pekoe.data.tokenizer import Tokenizer

_PIECE = 64  # characters of an event of a stream
_WITHOUT_EFFECT = (
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"),
    *("return_tokens_as_token_ids", "reasoning_effort", "parallel_tool_calls", "prompt_cache_retention"),
)


def openai_error(status: int, message: str, code: str | None) -> Mapping[str, Any]:
    """As OpenAI's clients read it."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def sampling_of(fields: Fields) -> dict[str, Any]:
    """What the APIs of OpenAI have in common."""
    for name in ("presence_penalty", "frequency_penalty"):
        fields.refuse(name, (0,), "0: log-probs are those of the model alone")
    fields.refuse("logit_bias", ({},), "none: log-probs are those of the model alone")
    return {
        "model": fields.get("model", str, "the model's name") or "",
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 1e-6, 1),
        "stream": fields.flag("stream"),
    }


def tools_of(fields: Fields) -> list[Any] | None:
    """The functions that the model may call; none with tool_choice "none"."""
    tools: list[Any] | None = fields.get("tools", list, "a list of functions")
    if tools:
        check_tools(tools)
    fields.refuse("tool_choice", ("auto", "none"), 'tool_choice "auto" or "none": the model decides what it calls')
    return tools if tools and fields.get("tool_choice", str, "a text") != "none" else None


def read_chat(fields: Fields) -> Asked:
    """A request of /v1/chat/completions."""
    fields.refuse("response_format", ({"type": "text"},), 'type "text": nothing constrains what is sampled')
    fields.refuse("modalities", (["text"],), "text alone")
    fields.refuse("functions", ([],), "tools, which replaced it")
    fields.refuse("top_logprobs", (0,), "0: the log-prob of the sampled token alone is known")
    fields.ignore(*_WITHOUT_EFFECT)
    options: dict[str, Any] = fields.get("stream_options", dict, "an object") or {}
    variables: dict[str, Any] | None = fields.get("chat_template_kwargs", dict, "an object")
    asked: dict[str, Any] = sampling_of(fields) | {
        "conversations": [read_messages(fields.get("messages", list, "a list of messages"))],
        "n": fields.count("n", MAX_ANSWERS) or 1,
        "tools": tools_of(fields),
        "max_tokens": fields.count("max_completion_tokens") or fields.count("max_tokens"),
        "stop": fields.texts("stop"),
        "seed": fields.get("seed", int, "a whole number"),
        "variables": variables,
        "with_usage": bool(options.get("include_usage")),
        "with_logprobs": fields.flag("logprobs"),
        "with_ids": fields.flag("return_token_ids"),
    }
    fields.ignore("max_tokens")
    return Asked(**asked, ignored=fields.rest())


def read_completion(fields: Fields) -> Asked:
    """A request of /v1/completions; prompts are texts or token ids."""
    fields.refuse("echo", (False,), "false")
    fields.refuse("suffix", ("",), "none")
    fields.ignore(*_WITHOUT_EFFECT)
    n = fields.count("n", MAX_ANSWERS) or 1
    fields.refuse("best_of", (n,), "none: every answer is returned")
    options: dict[str, Any] = fields.get("stream_options", dict, "an object") or {}
    logprobs = fields.count("logprobs", 1, 0)  # 1: the likeliest, which for us is the sampled one
    asked: dict[str, Any] = sampling_of(fields) | {
        "conversations": [[{"role": "raw", "content": prompt}] for prompt in _prompts(fields)],
        "n": n,
        "max_tokens": fields.count("max_tokens") or 16,  # as OpenAI's
        "stop": fields.texts("stop"),
        "seed": fields.get("seed", int, "a whole number"),
        "with_usage": bool(options.get("include_usage")),
        "with_logprobs": logprobs is not None,
        "with_ids": fields.flag("return_token_ids"),
    }
    return Asked(**asked, ignored=fields.rest())


def _prompts(fields: Fields) -> list[Any]:
    value: Any = fields.get("prompt", (str, list), "a text, token ids, or a list of these")
    whole = not isinstance(value, list) or (value and all(type(one) is int for one in value))
    prompts: list[Any] = [value] if whole else value

    def good(prompt: Any) -> bool:
        if isinstance(prompt, list):
            return bool(prompt) and all(type(one) is int and 0 <= one < 2**31 for one in prompt)
        return isinstance(prompt, str) and bool(prompt)

    if not prompts or len(prompts) > MAX_ANSWERS or not all(good(prompt) for prompt in prompts):
        expected = f"1 to {MAX_ANSWERS} prompts, each a text or token ids that are not empty"
        raise UserError(f"prompt: expected {expected}, got {shown(value)}")
    return prompts


class OpenAIChat:
    """Writes answers. Log-probs are of every sampled token, the stop token too, at the sampling temperature."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._spelt = tokenizer, dict[int, str]()
        self.chat = Api(read_chat, self.answer, partial(_ChatStream, self), openai_error, "[DONE]")
        self.completions = Api(read_completion, self.text_answer, partial(_TextStream, self), openai_error, "[DONE]")

    def answer(self, asked: Asked, replies: Sequence[Reply]) -> Mapping[str, Any]:
        """The body of an answer to `read_chat`'s request."""
        choices: list[dict[str, Any]] = []
        for index, reply in enumerate(replies):
            message: dict[str, Any] = {"role": "assistant", "content": reply.content or None, "refusal": None}
            if not reply.tool_calls:
                message["content"] = reply.content
            if reply.reasoning:
                message["reasoning_content"] = reply.reasoning
            if reply.tool_calls:
                message["tool_calls"] = reply.message["tool_calls"]
            choices.append({"index": index, "message": message} | self.end(asked, reply))
        ids = {"prompt_token_ids": replies[0].context.tolist()} if asked.with_ids else {}
        return _head("chatcmpl", "chat.completion", asked) | {"choices": choices, "usage": usage_of(replies)} | ids

    def text_answer(self, asked: Asked, replies: Sequence[Reply]) -> Mapping[str, Any]:
        """The body of an answer to `read_completion`'s request."""
        choices = [{"index": i, "text": reply.text} | self.text_end(asked, reply) for i, reply in enumerate(replies)]
        return _head("cmpl", "text_completion", asked) | {"choices": choices, "usage": usage_of(replies, asked.n)}

    def end(self, asked: Asked, reply: Reply) -> dict[str, Any]:
        """Why a chat's answer ended, its log-probs and ids."""
        return self._end(asked, reply, self._logprobs)

    def text_end(self, asked: Asked, reply: Reply) -> dict[str, Any]:
        """Those of a text."""
        ids = {"prompt_token_ids": reply.context.tolist()} if asked.with_ids else {}
        return self._end(asked, reply, self._text_logprobs) | {"finish_reason": reply.finish} | ids

    def _end(self, asked: Asked, reply: Reply, logprobs: Callable[[Reply], Mapping[str, Any]]) -> dict[str, Any]:
        finish = "tool_calls" if reply.tool_calls else reply.finish
        ids = {"token_ids": reply.tokens.tolist(), "versions": reply.versions} if asked.with_ids else {}
        return {"finish_reason": finish, "logprobs": logprobs(reply) if asked.with_logprobs else None} | ids

    def _text_logprobs(self, reply: Reply) -> Mapping[str, Any]:
        return {"tokens": self.spell(reply.tokens), "token_logprobs": reply.logprobs.tolist(), "top_logprobs": None}

    def _logprobs(self, reply: Reply) -> Mapping[str, Any]:
        pairs = zip(self.spell(reply.tokens), reply.logprobs.tolist(), strict=True)
        content = [
            {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
            for token, logprob in pairs
        ]
        return {"content": content, "refusal": None}

    def spell(self, tokens: IntArray) -> list[str]:
        """Each token alone."""
        for token in set(tokens.tolist()) - self._spelt.keys():
            self._spelt[token] = self._tokenizer.decode([token])
        return [self._spelt[token] for token in tokens.tolist()]


class _ChatStream(Stream):
    """Chunks of /v1/chat/completions, those of all choices as they come."""

    def __init__(self, chat: OpenAIChat, asked: Asked) -> None:
        self._chat, self._asked = chat, asked
        self._head = _head("chatcmpl", "chat.completion.chunk", asked)
        self._sent: dict[int, Sent] = {}

    def more(self, index: int, delta: Delta) -> Iterator[Event]:
        if index not in self._sent:
            self._sent[index] = Sent()
            yield self._chunk(index, {"role": "assistant", "content": ""})
        self._sent[index].add(delta)
        for piece in pieces(delta.reasoning):
            yield self._chunk(index, {"reasoning_content": piece})
        for piece in pieces(delta.content):
            yield self._chunk(index, {"content": piece})

    def end(self, replies: Sequence[Reply]) -> Iterator[Event]:
        for index, reply in enumerate(replies):
            yield from self.more(index, self._sent.get(index, Sent()).rest(reply))
            for number, call in enumerate(reply.message.get("tool_calls", ())):
                yield self._chunk(index, {"tool_calls": [{"index": number} | call]})
            yield self._chunk(index, {}, **self._chat.end(self._asked, reply))
        if self._asked.with_usage:
            yield "", self._head | {"choices": [], "usage": usage_of(replies)}

    def _chunk(self, index: int, delta: Mapping[str, Any], **more: Any) -> Event:
        return "", self._head | {"choices": [{"index": index, "delta": delta, "finish_reason": None} | more]}


class _TextStream(Stream):
    """Those of /v1/completions."""

    def __init__(self, chat: OpenAIChat, asked: Asked) -> None:
        self._chat, self._asked = chat, asked
        self._head = _head("cmpl", "text_completion", asked)
        self._sent = [Sent() for _ in range(asked.num_answers)]

    def more(self, index: int, delta: Delta) -> Iterator[Event]:
        self._sent[index].add(delta)
        for piece in pieces(delta.text):
            yield (
                "",
                self._head | {"choices": [{"index": index, "text": piece, "finish_reason": None, "logprobs": None}]},
            )

    def end(self, replies: Sequence[Reply]) -> Iterator[Event]:
        for index, reply in enumerate(replies):
            yield from self.more(index, self._sent[index].rest(reply))
            end = self._chat.text_end(self._asked, reply)
            yield "", self._head | {"choices": [{"index": index, "text": ""} | end]}
        if self._asked.with_usage:
            yield "", self._head | {"choices": [], "usage": usage_of(replies, self._asked.n)}


def pieces(text: str) -> Iterator[str]:
    """A text as the events of a stream have it."""
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def usage_of(replies: Sequence[Reply], n: int | None = None) -> Mapping[str, Any]:
    """Tokens of contexts, each counted once for its `n` answers (None: all are of one), and of answers."""
    contexts = replies[:: n or len(replies)]
    prompt, sampled = sum(len(reply.context) for reply in contexts), sum(len(reply.tokens) for reply in replies)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _head(prefix: str, kind: str, asked: Asked) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}
