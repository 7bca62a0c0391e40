"""What `pekoe doctor` says of this machine, and of a recipe's batch: counts, without running anything."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from statistics import median

import torch

from pekoe.core.config import RLConfig
from pekoe.core.journal import read_lines
from pekoe.core.spec import ModelSpec

GIB = 2**30

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
