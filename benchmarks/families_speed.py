"""Qwen2 through both implementations of a model, engine and trainer side by side in one process.

    python benchmarks/families_speed.py [--sizes 0.85M 26M] [--rounds 5] [--out FILE.json]

The same weights are loaded by our decoder ("pekoe") and as transformers' module with our attention ("transformers").
Engine: samples of prompts of 64 tokens, 64 new tokens each. Trainer: optimizer steps on sequences of 128 tokens. They
take turns, round by round; ratios are of transformers' rate to ours in the same round, and the median is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pekoe.algo.loss import cross_entropy
from pekoe.config.recipes import OptimSection
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Sample, SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.model import Decoder, LanguageModel, load_model, save_model
from pekoe.train import Trainer

PROMPT, NEW, LENGTH, BUDGET = 64, 64, 128, 2048
FIELDS = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
SIZES = {"0.85M": (128, 4, 4, 2, 32, 384), "26M": (512, 8, 8, 4, 64, 1536)}


def sampled(model: LanguageModel, engine: EmbeddedEngine, prompts: int) -> float:
    """Tokens a second."""
    rng = np.random.default_rng(0)
    asked = [rng.integers(0, model.spec.vocab_size, PROMPT).tolist() for _ in range(prompts)]
    engine.flush_cache()
    start = time.perf_counter()
    groups = engine.generate(asked, SamplingParams(4, 1.0, max_new_tokens=NEW, stop_token_ids=()))
    return sum(c.num_tokens for group in groups for c in group) / (time.perf_counter() - start)


def trained(trainer: Trainer, sequences: int) -> float:
    """Tokens a second."""
    rng, mask = np.random.default_rng(0), np.arange(LENGTH) >= LENGTH // 4
    zeros = np.zeros(LENGTH, np.float32)
    vocab = trainer.model.spec.vocab_size
    batch = [Sample(rng.integers(0, vocab, LENGTH), mask, zeros, mask.astype(np.float32), i) for i in range(sequences)]
    start = time.perf_counter()
    trainer.step(batch, cross_entropy)
    return sequences * LENGTH / (time.perf_counter() - start)


def compare(size: str, rounds: int) -> dict[str, Any]:
    spec = ModelSpec(
        "qwen2",
        512 if size == "0.85M" else 4096,
        max_positions=512,
        qkv_bias=True,
        tied_embeddings=True,
        **dict(zip(FIELDS, SIZES[size], strict=True)),
    )
    with tempfile.TemporaryDirectory() as place:
        model = Decoder(spec)
        model.init_weights(0)
        save_model(model, Path(place) / "model")
        ours, theirs = (load_model(Path(place) / "model", implementation=i) for i in ("pekoe", "transformers"))
    models = {"pekoe": ours, "transformers": theirs}
    few = 8 if size == "26M" else 16
    rates: dict[str, dict[str, list[float]]] = {"engine": {n: [] for n in models}, "trainer": {n: [] for n in models}}
    for _ in range(rounds + 1):  # the first warms
        for name, each in models.items():
            with closing(EmbeddedEngine(each, max_sequence_tokens=PROMPT + NEW)) as engine:
                sampled(each, engine, 1)
                rates["engine"][name].append(sampled(each, engine, few))
    trainers = {n: Trainer(m, OptimSection(), BUDGET, 1000) for n, m in models.items()}
    for _ in range(rounds + 1):
        for name, trainer in trainers.items():
            rates["trainer"][name].append(trained(trainer, 2 * few))
    found: dict[str, Any] = {"size": size, "num_parameters": spec.num_parameters}
    for part, by_name in rates.items():
        pairs = list(zip(by_name["pekoe"][1:], by_name["transformers"][1:], strict=True))
        found[part] = {
            "pekoe_tokens_per_s": statistics.median(a for a, _ in pairs),
            "transformers_tokens_per_s": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(b / a for a, b in pairs),
            "ratios": sorted(b / a for a, b in pairs),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = [compare(size, args.rounds) for size in args.sizes]
    for found in results:
        for part in ("engine", "trainer"):
            row = found[part]
            print(
                f"{found['size']} {part}: pekoe {row['pekoe_tokens_per_s']:,.0f} tokens/s, transformers "
                f"{row['transformers_tokens_per_s']:,.0f}, ratio {row['ratio']:.2f} "
                f"({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f})"
            )
    if args.out:
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        args.out.write_text(json.dumps({"threads": torch.get_num_threads(), **versions, "results": results}, indent=2))


if __name__ == "__main__":
    main()
