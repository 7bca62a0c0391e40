"""The process in which a chat template runs: a Jinja program that came with a model, and may loop or multiply for ever.

Started by `pekoe.data.chat`, and ended by the end of its input. Its arguments are the seconds of the processor that a
conversation may take, and the characters of its text; the process may take MEMORY_LIMIT_BYTES. The first line of its
input is {"source", "special_tokens"}, each other one {"messages", "add_generation_prompt", "today", "tools",
"variables"}; its answers are lines {"text"} or {"error"}. It imports nothing of Pekoe, so that it
starts in a tenth of a second.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import date
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_LIMIT_BYTES = 1 << 30


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for trainers that mask by it; we only render what is inside."""

    tags = {"generation"}  # noqa: RUF012 (the base class says so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


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


def environment() -> ImmutableSandboxedEnvironment:
    """What `transformers` renders templates in. It runs nothing to parse one; it may to compile one (constants)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    helpers: dict[str, Any] = {"raise_exception": _raise_exception}
    environment.globals.update(helpers)
    return environment


def _render(template: jinja2.Template, special_tokens: dict[str, str], request: dict[str, Any], most: int) -> str:
    text = template.render(
        **special_tokens | request["variables"],
        messages=request["messages"],
        add_generation_prompt=request["add_generation_prompt"],
        tools=request["tools"],
        documents=None,
        strftime_now=date.fromisoformat(request["today"]).strftime,
    )
    if len(text) > most:
        raise ValueError(f"it made {len(text):,} characters, more than {most:,}")
    return text


def main() -> None:
    """Render until stdin ends. A signal ends what takes longer than its time."""
    limit_s, most = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    first = json.loads(sys.stdin.readline())
    template: jinja2.Template | None = None
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            template = template or environment().from_string(first["source"])
            answer = {"text": _render(template, first["special_tokens"], json.loads(line), most)}
            data = json.dumps(answer)
        except MemoryError:
            data = json.dumps({"error": f"it takes more memory than {MEMORY_LIMIT_BYTES >> 20} MiB"})
        except Exception as error:  # a template is a downloaded program: any exception is a failure of the template
            data = json.dumps({"error": (str(error) or type(error).__name__)[:1000]})
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(data, flush=True)


if __name__ == "__main__":
    main()
