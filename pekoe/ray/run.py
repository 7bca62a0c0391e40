"""Builds the parts of `run_rl` on a cluster, and starts the loop again from the last checkpoint when a rank is lost."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pekoe.config.recipes import RLConfig
from pekoe.core.errors import RunError
from pekoe.core.loop import SyncReport
from pekoe.core.progress import ProgressReporter
from pekoe.core.spec import ModelSpec
from pekoe.core.words import counted
from pekoe.data.order import DataOrder
from pekoe.engine.pool import EnginePool
from pekoe.model import read_spec
from pekoe.ray.engine_actor import RayStarter
from pekoe.ray.placement import WorkerLost, bundles, connect, node_of, place
from pekoe.ray.store import RayJudge, RayRecords, StoreRegistry
from pekoe.ray.trainer import RaySender, RayTrainer
from pekoe.run.build import RLParts, check_room, open_episodes, open_run, open_task, open_tokenizer
from pekoe.run.interrupt import LastStep, StepTimer, Stop
from pekoe.run.judging import make_judge
from pekoe.run.metrics import StepCounters
from pekoe.run.rl import run_rl
from pekoe.run.rollouts import Rollouts
from pekoe.run.run_dir import with_date
from pekoe.weights import WeightChannel


@dataclass(frozen=True, slots=True)
class Cluster:
    """The loop's parts, and those of them that know of processes."""

    parts: RLParts
    trainer: RayTrainer
    pool: EnginePool
    stores: StoreRegistry
    channel: RayChannel
    records: RayRecords


class RayChannel(WeightChannel):
    """With `colocate`, the ranks give back memory that they keep before the engines take theirs."""

    trainer: RayTrainer | None = None  # where it takes turns with the engines

    def publish(self, version: int, wait: bool = True) -> SyncReport:
        if self.trainer is not None:
            self.trainer.call("empty_cache", "the ranks to give memory back")
        return super().publish(version, wait)


def _require_engine(pool: EnginePool) -> None:
    """An engine that comes back while the ranks are a version ahead cannot be given the weights before."""
    if not pool.in_state("serving"):
        raise WorkerLost("every engine was lost while it sampled for a step to come")


def run_cluster(config: RLConfig, view: ProgressReporter, stop: Stop, from_step: int | None = None) -> None:
    """`run_rl` on a cluster. `from_step`: see `RunDir`."""
    with ExitStack() as stack:
        run_with_restarts(build_cluster(config, view, stop, stack, from_step))


def run_with_restarts(cluster: Cluster) -> None:
    """Run the loop; again from the last checkpoint where a rank or a store is lost, `cluster.max_restarts` times."""
    parts, trainer = cluster.parts, cluster.trainer
    section = parts.config.cluster
    assert section is not None
    for restart in range(section.max_restarts + 1):
        try:
            if restart:
                trainer.start()
            return run_rl(parts)
        except WorkerLost as error:
            if restart == section.max_restarts:
                raise RunError(
                    f"{error}; training was started again {counted(restart, 'time')} (cluster.max_restarts)"
                ) from None
            parts.view.say(f"training broke off, and begins again from the last checkpoint: {error}")
            trainer.stop()
            parts.rollouts.cancel()
            parts.eval_rollouts.cancel()
            parts.run.forget_writing()
            cluster.records.forget()
            cluster.channel.forget()
            parts.order = DataOrder([p.uid for p in parts.problems], parts.config.run.seed)  # if there is no checkpoint


