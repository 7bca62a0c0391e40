"""Speed of families of transformers, engine and trainer, side by side in one process.

    python benchmarks/families_speed.py [--sizes 0.85M 26M mixture] [--rounds 5] [--out FILE.json]

0.85M and 26M: a Qwen2 by our decoder ("pekoe") and as transformers' module with our attention ("transformers"), of the
same weights. mixture: a Qwen3 whose MLPs are 16 experts of a quarter of its width, 4 for a token ("mixture"), beside
the dense Qwen3 of its active size by transformers ("dense") and by our decoder ("pekoe").

Engine: samples of prompts of 64 tokens, 64 new tokens each. Trainer: optimizer steps on sequences of 128 tokens. Models
take turns, round by round; ratios are of rates in the same round to the first model's, and the median is shown.
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
from pekoe.core.spec import FamilySpec, ModelSpec
from pekoe.core.types import Sample, SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.model import Decoder, LanguageModel, load_model, save_model
from pekoe.train import Trainer

PROMPT, NEW, LENGTH, BUDGET = 64, 64, 128, 2048
FIELDS = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
SHAPES = {"0.85M": (128, 4, 4, 2, 32, 384), "26M": (512, 8, 8, 4, 64, 1536)}
EXPERTS, CHOSEN = 16, 4
SIZES = (*SHAPES, "mixture")


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


def models_of(size: str, place: Path) -> dict[str, LanguageModel]:
    """The one that others are compared with comes first."""
    qwen3 = size == "mixture"
    spec = ModelSpec(
        "qwen3" if qwen3 else "qwen2",
        512 if size == "0.85M" else 4096,
        max_positions=512,
        qkv_bias=not qwen3,
        qk_norm=qwen3,
        tied_embeddings=True,
        **dict(zip(FIELDS, SHAPES["26M" if qwen3 else size], strict=True)),
    )
    model = Decoder(spec)
    model.init_weights(0)
    save_model(model, place / "dense")
    ours, theirs = (load_model(place / "dense", implementation=i) for i in ("pekoe", "transformers"))
    if not qwen3:
        return {"pekoe": ours, "transformers": theirs}
    return {"dense": theirs, "mixture": mixture_of(spec, place / "mixture"), "pekoe": ours}


def mixture_of(spec: ModelSpec, place: Path) -> LanguageModel:
    """Experts in place of MLPs, of which a token uses as many channels as an MLP has."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        moe_intermediate_size=spec.intermediate_size // CHOSEN,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    model = load_model(place)
    assert isinstance(model.spec, FamilySpec)
    routers = spec.num_layers * EXPERTS * spec.hidden_size
    assert model.spec.active == spec.num_parameters + routers, "the two are of one active size"
    return model


def compare(size: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        models = models_of(size, Path(place))
    few = 16 if size == "0.85M" else 8
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
    sizes = {name: each.spec for name, each in models.items()}
    found: dict[str, Any] = {
        "size": size,
        "num_parameters": {name: spec.num_parameters for name, spec in sizes.items()},
        "active_parameters": {n: s.active if isinstance(s, FamilySpec) else s.num_parameters for n, s in sizes.items()},
    }
    first, *others = models
    for part, by_name in rates.items():
        found[part] = {f"{name}_tokens_per_s": statistics.median(values[1:]) for name, values in by_name.items()}
        for name in others:
            ratios = [b / a for a, b in zip(by_name[first][1:], by_name[name][1:], strict=True)]
            found[part] |= {f"{name}_ratio": statistics.median(ratios), f"{name}_ratios": sorted(ratios)}
    return found


def shown(found: dict[str, Any]) -> list[str]:
    first, *others = found["num_parameters"]
    lines: list[str] = []
    for part in ("engine", "trainer"):
        row = found[part]
        rates = ", ".join(f"{name} {row[f'{name}_tokens_per_s']:,.0f}" for name in (first, *others))
        ratios = ", ".join(
            f"{name} {row[f'{name}_ratio']:.2f} ({row[f'{name}_ratios'][0]:.2f} to {row[f'{name}_ratios'][-1]:.2f})"
            for name in others
        )
        lines.append(f"{found['size']} {part}, tokens/s: {rates}; of {first}'s: {ratios}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = [compare(size, args.rounds) for size in args.sizes]
    for found in results:
        print("\n".join(shown(found)))
    if args.out:
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        args.out.write_text(json.dumps({"threads": torch.get_num_threads(), **versions, "results": results}, indent=2))


if __name__ == "__main__":
    main()
