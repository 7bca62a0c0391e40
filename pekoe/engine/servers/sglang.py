"""SGLang servers (written against 0.5.23): https://docs.sglang.ai.

How SGLang differs from what Pekoe needs, and what this client does about it:

1. With n > 1 all samples get one seed. So: one request for each sample, after one that only computes the prompt.
2. Seeds decide the tokens only with `--enable-deterministic-inference` (GPU; slower), which `engine.server.args` may
   set.
3. Log-probs are at the sampling temperature (1 for greedy), before top-p and top-k, as Pekoe's. But with both, top-p
   is of the whole distribution, in other engines of what top-k left. So: only one of them.
4. `ignore_eos` also ignores `stop_token_ids`. So it is set only without those; otherwise the model's own end tokens
   stop too, and `Tokenizer.stop_token_ids` includes them.
5. The context must exceed the longest sequence by some tokens, or responses are cut silently.
6. KV survives `in_place` pauses and updates without a flush. So: `retract`, and always a flush.
"""

from __future__ import annotations

import asyncio
import contextlib
from base64 import b64decode
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from pekoe.core.errors import RunError, UserError
from pekoe.core.types import FinishReason, Request, SamplingParams
from pekoe.engine.base import BroadcastGroup, Checksums, EngineKind
from pekoe.engine.buckets import Tensors
from pekoe.engine.sampling import key_of
from pekoe.engine.servers.client import (
    ABORTED,
    GIVES_EXPERTS,
    KEY_VARIABLE,
    Answer,
    ServerClient,
    SilenceError,
    group_fields,
    logprob,
    refuse_key,
    shown,
    tensor_fields,
    token_ids,
    whole,
)
from pekoe.engine.servers.engine import ServerEngine

LAUNCH = Path(__file__).with_name("sglang_launch.py")
_CONTEXT_MARGIN = 8  # a prompt must be shorter than the context by 6, a response's end by 1
_FLUSH_ATTEMPTS, _FLUSH_AGAIN_S = 25, 0.2


