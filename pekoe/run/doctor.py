"""`pekoe doctor`: what there is on this machine, and whether a recipe's training fits in its memory."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from statistics import median

import psutil
import torch

from pekoe.config.base import MAX_COUNT, read_toml
from pekoe.config.cluster import ClusterSection, ParallelSection
from pekoe.config.recipes import RLConfig, SFTConfig, load_config
from pekoe.core.errors import UserError
from pekoe.core.hardware import PROCESS, USABLE, Device, device_named
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress, ProgressReporter
from pekoe.core.roofline import sampling_flops, training_flops
from pekoe.core.spec import Family, FamilySpec, ModelSpec
from pekoe.core.words import counted
from pekoe.model import LoRA, read_spec
from pekoe.plan.shapes import recognise_model
from pekoe.run.build import check_context, takes_turns
from pekoe.run.hardware import measure_ceilings
from pekoe.train.adamw import MAX_BETA2
from pekoe.train.memory_estimate import StepMemory, predict

GIB = 2**30
JUDGE = int(0.15 * GIB)  # a judge process
GAPS = 0.5  # on a CPU, of forward and backward: the most seen; activation checkpointing calls `limit_malloc_cache`
GAPS_OF_ADAPTERS = 0.2  # then, too: their blocks may be smaller than its limit

_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")

# (what it is for, the package that says whether it is there, how it is installed)
PARTS = (
    ("cluster", "ray", "pip install 'pekoe[cluster]'"),
    ("report", "plotly", "pip install 'pekoe[report]'"),
    ("data sets", "datasets", "pip install 'pekoe[data]'"),
    ("demo, gym", "reasoning-gym", "pip install 'pekoe[demo]'"),
    ("kernel times", "aiconfigurator-core", "pip install 'pekoe[plan]'"),
    ("W&B", "wandb", "pip install 'pekoe[wandb]'"),
    ("Trackio", "trackio", "pip install 'pekoe[trackio]'"),
)
# Servers have environments of their own, whose Python is `engine.server.python`.
SERVERS = (("SGLang", ".venv-sglang"), ("vLLM", ".venv-vllm"))


# Where engine and trainer take turns, each part is held by one of them at a time.
_TRAINING = ("gradients", "gathered by FSDP", "forward and backward")
_SAMPLING = ("KV cache", "weights laid out for decoding")


@dataclass(frozen=True, slots=True)
class Forecast:
    """Whether a recipe fits: bytes of one training process at its peak."""

    parts: dict[str, int]
    available: int
    token_budget: int
    largest_budget: int
    """The largest train.token_budget that fits; 0 where none does."""
    smallest_budget: int
    """What the longest sequence needs."""
    longest: int
    """Tokens of the longest sequence."""
    turns: bool = False
    """Whether the engine gives its memory back while the trainer works."""
    kv_tokens: int | None = None
    """That the engine's KV cache holds; None: no engine is in this process."""

    @property
    def total(self) -> int:
        if not self.turns:
            return sum(self.parts.values())
        training, sampling = (sum(self.parts.get(name, 0) for name in names) for names in (_TRAINING, _SAMPLING))
        return sum(self.parts.values()) - min(training, sampling)

    @property
    def fits(self) -> bool:
        return self.total <= USABLE * self.available and self.kv_fits

    @property
    def kv_fits(self) -> bool:
        """Whether the KV cache holds the longest sequence."""
        return self.kv_tokens is None or self.kv_tokens >= self.longest

    @property
    def could_fit(self) -> bool:
        """Whether it does with a smaller train.token_budget."""
        return self.kv_fits and self.largest_budget >= self.smallest_budget

    def lines(self) -> list[str]:
        """Its table."""
        lines: list[str] = []
        for name, size in self.parts.items():
            when = ""
            if self.turns and name in _TRAINING + _SAMPLING:
                when = "  while it trains" if name in _TRAINING else "  while it samples"
            if name == "KV cache" and self.kv_tokens:
                when += f": {self.kv_tokens:,} tokens"
            lines.append(f"{name:<29} {_size(size)}{when}")
        lines.append(f"{'together, at the peak':<29} {_size(self.total)}")
        lines.append(f"{f'{USABLE:.0%} of what is available':<29} {_size(USABLE * self.available)}")
        return lines


