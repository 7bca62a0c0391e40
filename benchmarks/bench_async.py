"""Training while sampling: steps a second of `run_rl` by schedule, beside the synchronous run.

    make bench-async                          (about 25 minutes; ARGS=--quick: a minute)
    make bench-async ARGS="--parts gpu scale"

Three parts. `ray`: a tiny model on a local Ray cluster, one embedded engine and one rank on a core each; responses end
where random weights happen to sample the stop token, so their lengths are ragged. `gpu`: engines and ranks of a 7B
model on H100s, simulated in time (`async_engines.py` says how); the loop, the engine pool and the rollouts are real.
`scale`: the same with 16 and 64 engines, for the controller's own time and bytes.

The schedules of a round run one after another, and ratios are within a round, so that what disturbs the machine for
minutes disturbs all of them; figures are medians over rounds. Steps at the beginning, where nothing is in flight yet,
and at the end, where nothing more is put, are left out. A run's rate is its steps by their time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import rollout_report as report
from async_engines import (
    MAX_NEW_TOKENS,
    PROMPT_TOKENS,
    Q7B,
    TOKEN_BUDGET,
    Clock,
    Gpu,
    GpuStarter,
    GpuTrainer,
    GpuWeights,
    PackedJudge,
    PackedRecords,
    Prompts,
)

from pekoe.config import RLConfig, load_config
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.core.types import Problem
from pekoe.data.order import DataOrder
from pekoe.engine.pool import EnginePool
from pekoe.ray.placement import ByteCount
from pekoe.run.build import RLParts, sampling
from pekoe.run.interrupt import LastStep, StepTimer, Stop
from pekoe.run.metrics import StepCounters
from pekoe.run.rl import run_rl
from pekoe.run.rollouts import Rollouts
from pekoe.run.run_dir import RunDir

GO_ON = "rollout.during_update=go_on"
SCHEDULES: dict[str, tuple[str, ...]] = {
    "lag 0": (),
    "pinned 1": ("rollout.max_lag=1",),
    "in flight 1": ("rollout.max_lag=1", GO_ON),
    "in flight 2": ("rollout.max_lag=2", GO_ON),
}
LONG_TAILS = {  # of gpu, whose longest responses outlast several steps
    "in flight 2, window": ("rollout.max_lag=2", GO_ON),  # of a batch: the oldest token may be 3 versions old
    "in flight 4": ("rollout.max_lag=4", GO_ON),
}
PROMPTS_PER_ENGINE, SAMPLES = 8, 16  # 512 x 16 on 64 engines: AReaL's 7B recipe
MINIBATCHES = 4
Result = dict[str, Any]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("ray", "gpu", "scale"), default=["ray", "gpu", "scale"])
    parser.add_argument("--rounds", type=int, default=3, help="of ray and gpu; scale has one")
    parser.add_argument("--steps", type=int, default=20, help="of each run of ray and gpu; half of it in scale")
    parser.add_argument("--engines", type=int, default=4, help="of gpu, with as many ranks")
    parser.add_argument("--scales", type=int, nargs="+", default=[16, 64], help="engines of scale")
    parser.add_argument("--scale", type=float, default=1 / 125, help="seconds here for a GPU's second")
    parser.add_argument("--quick", action="store_true", help="gpu and scale alone, one short round")
    parser.add_argument("--out", type=Path, help="results (default: benchmarks/results/async_<hardware>_<date>.json)")
    args = parser.parse_args(argv)
    if args.quick:
        args.parts, args.rounds, args.steps, args.engines, args.scales = ["gpu", "scale"], 1, 10, 2, [4]
        args.scale = 1 / 600
    least = 3 * (2 if args.quick else 4) + 4
    if args.steps < least:
        parser.error(f"--steps: expected at least {least}, got {args.steps}")
    args.device = "cpu"
    return args


def steps_of(run: Path) -> list[Result]:
    return [event for event in read_lines(run / "journal.jsonl") if event["event"] == "step"]


def counted(steps: Sequence[Result], lag: int) -> list[Result]:
    """Without the first steps, and without the last, where less and less is left to sample: from step num_steps - lag
    on nothing is put, and as many steps before it already end with fewer samples ahead than they began with."""
    return list(steps[lag + 1 : len(steps) - 2 * lag])


def rate_of(steps: Sequence[Result], lag: int) -> float:
    """Steps a second."""
    measured = counted(steps, lag)
    return (len(measured) - 1) / (measured[-1]["time"] - measured[0]["time"])


def ratios(rates: Mapping[str, Sequence[float]]) -> Result:
    """Of each schedule: the median rate, and the median of its ratios to the synchronous run of the same round."""
    base = rates["lag 0"]
    return {
        name: {
            "steps_per_s": round(statistics.median(own), 4),
            "by_round": [round(rate, 4) for rate in own],
            "to_lag_0": round(statistics.median(a / b for a, b in zip(own, base, strict=True)), 3),
        }
        for name, own in rates.items()
    }


# A local Ray cluster


def tiny_inputs(folder: Path) -> Result:
    """A model of random weights, problems, and the recipe."""
    from pekoe.core.spec import ModelSpec
    from pekoe.data.problems import write_problems
    from pekoe.data.tokenizer import Tokenizer
    from pekoe.demo.char_tokenizer import make_char_tokenizer
    from pekoe.model import Decoder, save_model

    files = make_char_tokenizer("0123456789+=abcdefghijklmnopqrstuvwxyz")
    sizes = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    vocab = Tokenizer(files).vocab_size
    spec = ModelSpec(family="qwen3", vocab_size=vocab, intermediate_size=384, max_positions=512, qk_norm=True, **sizes)
    model = Decoder(spec)
    model.init_weights(0)
    model.assets = dict(files)
    save_model(model, folder / "model")
    problems = [
        Problem(f"{a}+{b}", ({"role": "user", "content": f"{a}+{b}="},), str(a + b))
        for a in range(16)
        for b in range(16)
    ]
    write_problems(folder / "problems.jsonl", problems)
    return {
        "model": {"path": str(folder / "model"), "device": "cpu"},
        "run": {"threads": 1},
        "data": {"train": str(folder / "problems.jsonl"), "max_prompt_tokens": 12},
        "rollout": {"prompts_per_step": 12, "samples_per_prompt": 8, "max_new_tokens": 320},
        "optim": {"lr": 1e-6},  # weights stay random: lengths stay as they are
        "algo": {"minibatches": 2},
        "train": {"token_budget": 2048, "save_every": 10_000},
        "verify": {"workers": 1, "random": True},
        "cluster": {"generation": {"engines": 1}, "training": {"ranks": 1}},
    }


def bench_ray(args: argparse.Namespace) -> Result:
    from pekoe.ray import run_cluster

    rates: dict[str, list[float]] = {name: [] for name in SCHEDULES}
    seen: dict[str, list[Result]] = {name: [] for name in SCHEDULES}
    with tempfile.TemporaryDirectory() as folder:
        recipe = tiny_inputs(Path(folder)) | {"num_steps": args.steps}
        for number in range(args.rounds):
            for name, words in SCHEDULES.items():
                run = Path(folder) / f"{name}-{number}".replace(" ", "-")
                config = load_config(recipe, (*words, f"run.dir={run}"), RLConfig)
                run_cluster(config, NoProgress(), Stop())
                steps = steps_of(run)
                rates[name].append(rate_of(steps, config.rollout.max_lag))
                seen[name] += counted(steps, config.rollout.max_lag)
                print(f"ray, round {number + 1}: {name}: {rates[name][-1]:.3f} steps/s", flush=True)
    result = ratios(rates)
    for name, steps in seen.items():
        result[name] |= {
            "controller_bytes_per_rollout": round(
                sum(s["controller_bytes"] for s in steps) / sum(s["num_rollouts"] for s in steps)
            ),
            **{f"idle_{role}": round(statistics.median(s[f"idle_{role}"] for s in steps), 3) for role in ROLES},
            "seconds": phases_of(steps),
            "median_step_s": round(statistics.median(step["step_s"] for step in steps), 3),  # without rare long ones
        }
    lengths = {
        key: statistics.median(s[key] for s in seen["lag 0"]) for key in ("response_tokens", "response_tokens_max")
    }
    return {"schedules": result, "lengths": lengths, "recipe": {k: recipe[k] for k in ("rollout", "algo", "train")}}


ROLES = ("engines", "ranks")


def phases_of(steps: Sequence[Result], scale: float = 1.0) -> dict[str, float]:
    """Median seconds of each phase of a step."""
    names = dict.fromkeys(name for step in steps for name in step["seconds"])
    return {name: round(statistics.median(s["seconds"].get(name, 0.0) for s in steps) / scale, 3) for name in names}


# Engines and ranks of a 7B model, in time alone


def gpu_config(num_engines: int, num_steps: int, words: Sequence[str], run: Path) -> RLConfig:
    prompts = PROMPTS_PER_ENGINE * num_engines
    recipe: Result = {
        "num_steps": num_steps,
        "run": {"dir": str(run)},
        "model": {"path": "q7b", "dtype": "bfloat16", "device": "cpu"},
        "data": {"train": "none", "max_prompt_tokens": 1024},
        "rollout": {"prompts_per_step": prompts, "samples_per_prompt": SAMPLES, "max_new_tokens": MAX_NEW_TOKENS},
        "algo": {"minibatches": MINIBATCHES},
        "train": {"token_budget": TOKEN_BUDGET, "save_every": 10_000},
        "cluster": {
            "generation": {"engines": num_engines, "gpus_per_engine": 1},
            "training": {"ranks": num_engines, "gpus_per_rank": 1},
        },
    }
    return load_config(recipe, tuple(words), RLConfig)


def gpu_parts(config: RLConfig, clock: Clock, stack: ExitStack) -> RLParts:
    assert config.cluster is not None
    num_engines, rollout = config.cluster.generation.engines, config.rollout
    view, stop, passed = NoProgress(), Stop(), clock.passed
    problems = [
        Problem(f"p{i}", ({"role": "user", "content": "x"},), "0") for i in range(20 * rollout.prompts_per_step)
    ]
    starters = [GpuStarter(clock, i, rollout.samples_per_prompt) for i in range(num_engines)]
    pool = EnginePool(starters, start_limit_s=60)  # type: ignore[arg-type]
    stack.callback(pool.close)
    pool.wait_started()
    run = stack.enter_context(RunDir(config))
    trainer, timer = GpuTrainer(clock, config.cluster.training.ranks), StepTimer(view)
    common: Any = pool, Prompts(), PackedJudge(passed), sampling(rollout, (), 0), timer, view, stop
    rollouts = Rollouts(*common, window=rollout.window)
    return RLParts(
        config=config,
        problems=problems,
        held_out=[],
        order=DataOrder([p.uid for p in problems], 0),
        stop_token_ids=(),
        trainer=trainer,
        last_step=LastStep(trainer, stop, copies=False),
        rollouts=rollouts,
        eval_rollouts=rollouts,
        weights=GpuWeights(pool, clock),
        records=PackedRecords(passed),
        run=run,
        view=view,
        timer=timer,
        counters=StepCounters([rollouts.counters, trainer.counters, passed.counters], cluster=True),
        spec=Q7B,
    )


def run_gpu(num_engines: int, num_steps: int, words: Sequence[str], scale: float, gpu: Gpu) -> Result:
    """One run; seconds of GPUs, but for the controller's, which are this process's."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = gpu_config(num_engines, num_steps, words, Path(folder) / "run")
        clock = Clock(gpu, scale, ByteCount())
        stack.callback(clock.close)
        parts = gpu_parts(config, clock, stack)
        lag, trainer = config.rollout.max_lag, parts.trainer
        process, thread = time.process_time(), time.thread_time()
        run_rl(parts)
        process, thread = time.process_time() - process, time.thread_time() - thread
        simulated, here = clock.simulated.total, clock.simulated.here
        steps = steps_of(Path(folder) / "run")
    assert isinstance(trainer, GpuTrainer)
    measured = counted(steps, lag)
    num_rollouts = sum(s["num_rollouts"] for s in measured)
    return {
        "step_s": 1 / rate_of(steps, lag) / scale,
        "train_s": sum(trainer.seconds) / num_steps,
        "generation": full_load(trainer.lengths, num_engines, num_steps, gpu),
        "seconds": phases_of(measured, scale),
        "idle": {role: round(statistics.mean(s[f"idle_{role}"] for s in measured), 3) for role in ROLES},
        "lag_mean": round(statistics.mean(s.get("lag_mean", 0.0) for s in measured), 2),
        "lag_max": max(s.get("lag_max", 0) for s in measured),
        "controller": {
            "loop_thread_s_per_step": round((thread - here) / num_steps, 4),
            "all_threads_s_per_step": round((process - simulated) / num_steps, 4),
            "bytes_per_rollout": round(sum(s["controller_bytes"] for s in measured) / num_rollouts),
        },
        "num_rollouts_per_step": num_rollouts // len(measured),
    }