def build_cluster(
    config: RLConfig, view: ProgressReporter, stop: Stop, stack: ExitStack, from_step: int | None = None
) -> Cluster:
    """Everything for `run_rl`. What must be closed is pushed on `stack`."""
    config = with_date(config)
    assert config.cluster is not None
    section = config.cluster
    spec, _ = read_spec(Path(config.model.path), config.model.implementation)
    tokenizer = open_tokenizer(config.model, spec)
    task = open_task(config, spec, tokenizer, view)
    one_judge = config.verify.model_copy(update={"workers": 1})  # do they start at all? Before anything else does
    make_judge(one_judge, tokenizer, config.run.seed, [*task.problems, *task.held_out]).close()
    run = open_run(config, tokenizer, task, view, stack, from_step)
    connect(section, view, stack)
    stores, timer = StoreRegistry(config), StepTimer(view)
    trainer, pool = _start(config, spec, task.longest, stores, view, stop, stack)
    stack.callback(run.forget_writing)  # what the ranks are writing may stand, whatever ends the run
    check_room(pool.max_sequence_tokens, task.longest)
    for params in task.planned:
        pool.check(params)
    channel = RayChannel(
        pool,
        RaySender(trainer, config),
        route=section.sync,
        canary=tokenizer.encode_prompt(task.problems[0].messages),
        temperature=config.rollout.temperature,
        checksum_every=config.engine.server.checksum_every,
        limit_s=section.sync_limit_s,
        folder=run.path / "logs" / "weights",
        bucket_bytes=section.bucket_mib << 20,
        # NCCL takes no two members on one GPU.
        backend="nccl" if section.training.gpus_per_rank and not section.colocate else "gloo",
        stopping=lambda: stop.requested,
    )
    channel.trainer = trainer if section.colocate else None
    judge = RayJudge(stores, config.verify.time_limit_s)
    stack.callback(judge.close)
    records = RayRecords(run.path, stores)
    stack.callback(records.forget)
    # The ranks hold the weights at which a step starts while it is sampled, unless sampling is ahead.
    prefetches = config.algo.proximal == "recompute" and not section.colocate and not config.rollout.max_lag
    add = trainer.prefetcher.add if prefetches else None
    common = pool, tokenizer, judge, task.planned[0], timer, view, stop, channel.catch_up
    at_once, window = config.engine.max_running * len(pool.members), config.rollout.window
    episodes, eval_episodes = (open_episodes(config, pool, tokenizer, stack) for _ in range(2))
    adopt = records.adopt_one
    rollouts = Rollouts(
        *(*common, partial(_require_engine, pool), add, section.colocate, window, at_once, episodes, adopt)
    )
    parts = RLParts(
        config=config,
        problems=task.problems,
        held_out=task.held_out,
        order=DataOrder([p.uid for p in task.problems], config.run.seed),
        stop_token_ids=tokenizer.stop_token_ids,
        trainer=trainer,
        last_step=LastStep(trainer, stop, copies=False),
        rollouts=rollouts,
        eval_rollouts=Rollouts(*common, at_once=at_once, episodes=eval_episodes, adopt=adopt),
        weights=channel,
        records=records,
        run=run,
        view=view,
        timer=timer,
        counters=StepCounters([part.counters for part in (rollouts, trainer, channel, stores.passed)], cluster=True),
        spec=spec,
        machine=trainer.machine(),
    )
    return Cluster(parts, trainer, pool, stores, channel, records)


def _start(
    config: RLConfig,
    spec: ModelSpec,
    longest: int,
    stores: StoreRegistry,
    view: ProgressReporter,
    stop: Stop,
    stack: ExitStack,
) -> tuple[RayTrainer, EnginePool]:
    """Place and start ranks and engines; returns when all are ready."""
    section = config.cluster
    assert section is not None
    number, limit_s = section.generation.engines, section.start_limit_s
    devices: list[str | None] = [None] * number
    if section.colocate:  # engines are given the ranks' devices
        trainer = RayTrainer(config, spec, stores, stack)
        places = [(trainer.place, bundle) for bundle in range(number)]
    else:  # engines first: they are the larger pieces, and ranks that are spread may take the room of one
        needed = bundles(section)["engine"]
        places = [(place([b], "PACK", f"engine {i}", limit_s, stack), 0) for i, b in enumerate(needed)]
        trainer = RayTrainer(config, spec, stores, stack)
    nodes = {node_of(group, bundle) for group, bundle in places}
    stores.num_judges = max(1, config.verify.workers // len(nodes))
    if section.colocate:
        trainer.start()
        devices = list(trainer.devices)
    starters = [RayStarter(config, i, *places[i], stores, longest, devices[i]) for i in range(number)]
    pool = EnginePool(starters, start_limit_s=limit_s, silence_limit_s=section.silence_limit_s, on_event=view.say)
    stack.callback(pool.close)
    if not section.colocate:
        trainer.start()  # while the engines start
    pool.wait_started(view, stop.check)
    return trainer, pool
