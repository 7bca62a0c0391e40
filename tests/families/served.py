"""A family's tiny model at a real server: `python -m tests.families.served vllm|sglang FAMILY ...` says which works.

Sampled from as it was loaded, and after each publish of other weights, by a broadcast and by a directory.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import SamplingParams
from pekoe.engine import SGLangEngine, VLLMEngine
from pekoe.engine.base import requests_of
from pekoe.engine.servers import ServerEngine
from pekoe.model import LanguageModel, load_model
from pekoe.weights.checksums import PlainChecksums, SGLangChecksums, checksums_of, differing
from tests.families.configs import make
from tests.servers.common import off, sample, update

TOLERANCE = 5e-4
# Sizes that servers take on a CPU: heads of 32, a vocabulary and widths that nobody pads.
BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
WINDOWED = {"sliding_window": 16}
MIXED = {"moe_intermediate_size": 64}
OWN: dict[str, dict[str, Any]] = {
    "qwen3_moe": MIXED,
    "qwen2_moe": {**MIXED, "shared_expert_intermediate_size": 64},
    "olmoe": {**MIXED, "num_key_value_heads": 2},
    "glm4_moe": MIXED,
    "ernie4_5_moe": MIXED,
    "gemma2": {**WINDOWED, "query_pre_attn_scalar": 32},
    "gemma3_text": {**WINDOWED, "query_pre_attn_scalar": 32},
    "mistral": WINDOWED,
    "mixtral": {"intermediate_size": 64},
    "gpt_oss": {**WINDOWED, "intermediate_size": 64},
    "phi3": {"sliding_window": 512, "head_dim": 32},
    "cohere2": WINDOWED,
    "exaone4": WINDOWED,
}
_TRIED = """qwen2 qwen3 llama qwen3_moe gemma3_text mistral mixtral gemma gemma2 gpt_oss phi3 glm4 glm4_moe
olmo2 olmoe smollm3 granite cohere2 ernie4_5 exaone4 qwen2_moe starcoder2"""
TRIED = _TRIED.split()
SIZES = {family: BASE | OWN.get(family, {}) for family in TRIED}


def engine_of(kind: str, model: Path, spec: Any, logs: Path) -> ServerEngine:
    server: dict[str, Any] = {
        "python": os.environ[f"PEKOE_{kind.upper()}_PYTHON"],
        "start_limit_s": 600.0,
        "update_limit_s": 60.0,
        "request_limit_s": 60.0,
    }
    if kind == "sglang":
        server["env"] = {"PYTHONPATH": str(Path(__file__).parent.parent / "servers" / "sglang_cpu" / "shim")}
    section = EngineSection.model_validate({"backend": kind, "server": server, "kv_tokens": 4096, "max_running": 16})
    made = VLLMEngine if kind == "vllm" else SGLangEngine
    return made(model, section, spec, 128, logs, threads=1)


def serve(family: str, kind: str, place: Path) -> dict[str, float]:
    """The largest difference of log-probs at each state of the weights. RunError where the server cannot,
    AssertionError where one is above `TOLERANCE`."""
    models: list[LanguageModel] = []
    for seed in range(3):
        make(family, seed, **SIZES[family]).save_pretrained(place / str(seed))
        models.append(load_model(place / str(seed), implementation="transformers"))
    engine = engine_of(kind, place / "0", models[0].spec, place / "logs")
    found: dict[str, float] = {}
    try:
        for version, (state, route) in enumerate((("loaded", ""), ("broadcast", "broadcast"), ("disk", "disk"))):
            if route:
                update(engine, models[version], version, route, place)
            found[state] = difference(engine, models[version])
            assert found[state] <= TOLERANCE, f"{family} at {kind}, {state}: {found[state]:.2g}"
            found[f"{state}, other checksums"] = len(others(engine, models[version]))
    finally:
        engine.close()
    return found


def others(engine: ServerEngine, model: LanguageModel) -> list[str]:
    """Parameters of which the server's checksums are not the model's, where names may differ, too."""
    builder = PlainChecksums(torch.float32, server=True) if engine.kind == "vllm" else SGLangChecksums(torch.float32)
    return differing(checksums_of(model, builder), engine.checksums() or {})


def difference(engine: ServerEngine, model: LanguageModel) -> float:
    """Of some responses longer than windows, sampled together: shared prompts, and prefixes that are cached."""
    rng = np.random.default_rng(0)
    params = SamplingParams(2, 1.0, max_new_tokens=30, stop_token_ids=())
    prompts = [rng.integers(0, 64, n) for n in (3, 20, 9)]
    requests = [r for i, p in enumerate(prompts) for r in requests_of(f"p{i}", 0, p, params)]
    return max(off(model, completion) for completion in sample(engine, requests))


def outcome(family: str, kind: str) -> str:
    """yes, refused (what it cannot do), or **no**."""
    with tempfile.TemporaryDirectory() as place:
        try:
            found = serve(family, kind, Path(place))
            print(f"{kind} {family}: {found}", flush=True)
            return "yes"
        except (RunError, UserError, ValueError, TypeError) as error:
            print(f"{kind} {family}: {last_words(error)}", flush=True)
            return "refused"
        except AssertionError as error:
            print(f"{kind} {family}: {error}", flush=True)
            return "**no**"


def last_words(error: Exception) -> str:
    """The line of a message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if "Error" in line] or lines
    return said[-1][-300:]


def main(words: Sequence[str]) -> int:
    torch.set_num_threads(1)
    kind, *families = words
    return int("**no**" in [outcome(family, kind) for family in families or TRIED])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
