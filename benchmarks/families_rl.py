"""The demo's task with families that transformers computes, from nothing: pass@1 after SFT and after RL, and for
mixtures of experts RL with routing replay on and off.

    make families-rl ARGS="--out runs/families --json OUT.json"

Data, recipes and evaluations are those of `pekoe demo`. A stage that is in the directory is not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from pekoe import __version__
from pekoe.config.recipes import EvalConfig, RLConfig, SFTConfig, load_config
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.core.statistics import paired
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.demo.problems import ARITHMETIC_ALPHABET
from pekoe.demo.run import CONTEXT, eval_recipe, make_data, rl_recipe, sft_recipe
from pekoe.model import load_model, save_model
from pekoe.run.build import build_rl
from pekoe.run.evaluate import run_eval
from pekoe.run.interrupt import Stop
from pekoe.run.rl import run_rl
from pekoe.run.sft import run_sft

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_COMMON,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "gemma3_text": {
        **_COMMON,
        "intermediate_size": 384,
        "sliding_window": 24,
        "layer_types": _WINDOWS,
        "query_pre_attn_scalar": 32,
    },
    "gpt_oss": {
        **_COMMON,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 128,
        "sliding_window": 24,
        "layer_types": _WINDOWS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
MIXTURES = ("qwen3_moe", "gpt_oss")


def make_model(family: str, start: Path, seed: int) -> int:
    """Write a random model as transformers begins it, with the demo's tokenizer; returns its parameters."""
    files = make_char_tokenizer(ARITHMETIC_ALPHABET)
    settings = {**FAMILIES[family], "vocab_size": Tokenizer(files).vocab_size}
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **settings))
    bare = start.with_name("bare")
    made.save_pretrained(bare)
    model = load_model(bare, implementation="transformers")
    model.assets = dict(files)
    save_model(model, start)
    return sum(parameter.numel() for parameter in model.parameters())


def _steps(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "journal.jsonl") if event["event"] == "step"]


def measure(out: Path, stage: str, seed: int) -> dict[str, Any]:
    result = run_eval(load_config(eval_recipe(out, stage, seed), ["run.threads=1"], EvalConfig), NoProgress())
    figures = result.as_dict()
    kept = ("pass_at_1", "ci95", "num_problems", "samples_per_problem", "response_tokens", "unparsed_rate")
    return {name: figures[name] for name in kept} | {"rates": result.rates}


def rl(out: Path, stage: str, seed: int, words: list[str]) -> dict[str, Any]:
    recipe = rl_recipe(out, seed)
    del recipe["eval"]
    recipe["run"]["dir"] = str(out / stage)
    config = load_config(recipe, ["run.threads=1", *words], RLConfig)
    stop = Stop()
    with stop.listening(), ExitStack() as stack:
        run_rl(build_rl(config, NoProgress(), stop, stack))
    steps = _steps(out / stage)
    first, last = steps[0], steps[-1]
    return {
        "num_steps": len(steps),
        "reward": [round(step["reward"], 3) for step in steps],
        "logprob_diff_mean": sum(step.get("logprob_diff", 0.0) for step in steps) / len(steps),
        "logprob_diff_max": max(step.get("logprob_diff_max", 0.0) for step in steps),
        "experts": {
            name: [round(first[name], 4), round(last[name], 4)]
            for name in ("expert_entropy", "expert_load_min", "expert_load_max")
            if name in first and name in last
        },
    }


class Stages:
    """Results by stage, kept in the directory."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def run(self, name: str, work: Any) -> Any:
        if name not in self.results:
            start = time.perf_counter()
            result = work()
            self.results[name] = {"seconds": round(time.perf_counter() - start, 1), "result": result}
            self._file.write_text(json.dumps(self.results, indent=1))
        return self.results[name]["result"]


def learn(family: str, out: Path, seed: int, sft_words: list[str], rl_words: list[str]) -> dict[str, Any]:
    """SFT, then RL with and without routing replay, each measured."""
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out / "families.json")

    def begin() -> int:
        make_data(out, seed)
        return make_model(family, out / "start", seed)

    def sft() -> float:
        run_sft(load_config(sft_recipe(out, seed), ["run.threads=1", *sft_words], SFTConfig), NoProgress())
        return _steps(out / "sft")[-1]["loss"]

    parameters = stages.run("data", begin)
    stages.run("sft", sft)
    before = stages.run("measure_sft", lambda: measure(out, "sft", seed))
    report: dict[str, Any] = {"family": family, "seed": seed, "parameters": parameters, "sft": _without(before)}
    low, high = before["ci95"]
    print(
        f"{family:12} {parameters / 1e6:.2f}M  SFT      {before['pass_at_1']:6.1%} [{low:.1%}, {high:.1%}]", flush=True
    )
    for replays in (False, True) if family in MIXTURES else (False,):
        stage = "rl_replay" if replays else "rl"
        words = [*rl_words, *(["rollout.replay_routing=true"] if replays else [])]
        ran = stages.run(stage, partial(rl, out, stage, seed, words))
        after = stages.run(f"measure_{stage}", partial(measure, out, stage, seed))
        change = paired(before["rates"], after["rates"], (before["samples_per_problem"], after["samples_per_problem"]))
        report[stage] = ran | _without(after) | {"less_sft": change}
        low, high = after["ci95"]
        name = "replayed" if replays else "RL"
        print(
            f"{family:12}        {name:8} {after['pass_at_1']:6.1%} [{low:.1%}, {high:.1%}]  reward "
            f"{ran['reward'][0]:+.1f} -> {ran['reward'][-1]:+.1f}, log-probs differ by at most "
            f"{ran['logprob_diff_max']:.1e}",
            flush=True,
        )
    return report | {"seconds": {name: stage["seconds"] for name, stage in stages.results.items()}}


def _without(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != "rates"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/families"))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft", nargs="*", default=[], help="overrides of SFT, such as sft.epochs=2")
    parser.add_argument("--rl", nargs="*", default=[], help="overrides of RL, such as num_steps=20")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for family in args.families:
        runs.append(learn(family, args.out / family, args.seed, args.sft, args.rl))
        if args.json:
            versions = {name: version(name) for name in ("torch", "transformers", "math-verify", "reasoning-gym")}
            about = {
                "what": "the demo's task with families of transformers, from nothing",
                "pekoe": __version__,
                "versions": {"python": platform.python_version(), **versions},
                "machine": platform.machine(),
                "sft": args.sft,
                "rl": args.rl,
                "models": {family: FAMILIES[family] for family in args.families},
            }
            args.json.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
