"""From a config to the objects that a loop is given. Laptop, GPU and cluster differ here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pekoe.config.data import ProblemSection
from pekoe.config.recipes import (
    CurateConfig,
    EvalConfig,
    EvalSection,
    ModelSection,
    Process,
    RLConfig,
    RolloutSection,
    TrainSection,
)
from pekoe.core.errors import UserError
from pekoe.core.progress import ProgressReporter, phase
from pekoe.core.spec import ModelSpec
from pekoe.core.types import Problem, Prompt, SamplingParams
from pekoe.data.mix import DataReport, gather_problems
from pekoe.data.order import DataOrder
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine import EmbeddedEngine, Generator, RemoteEngine, SGLangEngine, VLLMEngine
from pekoe.model import Decoder, load_model
from pekoe.run.distributed import require_single_process
from pekoe.run.hardware import describe
from pekoe.run.interrupt import Stop
from pekoe.run.judging import check_kinds, make_judge
from pekoe.run.rollouts import Sampler
from pekoe.run.run_dir import RunDir, with_date
from pekoe.run.sync import WeightSync
from pekoe.train import Layout, Trainer
from pekoe.train.memory import limit_malloc_cache


@dataclass(slots=True)
class RLParts:
    """What `run_rl` works with."""

    config: RLConfig
    problems: list[Problem]
    held_out: list[Problem]
    order: DataOrder
    tokenizer: Tokenizer
    trainer: Trainer
    sampler: Sampler
    sync: WeightSync
    run: RunDir
    view: ProgressReporter
    stop: Stop
    measured: Callable[[], dict[str, Any]] = dict[str, Any]
    """What else the journal says of a step: since it was last asked."""
    spec: ModelSpec | None = None
    """The model's shape, where a step's operations and bytes are to be counted."""
    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the journal says of the machine, in the beginning."""


