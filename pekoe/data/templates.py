"""Chat templates of model families, in our words, for models that come without one or with another.

They render what the families' published templates render for turns of system, user and assistant (tool calls aside).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """A Jinja template, the markers that must be tokens of the model, and the token that ends a response."""

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

FAMILIES = {
    # https://huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Qwen-7B, tokenizer_config.json
    "r1": Family(_R1, ("<｜User｜>", "<｜Assistant｜>"), "<｜end▁of▁sentence｜>"),
    # https://huggingface.co/Qwen/Qwen2.5-7B-Instruct, tokenizer_config.json
    "qwen": Family(_QWEN, ("<|im_start|>",), "<|im_end|>"),
}
