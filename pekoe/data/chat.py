"""Chat templates: Jinja programs that come with models, run in a sandbox as `transformers` does, and two of our own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pekoe.core.errors import UserError


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for trainers that mask by it; we only render what is inside."""

    tags = {"generation"}  # noqa: RUF012 (the base class says so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """A compiled chat template, with the special tokens it may name. Renders what `transformers` renders."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any], origin: str) -> None:
        """`origin` names the template in messages. Raises UserError for a syntax error."""
        self._origin = origin
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        helpers: dict[str, Any] = {"raise_exception": _raise_exception}
        environment.globals.update(helpers)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{origin}: expected a Jinja chat template, got {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, today: date) -> str:
        """The conversation as text; `today` is what `strftime_now` prints.

        Raises UserError where the template refuses the messages, or fails.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                strftime_now=today.strftime,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a downloaded program: any exception is a failure of the template
            roles = [message["role"] for message in messages]
            raise UserError(f"{self._origin}: the chat template refused messages of roles {roles}: {error}") from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; prompts are no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@dataclass(frozen=True, slots=True)
class Family:
    """A model family's template, the markers that must be tokens of the model, and the token that ends a response."""

    source: str
    markers: tuple[str, ...]
    end: str


OPENING = "<think>\n"  # of a response that has to begin by thinking

_R1 = """{{ bos_token }}
{%- for message in messages %}
{%- if message.role == "system" %}{{ message.content }}
{%- elif message.role == "user" %}<｜User｜>{{ message.content }}
{%- else %}<｜Assistant｜>{{ message.content.split("</think>")[-1] }}<｜end▁of▁sentence｜>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<｜Assistant｜>{% endif %}"""

_QWEN = """{%- if messages[0].role != "system" -%}
<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>{{ "\n" }}
{%- endif %}
{%- for message in messages -%}
<|im_start|>{{ message.role }}{{ "\n" }}{{ message.content }}<|im_end|>{{ "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ "\n" }}{% endif %}"""

# For models that come without a template, or with another. They render what the families' published templates render
# for turns of system, user and assistant, without tool calls.
FAMILIES = {
    # https://huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Qwen-7B, tokenizer_config.json
    "r1": Family(_R1, ("<｜User｜>", "<｜Assistant｜>"), "<｜end▁of▁sentence｜>"),
    # https://huggingface.co/Qwen/Qwen2.5-7B-Instruct, tokenizer_config.json
    "qwen": Family(_QWEN, ("<|im_start|>",), "<|im_end|>"),
}
