"""Answers of servers as nobody should give them: each ends with what it says, or with one clear error.

A program: `python -m tests.engine.servers.fuzz_answers --seconds 300 --seed 1`; its short form is a test. Answers that
real servers gave are changed at random (values, types, sizes, bytes, headers, status, time) and sent through a real
socket to an engine. What breaks the promise is printed with its seed, and the status is 1.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import math
import random
import resource
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pekoe.config.engine import EngineSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Request, SamplingParams
from pekoe.engine.servers import ServerEngine, SGLangEngine, VLLMEngine
from tests.fuzzing import main

HERE = Path(__file__).parent
SPEC = ModelSpec("qwen2", 512, 128, 4, 4, 2, 32, 384, 4096)  # of the recordings
LIMIT_S = 0.3  # of a request
MOST_BYTES = 700 << 20  # that the process may take on top of what it had
KINDS: dict[str, type[ServerEngine]] = {"sglang": SGLangEngine, "vllm": VLLMEngine}
RECORDED = {"sglang": "generate_stop_token", "vllm": "generate_greedy"}
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 511, 512, 1.5, -0.0, 1e39, -1e39, 1e308, math.nan, math.inf, -math.inf),
    *(
        2**31,
        2**63,
        2**64,
        -(2**70),
        10**400,
        "",
        "0",
        "-1",
        "1.5",
        "NaN",
        "default",
        "x" * 10_000,
        "\ud800",
        "\x1b[2J",
    ),
    *([], {}, [[]], [None], [0] * 10_000, {"": {}}, {"type": "stop"}, "\N{ARABIC-INDIC DIGIT ONE}", " 1 ", "1_0"),
]
Answer = list[bytes]
"""Pieces that are sent one after the other, with a moment between them; then the connection is closed or kept."""


class HostileServer:
    """Answers requests with what `answer(path, body)` gives, over a real socket."""

    def __init__(self, answer: Callable[[str, Any], Answer]) -> None:
        self._answer, self._listener = answer, socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as stream:
                while line := stream.readline():
                    size = 0
                    while (header := stream.readline().strip().lower()) != b"":
                        if header.startswith(b"content-length:"):
                            size = int(header.partition(b":")[2])
                    body = stream.read(size)
                    pieces = self._answer(line.split()[1].decode(), json.loads(body) if body else None)
                    for piece in pieces:
                        connection.sendall(piece)
                        if len(pieces) > 2:
                            time.sleep(0.02)
                    if not pieces or b"\r\nconnection: close\r\n" in pieces[0]:
                        return
        except (OSError, ValueError):
            return

    def close(self) -> None:
        self._listener.close()


def http(data: bytes, status: int = 200, headers: str = "", length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return f"HTTP/1.1 {status} Whatever\r\ncontent-length: {size}\r\n{headers}\r\n".encode("latin-1") + data


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    found: list[tuple[Any, Any]] = []
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        found += [(tree, key), *places(value)]
    return found


def changed(tree: Any, rng: random.Random) -> Any:
    """A copy with one to three places changed."""
    tree = [copy.deepcopy(tree)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        container, key = rng.choice(places(tree))
        what = rng.randrange(5)
        if what == 0 and container is not tree:
            del container[key]
        elif what == 1 and isinstance(container[key], list):
            container[key] = container[key] * rng.choice((0, 2, 1000)) + container[key][: rng.randrange(3)]
        elif what == 2 and type(container[key]) in (int, float):
            container[key] = container[key] + rng.choice((1, -1, 0.5, 1e9, 1e300))
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    return tree[0]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are not what they were."""
    where, deep = rng.randrange(len(data)), rng.choice((100, 990, 1001, 100_000))
    return rng.choice(
        (
            data[:where],
            data[:where] + bytes([rng.randrange(256)]) + data[where + 1 :],
            data[:where] + rng.randbytes(8) + data[where:],
            b"",
            b"null",
            b"<html>no</html>",
            b"[" * deep + b"]" * deep,
            b'{"output_ids":' + b'{"a":' * deep,
            b'{"choices": [1e400, ' + b"9" * rng.choice((400, 5000)) + b"]}",
            data.decode(errors="replace").encode("utf-16"),
            rng.randbytes(64),
            b" " * (1 << 22),
            b"[" + b"[]," * (1 << 19) + b"0]",
        )
    )


