"""Chat templates: Jinja programs that come with models, run in a sandbox as `transformers` does, and two of our own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO, Any, cast

import jinja2
import markupsafe

from pekoe.core.errors import UserError
from pekoe.data import template_process
from pekoe.data.rows import MAX_CHARS

MAX_SOURCE_CHARS = 1_000_000
CPU_LIMIT_S = 5.0  # of a conversation
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A chat template, with the special tokens it may name. Renders what `transformers` renders.

    Templates are programs that come with models, so they run in a process with limits (`data.template_process`), which
    starts when the first conversation is rendered, and again after one that met a limit.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        """`origin` names the template in messages. Raises UserError for a syntax error."""
        self._origin, self.source = origin, source
        self._start_line = json.dumps({"source": source, "special_tokens": dict(special_tokens)}) + "\n"
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], int | None] | None = None
        self._lock = threading.Lock()
        try:
            if len(source) > MAX_SOURCE_CHARS:
                raise ValueError(f"{len(source):,} characters")
            template_process.environment().parse(source)
        except Exception as error:  # also RecursionError
            got = str(error)[:500] or type(error).__name__
            raise UserError(f"{origin}: expected a Jinja chat template, got {got}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        today: date,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; `today` is what `strftime_now` prints.

        `tools` are JSON schemas of functions, `variables` what else the template may ask for (Qwen3's enable_thinking).
        Keys of messages that are None are absent, and reasoning has each of its names, as in `transformers`. A template
        that fails without a key (DeepSeek V3's asks whether content is none) gets None.

        Raises UserError where the template refuses the messages, fails, or meets a limit.
        """
        request = {"messages": messages, "add_generation_prompt": add_generation_prompt, "today": today.isoformat()}
        request |= {"tools": tools, "variables": variables or {}}
        plain = [_named(message) for message in messages]
        with self._lock:
            answer = self._ask(json.dumps(request | {"messages": plain}, default=dict) + "\n")
            if "error" in answer and any(None in message.values() for message in messages):
                answer = self._ask(json.dumps(request, default=dict) + "\n")
        if "text" in answer:
            return answer["text"]
        roles = [message["role"] for message in messages]
        raise UserError(
            f"{self._origin}: the chat template refused messages of roles {roles}: {answer['error']}"
        ) from None

    def _ask(self, line: str) -> dict[str, str]:
        answer, status = "", None
        try:
            if self._process is None:
                self._process = _start()
                self._end = weakref.finalize(self, _end, self._process)
                line = self._start_line + line
            stdin, stdout = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
            with contextlib.suppress(BrokenPipeError):  # it died; its status says of what
                stdin.write(line)
                stdin.flush()
            answer = stdout.readline()
        finally:
            if not answer.endswith("\n"):  # it died, or Ctrl-C: what it may still answer is not the next one's
                self._process = None
                status = self._end and self._end()
        if answer.endswith("\n"):
            return json.loads(answer)
        limit = f"it takes more than {CPU_LIMIT_S:g} s"
        return {"error": limit if status == -signal.SIGPROF else f"its process ended with status {status}"}


def _named(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, and with the reasoning of a turn under all the names that templates use."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _start() -> subprocess.Popen[str]:
    libraries = dict.fromkeys(str(Path(module.__file__ or "").parents[1]) for module in (jinja2, markupsafe))
    linker = {name: path for name, path in os.environ.items() if name == "LD_LIBRARY_PATH"}  # an interpreter's own
    return subprocess.Popen(
        [sys.executable, "-P", "-s", "-S", template_process.__file__, str(CPU_LIMIT_S), str(MAX_CHARS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="ascii",
        env={**linker, "PYTHONPATH": os.pathsep.join(libraries), "PYTHONHASHSEED": "0"},
        start_new_session=True,  # the terminal's Ctrl-C does not reach it
    )


def _end(process: subprocess.Popen[str]) -> int:
    """Kill it, if it lives, and return its status."""
    process.kill()
    for file in (cast(IO[str], process.stdin), cast(IO[str], process.stdout)):
        with contextlib.suppress(BrokenPipeError):  # what it did not read
            file.close()
    return process.wait()


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