def environment() -> list[tuple[str, str]]:
    """Software and devices of this machine as names and values; for what is absent, the command that installs it."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), None)
    rows = [
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
            rows.append((name, f"{package} {version(package)}"))
        except PackageNotFoundError:
            rows.append((name, f"absent: {install}"))
    for name, folder in SERVERS:
        python = Path(folder) / "bin" / "python"
        install = f"python -m venv {folder} && {python} -m pip install {name.lower()} (pekoe recipe server)"
        rows.append((name, str(python) if python.exists() else f"absent here: {install}"))
    return rows


def examine(
    recipe: str,
    overrides: Sequence[str],
    processes: int,
    memory_bytes: int | None,
    place: Callable[[ClusterSection, ProgressReporter], list[str]] | None = None,
    device: str | None = None,
) -> tuple[list[str], str | None]:
    """A recipe's forecast in words, and what is wrong with it, if anything is.

    Args:
        place: where a cluster's engines and ranks would be, a line a node (`pekoe.ray.plan`).
        device: a GPU that need not be here, by its name; the model need not be either, if it is a known one.
    """
    gpu = device_named(device, "doctor --device") if device else None
    overrides = [*overrides, *(["model.device=cuda"] if gpu else [])]
    kind = RLConfig if "num_steps" in read_toml(Path(recipe)) else SFTConfig  # a recipe of `rl` must have it
    config = load_config(recipe, overrides, kind)
    spec, source = _spec(config)
    if isinstance(config, RLConfig):
        check_context(spec, config.data.max_prompt_tokens, config.rollout.max_new_tokens)
    lines = [*([source] if source else []), *(step_summary(config, spec) if isinstance(config, RLConfig) else [])]
    if gpu is not None:
        memory_bytes = memory_bytes or int(gpu.memory_bytes)
        lines.append(f"on one {gpu.name}: {memory_bytes / GIB:.1f} GiB ({gpu.source})")
    if isinstance(config, RLConfig) and config.cluster is not None:
        processes = config.cluster.training.ranks
        if gpu is None:  # else the cluster is not here either
            assert place is not None
            lines += place(config.cluster, NoProgress())
        lines.append(f"of {processes} training ranks, each:")
    memory = forecast(config, processes, memory_bytes)
    if isinstance(config, RLConfig) and config.cluster is None and (gpu or memory_bytes is None):
        # After the forecast, as measuring takes memory.
        lines.append(min_step_time(config, spec, gpu))
    lines += memory.lines()
    if memory.fits:
        lines.append(f"it fits; the largest train.token_budget that does is about {memory.largest_budget:,}")
        return lines, None
    if memory.could_fit:
        return lines, (
            f"train.token_budget: expected at most {memory.largest_budget}, which fits, got {memory.token_budget}"
        )
    if isinstance(config, RLConfig) and not memory.kv_fits and (config.engine.kv_tokens or config.engine.kv_gib):
        key = "engine.kv_tokens" if config.engine.kv_tokens else "engine.kv_gib"
        return lines, (
            f"{key}: expected KV of the longest sequence, {memory.longest} tokens, got room for {memory.kv_tokens}; "
            f"nearest: engine.kv_tokens={memory.longest}"
        )
    nearest = _nearest(recipe, overrides, kind, processes, memory_bytes, memory.smallest_budget)
    if memory.largest_budget >= memory.smallest_budget:
        return lines, (
            f"memory: expected room for KV of the longest sequence, {memory.longest} tokens, got {memory.kv_tokens}"
            f"{nearest}"
        )
    return lines, (
        f"memory: expected {memory.total / GIB:.1f} GiB or more, got {USABLE * memory.available / GIB:.1f} GiB; "
        f"no train.token_budget fits the longest sequence, {memory.smallest_budget} tokens at each process{nearest}"
    )


# What is tried, in this order, where a recipe does not fit: what costs least first.
_CHANGES = (
    ("train.activation_checkpointing=true",),
    ("model.dtype='bfloat16'", "train.activation_checkpointing=true"),
    ("train.moments='bfloat16'", "model.dtype='bfloat16'", "train.activation_checkpointing=true"),
    ("model.lora.rank=32", "train.activation_checkpointing=true"),
    ("model.lora.rank=32", "model.dtype='bfloat16'", "train.activation_checkpointing=true"),
)


def _nearest(
    recipe: str,
    overrides: Sequence[str],
    kind: type[RLConfig] | type[SFTConfig],
    processes: int,
    memory: int | None,
    smallest: int,
) -> str:
    """What would make a recipe fit, at the end of a message: changes of keys, or shorter sequences.

    `smallest`: tokens of a micro-batch that the longest sequence needs; with so many it is predicted, which is quick.
    """

    def forecast_with(words: Sequence[str]) -> Forecast:
        return forecast(load_config(recipe, [*overrides, *words], kind), processes, memory, refine=False)

    given = load_config(recipe, overrides, kind)
    found, new = None, list[str]()
    for changes in _CHANGES:
        words = [change for change in changes if _says_more(given, change)]
        try:
            changed = forecast_with([*words, f"train.token_budget={smallest}"])
        except UserError:  # a rank above a dimension of the model
            continue
        if changed.fits:
            budget = given.train.token_budget
            enough = changed.largest_budget > 1.25 * budget  # extrapolated
            return f"; nearest: {' '.join([*words, *([] if enough else [f'train.token_budget={smallest}'])])}"
        found, new = changed, words
    if found is None or not isinstance(given, RLConfig):
        return ""
    for _ in range(3):
        most = min(found.largest_budget, found.kv_tokens or found.largest_budget)
        if (new_tokens := most - given.data.max_prompt_tokens) < 1:
            return ""
        words = [*new, f"rollout.max_new_tokens={new_tokens}", f"train.token_budget={most}"]
        found = forecast_with(words)
        if found.fits:
            return f"; nearest: {' '.join(words)}"
    return ""


def _says_more(config: RLConfig | SFTConfig, change: str) -> bool:
    """Whether a change is one: of a recipe that has an adapter or bfloat16 it is not."""
    if change.startswith("model.lora"):
        return config.model.lora is None
    if change.startswith("train.moments"):
        return config.train.moments == "float32" and config.optim.beta2 <= MAX_BETA2
    return config.model.dtype != "bfloat16" if "dtype" in change else not config.train.activation_checkpointing


def _spec(config: RLConfig | SFTConfig) -> tuple[ModelSpec, str]:
    """The model's shape; of a known model that is not here, by its directory's name, which is then said."""
    path = Path(config.model.path)
    shape = None if (path / "config.json").is_file() else recognise_model(path.name)
    if shape is None or shape.num_experts or shape.kv_width is not None or not shape.gated:
        return read_spec(path, config.model.implementation)[0], ""
    sizes = shape.vocab, shape.hidden, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim
    family: Family = "llama"
    if shape.name.startswith("qwen"):
        family = "qwen3" if shape.name.startswith("qwen3") else "qwen2"
    biases, norms = family == "qwen2", family == "qwen3"
    spec = ModelSpec(
        family, *sizes, shape.dense_width, 131_072, tied_embeddings=shape.tied, qkv_bias=biases, qk_norm=norms
    )
    return spec, f"{path} is not here: the shape is {shape.name}'s, by its name"


def step_summary(config: RLConfig, spec: ModelSpec) -> list[str]:
    """The sizes of a step, and its median seconds where the run directory has steps already."""
    rollout, algo = config.rollout, config.algo
    responses = rollout.prompts_per_step * rollout.samples_per_prompt
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    minibatch = ceil(responses / algo.minibatches)
    together = min(minibatch, max(1, config.train.token_budget // longest))
    active = ""
    if isinstance(spec, FamilySpec) and spec.num_experts:
        active = f" ({spec.active / 1e6:,.1f}M for a token: {spec.experts_per_token} of {spec.num_experts} experts)"
    lines = [
        f"{spec.family} of {spec.num_parameters / 1e6:,.1f}M parameters{active}, context {spec.max_positions:,}",
        f"a step: {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} = {responses:,} responses of at "
        f"most {rollout.max_new_tokens:,} tokens: at most {responses * rollout.max_new_tokens:,} are sampled",
        f"trained in {counted(algo.minibatches, 'optimizer step')} of at most {minibatch * longest:,} tokens, "
        f"{together} or more responses a micro-batch",
    ]
    if adapter := config.model.adapter_parameters(spec):
        item = 2 if config.model.dtype == "bfloat16" else 4
        lines.append(
            f"an adapter of {adapter / 1e6:,.2f}M parameters: a publish to vLLM is {_size(4 * adapter).strip()}, of "
            f"the whole model {_size(item * spec.num_parameters).strip()}"
        )
    journal = Path(config.run.dir) / "journal.jsonl"
    events = read_lines(journal) if journal.is_file() else []
    steps = [event for event in events if event.get("event") == "step" and {"step", "step_s"} <= event.keys()]
    left = config.num_steps - (steps[-1]["step"] if steps else 0)
    if steps and left > 0:
        seconds = median(step["step_s"] for step in steps)
        lines.append(
            f"{config.run.dir} has {counted(len(steps), 'step')}, {seconds:.3g} s each (median): about "
            f"{seconds * left / 60:,.1f} minutes for the {left:,} that {'is' if left == 1 else 'are'} left"
        )
    return lines


def min_step_time(config: RLConfig, spec: ModelSpec, gpu: Device | None = None) -> str:
    """The least time of a step on this machine, or on a GPU that is not here, from its floating-point operations."""
    rollout, prompt = config.rollout, config.data.max_prompt_tokens
    responses, new = rollout.prompts_per_step * rollout.samples_per_prompt, rollout.max_new_tokens
    if gpu is None:
        device = torch.device("cuda" if config.model.device != "cpu" and torch.cuda.is_available() else "cpu")
        reached, where, whose = (
            measure_ceilings(device, getattr(torch, config.model.dtype)).flop_s,
            "here",
            "a matrix product's",
        )
    else:
        reached, where, whose = gpu.flop_s, "there", "the data sheet's"
    group = sampling_flops(spec, [(prompt, [new] * rollout.samples_per_prompt)]).total
    sampling = rollout.prompts_per_step * group / reached
    adapter = config.model.adapter_parameters(spec)
    training = training_flops(spec, [prompt + new] * responses, responses * new, adapter).total / reached
    return (
        f"were every response as long as it may be, a step would take at least {sampling + training:.2g} s {where}: "
        f"arithmetic alone ({sampling:.2g} s to sample, {training:.2g} s to train), at {whose} "
        f"{reached / 1e9:,.0f} GFLOP/s"
    )


def available_bytes(device: str) -> int:
    """Memory that a new process could have: of the first GPU, or of this machine or container."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("doctor: expected --memory-gib for a GPU (model.device = 'cuda'), as this machine has none")
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    if _LIMIT.is_file() and (limit := _LIMIT.read_text().strip()).isdecimal():
        free = min(free, int(limit) - int(_USED.read_text()))
    return free


