"""Kernel times that AIConfigurator measured, in place of an engine's fitted constants: `pip install 'pekoe[plan]'`.

Its core (Apache-2.0) has tables of kernels that were timed on devices; it adds them up to a decoding step or a prefill.
Constants of `Engine` are fitted to these for the model, device and tensor parallelism of a plan; what a scheduler takes
for each sequence is none of them and stays.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from pekoe.core.errors import UserError, nearest
from pekoe.plan.calibrate import descend
from pekoe.plan.costs import Constants, Engine
from pekoe.plan.shapes import Shape

BACKENDS = ("vllm", "sglang")
SYSTEMS = {"a100": "a100_sxm", "h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm", "gb200": "gb200",
           "l40s": "l40s", "rtx-pro-6000": "rtx_pro_6000_server"}  # fmt: skip
STEPS = ((1, 1024), (8, 2048), (16, 4096), (64, 4096), (128, 2048), (256, 8192))  # sequences, and context of each
PREFILLS = (512, 4096)  # tokens
Times = Sequence[tuple[int, int, float]]  # sequences (0: a prefill), tokens of each, seconds


@cache
def kernel_constants(engine: Engine, backend: str) -> tuple[Constants, str]:
    """Constants of `engine` by the kernels of a backend, and a sentence on them. UserError where there are none."""
    if backend not in BACKENDS:
        raise UserError(
            f"--kernels: expected one of {', '.join(BACKENDS)}, got {backend!r}.{nearest(backend, BACKENDS)}"
        )
    name = engine.device.name
    if name not in SYSTEMS or engine.weight_bytes != 2 or engine.shape.num_experts:
        raise UserError(
            f"--kernels: expected a dense model in bfloat16 on one of {', '.join(SYSTEMS)}, got {engine.shape.name} in "
            f"{'bfloat16' if engine.weight_bytes == 2 else 'float32'} on {name}"
        )
    times = measured(engine, backend)
    constants, error = fit(engine, times)
    met = f"{len(times)} times, met within {error:.0%}"
    return constants, f"engines: {backend}'s kernels on {SYSTEMS[name]} by AIConfigurator ({met})"


def fit(engine: Engine, times: Times) -> tuple[Constants, float]:
    """Constants with which `engine` takes these times, and the median error that is left."""
    names = ["weight_share", "decode_flops", "kv_share", "layer_s", "prefill_flops"]
    names += ["link_share", "message_s"] if engine.tp > 1 else []

    def errors(constants: Constants) -> list[float]:
        tried, found = replace(engine, constants=constants), list[float]()
        for sequences, tokens, seconds in times:
            step = tried.decode(sequences, tokens) - constants.sequence_s * sequences
            said = step if sequences else tried.prefill(tokens) - constants.prefill_s
            found.append(abs(math.log(said / seconds)))
        return found

    def loss(constants: Constants) -> float:
        if any(getattr(constants, name) > 1 for name in names if name.endswith(("_share", "_flops"))):
            return math.inf
        return sum(errors(constants))

    constants = descend(loss, engine.constants, names, 40, 0.3)
    return constants, median(math.expm1(error) for error in errors(constants))


def measured(engine: Engine, backend: str) -> Times:
    """What AIConfigurator says."""
    logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
    try:
        handle: Any = importlib.import_module("aiconfigurator_core.sdk.engine").EngineHandle
    except ImportError:
        raise UserError(
            "--kernels: expected AIConfigurator, which is not installed: pip install 'pekoe[plan]'"
        ) from None
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_config(engine.shape)), encoding="utf-8")
        try:
            compiled = handle.compile(folder, SYSTEMS[engine.device.name], backend, tp_size=engine.tp)
            steps = [(n, tokens, compiled.predict_decode_latency(n, tokens) / 1000) for n, tokens in STEPS]
            return (*steps, *((0, tokens, compiled.predict_prefill_latency(1, tokens) / 1000) for tokens in PREFILLS))
        except Exception as error:  # its own kinds, and those of its tables
            raise UserError(f"--kernels: AIConfigurator has no times for this: {error}") from None


def _config(shape: Shape) -> dict[str, Any]:
    """As Qwen3's, whose heads have a size of their own; norms and biases of other families are small beside."""
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": shape.dense_width, "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "tie_word_embeddings": shape.tied, "max_position_embeddings": 131072,
    }  # fmt: skip
