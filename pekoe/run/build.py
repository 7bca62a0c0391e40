"""Builds the objects of a loop from a config, in one process; `pekoe.ray` builds those of a cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pekoe.agents.episodes import Episodes, check_episode
from pekoe.agents.tools import AnswerParser
from pekoe.algo.advantage import find_advantage
from pekoe.config.data import ProblemSection
from pekoe.config.recipes import (
    CurateConfig,
    CurateSection,
    EvalConfig,
    EvalSection,
    ModelSection,
    OptimSection,
    Process,
    RLConfig,
    RolloutSection,
    TrainedModelSection,
    TrainSection,
)
from pekoe.config.secrets import without_secrets
from pekoe.core import loop as core
from pekoe.core.errors import UserError
from pekoe.core.functions import load_function
from pekoe.core.progress import ProgressReporter, phase
from pekoe.core.spec import ModelSpec
from pekoe.core.types import IntArray, Problem, SamplingParams
from pekoe.core.words import counted
from pekoe.data.mix import DataReport, RefusedReferences, gather_problems
from pekoe.data.order import DataOrder
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine.base import EngineKind
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.engine.pool import EnginePool, Starter
from pekoe.engine.servers import ServerEngine, SGLangEngine, VLLMEngine
from pekoe.model import LanguageModel, LoRA, check_model, check_routing, is_adapter, load_model
from pekoe.model.hf import base_of
from pekoe.model.lora import add_lora
from pekoe.run.checkpoints import checkpoints, step_of
from pekoe.run.distributed import require_single_process
from pekoe.run.hardware import describe
from pekoe.run.inputs import inputs_of
from pekoe.run.interrupt import LastStep, StepTimer, Stop
from pekoe.run.judging import make_judge
from pekoe.run.metrics import StepCounters
from pekoe.run.outlook import Outlook
from pekoe.run.records import LocalRecords, RecordWriter
from pekoe.run.references import reference_check
from pekoe.run.rollouts import Rollouts
from pekoe.run.run_dir import RunDir, with_date
from pekoe.train import Layout, Trainer
from pekoe.train.memory import limit_malloc_cache
from pekoe.train.memory_estimate import predict
from pekoe.train.trainer import learning_rate
from pekoe.weights import LocalSender, StagedSender, WeightChannel, forward_logprobs


@dataclass(slots=True)
class RLParts:
    """What `run_rl` works with."""

    config: RLConfig
    problems: list[Problem]
    held_out: list[Problem]
    order: DataOrder
    stop_token_ids: tuple[int, ...]
    trainer: core.Trainer
    last_step: LastStep
    rollouts: core.Rollouts
    eval_rollouts: core.Rollouts
    """The same engines and judges; its groups do not queue behind those of training."""
    weights: core.Weights
    records: RecordWriter
    run: RunDir
    view: ProgressReporter
    timer: StepTimer
    counters: StepCounters
    spec: ModelSpec
    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    """The journal's event on the machine, written when the run begins."""
    collapsed: bool = False
    """Whether a collapse was reported."""
    outlook: Outlook = field(default_factory=Outlook)
    was_well: bool = False
    """Whether a step of the run `looks_well`."""
    num_admitted: int = 0
    """Steps whose groups have been put, since the run began."""
    in_flight: core.InFlight | None = None
    """What was put and not taken when the last step was complete."""

    def begin_step(self) -> None:
        """Forget the phases and counters of what came before."""
        self.timer.restart()
        self.counters.take()


def prepare(run: Process, train: TrainSection | None = None) -> None:
    """Set the number of threads, and limit the allocator's cache where activations are checkpointed."""
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


