"""The demo: SFT and RL of a small decoder from random weights, on a laptop.

SFT shows two ways to answer: some demonstrations work the sum out line by line, some guess at once and are mostly
wrong. RL on verified answers then teaches the model which is better.

Every stage runs the code that a recipe runs. A finished stage is not run again, an interrupted one continues.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pekoe.config.model import LORA_RATE
from pekoe.config.recipes import EvalConfig, RLConfig, SFTConfig, load_config
from pekoe.core.errors import UserError, nearest
from pekoe.core.journal import read_lines
from pekoe.core.progress import ProgressReporter
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Problem
from pekoe.data.problems import Demonstration, write_demonstrations, write_problems
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.demo.problems import ARITHMETIC_ALPHABET, make_arithmetic
from pekoe.model import Decoder, save_model
from pekoe.run.build import build_rl
from pekoe.run.evaluate import run_eval
from pekoe.run.interrupt import Stop
from pekoe.run.rl import run_rl
from pekoe.run.sft import run_sft

NUM_HELD_OUT, NUM_WORKED, NUM_GUESSED, NUM_PROBLEMS = 128, 4096, 5120, 4096
MAX_GUESS_ERROR = 5
TASK: dict[str, Any] = {"num_terms": (4, 5), "num_digits": (1, 1), "negative_totals": False}
CONTEXT = 128
CLUSTER: dict[str, Any] = {"generation": {"engines": 2}, "training": {"ranks": 2}}
LORA: dict[str, Any] = {"rank": 16, "alpha": 16.0}
STAGES = "stages.json"


def model_spec(vocab_size: int) -> ModelSpec:
    """A Qwen3 decoder of 1.2 million parameters."""
    return ModelSpec(
        family="qwen3",
        vocab_size=vocab_size,
        hidden_size=160,
        num_layers=4,
        num_heads=5,
        num_kv_heads=1,
        head_dim=32,
        intermediate_size=480,
        max_positions=CONTEXT,
        qk_norm=True,
        tied_embeddings=True,
    )


def sft_recipe(out: Path, seed: int) -> dict[str, Any]:
    return {
        "run": {"dir": str(out / "sft"), "seed": seed},
        "model": {"path": str(out / "start"), "device": "cpu"},
        "data": {"train": str(out / "data" / "demonstrations.jsonl")},
        "sft": {"epochs": 5, "batch_size": 32},
        "optim": {"lr": 4e-3, "warmup_fraction": 0.1, "schedule": "cosine"},
        "train": {"token_budget": 8192, "save_every": 256, "keep_checkpoints": 1},
    }


def rl_recipe(out: Path, seed: int) -> dict[str, Any]:
    """`recipes/laptop.toml` says the same (a test compares them)."""
    return {
        "num_steps": 60,
        "run": {"dir": str(out / "rl"), "seed": seed},
        "model": {"path": str(out / "sft" / "model"), "device": "cpu"},
        "data": {"train": str(out / "data" / "train.jsonl"), "max_prompt_tokens": 24},
        "rollout": {"prompts_per_step": 32, "samples_per_prompt": 8, "max_new_tokens": 64},
        "optim": {"lr": 2e-4, "warmup_fraction": 0.02},
        "train": {"token_budget": 8192, "save_every": 20, "keep_checkpoints": 1},
        "verify": {"workers": 1},
        "eval": {"data": str(out / "data" / "held_out.jsonl"), "every": 30},
    }


def eval_recipe(out: Path, stage: str, seed: int) -> dict[str, Any]:
    return {
        "run": {"seed": seed},
        "model": {"path": str(out / stage / "model"), "device": "cpu"},
        "max_prompt_tokens": 24,
        "eval": {"data": str(out / "data" / "held_out.jsonl"), "samples": 32, "max_new_tokens": 64},
        "verify": {"workers": 1},
    }


_WEIGHTS = "adapter_model.safetensors", "model.safetensors"

# A smoke test of every stage in under a minute; it learns nothing.
QUICK_SFT = ("sft.epochs=1", "sft.batch_size=512")
QUICK_RL = ("num_steps=2", "rollout.prompts_per_step=8", "rollout.max_new_tokens=48", "eval.every=2", "eval.samples=2")
QUICK_EVAL = ("eval.samples=2", "eval.max_new_tokens=48")
ON_GPU = ("model.device=cuda", "model.dtype=bfloat16")


def run_demo(
    out: Path,
    seed: int,
    control: bool,
    fresh: bool,
    quick: bool,
    view: ProgressReporter,
    cluster: bool = False,
    lora: bool = False,
    device: str = "cpu",
) -> str:
    """Run the stages that are not finished yet, write summary.json, and return the text to print.

    With `cluster`, the RL stage runs a second time, on Ray; with `lora`, with an adapter in place of all weights.
    `device`: "cpu", or "cuda".
    """
    if device not in ("cpu", "cuda"):
        raise UserError(f"demo --device: expected 'cpu' or 'cuda', got {device!r}.{nearest(device, ('cpu', 'cuda'))}")
    on = ON_GPU if device == "cuda" else ()
    if fresh and out.exists():
        if any(out.iterdir()) and not (out / STAGES).exists():
            raise UserError(f"{out}: --fresh removes an earlier demo; this directory holds something else")
        shutil.rmtree(out)
    stages = Stages(out, {"seed": seed, "control": control, "quick": quick} | ({"device": device} if on else {}), view)
    stages.run("data", lambda: make_data(out, seed))
    stages.run("sft", lambda: _sft(out, seed, quick, view, on))
    stages.run("measure_sft", lambda: _measure(out, "sft", seed, quick, view, on))
    stages.run("rl", lambda: _rl(out, seed, control, quick, view, on))
    stages.run("measure_rl", lambda: _measure(out, "rl", seed, quick, view, on))
    if lora:
        stages.run("rl_lora", lambda: _rl(out, seed, control, quick, view, on, lora=LORA))
        stages.run("measure_rl_lora", lambda: _measure(out, "rl_lora", seed, quick, view, on))
    if cluster:
        stages.run("rl_cluster", lambda: _rl(out, seed, control, quick, view, on, CLUSTER))
        stages.run("measure_rl_cluster", lambda: _measure(out, "rl_cluster", seed, quick, view, on))
    measured = {"sft": stages.results["measure_sft"], "rl": stages.results["measure_rl"]}
    summary: dict[str, Any] = {
        name: {"pass_at_1": result["pass_at_1"], "ci95": list(result["ci95"])} for name, result in measured.items()
    }
    summary |= {"seconds": stages.seconds, "seed": seed, "control": control}
    summary |= {name: measured["sft"][name] for name in ("num_problems", "samples_per_problem")}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    note = "\n\nThis was the quick form: a test of every stage, which learns nothing. Without --quick it learns."
    return describe(out, summary, stages.results, control) + (note if quick else "")


class Stages:
    """The finished stages, with seconds and results, kept in stages.json. A finished stage is not run again."""

    def __init__(self, out: Path, settings: dict[str, Any], view: ProgressReporter) -> None:
        self.results: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.settings = settings
        self._file, self._view = out / STAGES, view
        if self._file.exists():
            saved = json.loads(self._file.read_text(encoding="utf-8"))
            if saved["settings"] != settings:
                raise UserError(
                    f"{out}: holds a demo with {saved['settings']}, got {settings}; "
                    "add --fresh to remove it, or choose another --out"
                )
            self.results, self.seconds = saved["results"], saved["seconds"]
        else:
            try:
                out.mkdir(parents=True, exist_ok=True)
                self._write()
            except OSError as error:
                raise UserError(f"{out}: expected a directory that can be written: {error.strerror}") from None

    def run(self, name: str, work: Callable[[], Any]) -> None:
        if name in self.results:
            self._view.say(f"{name}: done before, in {self.seconds[name]:.0f} s (--fresh starts anew)")
            return
        self._view.say(f"{name}: ...")
        start = time.perf_counter()
        self.results[name] = work()
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self._write()

    def _write(self) -> None:
        content = {"settings": self.settings, "seconds": self.seconds, "results": self.results}
        partial = self._file.with_name(f".{STAGES}")
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(self._file)


def make_data(out: Path, seed: int) -> dict[str, int]:
    """Held-out problems first, then demonstrations and RL problems that share no prompt with them or each other."""
    held_out = make_arithmetic(NUM_HELD_OUT, 3 * seed, **TASK)
    taken = {_prompt(problem) for problem, _ in held_out}
    worked = make_arithmetic(NUM_WORKED + NUM_GUESSED, 3 * seed + 1, exclude=taken, **TASK)
    taken |= {_prompt(problem) for problem, _ in worked}
    problems = make_arithmetic(NUM_PROBLEMS, 3 * seed + 2, exclude=taken, **TASK)
    sets = [{_prompt(problem) for problem, _ in part} for part in (held_out, worked, problems)]
    assert len(set.union(*sets)) == sum(map(len, sets)), "held-out, SFT and RL problems must be disjoint"
    folder = out / "data"
    folder.mkdir(exist_ok=True)
    write_problems(folder / "held_out.jsonl", [problem for problem, _ in held_out])
    write_problems(folder / "train.jsonl", [problem for problem, _ in problems])
    rng = np.random.default_rng(seed)
    demonstrations = [
        Demonstration(problem.messages, solution if i < NUM_WORKED else _guess(problem, rng))
        for i, (problem, solution) in enumerate(worked)
    ]
    write_demonstrations(folder / "demonstrations.jsonl", demonstrations)
    files = make_char_tokenizer(ARITHMETIC_ALPHABET)
    model = Decoder(model_spec(Tokenizer(files).vocab_size))
    model.init_weights(seed)
    model.assets = dict(files)
    save_model(model, out / "start")
    return {"num_parameters": model.spec.num_parameters, "num_problems": len(problems), "num_held_out": len(held_out)}


def _guess(problem: Problem, rng: np.random.Generator) -> str:
    """A boxed answer without work, its error uniform in [-MAX_GUESS_ERROR, MAX_GUESS_ERROR]."""
    return f"\\boxed{{{int(problem.gold) + int(rng.integers(-MAX_GUESS_ERROR, MAX_GUESS_ERROR + 1))}}}"


def _prompt(problem: Problem) -> str:
    return problem.messages[-1]["content"]


def _sft(out: Path, seed: int, quick: bool, view: ProgressReporter, on: Sequence[str]) -> dict[str, Any]:
    run_sft(load_config(sft_recipe(out, seed), [*(QUICK_SFT if quick else ()), *on], SFTConfig), view)
    return {"loss": _steps(out / "sft")[-1]["loss"]}


def _rl(
    out: Path,
    seed: int,
    control: bool,
    quick: bool,
    view: ProgressReporter,
    on: Sequence[str],
    cluster: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
) -> dict[str, Any]:
    overrides = [*(QUICK_RL if quick else ()), *(["verify.random=true"] if control else []), *on]
    recipe = rl_recipe(out, seed)
    if control:  # its evaluations would be random, too
        del recipe["eval"]
        overrides = [override for override in overrides if not override.startswith("eval.")]
    if cluster is not None:
        recipe |= {"cluster": cluster, "run": recipe["run"] | {"dir": str(out / "rl_cluster")}}
    if lora is not None:
        recipe |= {"model": recipe["model"] | {"lora": lora}, "run": recipe["run"] | {"dir": str(out / "rl_lora")}}
        recipe["optim"] = recipe["optim"] | {"lr": LORA_RATE * recipe["optim"]["lr"]}
    config = load_config(recipe, overrides, RLConfig)
    stop = Stop()
    with stop.listening(), ExitStack() as stack:
        if cluster is not None:
            from pekoe.ray import run_cluster

            run_cluster(config, view, stop)
        else:
            run_rl(build_rl(config, view, stop, stack))
    steps = _steps(Path(config.run.dir))
    seconds: Counter[str] = Counter()
    for step in steps:
        seconds.update(step["seconds"])
    result = {
        "reward": [round(step["reward"], 3) for step in steps],
        "logprob_diff_max": max(step.get("logprob_diff_max", 0.0) for step in steps),
        "seconds": {name: round(total, 2) for name, total in seconds.items()},
    }
    if lora is not None:
        files = Path(config.run.dir) / "model", Path(config.model.path)
        result["publish_bytes"] = [(path / name).stat().st_size for path, name in zip(files, _WEIGHTS, strict=True)]
    if cluster is not None:
        result["controller_bytes"] = median(step["controller_bytes"] / step["num_rollouts"] for step in steps)
        result |= {name: median(step[name] for step in steps) for name in ("idle_engines", "idle_ranks")}
    return result


def _measure(
    out: Path, stage: str, seed: int, quick: bool, view: ProgressReporter, on: Sequence[str]
) -> dict[str, Any]:
    overrides = [*(QUICK_EVAL if quick else ()), *on]
    result = run_eval(load_config(eval_recipe(out, stage, seed), overrides, EvalConfig), view)
    return {**result.as_dict(), "examples": result.examples}


def describe(out: Path, summary: dict[str, Any], results: dict[str, Any], control: bool) -> str:
    """The text that the demo prints at its end."""
    data, rl = results["data"], results["rl"]
    taught = "verdicts DRAWN AT RANDOM (control)" if control else "verified answers alone"
    lengths = [results[stage]["response_tokens"] for stage in ("measure_sft", "measure_rl")]
    lines = [
        "",
        f"A decoder of {data['num_parameters'] / 1e6:.1f}M parameters, from random weights. SFT on {NUM_WORKED} sums "
        f"worked out line by line and {NUM_GUESSED} guessed",
        f"at once. Then RL on {data['num_problems']} other problems, from {taught}.",
        "",
        f"  pass@1 on {summary['num_problems']} held-out problems x {summary['samples_per_problem']} samples "
        "(temperature 1.0), 95 % intervals over problems:",
        f"    after SFT  {_figure(summary['sft'])}   {lengths[0]:.0f} tokens a response",
        f"    after RL   {_figure(summary['rl'])}   {lengths[1]:.0f} tokens a response",
        *_with_lora(results),
        *_on_cluster(results),
        "",
        f"  reward over the RL steps  {_sparkline(rl['reward'])}  {rl['reward'][0]:+.1f} -> {rl['reward'][-1]:+.1f}",
        f"  largest difference between sampling and training log-probs: {rl['logprob_diff_max']:.0e}",
        "",
        "  where the time went (s): "
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items())
        + f"; total {sum(summary['seconds'].values()):.0f}",
        "  within RL (s): " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in rl["seconds"].items()),
        "",
    ]
    examples = zip(results["measure_sft"]["examples"], results["measure_rl"]["examples"], strict=True)
    # Two examples; first those that were wrong after SFT and are correct after RL.
    ranked = sorted(examples, key=lambda pair: (pair[1]["label"] != "correct", pair[0]["label"] == "correct"))
    for before, after in ranked[:2]:
        lines += [f"  {before['prompt']}   (answer {before['gold']})"]
        for name, example in (("SFT", before), ("RL ", after)):
            response = example["response"].replace("\n", "  ")[:120]
            lines += [f"    {name}: {response}  {example['label']}"]
    # As the user called this program, so that the commands can be pasted.
    program = os.path.relpath(sys.argv[0]) if Path(sys.argv[0]).name == "pekoe" else "pekoe"
    lines += [
        "",
        "What to try next:",
        f"  the run as a page           {program} report {out}/rl",
        f"  every response, judged      zstd -dc {out}/rl/rollouts/step-000001.jsonl.zst | head -n 3",
        f"  the RL stage with your lr   {program} rl laptop run.dir=runs/mine optim.lr=1e-3",
        f"  the control                 {program} demo --control --out runs/control",
        f"  use the model               AutoModelForCausalLM.from_pretrained('{out}/rl/model')",
    ]
    return "\n".join(lines)


def _with_lora(results: dict[str, Any]) -> list[str]:
    """The lines on RL with an adapter, if that stage ran."""
    if "measure_rl_lora" not in results:
        return []
    after, rl = results["measure_rl_lora"], results["rl_lora"]
    adapter, whole = rl["publish_bytes"]
    return [
        f"    after RL   {_figure(after)}   {after['response_tokens']:.0f} tokens a response, by LoRA of rank "
        f"{LORA['rank']}: {adapter:,} bytes of weights in place of {whole:,}",
        f"  reward, by LoRA           {_sparkline(rl['reward'])}  {rl['reward'][0]:+.1f} -> {rl['reward'][-1]:+.1f}",
    ]


def _on_cluster(results: dict[str, Any]) -> list[str]:
    """The lines on RL on Ray, if that stage ran."""
    if "measure_rl_cluster" not in results:
        return []
    after, rl = results["measure_rl_cluster"], results["rl_cluster"]
    tenths = _means(results["rl"]["reward"], 10), _means(rl["reward"], 10)
    apart = max(abs(a - b) for a, b in zip(*tenths, strict=True))
    num_engines, num_ranks = CLUSTER["generation"]["engines"], CLUSTER["training"]["ranks"]
    return [
        f"    after RL   {_figure(after)}   {after['response_tokens']:.0f} tokens a response, on Ray: "
        f"{num_engines} engines, {num_ranks} training ranks",
        "",
        f"  reward, on Ray            {_sparkline(rl['reward'])}  {rl['reward'][0]:+.1f} -> {rl['reward'][-1]:+.1f}",
        f"  means over tenths of the steps differ from one process's by at most {apart:.2f} (a reward is -5 or 5)",
        f"  of a step, an engine is idle {rl['idle_engines']:.0%} and a rank {rl['idle_ranks']:.0%} (medians); the "
        f"loop's process passes on {rl['controller_bytes']:.0f} bytes a rollout",
    ]


def _figure(measured: dict[str, Any]) -> str:
    low, high = measured["ci95"]
    return f"{measured['pass_at_1']:6.1%}  [{low:.1%}, {high:.1%}]"


def _means(values: list[float], num_parts: int) -> list[float]:
    """Means of at most `num_parts` consecutive parts of about equal length."""
    return [float(part.mean()) for part in np.array_split(values, min(num_parts, len(values)))]


def _sparkline(values: list[float]) -> str:
    """Means of 40 parts, as bars from the smallest to the largest."""
    means = _means(values, 40)
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (mean - low) / span))] for mean in means)


def _steps(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "journal.jsonl") if event["event"] == "step"]