class SGLangClient(ServerClient):
    """SGLang's native API: token ids in, token ids out."""

    sample_path, resume_path = "/generate", "/continue_generation"
    offload_path, onload_path = "/release_memory_occupation", "/resume_memory_occupation"
    empty_body: ClassVar[dict[str, Any] | None] = {}

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        options = self.options
        assert options.config.python is not None
        refuse_key(options.config.args)
        context = options.max_sequence_tokens + _CONTEXT_MARGIN
        argv = [options.config.python, str(LAUNCH), "--model-path", str(options.model)]
        argv += ["--host", "127.0.0.1", "--port", str(port), "--device", options.device, "--dtype", options.dtype]
        argv += ["--context-length", str(context), "--max-running-requests", str(options.max_running)]
        # No text is sent or wanted; the warm-up would send some.
        argv += ["--skip-tokenizer-init", "--skip-server-warmup", "--weight-version", "0"]
        if options.kv_tokens is not None:
            argv += ["--max-total-tokens", str(max(options.kv_tokens, context))]
        if options.offloads and options.device == "cuda":
            argv += ["--enable-memory-saver"]
        if options.routing:
            argv += [GIVES_EXPERTS]
        env = {"HF_HUB_OFFLINE": "1", KEY_VARIABLE: self.key}
        if options.device == "cpu":
            argv += ["--sleep-on-idle"]
            env["SGLANG_USE_CPU_ENGINE"] = "1"
        if context > options.spec.max_positions:  # by the margin alone: no position is ever used beyond the model's
            env["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
        return [*argv, *options.config.args], env

    # Sampling

    @staticmethod
    def check_params(params: SamplingParams) -> None:
        if params.min_new_tokens:
            raise UserError(
                f"sampling min_new_tokens: expected 0 with SGLang (it needs the tokenizer for it, and its log-probs "
                f"would be those after the ban), got {params.min_new_tokens}; nearest: 0"
            )
        if params.top_k > 0 and params.top_p < 1:
            raise UserError(
                f"sampling top_p with top_k: expected one of them with SGLang (it takes top-p of the whole "
                f"distribution, other engines of what top-k left), got {params.top_p} with {params.top_k}; nearest: "
                f"top_p = 1 or top_k = 0"
            )

    async def prefill(self, request: Request) -> int:
        body = {"input_ids": request.tokens.tolist(), "sampling_params": {"max_new_tokens": 0, "temperature": 0}}
        content = await self.post("/generate", body, self.options.config.request_limit_s)
        return len(request.tokens) - int(self.field(self.field(content, "meta_info", dict), "cached_tokens", int))

    @staticmethod
    def body(request: Request, rid: str) -> dict[str, Any]:
        params = request.params
        sampling: dict[str, Any] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "max_new_tokens": params.max_new_tokens,
            "ignore_eos": not params.stops,
            "sampling_seed": key_of(request) & 0x7FFFFFFF,
            # A model's generation_config.json may set these; log-probs would not be the policy's.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        if params.stops:
            sampling["stop_token_ids"] = list(params.stops)
        body = {"input_ids": request.tokens.tolist(), "rid": rid, "sampling_params": sampling, "return_logprob": True}
        return body | ({"return_routed_experts": True} if params.routing else {})

    @staticmethod
    def parse(content: Any) -> Answer:
        meta = content["meta_info"]
        finish = meta["finish_reason"]
        reason: FinishReason = finish["type"]
        if reason == "abort" and finish.get("status_code") is not None:  # by the server, not by us
            raise ValueError(str(finish.get("message")))
        if reason == "stop" and not isinstance(finish["matched"], int):  # a NaN, among others
            raise ValueError(f"a stop at {shown(finish['matched'])}, not at a token")
        tokens = token_ids(content["output_ids"])
        if reason == "abort" and not tokens:  # aborted in the queue: such an answer lacks most fields
            return ABORTED
        entries = meta["output_token_logprobs"]
        if [entry[1] for entry in entries] != tokens:
            raise ValueError("its log-probs are not those of its tokens")
        spans = [tuple(whole(span[key]) for key in ("version", "start", "end")) for span in meta["weight_versions"]]
        starts = [start for _, start, _ in spans] + [len(tokens)]
        if starts[0] != 0 or starts[1:] != [end for _, _, end in spans]:
            raise ValueError(f"versions with gaps: {spans}")
        versions = [(version, start) for version, start, end in spans if start < end]
        cached = whole(meta.get("cached_tokens", 0) if reason == "abort" else meta["cached_tokens"])
        logprobs, packed = [logprob(entry[0]) for entry in entries], meta.get("routed_experts")
        experts = None if packed is None else np.frombuffer(b64decode(packed, validate=True), "<i4")
        return Answer(tokens, logprobs, reason, versions, meta["id"], whole(meta["prompt_tokens"]), cached, experts)

    async def abort(self, rids: Sequence[str]) -> None:
        await asyncio.gather(*(self.post("/abort_request", {"rid": rid}) for rid in rids))

    async def check_attached(self) -> None:
        if self.options.routing:
            gives = self.field(await self.get("/server_info"), "enable_return_routed_experts", bool)
            if not gives:
                raise UserError(f"{self.url}: expected an SGLang server with {GIVES_EXPERTS}, got one without")

    # Weights

    async def pause(self, mode: Literal["abort", "keep"]) -> None:
        await self.post("/pause_generation", {"mode": "abort" if mode == "abort" else "retract"})

    async def flush(self) -> None:
        for attempt in range(_FLUSH_ATTEMPTS):
            try:
                await self.post("/flush_cache")
                return
            except SilenceError:
                raise
            except RunError:  # what was aborted or retracted just now is not out of its batch yet
                if attempt == _FLUSH_ATTEMPTS - 1:
                    raise
            await asyncio.sleep(_FLUSH_AGAIN_S)

    async def version(self) -> str:
        return str(self.field(await self.get("/model_info"), "weight_version", str))

    async def set_version(self, version: int) -> None:
        body = {"new_version": str(version), "abort_all_requests": False}  # by default it aborts
        self._succeeded(await self.post("/update_weight_version", body))

    async def load(self, directory: Path, version: int) -> None:
        body = {"model_path": str(directory), "weight_version": str(version), "flush_cache": True}
        self._succeeded(await self.post("/update_weights_from_disk", body))

    async def num_workers(self) -> int:
        return int(self.field(await self.get("/server_info"), "tp_size", int))

    async def join_group(self, group: BroadcastGroup) -> None:
        self._succeeded(await self.post("/init_weights_update_group", group_fields(group)))

    async def receive(self, group: BroadcastGroup, parts: Iterable[Tensors], version: int) -> None:
        with contextlib.suppress(RunError):  # no session is open, unless an update broke off
            await self.post("/end_weight_update", {})
        self._succeeded(await self.post("/begin_weight_update", {}))
        for tensors in parts:
            body = tensor_fields(tensors, "dtypes") | {"group_name": group.name}
            self._succeeded(await self.post("/update_weights_from_distributed", body))
        self._succeeded(await self.post("/end_weight_update", {}))
        await self.set_version(version)

    async def leave_group(self, group: BroadcastGroup) -> None:
        await self.post("/destroy_weights_update_group", {"group_name": group.name})

    async def checksums(self) -> Checksums | None:
        """By SGLang's names; on CPU, the first 8 bytes of SHA-256 of the values. None of split weights."""
        content = await self.post("/weights_checker", {"action": "checksum"})
        ranks = self.field(content, "ranks", list)
        return dict(self.field(ranks[0], "checksums", dict)) if len(ranks) == 1 else None

    def _succeeded(self, content: Any) -> None:
        if not isinstance(content, dict) or content.get("success") is not True:
            raise RunError(f"{self.url}: expected success, got {shown(content)}")


class SGLangEngine(ServerEngine):
    """An Engine on an SGLang server; see `ServerEngine`."""

    client_class = SGLangClient
    name = "SGLang"
    kind: EngineKind = "sglang"