def open_model(model: ModelSection, seed: int = 0) -> tuple[LanguageModel, Tokenizer, torch.dtype]:
    """Load weights and tokenizer; returns them with the dtype of the matrix products. `seed`: of a new adapter, where
    the recipe asks for one."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if model.device == "auto" else model.device
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device: expected a CUDA device, found none on this machine; nearest: 'cpu'")
    decoder, dtype = load_trained(model, name, seed), getattr(torch, model.dtype)
    return decoder, open_tokenizer(model, decoder.spec), dtype


def load_trained(model: ModelSection, device: str, seed: int, own: torch.dtype = torch.float32) -> LanguageModel:
    """The weights in `own`; with a section `lora` frozen, in the dtype of the matrix products, with a new adapter."""
    section = model.lora if isinstance(model, TrainedModelSection) else None
    if section is None:
        decoder = load_model(model.path, own, device, model.implementation)
        check_model(decoder)
        return decoder
    base, digest = base_of(model.path)
    decoder = load_model(model.path, getattr(torch, model.dtype), device, model.implementation)
    check_model(decoder)
    lora = LoRA(section.rank, section.alpha, section.targets or (), base, digest)
    decoder.lora = add_lora(decoder, lora, seed)
    return decoder


def open_problems(
    data: ProblemSection,
    tokenizer: Tokenizer,
    view: ProgressReporter,
    refused: RefusedReferences | None = None,
    keep_rows: bool = False,
) -> list[Problem]:
    """Read an evaluation set (`data.train`). What is left out of it, or refused and kept, is reported."""
    problems, report = gather_problems(data, 0, tokenizer, view, refused, keep_rows)
    if losses := report.losses(data.described):
        view.say(f"{data.described}: skipped {losses}")
    for line in report.warnings():
        view.say(f"{data.described}: {line}")
    return problems


def check_context(spec: ModelSpec, max_prompt_tokens: int, max_new_tokens: int) -> None:
    longest, context = max_prompt_tokens + max_new_tokens, spec.max_positions
    if longest > context:
        key, room = "new", context - max_prompt_tokens
        if room < 1:  # fewer new tokens would not help
            key, room = "prompt", context - max_new_tokens
        raise UserError(
            f"context: expected prompt and response to fit the model's {context} positions, got max_prompt_tokens "
            f"{max_prompt_tokens} + max_new_tokens {max_new_tokens} = {longest}; "
            f"most {key} tokens that fit: {max(0, room)} (max_{key}_tokens)"
        )


def sampling(rollout: RolloutSection, stop_token_ids: tuple[int, ...], seed: int) -> SamplingParams:
    return SamplingParams(
        n=rollout.samples_per_prompt,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_new_tokens=rollout.min_new_tokens,
        max_new_tokens=rollout.max_new_tokens,
        stop_token_ids=stop_token_ids,
        seed=seed,
        stream="train",
        routing=rollout.replay_routing,
    )


def sampling_for(
    section: EvalSection | CurateSection, max_new_tokens: int, stop_token_ids: tuple[int, ...], seed: int
) -> SamplingParams:
    return SamplingParams(
        n=section.samples,
        temperature=section.temperature,
        top_p=section.top_p,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        seed=seed,
        stream="eval",
    )


def eval_sampling(config: RLConfig, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """Sampling parameters of the evaluations while a run trains."""
    new_tokens = config.eval.max_new_tokens or config.rollout.max_new_tokens
    return sampling_for(config.eval, new_tokens, stop_token_ids, config.run.seed)


def check_room(kv_tokens: int, longest: int) -> None:
    if kv_tokens < longest:
        raise UserError(
            f"engine.kv_tokens: expected room for the longest sequence, {longest} tokens, got {kv_tokens}; "
            f"raise it (or engine.kv_gib, where it is absent)"
        )


SamplingConfig = RLConfig | EvalConfig | CurateConfig


@dataclass(frozen=True, slots=True)
class EmbeddedStarter:
    """Starts the engine of this process on a model that the trainer may share (implements `engine.Starter`)."""

    model: LanguageModel
    config: SamplingConfig
    longest: int
    view: ProgressReporter
    reserve_bytes: int = 0
    """Of a GPU, that training takes while the engine holds its KV."""
    name: str = "the embedded engine"
    kind: EngineKind = "embedded"

    def start(self) -> EmbeddedEngine:
        dtype: torch.dtype = getattr(torch, self.config.model.dtype)
        routing = isinstance(self.config, RLConfig) and self.config.rollout.replay_routing
        common = self.model, self.config.engine, self.longest, dtype
        engine = EmbeddedEngine(*common, reserve_bytes=self.reserve_bytes, routing=routing)
        self.view.say(f"KV cache: {engine.kv_bytes / 2**20:.0f} MiB for {engine.num_kv_tokens:,} tokens")
        return engine


@dataclass(frozen=True, slots=True)
class ServerStarter:
    """Launches a server, or attaches to one (implements `engine.Starter`)."""

    config: SamplingConfig
    spec: ModelSpec
    device: str
    threads: int
    longest: int
    log_dir: Path
    number: int = 0
    offloads: bool = False

    @property
    def kind(self) -> EngineKind:
        return self.config.engine.backend

    @property
    def name(self) -> str:
        urls, label = self.config.engine.server.urls, _SERVERS[self.config.engine.backend].name
        return f"{label} at {without_secrets(urls[self.number])}" if urls else f"{label} server {self.number}"

    def start(self) -> ServerEngine:
        urls, model = self.config.engine.server.urls, self.config.model
        lora = model.lora if isinstance(model, TrainedModelSection) else None
        if is_adapter(Path(model.path)):
            raise UserError(
                f"model.path: expected a whole model for {_SERVERS[self.config.engine.backend].name}, got an adapter; "
                f"make one of it first: pekoe merge {model.path} NEW_DIRECTORY"
            )
        served = Path(model.path), self.config.engine, self.spec, self.longest, self.log_dir
        return _SERVERS[self.config.engine.backend](
            *(*served, model.dtype, self.device, self.threads),
            number=self.number,
            url=urls[self.number] if urls else None,
            offloads=self.offloads,
            lora_rank=lora.rank if lora else 0,
            routing=isinstance(self.config, RLConfig) and self.config.rollout.replay_routing,
        )


_SERVERS: dict[str, type[ServerEngine]] = {"sglang": SGLangEngine, "vllm": VLLMEngine}


def open_pool(
    config: SamplingConfig,
    model: LanguageModel,
    longest: int,
    planned: Sequence[SamplingParams],
    log_dir: Path,
    view: ProgressReporter,
    stop: Stop,
    stack: ExitStack,
) -> EnginePool:
    """The engines of one process that the config names, ready; closed with `stack`.

    Args:
        model: what the embedded engine samples from. Servers start from the same directory, `config.model.path`.
        longest: tokens of the longest prompt with its response.
        planned: every kind of sampling that the engines will be asked for.
        log_dir: for servers.
    """
    section, server = config.engine, config.engine.server
    if section.backend == "embedded":
        reserve = training_bytes(config, model, longest) if isinstance(config, RLConfig) else 0
        starters: list[Starter] = [EmbeddedStarter(model, config, longest, view, reserve)]
    else:
        check_room(section.kv_tokens or longest, longest)  # before any is started
        number = len(server.urls) or server.count
        device = next(model.parameters()).device.type
        if device == "cuda" and not server.urls and server.count > 1 and not server.gpus:
            nearest = ", ".join(f'"{i}"' for i in range(number))
            raise UserError(
                f"engine.server.gpus: expected the GPUs of each of {number} servers, which would all take the first; "
                f"nearest: [{nearest}]"
            )
        threads = max(1, (config.run.threads or os.cpu_count() or 1) // number)
        for params in planned:
            _SERVERS[section.backend].check_params(params)
        starters = [ServerStarter(config, model.spec, device, threads, longest, log_dir, i) for i in range(number)]
        view.say(
            f"{'attaching to' if server.urls else 'starting'} {number} {section.backend} server{'s' * (number > 1)}, "
            f"weights by {server.sync}; at most {server.start_limit_s:g} s; logs in {log_dir}"
        )
    pool = EnginePool(
        starters,
        start_limit_s=server.start_limit_s + 30,  # a server that does not start says more itself
        restart=section.backend != "embedded",
        on_event=view.say,
        serving_at_once=True,
    )
    stack.callback(pool.close)
    with phase(view, "servers") if section.backend != "embedded" else nullcontext():
        pool.wait_started(check=stop.check)
    check_room(pool.max_sequence_tokens, longest)
    for params in planned:
        pool.check(params)
    return pool


def takes_turns(config: RLConfig, device: str) -> bool:
    """Whether one process on one GPU samples and trains by turns: its engine gives KV and graphs back meanwhile."""
    return (
        device == "cuda"
        and config.cluster is None
        and config.engine.backend == "embedded"
        and not config.rollout.max_lag
    )


def training_bytes(config: RLConfig, model: LanguageModel, longest: int) -> int:
    """What a GPU must have free for a training step while the engine holds its KV."""
    device = next(model.parameters()).device.type
    if device != "cuda" or takes_turns(config, device):
        return 0
    train, dtype = config.train, getattr(torch, config.model.dtype)
    longest = min(longest, train.token_budget)
    step = predict(
        model.spec, train.token_budget, longest, dtype, train.activation_checkpointing, device, lora=model.lora
    )
    return step.gradients + step.activations


def make_trainer(config: RLConfig, model: LanguageModel, dtype: torch.dtype, layout: Layout | None = None) -> Trainer:
    updates, train = config.num_steps * config.algo.minibatches, config.train
    reference = None
    if config.rollout.replay_routing:
        check_routing(model)
    if config.algo.kl and model.lora is None:  # a model with an adapter has its reference: itself without it
        # Where processes share it, it goes to the device layer by layer: no device ever holds it whole.
        device = "cpu" if layout is not None else str(next(model.parameters()).device)
        reference = load_model(config.model.path, dtype, device, config.model.implementation).requires_grad_(False)
    return Trainer(
        model,
        config.optim,
        train.token_budget,
        updates,
        config.rollout.temperature,
        dtype,
        activation_checkpointing=train.activation_checkpointing,
        compile=train.compile,
        moments=getattr(torch, train.moments),
        moments_on_host=train.moments_on_host,
        balance_loss=train.balance_loss,
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
    planned: list[SamplingParams]
    """Every kind of sampling that the engines will be asked for."""


def open_task(config: RLConfig, spec: ModelSpec, tokenizer: Tokenizer, view: ProgressReporter) -> Task:
    """Read the data of a recipe. UserError for what does not fit the model, or is not enough."""
    data, rollout = config.data, config.rollout
    find_advantage(config.algo.advantage)  # a mistake in it is found now
    if rollout.episode is not None:
        check_episode(rollout.episode)
    for name in config.track.metrics:
        load_function(name, "track.metrics")
    new_tokens = max(rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    check_context(spec, data.max_prompt_tokens, new_tokens)
    folder = config.run.dir
    refused = reference_check(config.verify, view, folder)
    keep_rows = bool(config.verify.rewards) or rollout.episode is not None
    problems, report = gather_problems(data, config.run.seed, tokenizer, view, refused, keep_rows)
    for line in report.summary():
        view.say(line)
    planned = [sampling(rollout, tokenizer.stop_token_ids, config.run.seed)]
    held_out: list[Problem] = []
    if config.eval.data and config.eval.every:
        own = data.model_dump(include={"max_prompt_tokens", "skip_malformed", "check"})
        own |= {"train": config.eval.data, "columns": config.eval.columns}
        held_out = open_problems(ProblemSection.model_validate(own), tokenizer, view, refused, keep_rows)
        planned.append(eval_sampling(config, tokenizer.stop_token_ids))
    if len(problems) < rollout.prompts_per_step:
        raise UserError(
            f"rollout.prompts_per_step: expected at most the {len(problems)} problems of an epoch, "
            f"got {rollout.prompts_per_step}"
        )
    return Task(problems, held_out, report, data.max_prompt_tokens + new_tokens, planned)


def build_rl(
    config: RLConfig, view: ProgressReporter, stop: Stop, stack: ExitStack, from_step: int | None = None
) -> RLParts:
    """Everything for `pekoe rl` in one process. What must be closed is pushed on `stack`. `from_step`: see `RunDir`."""
    require_single_process("rl")
    config = with_date(config)
    prepare(config.run, config.train)
    model, tokenizer, dtype = open_model(config.model, config.run.seed)
    machine = describe(next(model.parameters()).device, dtype)  # before an engine takes what memory there is
    task = open_task(config, model.spec, tokenizer, view)
    run = open_run(config, tokenizer, task, view, stack, from_step)
    logs, seed = run.path / "logs", config.run.seed
    judge = make_judge(config.verify, tokenizer, seed, [*task.problems, *task.held_out], logs)
    stack.callback(judge.close)
    records = LocalRecords(run.path, tokenizer)
    stack.callback(records.close)
    temperature, lag = config.rollout.temperature, config.rollout.max_lag
    embedded = config.engine.backend == "embedded"
    staged = StagedSender(model, dtype, temperature, embedded) if lag else None  # before the trainer prepares the model
    trainer, timer = make_trainer(config, model, dtype), StepTimer(view)
    last_step = LastStep(trainer, stop, copies=trainer.device.type == "cpu")
    trainer.stopping = last_step.drops
    sender = staged or LocalSender(model, dtype, trainer.logprobs)
    pool = open_pool(config, sender.model, task.longest, task.planned, logs, view, stop, stack)
    canary = tokenizer.encode_prompt(task.problems[0].messages)
    weights = open_channel(config, pool, sender, canary, temperature, logs, stop)
    common, catch_up = (pool, tokenizer, judge, task.planned[0], timer, view, stop), weights.catch_up
    at_once, window = config.engine.max_running * len(pool.members), config.rollout.window
    episodes, eval_episodes = (open_episodes(config, pool, tokenizer, stack) for _ in range(2))
    rollouts = Rollouts(
        *(*common, catch_up, catch_up if lag else lambda: None),
        offloads=takes_turns(config, trainer.device.type),
        window=window,
        at_once=at_once,
        episodes=episodes,
    )
    return RLParts(
        config=config,
        problems=task.problems,
        held_out=task.held_out,
        order=DataOrder([p.uid for p in task.problems], config.run.seed),
        stop_token_ids=tokenizer.stop_token_ids,
        trainer=trainer,
        last_step=last_step,
        rollouts=rollouts,
        eval_rollouts=Rollouts(*common, catch_up, at_once=at_once, episodes=eval_episodes),
        weights=weights,
        records=records,
        run=run,
        view=view,
        timer=timer,
        counters=StepCounters([rollouts.counters]),
        spec=model.spec,
        machine=machine,
    )


def open_episodes(config: RLConfig, pool: EnginePool, tokenizer: Tokenizer, stack: ExitStack) -> Episodes | None:
    """What runs the recipe's episodes; None: single answers."""
    if config.rollout.episode is None:
        return None
    episodes = Episodes(config.rollout, config.verify, pool, tokenizer, AnswerParser.of(tokenizer))
    stack.callback(episodes.close)
    return episodes