def answer_of(content: Any, rng: random.Random) -> Answer:
    """What the server sends in place of `content`."""
    data = json.dumps(content).encode()
    what = rng.randrange(100)
    if what < 50:
        return [http(json.dumps(changed(content, rng)).encode())]
    if what < 70:
        return [http(damaged(data, rng))]
    if what < 80:
        status = rng.choice((100, 101, 199, 204, 206, 301, 304, 400, 401, 404, 418, 429, 500, 503, 504, 599, 600, 999))
        after = rng.choice(
            ("0", "-1", "1e400", "9" * 50, "nan", "Thu, 99 Foo", "Wed, 21 Oct 2015 07:28:00 GMT", "\xe9")
        )
        message = rng.choice(({"error": {"message": rng.choice(ODD)}}, {"detail": [content]}, "no", None))
        return [http(json.dumps(message).encode(), status, f"retry-after: {after}\r\n")]
    if what < 90:
        coded = rng.choice(((gzip.compress(b"0" * 10**7), "gzip"), (data, "br"), (data, "deflate, gzip"), (data, "x")))
        return rng.choice(
            (
                [http(coded[0], 200, f"content-encoding: {coded[1]}\r\n")],
                [http(data, length=len(data) + 5, headers="connection: close\r\n")],
                [http(data, length=max(0, len(data) - 5))],
                [http(data) + data],
                [http(data, headers="x: " + "y" * rng.choice((1000, 200_000)) + "\r\n")],
                [http(data, headers="a\x00b: c\r\n")],
                [http(data, headers="content-type: text/html; charset=nonsense\r\nset-cookie: \x01=;;\r\n")],
                [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n" + data],
                [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7fffffffffffffff\r\n" + data],
                [b"HTTP/9.9 200 OK\r\n\r\n" + data],
                [rng.randbytes(200)],
                [],
            )
        )
    if what < 92:  # it drips
        return [http(b"", length=1000), *(b" " for _ in range(100))]
    return [http(data)]


class Case:
    """The answer to every request of one case: `wild` to the path that is attacked, a true one to the others."""

    def __init__(self, kind: str) -> None:
        self.kind, self.path, self.rng, self.version = kind, "", random.Random(0), "0"
        recorded = json.loads((HERE / "contracts" / f"{kind}.json").read_text())[RECORDED[kind]]
        self.tokens: list[int] = recorded["request"]["json"]["input_ids" if kind == "sglang" else "token_ids"]
        self.recorded = recorded["response"]

    def __call__(self, path: str, body: Any) -> Answer:
        content = self.true(path, body)
        if path.partition("?")[0] == self.path:
            return answer_of(content, self.rng)
        return [http(json.dumps(content).encode())]

    def true(self, path: str, body: Any) -> Any:
        if path in ("/generate", "/inference/v1/generate"):
            return self._response(body)
        if path in ("/update_weight_version", "/update_weights_from_disk"):
            self.version = body.get("new_version") or body["weight_version"]
        if path.startswith("/reset_prefix_cache"):
            return {"success": True}
        model = {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32", "max_model_len": 4096}
        return {
            "success": True,
            "weight_version": self.version,
            "tp_size": 1,
            "world_size": 1,
            "ranks": [{"checksums": {"model.norm.weight": "abc"}}],
            "results": [{"model.norm.weight": "12"}],
            "vllm_config": {"model_config": model},
        }

    def _response(self, body: Any) -> Any:
        answer = copy.deepcopy(self.recorded)
        if self.kind == "vllm":
            answer["request_id"] = "generate-tokens-" + body["request_id"]
            answer["choices"][0]["weight_versions"][0]["version"] = self.version
        else:
            answer["meta_info"]["id"] = body.get("rid", "")
            answer["meta_info"]["weight_versions"][0]["version"] = self.version
        return answer


PATHS = {
    "sglang": ["/model_info", "/update_weights_from_disk", "/weights_checker", "/server_info", "/pause_generation"],
    "vllm": ["/weight_info", "/collective_rpc", "/get_world_size", "/reset_prefix_cache", "/pause"],
}


class Fuzz:
    """An engine of one kind on a hostile server. `run(seed)` is one case; `problems` are promises broken."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder, self.case = kind, folder, Case(kind)
        (folder / "config.json").write_text("{}")
        self.server = HostileServer(self.case)
        limits = {"start_limit_s": 20, "request_limit_s": LIMIT_S, "update_limit_s": LIMIT_S, "retries": 1}
        section = {"backend": kind, "server": {"urls": [self.server.url]} | limits}
        config = EngineSection.model_validate(section)
        self.engine = self._attach(config)
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.engine._thread.loop.set_exception_handler(lambda _, what: self._problem(-1, f"in the loop: {what}"))
        size = 14 if kind == "sglang" else 6
        stops = tuple(range(3, 40)) if kind == "sglang" else ()
        self.params = SamplingParams(max_new_tokens=400 if stops else size, temperature=1.0, stop_token_ids=stops)

    def _attach(self, config: EngineSection) -> ServerEngine:
        for _ in range(10):
            with contextlib.suppress(RunError):  # the limits are short for a machine that does much else
                return KINDS[self.kind](self.folder, config, SPEC, 4096, self.folder, url=self.server.url)
        raise RunError("no server within ten attempts")

    def _problem(self, seed: int, what: str) -> None:
        self.problems.append(f"{self.kind}, seed {seed}: {what[:2000]}")

    def run(self, seed: int) -> None:
        rng = self.case.rng = random.Random(seed)
        sampling = rng.random() < 0.8
        self.case.path = self.engine.client_class.sample_path if sampling else rng.choice(PATHS[self.kind])
        start = time.monotonic()
        try:
            self._sample(seed) if sampling else self._other(rng)
            self.outcomes["answer"] += 1
        except (RunError, UserError) as error:
            self.outcomes[type(error).__name__] += 1
            text = str(error)
            if len(text) > 6000 or "Traceback" in text or not text.replace("\n", "").isprintable():
                self._problem(seed, f"a message that is not clear: {text!r}")
        except BaseException as error:
            self._problem(seed, f"{type(error).__name__}: {error}")
        if time.monotonic() - start > 30:  # a machine that does much else takes some seconds
            self._problem(seed, f"it took {time.monotonic() - start:.1f} s")

    def _sample(self, seed: int) -> None:
        request = Request("p", 0, 0, np.array(self.case.tokens), self.params)
        (future,) = self.engine.submit([request])
        completion = future.result(20 * LIMIT_S)
        tokens, logprobs = completion.tokens, completion.logprobs
        sound = len(tokens) == len(logprobs) and ((tokens >= 0) & (tokens < SPEC.vocab_size)).all()
        if not (sound and np.isfinite(logprobs).all() and (logprobs <= 1e-3).all()):
            self._problem(seed, f"an answer was taken that cannot be one: {tokens} {logprobs}")

    def _other(self, rng: random.Random) -> None:
        engine = self.engine
        engine._num_workers = 0
        calls: list[Callable[[], object]] = [
            lambda: engine.update_weights(self.folder, rng.randrange(5)),
            engine.flush_cache,
            engine.checksums,
            lambda: engine.num_workers,
            engine.health,
        ]
        try:
            for call in calls:
                call()
        finally:
            self.case.path = ""
            engine.update_weights(self.folder, 0)  # of use again

    def close(self) -> None:
        self.case.path = ""
        self.engine.close()
        self.server.close()


def fuzz(seconds: float, seed: int, folder: Path) -> list[str]:
    """Cases of both kinds for so long, from `seed` on; returns what broke the promise."""
    module = "pekoe.engine.servers"
    quick = {
        f"{module}.engine._BACKOFF_S": 0.0,
        f"{module}.engine._BUSY_S": 0.0,
        f"{module}.sglang._FLUSH_AGAIN_S": 0.0,
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crashed: list[str] = []
    hook = threading.excepthook
    threading.excepthook = lambda what: crashed.append(f"in a thread: {what.exc_type.__name__}: {what.exc_value}")
    parts: list[Fuzz] = []
    try:
        with mock.patch.multiple(f"{module}.client", _HEALTH_LIMIT_S=LIMIT_S), mock.patch.dict("os.environ"):
            for name, value in quick.items():
                mock.patch(name, value).start()
            for kind in KINDS:
                (folder / kind).mkdir()
                parts.append(Fuzz(kind, folder / kind))
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                for part in parts:
                    part.run(seed)
                seed += 1
    finally:
        for part in parts:
            part.close()
            print(f"{part.kind}: {sum(part.outcomes.values())} cases, {dict(part.outcomes)}")
        mock.patch.stopall()
        threading.excepthook = hook
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    problems = [*crashed, *(problem for part in parts for problem in part.problems)]
    return problems if grown < MOST_BYTES else [*problems, f"it took {grown / 2**20:.0f} MiB of memory"]


if __name__ == "__main__":
    sys.exit(main(__doc__, fuzz))