def full_load(lengths: Sequence[int], num_engines: int, num_steps: int, gpu: Gpu) -> Result:
    """Seconds in which engines that always decode as many responses as they have room for sample a step's responses;
    and with weights loaded and the KV of all that run computed anew, once a step."""
    tokens, number = sum(lengths), gpu.max_running
    kv = sum(n * (PROMPT_TOKENS + n / 2) for n in lengths) / tokens  # at the mean, weighed by time
    each = tokens / num_engines / num_steps / number * gpu.decode_s(number, number * kv)
    each += len(lengths) / SAMPLES / num_engines / num_steps * gpu.prefill_s([PROMPT_TOKENS])
    update = gpu.load_s + gpu.prefill_s([round(kv)] * number)
    return {"full_load_s": each, "with_updates_s": each + update}


def bench_gpu(num_engines: int, num_steps: int, rounds: int, scale: float, names: Sequence[str]) -> Result:
    gpu, prompts = Gpu(), PROMPTS_PER_ENGINE * num_engines
    schedules = SCHEDULES | LONG_TAILS
    schedules["in flight 2, window"] += (f"rollout.window={prompts}",)
    runs: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            runs[name].append(run_gpu(num_engines, num_steps, schedules[name], scale, gpu))
            last = runs[name][-1]
            print(
                f"{num_engines} engines, round {number + 1}: {name}: {last['step_s']:.1f} s a step of the GPUs'; the "
                f"controller {last['controller']['all_threads_s_per_step']:.2f} s a step",
                flush=True,
            )
    rows = ratios({name: [1 / run["step_s"] for run in own] for name, own in runs.items()})
    for name, own in runs.items():
        own.sort(key=lambda run: run["step_s"])
        middle = own[len(own) // 2]
        generation, train = middle.pop("generation"), middle["train_s"]
        bound = max(generation["full_load_s"], train)
        with_updates = max(generation["with_updates_s"] if GO_ON in schedules[name] else bound, train)
        rows[name] |= middle | {
            "bound_s": round(bound, 1),
            "share_of_bound": round(bound / middle["step_s"], 3),
            "bound_with_updates_s": round(with_updates, 1),
            "share_of_bound_with_updates": round(with_updates / middle["step_s"], 3),
        }
    return {
        "num_engines": num_engines,
        "num_steps": num_steps,
        "scale": scale,
        "max_running": gpu.max_running,
        "schedules": rows,
    }


def show(title: str, part: Result) -> None:
    print(f"\n{title}")
    for name, row in part["schedules"].items():
        text = f"  {name:<20} {row['to_lag_0']:.2f} x lag 0"
        if "bound_s" in row:
            text += (
                f"; {row['step_s']:.0f} s a step, {row['share_of_bound']:.0%} of the bound ({row['bound_s']:.0f} s), "
                f"{row['share_of_bound_with_updates']:.0%} with KV computed anew; controller "
                f"{row['controller']['all_threads_s_per_step']:.2f} s, {row['controller']['bytes_per_rollout']} B a "
                f"rollout"
            )
        else:
            text += f"; {row['steps_per_s']:.3f} steps/s, {row['controller_bytes_per_rollout']} B a rollout"
        print(text)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    result = report.about("bench-async", args)
    result["versions"] |= {"torch": version("torch"), "ray": version("ray"), "numpy": np.__version__}
    if "ray" in args.parts:
        result["ray"] = bench_ray(args)
        show("Local Ray, one engine and one rank", result["ray"])
    names = [*SCHEDULES] if args.quick else [*SCHEDULES, *LONG_TAILS]
    if "gpu" in args.parts:
        result["gpu"] = bench_gpu(args.engines, args.steps, args.rounds, args.scale, names)
        show(f"A 7B model on {args.engines} + {args.engines} H100s (simulated)", result["gpu"])
    if "scale" in args.parts:
        result["scale"] = []
        for number in args.scales:  # slower, so that the controller's own time stays small beside a step
            scale, steps = args.scale * max(1.0, number / 16), max(10, args.steps // 2)
            result["scale"].append(bench_gpu(number, steps, 1, scale, ["lag 0", "in flight 2"]))
            show(f"{number} engines", result["scale"][-1])
    out = args.out or report.default_out(args, "async")
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    threading.current_thread().name = "loop"
    sys.exit(main())
