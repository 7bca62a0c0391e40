"""Load on the HTTP endpoint: many sessions at once, of which some break off, read slowly, or send nonsense.

    python benchmarks/bench_endpoint.py --sessions 256 --seconds 600

A small model of random weights on the embedded engine, in this process, with its clients, who take a share of its
time. Prints a JSON object: tokens a second of orderly sessions beside `Engine.generate` with as many sequences at once,
what became of the others, and what was left when all had gone. Exit status 1 where something was left, or an orderly
request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pekoe.agents.endpoint import Bounds, Endpoint
from pekoe.core.spec import ModelSpec
from pekoe.core.types import SamplingParams
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.engine.async_thread import AsyncThread
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.model import Decoder
from pekoe.run.serve import KeyedSessions

KEY, BODY_BYTES = "key-of-the-benchmark", 100_000
ODD = ("breaks off", "reads slowly", "malformed", "oversized")


def make_engine(tokenizer: Tokenizer, hidden: int, layers: int) -> EmbeddedEngine:
    """On random weights, which never end an answer early on average."""
    spec = ModelSpec(
        family="qwen2",
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=hidden // 4,
        intermediate_size=3 * hidden,
        max_positions=512,
        qkv_bias=True,
        tied_embeddings=True,
    )
    model = Decoder(spec)
    model.init_weights(0)
    return EmbeddedEngine(model.requires_grad_(False))


class Load:
    """Sessions that ask for `seconds`, a share `odd` of them in a way that a server has to bear."""

    def __init__(self, url: str, sessions: int, seconds: float, odd: float, new_tokens: int, seed: int = 0) -> None:
        self._url, self._sessions, self._end = url, sessions, time.monotonic() + seconds
        self._odd, self._most, self._random = odd, new_tokens, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.tokens = 0

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=120) as client:
            await asyncio.gather(*(self._session(client, number) for number in range(self._sessions)))

    async def _session(self, client: httpx.AsyncClient, number: int) -> None:
        odd = ODD[number % len(ODD)] if self._random.random() < self._odd else ""
        headers = {"authorization": f"Bearer {KEY}.{number}"}
        messages: list[Any] = []
        while time.monotonic() < self._end:
            if len(messages) > 6:
                messages = []
            messages.append({"role": "user", "content": f"{number}+{self._random.randrange(100)}="})
            body = {"messages": messages, "max_tokens": self._most}
            if odd:
                await self._one_odd(client, odd, body, headers)
                messages = []
                continue
            answer = await client.post("chat/completions", json=body, headers=headers)
            self.counts[f"orderly: {answer.status_code}"] += 1
            if answer.status_code == 200:
                self.tokens += answer.json()["usage"]["completion_tokens"]
                messages.append(answer.json()["choices"][0]["message"])
            else:
                await asyncio.sleep(0.1)

    async def _one_odd(self, client: httpx.AsyncClient, odd: str, body: Any, headers: Any) -> None:
        content = json.dumps(body).encode()
        if odd == "malformed":
            content = content[: self._random.randrange(len(content))]
        elif odd == "oversized":
            content = b"x" * (2 * BODY_BYTES)
        try:
            if odd == "breaks off":
                await client.post(
                    "chat/completions", content=content, headers=headers, timeout=self._random.random() / 5
                )
            elif odd == "reads slowly":
                stream = json.dumps(body | {"stream": True})
                async with client.stream("POST", "chat/completions", content=stream, headers=headers) as answer:
                    async for _ in answer.aiter_bytes(64):
                        await asyncio.sleep(0.01)
            else:
                answer = await client.post("chat/completions", content=content, headers=headers)
                self.counts[f"{odd}: {answer.status_code}"] += 1
                await asyncio.sleep(0.02)
                return
            self.counts[f"{odd}: done"] += 1
        except httpx.TimeoutException:
            self.counts[f"{odd}: gone"] += 1


def measure(sessions: int, seconds: float, odd: float, new_tokens: int, hidden: int, layers: int) -> dict[str, Any]:
    """See the module."""
    tokenizer = Tokenizer(make_char_tokenizer("0123456789+=\n abcdefghijklmnopqrstuvwxyz"))
    engine, process = make_engine(tokenizer, hidden, layers), psutil.Process()
    params = SamplingParams(max_new_tokens=new_tokens, stop_token_ids=tokenizer.stop_token_ids)
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": f"{i}+1="}]).tolist() for i in range(sessions)]
    engine.generate(prompts, params)  # kernels are compiled
    began, sampled = time.monotonic(), 0
    while time.monotonic() - began < min(seconds, 30):
        sampled += sum(len(group[0].tokens) for group in engine.generate(prompts, params))
    alone = sampled / (time.monotonic() - began)
    lines: list[str] = []
    keyed = KeyedSessions(engine, tokenizer, params, KEY, 512)
    endpoint = Endpoint(tokenizer, keyed, "bench", Bounds(body_bytes=BODY_BYTES, read_s=10), lines.append)
    thread = AsyncThread("endpoint")
    endpoint.start(thread)
    before, load = (
        process.memory_info().rss,
        Load(f"http://127.0.0.1:{endpoint.port}/v1/", sessions, seconds, odd, new_tokens),
    )
    began = time.monotonic()
    asyncio.run(load.run())
    took, end = time.monotonic() - began, time.monotonic() + 30
    while endpoint.num_sampling and time.monotonic() < end:
        time.sleep(0.05)
    engine.check_integrity()
    left = endpoint.num_sampling
    through = load.tokens / took
    endpoint.stop(thread)
    thread.stop()
    engine.close()
    return {
        **{"sessions": sessions, "seconds": round(took, 1), "odd": odd, "new_tokens": new_tokens, "hidden": hidden},
        **{"layers": layers, "torch": torch.__version__, "threads": torch.get_num_threads()},
        "generate_tokens_per_s": round(alone),
        "endpoint_tokens_per_s": round(through),
        "share": round(through / alone, 3),
        "requests": dict(sorted(load.counts.items())),
        "left_sampling": left,
        "memory_growth_mib": round((process.memory_info().rss - before) / 2**20, 1),
        "failures": lines[:5],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result; 1 where something was left or an orderly request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sessions", 256), ("new-tokens", 64), ("hidden", 128), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--odd", type=float, default=0.25, help="the share of sessions that are not orderly")
    given = parser.parse_args(arguments)
    result = measure(given.sessions, given.seconds, given.odd, given.new_tokens, given.hidden, given.layers)
    print(json.dumps(result, indent=2))
    orderly = {name for name in result["requests"] if name.startswith("orderly")}
    return int(bool(result["left_sampling"] or result["failures"] or orderly != {"orderly: 200"}))


if __name__ == "__main__":
    raise SystemExit(main())