def forecast(
    config: RLConfig | SFTConfig, processes: int = 1, memory_bytes: int | None = None, refine: bool = True
) -> Forecast:
    """Whether a recipe's training fits.

    Args:
        processes: how many train together; those on one machine share its memory, on a GPU each has its own.
        memory_bytes: for a machine other than this one.
        refine: predict the largest budget from a step of about that size, too.
    """
    spec, _ = _spec(config)
    cuda = config.model.device == "cuda" or (config.model.device == "auto" and torch.cuda.is_available())
    device = "cuda" if cuda else "cpu"
    available = memory_bytes or available_bytes(device) // (1 if cuda else processes)
    turns = isinstance(config, RLConfig) and takes_turns(config, device)
    step = _step(config, spec, processes, device, config.train.token_budget)
    beside = _beside(config, spec, cuda, step.weights, step.gradients)
    room = int(USABLE * available) - sum(size for name, size in beside.items() if not (turns and name in _SAMPLING))
    parts = {
        "weights": step.weights,
        "gradients": step.gradients,
        "Adam's moments": step.moments,
        "gathered by FSDP": step.gathered,
        "forward and backward": step.activations,
    } | beside
    if not cuda:  # on a GPU the copy goes to the host, and the allocator is torch's
        held = parts["copy for checkpoints"] = step.gradients + step.moments  # of weights that are trained
        room -= held
        gaps = GAPS_OF_ADAPTERS if config.model.lora else 0.0
        gaps = gaps if config.train.activation_checkpointing else GAPS
        parts["gaps of the allocator"] = round(gaps * step.activations)
    parallel = _parallel(config)
    longest = _longest(config, spec)
    smallest = -(-longest // (parallel.cp if parallel else 1))
    kv_tokens = None
    if isinstance(config, RLConfig) and config.cluster is None and config.engine.backend == "embedded":
        per_token = spec.kv_values_per_token * _kv_item(config, cuda)
        left = int(USABLE * available) - sum(size for name, size in parts.items() if not (turns and name in _TRAINING))
        kv_tokens = config.engine.kv_room(longest, per_token, left if cuda else None)
        parts["KV cache"] = kv_tokens * per_token
        if not turns:  # what is left for it is what training does not need, down to one sequence
            least = (
                min(kv_tokens, smallest)
                if cuda and not (config.engine.kv_gib or config.engine.kv_tokens)
                else kv_tokens
            )
            room -= least * per_token
    largest = _largest(step, room, parts)
    if largest and refine:  # chunks and padding make it less than linear: once more, where it matters
        largest = _largest(_step(config, spec, processes, device, largest), room, parts)
    parts = {name: size for name, size in parts.items() if size}
    return Forecast(parts, available, config.train.token_budget, largest, smallest, longest, turns, kv_tokens)


def _largest(step: StepMemory, room: int, parts: dict[str, int]) -> int:
    """The largest budget within `room`, of which state has its bytes once and the rest, where it does, gaps."""
    state = step.total - step.activations
    gaps = parts.get("gaps of the allocator", 0) / max(1, parts["forward and backward"])
    return min(MAX_COUNT, step.largest_budget(state + int((room - state) / (1 + gaps))))


def _step(config: RLConfig | SFTConfig, spec: ModelSpec, processes: int, device: str, budget: int) -> StepMemory:
    parallel = _parallel(config)
    tp, replicas = (parallel.tp, parallel.replicas) if parallel else (1, 1)
    if processes < tp * replicas:
        raise UserError(
            f"doctor: expected at least parallel.tp x parallel.replicas processes, {tp * replicas}, got {processes}; "
            f"nearest: --processes {tp * replicas}"
        )
    longest = min(budget, _longest(config, spec))
    dtype, again = getattr(torch, config.model.dtype), config.train.activation_checkpointing
    section = config.model.lora
    lora = LoRA(section.rank, section.alpha, section.targets or ()) if section else None
    shards, train = processes // (tp * replicas), config.train
    moment = 0 if train.moments_on_host and device == "cuda" else 2 if train.moments == "bfloat16" else 4
    return predict(spec, budget, longest, dtype, again, device, tp, shards, lora, moment)


def _parallel(config: RLConfig | SFTConfig) -> ParallelSection | None:
    return config.parallel if isinstance(config, SFTConfig) else config.cluster and config.cluster.training


def _longest(config: RLConfig | SFTConfig, spec: ModelSpec) -> int:
    if isinstance(config, RLConfig):
        return config.data.max_prompt_tokens + config.rollout.max_new_tokens
    return min(config.train.token_budget * config.parallel.cp, spec.max_positions)


def _beside(config: RLConfig | SFTConfig, spec: ModelSpec, cuda: bool, weights: int, trained: int) -> dict[str, int]:
    """What the process holds beside training, where it holds `weights` bytes of weights, of which it trains
    `trained`."""
    beside = {"Python and torch": PROCESS}
    if isinstance(config, SFTConfig):
        return beside
    if config.algo.kl and config.model.lora is None:
        beside["reference model"] = weights // (2 if config.model.dtype == "bfloat16" else 1)
    if config.cluster is not None:  # judges and engines are other processes
        return beside
    beside["judges"] = 0 if cuda else config.verify.workers * JUDGE
    engine = config.engine
    if config.rollout.max_lag:
        beside["copies of the weights"] = trained * (2 if engine.backend == "embedded" else 1)
    if engine.backend == "embedded" and (config.model.lora is None or config.model.dtype == "float32"):
        beside["weights laid out for decoding"] = _kv_item(config, cuda) * spec.num_parameters  # else as they are
    return beside


def _kv_item(config: RLConfig, cuda: bool) -> int:
    """Bytes of a number of KV, and of the weights that the engine in this process decodes with."""
    return 2 if cuda and config.model.dtype == "bfloat16" else 4


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:8.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:8.2f} MiB"
