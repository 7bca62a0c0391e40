"""A server that speaks as much of SGLang's API as `SGLangEngine` uses, with faults on demand. Standard library alone.

Its tokens are a function of the prompt, its log-probs of the version: -1 - version / 16. Imported by tests, and run
as a program in place of `python -m sglang.launch_server`.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeSGLang  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.handle_one({})

    def do_POST(self):
        size = int(self.headers.get("content-length", 0))
        self.handle_one(json.loads(self.rfile.read(size)) if size else None)

    def handle_one(self, body):
        server = self.server
        if server.key and self.headers.get("authorization") != f"Bearer {server.key}":
            return self.answer(401, {"error": "Unauthorized"})
        server.requests.append((self.path, body))
        time.sleep(server.slow.get(self.path, 0))
        fault = server.next_fault(self.path)
        if fault == "reset" or server.dead:
            self.reset()
        elif fault == "hang":
            server.released.wait(30)
            self.reset()
        elif fault == "drip":
            self.drip()
        elif fault == "another":  # the answer to somebody else's request
            self.answer(*server.on_generate(body | {"rid": "another"}))
        elif isinstance(fault, tuple):
            self.answer(*fault)
        else:
            route = getattr(server, "on" + self.path.replace("/", "_"), None)
            status, content = route(body) if route else (404, {"detail": "Not Found"})
            if server.dead:
                self.reset()
            else:
                self.answer(status, content)

    def drip(self):
        """A byte now and then: no read ever waits long."""
        self.send_response(200)
        self.send_header("content-length", "1000000")
        self.end_headers()
        while not self.server.released.wait(0.05):
            self.wfile.write(b" ")
            self.wfile.flush()

    def answer(self, status, content, headers=()):
        data = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.wfile = self.rfile = open("/dev/null", "r+b", buffering=0)  # noqa: SIM115 (what flushes later finds it)


class FakeSGLang(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int = 0, token_s: float = 0.0, version: str = "default"):
        super().__init__(("127.0.0.1", port), Handler)
        self.token_s, self.version, self.key = token_s, version, ""
        self.experts: list[int] | None = None  # of every token, layer by layer
        self.late_s = 0.0  # from a request's arrival to when an abort finds it
        self.dead = self.paused = self.lies_about_version = False
        self.requests: list[tuple[str, object]] = []
        self.faults: dict[str, list[object]] = {}
        self.slow: dict[str, float] = {}  # path -> seconds before it is answered
        self.released = threading.Event()
        self.running: dict[str, bool] = {}  # rid -> aborted
        self.most_running = 0
        self.started = Counter()
        self.changed = threading.Condition()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass

    def next_fault(self, path):
        faults = self.faults.get(path)
        if not faults:
            return None
        return faults[0] if faults[0] in ("hang", "drip", "always") else faults.pop(0)

    def die(self):
        """Drop everything; nobody listens any more."""
        self.dead = True
        self.shutdown()
        self.server_close()
        self.released.set()

    def on_health(self, _):
        return (503 if self.paused else 200), None  # the real one samples a token for it

    def on_server_info(self, _):
        return 200, {"tp_size": 1, "enable_return_routed_experts": self.experts is not None}

    def on_model_info(self, _):
        return 200, {"weight_version": "a lie" if self.lies_about_version else self.version}

    def on_generate(self, body):
        prompt, sampling = body["input_ids"], body["sampling_params"]
        if sampling["max_new_tokens"] == 0:
            return 200, {"output_ids": [], "meta_info": {"cached_tokens": 0}}
        rid, size = body["rid"], sampling["max_new_tokens"]
        time.sleep(self.late_s)
        with self.changed:
            self.running[rid] = False
            self.most_running = max(self.most_running, len(self.running))
            self.started[tuple(prompt)] += 1
        tokens, logprobs, versions, reason = [], [], [], {"type": "length", "length": size}
        while len(tokens) < size and not self.dead:
            with self.changed:
                while self.paused and not self.running[rid] and not self.dead:
                    self.changed.wait(0.05)
                if self.running[rid]:
                    reason = {"type": "abort", "message": "Aborted", "status_code": None}
                    break
            tokens.append((sum(prompt) + len(tokens)) % 32)
            logprobs.append([-1 - int(self.version) / 16, tokens[-1], None])
            if not versions or versions[-1]["version"] != self.version:
                versions.append({"version": self.version, "start": len(tokens) - 1})
            versions[-1]["end"] = len(tokens)
            if tokens[-1] in sampling.get("stop_token_ids", ()):
                reason = {"type": "stop", "matched": tokens[-1]}
                break
            time.sleep(self.token_s)
        with self.changed:
            del self.running[rid]
        meta = {"id": rid, "prompt_tokens": len(prompt), "finish_reason": reason, "cached_tokens": len(prompt) - 1}
        meta |= {"output_token_logprobs": logprobs, "weight_versions": versions}
        if body.get("return_routed_experts") and self.experts is not None:
            rows = max(0, len(prompt) + len(tokens) - 1)
            meta["routed_experts"] = b64encode(
                struct.pack(f"<{rows * len(self.experts)}i", *self.experts * rows)
            ).decode()
        return 200, {"output_ids": tokens, "meta_info": meta}

    def on_abort_request(self, body):
        with self.changed:
            for rid in self.running:
                if body.get("abort_all") or rid.startswith(body["rid"]):
                    self.running[rid] = True
            self.changed.notify_all()
        return 200, None

    def on_pause_generation(self, body):
        self.paused = True
        if body["mode"] == "abort":
            self.on_abort_request({"abort_all": True})
        return 200, {"status": "ok"}

    def on_continue_generation(self, _):
        with self.changed:
            self.paused = False
            self.changed.notify_all()
        return 200, {"status": "ok"}

    def on_flush_cache(self, _):
        return (400 if self.running and not self.paused else 200), None

    def on_weights_checker(self, _):
        return 200, {"ranks": [{"checksums": {"model.norm.weight": self.version}}]}

    def succeed(self, _):
        return 200, {"success": True}

    on_release_memory_occupation = on_resume_memory_occupation = succeed
    on_init_weights_update_group = on_destroy_weights_update_group = succeed
    on_begin_weight_update = on_update_weights_from_distributed = on_end_weight_update = succeed

    def on_update_weight_version(self, body):
        self.version = body["new_version"]
        return 200, {"success": True}

    def on_update_weights_from_disk(self, body):
        with open(body["model_path"] + "/config.json") as file:
            json.load(file)
        self.version = body["weight_version"]
        return 200, {"success": True}


if __name__ == "__main__":
    arguments = sys.argv[1:]
    fake = FakeSGLang(int(arguments[arguments.index("--port") + 1]), token_s=0.01, version="0")
    fake.key = os.environ["PEKOE_SERVER_KEY"]
    print("the fake serves", flush=True)
    threading.Event().wait()
