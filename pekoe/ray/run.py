"""From a config with a section `cluster` to what the loop is given; and the loop, begun again where it must be."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from pekoe.config.recipes import RLConfig
from pekoe.core.errors import RunError
from pekoe.core.progress import ProgressReporter
from pekoe.core.types import Prompt, SamplingParams
from pekoe.data.order import DataOrder
from pekoe.data.tokenizer import Tokenizer
from pekoe.model import read_spec
from pekoe.ray.engines import Engines
from pekoe.ray.logprob_prefetch import LogprobPrefetcher
from pekoe.ray.placement import Lost, StoreRegistry, connect, get
from pekoe.ray.sampler import ClusterSampler
from pekoe.ray.store import Key, StoreRef
from pekoe.ray.sync import ClusterSync
from pekoe.ray.trainer_actor import Traffic
from pekoe.ray.trainer_proxy import ClusterTrainer
from pekoe.run.build import RLParts, open_task, open_tokenizer
from pekoe.run.interrupt import Stop
from pekoe.run.rl import run_rl
from pekoe.run.rollouts import RolloutLine
from pekoe.run.run_dir import RunDir, with_date
from pekoe.run.sync import CANARY_TOKENS


class ClusterRunDir(RunDir):
    """A run directory whose rollouts are written by the depots that have them."""

    def __init__(self, config: RLConfig, view: ProgressReporter, depots: StoreRegistry, limit_s: float) -> None:
        super().__init__(config, (view.event,))
        self._model, self._depots, self._limit_s = config.model, depots, limit_s

    def write_rollouts(self, step: int, lines: Iterable[RolloutLine], tokenizer: Tokenizer) -> None:
        """One file a node; then the step's tokens are forgotten."""
        by_node: dict[int, list[tuple[dict[str, Any], Key]]] = {}
        for line in lines:
            assert isinstance(line.payload, StoreRef)
            by_node.setdefault(line.payload.node, []).append((line.said, line.payload.key))
        folder = (self.path / "rollouts").resolve()
        files = {node: str(folder / f"step-{step:06d}.{node}.jsonl.zst") for node in by_node}
        handles = self._depots.handles
        refs = [handles[node].write.remote(files[node], some, self._model) for node, some in by_node.items()]
        self._depots.count(by_node)
        get(refs, self._limit_s, "the rollouts to be written")
        self._depots.clear()


def run_cluster(config: RLConfig, view: ProgressReporter, stop: Stop) -> None:
    """`run_rl` on a cluster; begun again from the last checkpoint where a training process is lost."""
    with ExitStack() as stack:
        parts = build_cluster(config, view, stop, stack)
        assert config.cluster is not None
        trainer, sync = cast(ClusterTrainer, parts.trainer), cast(ClusterSync, parts.sync)
        for restart in range(config.cluster.max_restarts + 1):
            try:
                if restart:
                    trainer.start()
                return run_rl(parts)
            except Lost as error:
                if restart == config.cluster.max_restarts:
                    raise RunError(
                        f"{error}; training was begun again {restart} times (cluster.max_restarts)"
                    ) from None
                view.say(f"training broke off, and begins again from the last checkpoint: {error}")
                trainer.stop()
                parts.run.forget_writing()
                sync.forget_group()
                parts.order = DataOrder([p.uid for p in parts.problems], config.run.seed)  # if there is no checkpoint


def build_cluster(config: RLConfig, view: ProgressReporter, stop: Stop, stack: ExitStack) -> RLParts:
    """Everything for `run_rl`. What must be closed is pushed on `stack`."""
    config = with_date(config)
    assert config.cluster is not None
    section, rollout = config.cluster, config.rollout
    spec, _ = read_spec(Path(config.model.path))
    tokenizer = open_tokenizer(config.model, spec)
    task = open_task(config, spec, tokenizer, view)
    depots, limit_s = StoreRegistry(), section.step_limit_s
    run = stack.enter_context(ClusterRunDir(config, view, depots, limit_s))
    if task.report.dropped:
        task.report.write(run.path / "data.jsonl")
    connect(section, view, stack)
    ahead: LogprobPrefetcher | None = None
    if section.colocate:  # engines are told the ranks' devices
        trainer = ClusterTrainer(config, spec, depots, stack)
        trainer.start()
        shared = trainer.place, trainer.devices()
        engines = Engines(config, depots, task.longest, task.asked, view, stack, shared)
        trainer.take_turn = engines.release
    else:  # engines first: they are the larger pieces, and ranks that are spread may take the room of one
        engines = Engines(config, depots, task.longest, task.asked, view, stack)
        trainer = ClusterTrainer(config, spec, depots, stack)
        trainer.start()
        if config.algo.proximal == "recompute":
            ahead = LogprobPrefetcher(
                trainer, config.train.token_budget * section.training.ranks // section.training.tp
            )
    stack.callback(run.forget_writing)  # what the ranks are writing may as well stand, whatever ends the run
    engines.wait_ready()
    canary = Prompt("canary", 0, tokenizer.encode_prompt(task.problems[0].messages))
    room = min(CANARY_TOKENS, task.longest - len(canary.tokens))
    params = SamplingParams(max_new_tokens=room, temperature=rollout.temperature, stream="eval")
    bf16, every = config.model.dtype == "bfloat16", config.engine.server.checksum_every
    sync = ClusterSync(trainer, engines, section, canary, params, bf16, every, run.path / "logs" / "weights")
    return RLParts(
        config=config,
        problems=task.problems,
        held_out=task.held_out,
        order=DataOrder([p.uid for p in task.problems], config.run.seed),
        tokenizer=tokenizer,
        trainer=cast(Any, trainer),
        sampler=cast(Any, ClusterSampler(engines, view, stop, ahead)),
        sync=cast(Any, sync),
        run=run,
        view=view,
        stop=stop,
        measured=Account(trainer, sync, engines, depots, ahead).tell,
        spec=spec,
        machine=trainer.machine(),
    )


class Account:
    """What a step of a cluster has to tell beside the metrics."""

    def __init__(
        self,
        trainer: ClusterTrainer,
        sync: ClusterSync,
        engines: Engines,
        depots: StoreRegistry,
        ahead: LogprobPrefetcher | None,
    ) -> None:
        self._trainer, self._sync, self._engines = trainer, sync, engines
        self._depots, self._ahead = depots, ahead
        self._since = time.perf_counter()

    def tell(self) -> dict[str, Any]:
        """Since it was last asked: of an idle share, 1 is a step in which nobody of that role did anything."""
        trainer, engines, depots = self._trainer, self._engines, self._depots
        traffic, trainer.traffic = trainer.traffic, Traffic()
        passed, depots.num_bytes = depots.num_bytes, 0
        sampled_s, engines.busy_s = engines.busy_s, 0.0
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        saved_s = 0.0
        if self._ahead is not None:
            saved_s, self._ahead.saved_s = self._ahead.saved_s, 0.0
        return {
            "controller_bytes": passed,
            "transfer_bytes": traffic.num_bytes,
            "transfer_s": round(traffic.seconds, 4),
            "sync_send_s": round(self._sync.send_s, 4),
            "overlap_saved_s": round(saved_s, 4),
            "idle_engines": round(max(0.0, 1 - sampled_s / len(engines.all) / seconds), 4),
            "idle_ranks": round(max(0.0, 1 - traffic.busy_s / len(trainer.ranks) / seconds), 4),
            "num_engines": len(engines.in_state("serving")),
            "num_lost_engines": engines.num_lost,
        }