def open_run(
    config: RLConfig,
    tokenizer: Tokenizer,
    task: Task,
    view: ProgressReporter,
    stack: ExitStack,
    from_step: int | None = None,
) -> RunDir:
    """The run directory of a task, open until `stack` closes. UserError where it holds another run."""
    inputs = inputs_of(config, tokenizer, task.problems)
    run = stack.enter_context(RunDir(config, (view.event,), inputs=inputs, from_step=from_step))
    before = run.before.num_steps if isinstance(run.before, RLConfig) else config.num_steps
    say_changes(run, config.optim, view, config.algo.minibatches, before, config.num_steps)
    dropped = run.path / "data.jsonl"
    if task.report.dropped:
        task.report.write(dropped)
    else:
        dropped.unlink(missing_ok=True)  # of a run that was there before
    return run


def say_changes(run: RunDir, optim: OptimSection, view: ProgressReporter, per_step: int, was: int, now: int) -> None:
    """What differs from the recipe that the run in this directory had, and what that does to the learning rate.

    Args:
        per_step: optimizer steps of a step.
        was: steps of the run as it was begun; `now`: as it goes on.
    """
    for notice in run.notices:
        view.say(notice)
    saved = checkpoints(run.path)
    if not saved or run.before is None:
        return
    if run.changed:
        view.say(
            "going on with " + ", ".join(f"{key} = {now!r} (was {was!r})" for key, (was, now) in run.changed.items())
        )
    done = step_of(saved[-1])
    expected, rate = (learning_rate(optim, done * per_step, steps * per_step) for steps in (was, now))
    if expected != rate and done < now:
        last = learning_rate(optim, done * per_step - 1, was * per_step)
        view.say(
            f"optim.schedule = {optim.schedule!r} now spans {counted(now, 'step')} in place of {was}: the rate of "
            f"step {done + 1} begins at {rate:.3g} (that of step {done} ended at {last:.3g})"
        )


