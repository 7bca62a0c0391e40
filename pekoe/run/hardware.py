"""This machine: what `pekoe doctor` says of it and of a recipe's batch, and what a run journals of it."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pekoe.config.recipes import RLConfig
from pekoe.core.journal import read_lines
from pekoe.core.roofline import Ceilings, sampling_flops, training_flops
from pekoe.core.spec import ModelSpec

GIB = 2**30
_AT_LEAST, _LONG_S = 4, 0.15  # a ceiling is measured so often, and so long: what else goes on here comes and goes

# (what it is for, the package that says whether it is there, how it is installed)
PARTS = (
    ("cluster", "ray", "pip install 'pekoe[cluster]'"),
    ("report", "plotly", "pip install 'pekoe[report]'"),
    ("data sets", "datasets", "pip install 'pekoe[data]'"),
    ("demo, gym", "reasoning-gym", "pip install 'pekoe[demo]'"),
    ("W&B", "wandb", "pip install 'pekoe[wandb]'"),
    ("Trackio", "trackio", "pip install 'pekoe[trackio]'"),
)
# Servers have environments of their own, whose Python is `engine.server.python`.
SERVERS = (("SGLang", ".venv-sglang"), ("vLLM", ".venv-vllm"))


def environment() -> list[tuple[str, str]]:
    """What a run finds here, as names and values; of what is absent, the command that installs it."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), None)
    found = [
        ("pekoe", version("pekoe")),
        ("Python", f"{platform.python_version()} on {platform.platform(terse=True)}"),
        ("torch", torch.__version__),
        ("cores", f"{os.cpu_count()} ({torch.backends.cpu.get_cpu_capability()})"),
        ("disk", f"{shutil.disk_usage('.').free / GIB:.0f} GiB free here"),
        ("GPUs", ", ".join(f"{g.name}, {g.total_memory / GIB:.0f} GiB" for g in gpus) or "none"),
        ("train.compile", f"possible ({compiler})" if compiler or gpus else "no: apt-get install g++"),
    ]
    for name, package, install in PARTS:
        try:
            found.append((name, f"{package} {version(package)}"))
        except PackageNotFoundError:
            found.append((name, f"absent: {install}"))
    for name, folder in SERVERS:
        python = Path(folder) / "bin" / "python"
        make = f"make {folder}/.stamp (for a CPU); for a GPU see recipes/server.toml"
        found.append((name, str(python) if python.exists() else f"absent here: {make}"))
    return found


def describe(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The `machine` event of a journal: versions and, of the device that is given, its name and measured ceilings."""
    found: dict[str, Any] = {
        "versions": {"pekoe": version("pekoe"), "python": platform.python_version(), "torch": torch.__version__},
        "host": platform.node(),
        "platform": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device is None:
        return found
    ceilings = measure_ceilings(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    found |= {"device": f"{device.type} ({name})", "dtype": str(dtype).removeprefix("torch.")}
    return found | {"flop_s": ceilings.flop_s, "byte_s": ceilings.byte_s}


@cache
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What a square matrix product and a copy in memory reach here: each the fastest of some."""
    found = _measure(device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was measured with is not needed again
    return found


def _measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    width, size = 8192 if device.type == "cuda" else 1024, 2**26  # 256 MiB: more than caches hold
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)  # written once before: a page's first use is not memory's speed
    return Ceilings(
        flop_s=2 * width**3 / _fastest(lambda: torch.mm(a, b), device),
        byte_s=2 * source.nbytes / _fastest(lambda: target.copy_(source), device),
    )


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < _AT_LEAST or time.perf_counter() - begun < _LONG_S:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def batch(config: RLConfig, spec: ModelSpec) -> list[str]:
    """The arithmetic of a step, and what it took where the run directory has some already."""
    rollout, algo = config.rollout, config.algo
    responses = rollout.prompts_per_step * rollout.samples_per_prompt
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    minibatch = ceil(responses / algo.minibatches)
    together = min(minibatch, max(1, config.train.token_budget // longest))
    lines = [
        f"{spec.family} of {spec.num_parameters / 1e6:,.1f}M parameters, context {spec.max_positions:,}",
        f"a step: {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} = {responses:,} responses of at "
        f"most {rollout.max_new_tokens:,} tokens: at most {responses * rollout.max_new_tokens:,} are sampled",
        f"trained in {algo.minibatches} optimizer steps of at most {minibatch * longest:,} tokens, {together} or more "
        f"responses a micro-batch",
    ]
    journal = Path(config.run.dir) / "journal.jsonl"
    steps = [event for event in read_lines(journal) if event["event"] == "step"] if journal.is_file() else []
    left = config.num_steps - (steps[-1]["step"] if steps else 0)
    if steps and left > 0:
        seconds = median(step["step_s"] for step in steps)
        lines.append(
            f"{config.run.dir} has {len(steps)} steps, {seconds:.3g} s each (median): about "
            f"{seconds * left / 60:,.1f} minutes for the {left} that are left"
        )
    return lines


def least_time(config: RLConfig, spec: ModelSpec) -> str:
    """What a step takes on this machine at the least, from the arithmetic that it cannot do without."""
    rollout, prompt = config.rollout, config.data.max_prompt_tokens
    responses, new = rollout.prompts_per_step * rollout.samples_per_prompt, rollout.max_new_tokens
    device = torch.device("cuda" if config.model.device != "cpu" and torch.cuda.is_available() else "cpu")
    reached = measure_ceilings(device, getattr(torch, config.model.dtype)).flop_s
    group = sampling_flops(spec, [(prompt, [new] * rollout.samples_per_prompt)]).total
    sampling = rollout.prompts_per_step * group / reached
    training = training_flops(spec, [prompt + new] * responses, responses * new).total / reached
    return (
        f"were every response as long as it may be, a step would take at least {sampling + training:.2g} s here: "
        f"arithmetic alone ({sampling:.2g} s to sample, {training:.2g} s to train), at a matrix product's "
        f"{reached / 1e9:,.0f} GFLOP/s"
    )
