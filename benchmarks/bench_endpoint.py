"""The HTTP endpoint beside the engine alone, and under load that a server has to bear.

    python benchmarks/bench_endpoint.py --sessions 256 --rounds 5 --round-seconds 30 --seconds 600

A small model of random weights on the embedded engine in this process; the clients are a process of their own. First,
in turn, rounds of the same conversations of three turns: by `Engine.generate`, whose answers are laid end to end here,
and by as many sessions of the endpoint. Tokens are those that the engine sampled; the ratio is of the medians. With
`--vllm PYTHON`, the Python of an environment with vLLM, the same clients ask vLLM's own server of the same model in
each round, too (it is stopped while others work; it counts its tokens itself). Then, for `--seconds`, sessions of which
a share `--odd` break off, read slowly, or send nonsense: what became of requests, and what was left when all had gone.
Prints a JSON object, with the processor time that a token takes in the engine's threads, and an answer in the
endpoint's thread and the clients: it depends little on what else runs. Exit status 1 where something was left, or an
orderly request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

KEY, BODY_BYTES = "key-of-the-benchmark", 100_000
ODD = ("breaks off", "reads slowly", "malformed", "oversized")
TURNS = 3  # of a conversation
LONGEST = 512  # tokens of a sequence


class Load:
    """Sessions that ask for `seconds`, a share `odd` of them in a way that a server has to bear."""

    def __init__(self, host: str, given: Any) -> None:
        self._host, self._port, self._sessions, self._odd = host, given.port, given.sessions, given.odd
        self._end, self._random = time.monotonic() + given.seconds, random.Random(0)
        # ignore_eos is vLLM's; here params without stops say it, and the endpoint ignores it.
        self._asked = {"model": "bench", "max_tokens": given.new_tokens, "ignore_eos": True, "stream": given.stream}
        self.counts: Counter[str] = Counter()

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=f"http://{self._host}:{self._port}/v1/", limits=limits) as client:
            await asyncio.gather(*(self._session(client, number) for number in range(self._sessions)))

    async def _session(self, client: httpx.AsyncClient, number: int) -> None:
        if self._random.random() < self._odd:
            headers = {"authorization": f"Bearer {KEY}.{number}"}
            while time.monotonic() < self._end:
                body = {"messages": [self._question(number)], "stream": number % len(ODD) == 1}
                await self._one_odd(client, ODD[number % len(ODD)], json.dumps(body).encode(), headers)
            return
        reader, writer = await asyncio.open_connection(self._host, self._port)
        messages: list[Any] = []
        while time.monotonic() < self._end:
            messages = [*(messages if len(messages) < 2 * TURNS else ()), self._question(number)]
            status, answer = await self._post(reader, writer, number, {"messages": messages} | self._asked)
            self.counts[f"orderly: {status}"] += 1
            if status != 200:
                await asyncio.sleep(0.1)
                messages = []
            elif self._asked["stream"]:
                messages.append({"role": "assistant", "content": said_in(answer)})
            else:
                content = json.loads(answer)["choices"][0]["message"]["content"]
                messages.append({"role": "assistant", "content": content})
        writer.close()

    def _question(self, number: int) -> dict[str, str]:
        return {"role": "user", "content": f"{number}+{self._random.randrange(100)}="}

    async def _post(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, body: Any
    ) -> tuple[int, bytes]:
        """As lean as a client can be: what clients take is not the endpoint's."""
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}.{number}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(answer.split(b" ", 2)[1])
        if b"chunked" not in answer:
            size = int(answer.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            return status, await reader.readexactly(size)
        whole = b""
        while size := int(await reader.readline(), 16):
            whole += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return status, whole

    async def _one_odd(self, client: httpx.AsyncClient, odd: str, content: bytes, headers: Any) -> None:
        if odd == "malformed":
            content = content[: self._random.randrange(len(content))]
        elif odd == "oversized":
            content = b"x" * (2 * BODY_BYTES)
        try:
            if odd == "breaks off":
                limit = self._random.random() / 5
                await client.post("chat/completions", content=content, headers=headers, timeout=limit)
            elif odd == "reads slowly":
                async with client.stream("POST", "chat/completions", content=content, headers=headers) as answer:
                    async for _ in answer.aiter_bytes(64):
                        await asyncio.sleep(0.01)
            else:
                answer = await client.post("chat/completions", content=content, headers=headers, timeout=120)
                self.counts[f"{odd}: {answer.status_code}"] += 1
                await asyncio.sleep(0.02)
                return
            self.counts[f"{odd}: done"] += 1
        except httpx.TimeoutException:
            self.counts[f"{odd}: gone"] += 1


def said_in(stream: bytes) -> str:
    """The text of a stream of chunks."""
    lines = [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def clients(given: Any) -> None:
    """The process of the clients: begins at a line on stdin, and prints what it counted."""
    print("ready", flush=True)
    sys.stdin.readline()
    load = Load("127.0.0.1", given)
    asyncio.run(load.run())
    print(json.dumps({"requests": load.counts, "cpu_s": time.process_time()}))


def talk(given: Any, port: int, seconds: float, odd: float, read: Callable[[], Any]) -> tuple[float, Any, Any, Any]:
    """Clients ask for `seconds`: those that it took, what `read` gave before and after, and what clients counted."""
    command = [sys.executable, __file__, "--clients", "--port", str(port), "--odd", str(odd)]
    command += ["--sessions", str(given.sessions), "--seconds", str(seconds), "--new-tokens", str(given.new_tokens)]
    command += ["--stream"] * given.stream
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
        began, before = time.monotonic(), read()
        time.sleep(seconds)
        took, after = time.monotonic() - began, read()
        return took, before, after, json.loads(process.stdout.read())


class VLLM:
    """vLLM's own server of the same model, tokenizer and chat template."""

    def __init__(self, given: Any, bench: Bench, place: Path) -> None:
        from pekoe.engine.servers.process import ServerProcess, free_port
        from pekoe.model import save_model

        self._given, self._port = given, free_port()
        save_model(bench.model, place / "model")
        for name, content in bench.tokenizer_files.items():
            (place / "model" / name).write_bytes(content)
        argv = [given.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place / "model")]
        argv += ["--served-model-name", "bench", "--host", "127.0.0.1", "--port", str(self._port)]
        argv += ["--dtype", "float32", "--max-model-len", str(LONGEST), "--max-num-seqs", str(given.sessions)]
        argv += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]
        argv += ["--enable-prefix-caching", "--block-size", "32", "--kv-cache-memory-bytes", str(2**30)]
        argv += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
        threads = given.threads or psutil.cpu_count() or 1
        own = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
        self._process = ServerProcess("vLLM", argv, env, place / "vllm.log")

    def wait(self, limit_s: float = 400) -> None:
        end = time.monotonic() + limit_s
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{self._port}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:  # it does not listen yet
                pass
            if time.monotonic() > end or self._process.exit_code is not None:
                raise SystemExit(f"expected vLLM's server within {limit_s:g} s: {self._process.describe()}")
            time.sleep(0.5)

    def through(self, seconds: float) -> dict[str, Any]:
        """Tokens a second, and what became of requests."""
        with self.going():
            took, before, after, counted = talk(self._given, self._port, seconds, 0.0, self._num_tokens)
        return {"tokens_per_s": (after - before) / took, "requests": dict(sorted(counted["requests"].items()))}

    def _num_tokens(self) -> float:
        text = httpx.get(f"http://127.0.0.1:{self._port}/metrics", timeout=60).text
        return sum(float(value) for value in re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", text, re.M))

    @contextmanager
    def going(self) -> Iterator[None]:
        """It works inside, and stands still after."""
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stop()


class Bench:
    """An endpoint on an engine, and what is measured of it."""

    def __init__(self, given: Any) -> None:
        from pekoe.agents.endpoint import Bounds, Endpoint
        from pekoe.core.spec import ModelSpec
        from pekoe.core.types import SamplingParams
        from pekoe.data.tokenizer import Tokenizer
        from pekoe.demo.char_tokenizer import make_char_tokenizer
        from pekoe.engine.async_thread import AsyncThread
        from pekoe.engine.embedded import EmbeddedEngine
        from pekoe.model import Decoder
        from pekoe.run.serve import KeyedSessions

        self._given = given
        self.tokenizer_files = make_char_tokenizer("0123456789+=\n abcdefghijklmnopqrstuvwxyz")
        self._tokenizer = Tokenizer(self.tokenizer_files)
        shape: dict[str, Any] = {"vocab_size": self._tokenizer.vocab_size, "hidden_size": given.hidden}
        shape |= {"num_layers": given.layers, "num_heads": 4, "num_kv_heads": 2, "head_dim": given.hidden // 4}
        shape |= {"intermediate_size": 3 * given.hidden, "max_positions": LONGEST}
        spec = ModelSpec(family="qwen2", qkv_bias=True, tied_embeddings=True, **shape)
        self.model = Decoder(spec)
        self.model.init_weights(0)
        self.engine = EmbeddedEngine(self.model.requires_grad_(False))
        # Answers that random weights do not end: as many tokens of each, here and there.
        self._params = SamplingParams(max_new_tokens=given.new_tokens, stop_token_ids=())
        self.lines: list[str] = []
        keyed = KeyedSessions(self.engine, self._tokenizer, self._params, KEY, LONGEST)
        bounds = Bounds(body_bytes=BODY_BYTES, read_s=10)
        self.endpoint = Endpoint(self._tokenizer, keyed, "bench", bounds, self.lines.append)
        self.thread = AsyncThread("endpoint")
        self.endpoint.start(self.thread)

    def alone(self, seconds: float) -> tuple[float, float]:
        """By `generate`: tokens a second, and microseconds of processor time that a token takes."""
        size, end = self._given.sessions, time.monotonic() + seconds
        began, before, used = time.monotonic(), self.engine.stats().num_decode_tokens, self._cpu()[1]
        contexts: list[np.ndarray] = []
        for turn in itertools.count():
            if turn % TURNS == 0:
                contexts = [np.empty(0, np.int64)] * size
            asked = [self._question(number) for number in range(size)]
            contexts = [np.concatenate(pair) for pair in zip(contexts, asked, strict=True)]
            groups = self.engine.generate([context.tolist() for context in contexts], self._params)
            contexts = [np.concatenate([c, g[0].tokens]) for c, g in zip(contexts, groups, strict=True)]
            if time.monotonic() > end:
                break
        tokens = self.engine.stats().num_decode_tokens - before
        return tokens / (time.monotonic() - began), 1e6 * (self._cpu()[1] - used) / tokens

    def _question(self, number: int) -> np.ndarray:
        return self._tokenizer.encode_prompt([{"role": "user", "content": f"{number}+{random.randrange(100)}="}])

    def through(self, seconds: float, odd: float) -> dict[str, Any]:
        """Tokens a second through the endpoint, what became of requests, and processor time for each second."""
        took, (before, used), (after, left), counted = talk(
            self._given, self.endpoint.port, seconds, odd, lambda: (self.engine.stats(), self._cpu())
        )
        endpoint_s, others_s = (now - then for now, then in zip(left, used, strict=True))
        tokens = max(1, after.num_decode_tokens - before.num_decode_tokens)
        answers = max(1, sum(counted["requests"].values()))
        return {
            "tokens_per_s": tokens / took,
            "tokens_per_forward": tokens / max(1, after.num_forwards - before.num_forwards),
            "requests": dict(sorted(counted["requests"].items())),
            "engine_us_per_token": 1e6 * others_s / tokens,
            "endpoint_ms_per_answer": 1000 * endpoint_s / answers,
            "clients_ms_per_answer": 1000 * counted["cpu_s"] / answers,
        }

    def _cpu(self) -> tuple[float, float]:
        """Seconds of the endpoint's thread, and of all others."""
        (own,) = [thread.native_id or 0 for thread in threading.enumerate() if thread.name == "endpoint"]
        times = {one.id: one.user_time + one.system_time for one in psutil.Process().threads()}
        return times[own], time.process_time() - times[own]  # also of threads that have ended


def measure(given: Any) -> dict[str, Any]:
    """See the module."""
    import torch

    torch.set_num_threads(given.threads or torch.get_num_threads())
    bench, process = Bench(given), psutil.Process()
    bench.alone(0.1)  # kernels are compiled
    bench.through(0.5, 0.0)  # and the template's process is started
    with tempfile.TemporaryDirectory() as place:
        vllm = VLLM(given, bench, Path(place)) if given.vllm else None
        try:
            if vllm is not None:
                vllm.wait()
                vllm.through(0.5)
            alone, rounds, beside = in_turn(given, bench, vllm)
        finally:
            if vllm is not None:
                vllm.stop()
    before = process.memory_info().rss
    soak = bench.through(given.seconds, given.odd) if given.seconds else {}
    end = time.monotonic() + 30
    while bench.endpoint.num_sampling and time.monotonic() < end:
        time.sleep(0.05)
    bench.engine.check_integrity()
    left = bench.endpoint.num_sampling
    grown = (process.memory_info().rss - before) / 2**20
    bench.endpoint.stop(bench.thread)
    bench.thread.stop()
    bench.engine.close()
    through = [one["tokens_per_s"] for one in rounds]
    own = ("engine_us_per_token", "endpoint_ms_per_answer", "clients_ms_per_answer", "tokens_per_forward", "requests")
    theirs = {f"vllm_{name}": [one[name] for one in beside] for name in ("tokens_per_s", "requests") if beside}
    if beside:
        theirs["ratio_to_vllm"] = median(through) / median([one["tokens_per_s"] for one in beside])
    names = ("sessions", "rounds", "round_seconds", "seconds", "odd", "new_tokens", "hidden", "layers", "stream")
    return rounded(
        {
            **{name: getattr(given, name) for name in names},
            **{"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": psutil.cpu_count()},
            "generate_tokens_per_s": [speed for speed, _ in alone],
            "endpoint_tokens_per_s": through,
            "ratio_of_medians": median(through) / median([speed for speed, _ in alone]) if alone else None,
            "generate_us_per_token": [used for _, used in alone],
            **{name: [one[name] for one in rounds] for name in own},
            **theirs,
            **{"soak": soak, "left_sampling": left, "memory_growth_mib": grown, "failures": bench.lines[:5]},
        }
    )


def in_turn(given: Any, bench: Bench, vllm: VLLM | None) -> tuple[list[tuple[float, float]], list[Any], list[Any]]:
    """Rounds of the engine alone, through the endpoint, and by vLLM's server."""
    alone: list[tuple[float, float]] = []
    rounds: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    for _ in range(given.rounds):
        alone.append(bench.alone(given.round_seconds))
        rounds.append(bench.through(given.round_seconds, 0.0))
        if vllm is not None:
            beside.append(vllm.through(given.round_seconds))
    return alone, rounds, beside


def rounded(value: Any) -> Any:
    """Numbers as one reads them."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return (round(value) if value > 100 else round(value, 3)) if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result; 1 where something was left or an orderly request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sessions", 256), ("new-tokens", 64), ("hidden", 128), ("layers", 4), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--round-seconds", type=float, default=30)
    parser.add_argument("--seconds", type=float, default=600, help="of the load with odd sessions; 0: none")
    parser.add_argument("--odd", type=float, default=0.25, help="the share of sessions that are not orderly")
    parser.add_argument("--threads", type=int, default=0, help="of the engine; 0: as many as torch takes")
    parser.add_argument("--stream", action="store_true", help="answers are streamed")
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM, whose server is measured, too")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--clients", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.clients:
        clients(given)
        return 0
    result = measure(given)
    print(text := json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(f"{text}\n")
    requests = [*result["requests"], result["soak"].get("requests", {})]
    failed = any(name.startswith("orderly") and name != "orderly: 200" for counts in requests for name in counts)
    return int(bool(result["left_sampling"] or result["failures"] or failed))


if __name__ == "__main__":
    raise SystemExit(main())