def open_channel(
    config: SamplingConfig,
    pool: EnginePool,
    sender: LocalSender,
    canary: IntArray,
    temperature: float,
    log_dir: Path,
    stop: Stop,
) -> WeightChannel:
    """The channel of weights from this process to the engines that the config names."""
    server, embedded = config.engine.server, config.engine.backend == "embedded"
    return WeightChannel(
        pool,
        sender,
        route=server.sync if not embedded else "copy" if isinstance(sender, StagedSender) else "alias",
        canary=canary,
        temperature=temperature,
        checksum_every=1 if embedded else server.checksum_every,
        limit_s=server.update_limit_s,
        folder=log_dir / "weights",
        stopping=lambda: stop.requested,
    )


def attach_weights(
    config: SamplingConfig,
    pool: EnginePool,
    model: LanguageModel,
    tokenizer: Tokenizer,
    problem: Problem,
    params: SamplingParams,
    log_dir: Path,
    stop: Stop,
) -> WeightChannel:
    """Prove that the engines hold `model`; servers that ran already are sent it first.

    Returns the channel: an engine that is started again serves only after its `catch_up`.
    """
    temperature, dtype = params.temperature or 1.0, getattr(torch, config.model.dtype)
    sender = LocalSender(model, dtype, partial(forward_logprobs, model, temperature, dtype))
    canary = tokenizer.encode_prompt(problem.messages)
    channel = open_channel(config, pool, sender, canary, temperature, log_dir, stop)
    if config.engine.server.urls:
        channel.publish(0)
    else:
        channel.prove(0)
    return channel