def prepare(run: Process, train: TrainSection | None = None) -> None:
    """This process's threads, and its allocator where memory was asked to be spared."""
    if train is not None and train.activation_checkpointing:
        limit_malloc_cache()
    torch.set_num_threads(run.threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def open_tokenizer(model: ModelSection, spec: ModelSpec) -> Tokenizer:
    tokenizer = Tokenizer.load(Path(model.path)).with_template(model.template)
    if tokenizer.vocab_size > spec.vocab_size:
        raise UserError(
            f"{model.path}: expected a tokenizer of at most the model's {spec.vocab_size} tokens, "
            f"got {tokenizer.vocab_size}"
        )
    return tokenizer


def open_model(model: ModelSection) -> tuple[Decoder, Tokenizer, torch.dtype]:
    """Load weights and tokenizer; returns them with the dtype of the matrix products."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if model.device == "auto" else model.device
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device: expected a CUDA device, found none on this machine; nearest: 'cpu'")
    decoder = load_model(model.path, torch.float32, name)
    return decoder, open_tokenizer(model, decoder.spec), getattr(torch, model.dtype)


def open_problems(
    path: str, tokenizer: Tokenizer, max_prompt_tokens: int, skip: bool, view: ProgressReporter
) -> list[Problem]:
    """Read an evaluation set. A prompt that is too long is an error, or skipped and reported."""
    data = ProblemSection(train=path, max_prompt_tokens=max_prompt_tokens, skip_malformed=skip)
    problems, report = gather_problems(data, 0, tokenizer, view)
    if losses := report.losses(path):
        view.say(f"{path}: skipped {losses}")
    return problems


def check_context(spec: ModelSpec, max_prompt_tokens: int, max_new_tokens: int) -> None:
    longest, context = max_prompt_tokens + max_new_tokens, spec.max_positions
    if longest > context:
        raise UserError(
            f"context: expected prompt and response to fit the model's {context} positions, got max_prompt_tokens "
            f"{max_prompt_tokens} + max_new_tokens {max_new_tokens} = {longest}; "
            f"most new tokens that fit: {max(0, context - max_prompt_tokens)}"
        )


def sampling(rollout: RolloutSection, tokenizer: Tokenizer, seed: int) -> SamplingParams:
    return SamplingParams(
        n=rollout.samples_per_prompt,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_new_tokens=rollout.min_new_tokens,
        max_new_tokens=rollout.max_new_tokens,
        stop_token_ids=tokenizer.stop_token_ids,
        seed=seed,
        stream="train",
    )


def sampling_for(section: EvalSection, max_new_tokens: int, tokenizer: Tokenizer, seed: int) -> SamplingParams:
    return SamplingParams(
        n=section.samples,
        temperature=section.temperature,
        top_p=section.top_p,
        max_new_tokens=max_new_tokens,
        stop_token_ids=tokenizer.stop_token_ids,
        seed=seed,
        stream="eval",
    )


def open_sampler(
    config: RLConfig | EvalConfig | CurateConfig,
    model: Decoder,
    tokenizer: Tokenizer,
    longest: int,
    asked: Sequence[SamplingParams],
    log_dir: Path,
    view: ProgressReporter,
    stop: Stop,
    stack: ExitStack,
) -> Sampler:
    """The engine that the config names, and judges, closed with `stack`.

    Args:
        model: what the embedded engine samples from. Servers start from the same directory, `config.model.path`.
        longest: tokens of the longest prompt with its response.
        asked: every kind of sampling that the engine will be asked for.
        log_dir: for servers.
    """
    engine = open_engine(config, model, longest, asked, log_dir, view)
    stack.callback(engine.close)
    check_room(engine.max_sequence_tokens, longest)
    judge = make_judge(config.verify, tokenizer, config.run.seed)
    stack.callback(judge.close)
    return Sampler(engine, tokenizer, judge, view, stop)


def check_room(kv_tokens: int, longest: int) -> None:
    if kv_tokens < longest:
        raise UserError(
            f"engine.kv_tokens: expected room for the longest sequence, {longest} tokens, got {kv_tokens}; "
            f"raise it (or engine.kv_gib, where it is absent)"
        )


def open_engine(
    config: RLConfig | EvalConfig | CurateConfig,
    model: Decoder,
    longest: int,
    asked: Sequence[SamplingParams],
    log_dir: Path,
    view: ProgressReporter,
) -> Generator:
    """The engine that the config names, ready; says what it takes. See `open_sampler`."""
    section, server = config.engine, config.engine.server
    if section.backend == "embedded":
        engine = EmbeddedEngine(model, section, longest, getattr(torch, config.model.dtype))
        view.say(f"KV cache: {engine.kv_bytes / 2**20:.0f} MiB for {engine.num_kv_tokens:,} tokens")
        return engine
    threads = max(1, (config.run.threads or os.cpu_count() or 1) // (len(server.urls) or server.count))
    device = next(model.parameters()).device.type
    return open_servers(config, model.spec, device, threads, longest, asked, log_dir, view)


def open_servers(
    config: RLConfig | EvalConfig | CurateConfig,
    spec: ModelSpec,
    device: str,
    threads: int,
    longest: int,
    asked: Sequence[SamplingParams],
    log_dir: Path,
    view: ProgressReporter,
    releases: bool = False,
) -> RemoteEngine:
    """As `open_engine`, of servers; nothing of the model is loaded here. See `RemoteEngine`."""
    section, server = config.engine, config.engine.server
    kind = {"sglang": SGLangEngine, "vllm": VLLMEngine}[section.backend]
    check_room(section.kv_tokens or longest, longest)  # before any is started
    number = len(server.urls) or server.count
    if device == "cuda" and not server.urls and server.count > 1 and not server.gpus:
        each = ", ".join(f'"{i}"' for i in range(number))
        raise UserError(
            f"engine.server.gpus: expected the GPUs of each of {number} servers, which would all take the first; "
            f"nearest: [{each}]"
        )
    view.say(
        f"{'attaching to' if server.urls else 'starting'} {number} {section.backend} server{'s' * (number > 1)}, "
        f"weights by {server.sync}; at most {server.start_limit_s:g} s; logs in {log_dir}"
    )
    with phase(view, "servers"):
        remote = kind(
            Path(config.model.path),
            section,
            spec,
            longest,
            log_dir,
            config.model.dtype,
            device,
            threads,
            on_event=view.say,
            asked=asked,
            releases=releases,
        )
    if isinstance(remote, SGLangEngine) and not remote.seeded:
        view.say("SGLang runs without --enable-deterministic-inference: the same seed does not give the same tokens")
    return remote


def make_trainer(config: RLConfig, model: Decoder, dtype: torch.dtype, layout: Layout | None = None) -> Trainer:
    updates, train = config.num_steps * config.algo.minibatches, config.train
    reference = None
    if config.algo.kl:
        # Where processes share it, it goes to the device layer by layer: no device ever holds it whole.
        device = "cpu" if layout is not None else str(next(model.parameters()).device)
        reference = load_model(config.model.path, dtype, device).requires_grad_(False)
    return Trainer(
        model,
        config.optim,
        train.token_budget,
        updates,
        config.rollout.temperature,
        dtype,
        activation_checkpointing=train.activation_checkpointing,
        compile=train.compile,
        layout=layout,
        reference=reference,
    )


@dataclass(frozen=True, slots=True)
class Task:
    """What an RL run trains on and is measured by, checked against the model."""

    problems: list[Problem]
    held_out: list[Problem]
    report: DataReport
    longest: int
    """Tokens of the longest prompt with its response."""
    asked: list[SamplingParams]
    """Every kind of sampling that the engines will be asked for."""


def open_task(config: RLConfig, spec: ModelSpec, tokenizer: Tokenizer, view: ProgressReporter) -> Task:
    """Read the data of a recipe. UserError for what does not fit the model, or is not enough."""
    data, rollout = config.data, config.rollout
    new_tokens = max(rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    check_context(spec, data.max_prompt_tokens, new_tokens)
    problems, report = gather_problems(data, config.run.seed, tokenizer, view)
    for line in report.summary():
        view.say(line)
    check_kinds(problems, config.verify, data.described)
    asked = [sampling(rollout, tokenizer, config.run.seed)]
    held_out: list[Problem] = []
    if config.eval.data and config.eval.every:
        held_out = open_problems(config.eval.data, tokenizer, data.max_prompt_tokens, data.skip_malformed, view)
        check_kinds(held_out, config.verify, config.eval.data)
        asked.append(sampling_for(config.eval, config.eval.max_new_tokens or rollout.max_new_tokens, tokenizer, 0))
    if len(problems) < rollout.prompts_per_step:
        raise UserError(
            f"rollout.prompts_per_step: expected at most the {len(problems)} problems of an epoch, "
            f"got {rollout.prompts_per_step}"
        )
    return Task(problems, held_out, report, data.max_prompt_tokens + new_tokens, asked)


def build_rl(config: RLConfig, view: ProgressReporter, stop: Stop, stack: ExitStack) -> RLParts:
    """Everything for `pekoe rl`. What must be closed is pushed on `stack`."""
    require_single_process("rl")
    config = with_date(config)
    prepare(config.run, config.train)
    model, tokenizer, dtype = open_model(config.model)
    machine = describe(next(model.parameters()).device, dtype)  # before an engine takes what memory there is
    task = open_task(config, model.spec, tokenizer, view)
    run = stack.enter_context(RunDir(config, (view.event,)))
    if task.report.dropped:
        task.report.write(run.path / "data.jsonl")
    trainer = make_trainer(config, model, dtype)
    logs = run.path / "logs"
    sampler = open_sampler(config, model, tokenizer, task.longest, task.asked, logs, view, stop, stack)
    server = config.engine.server
    route = "alias" if config.engine.backend == "embedded" else server.sync
    canary = Prompt("canary", 0, tokenizer.encode_prompt(task.problems[0].messages))
    return RLParts(
        config=config,
        problems=task.problems,
        held_out=task.held_out,
        order=DataOrder([p.uid for p in task.problems], config.run.seed),
        tokenizer=tokenizer,
        trainer=trainer,
        sampler=sampler,
        sync=WeightSync(trainer, sampler.engine, canary, route, 1 if route == "alias" else server.checksum_every),
        run=run,
        view=view,
        stop=stop,
        measured=EngineCounts(sampler.engine).tell,
        spec=model.spec,
        machine=machine,
    )


class EngineCounts:
    """What an engine computed of prompts and what it need not, step by step."""

    def __init__(self, engine: Generator) -> None:
        self._engine, self._last = engine, engine.stats()

    def tell(self) -> dict[str, Any]:
        """Since it was last asked."""
        last, now = self._last, self._engine.stats()
        self._last = now
        found = {
            "prefill_tokens": now.num_prefill_tokens - last.num_prefill_tokens,
            "cached_tokens": now.num_cached_tokens - last.num_cached_tokens,
            "shared_tokens": now.num_shared_tokens - last.num_shared_tokens,
            "num_preemptions": now.num_preemptions - last.num_preemptions,
            "num_forwards": now.num_forwards - last.num_forwards,
        }
        return {name: number for name, number in found.items() if number}
