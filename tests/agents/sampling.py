"""Templates of several manners, and a sampler that remembers what engines were asked."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from pekoe.core.types import Completion, Request
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.engine.base import Sampler

ALPHABET = "0123456789+=\n abcdefghijklmnopqrstuvwxyz<>/|"
_LOOP = """{%- for message in messages -%}
{%- if message.role == "assistant" -%}<|assistant|>ANSWER<|end|>
{%- else -%}<|user|>{{ message.role[0] }} {{ message.content }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
TEMPLATES = {
    "append": _LOOP.replace("ANSWER", "{{ message.content }}"),
    "trim": _LOOP.replace("ANSWER", "{{ message.content | trim }}"),
    # As Qwen3's: what was thought before the last question is dropped.
    "forget": _LOOP.replace("ANSWER", "{{ message.content if loop.last else message.content.split('=')[-1] }}"),
    "none": None,
}


TEXT = "".join(map(chr, range(32, 127))) + "\n｜▁éü"
# In the manner of Hermes: tools first, calls between tags, results as tool messages.
HERMES = """{%- if tools %}<|user|>{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif -%}
{%- for message in messages -%}
{%- if message.role == "assistant" -%}<|assistant|>{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|end|>
{%- else -%}<|user|>{{ message.role[0] }}{{ message.content }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def text_tokenizer(template: str = HERMES) -> Tokenizer:
    """Of all printable ASCII, character by character."""
    return Tokenizer(make_char_tokenizer(TEXT) | {"chat_template.jinja": template.encode()})


class RecordingSampler(Sampler):
    """Passes requests on, and remembers them with their completions."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.asked: list[tuple[Request, Future[Completion]]] = []

    def submit(self, requests: Sequence[Request]) -> list[Future[Completion]]:
        futures = self.sampler.submit(requests)
        self.asked += zip(requests, futures, strict=True)
        return futures
