"""From a config with a section `cluster` to what the loop is given; and the loop, begun again where it must be."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from pekoe.core.config import RLConfig
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Problem, Prompt, SamplingParams
from pekoe.core.view import View
from pekoe.data.mix import gather_problems
from pekoe.data.order import DataOrder
from pekoe.data.tokenizer import Tokenizer
from pekoe.model import read_spec
from pekoe.run.build import RLParts, open_problems, sampling, sampling_for
from pekoe.run.cluster.depot import Key, Stored
from pekoe.run.cluster.engines import Engines
from pekoe.run.cluster.nodes import Depots, Lost, connect, get
from pekoe.run.cluster.sampler import ClusterSampler
from pekoe.run.cluster.sync import ClusterSync
from pekoe.run.cluster.trainer import ClusterStore, ClusterTrainer
from pekoe.run.control import Stop
from pekoe.run.rl import run_rl
from pekoe.run.rollout import RolloutLine
from pekoe.run.state import RunDir
from pekoe.run.sync import CANARY_TOKENS


class ClusterRunDir(RunDir):
    """A run directory whose rollouts are written by the depots that have them."""

    def __init__(self, config: RLConfig, view: View, depots: Depots, store: ClusterStore, limit_s: float) -> None:
        super().__init__(config, (view.event,), store=store)
        self._model, self._depots, self._limit_s = config.model, depots, limit_s

    def write_rollouts(self, step: int, lines: Iterable[RolloutLine], tokenizer: Tokenizer) -> None:
        """One file a node; then the step's tokens are forgotten."""
        by_node: dict[int, list[tuple[dict[str, Any], Key]]] = {}
        for line in lines:
            assert isinstance(line.payload, Stored)
            by_node.setdefault(line.payload.node, []).append((line.said, line.payload.key))
        folder = (self.path / "rollouts").resolve()
        files = {node: str(folder / f"step-{step:06d}.{node}.jsonl.zst") for node in by_node}
        handles = self._depots.handles
        refs = [handles[node].write.remote(files[node], some, self._model) for node, some in by_node.items()]
        self._depots.count(by_node)
        get(refs, self._limit_s, "the rollouts to be written")
        self._depots.clear()


def run_cluster(config: RLConfig, view: View, stop: Stop) -> None:
    """`run_rl` on a cluster; begun again from the last checkpoint where a training process is lost."""
    with ExitStack() as stack:
        parts = build_cluster(config, view, stop, stack)
        assert config.cluster is not None
        trainer, sync = cast(ClusterTrainer, parts.trainer), cast(ClusterSync, parts.sync)
        for restart in range(config.cluster.max_restarts + 1):
            try:
                return run_rl(parts)
            except Lost as error:
                if restart == config.cluster.max_restarts:
                    raise RunError(
                        f"{error}; training was begun again {restart} times (cluster.max_restarts)"
                    ) from None
                view.say(f"training broke off, and begins again from the last checkpoint: {error}")
                trainer.stop()
                parts.run.forget_writing()
                trainer.start()
                sync.forget_group()
                parts.order = DataOrder([p.uid for p in parts.problems], config.run.seed)  # if there is no checkpoint


def build_cluster(config: RLConfig, view: View, stop: Stop, stack: ExitStack) -> RLParts:
    """Everything for `run_rl`. What must be closed is pushed on `stack`."""
    assert config.cluster is not None
    section, data, rollout = config.cluster, config.data, config.rollout
    spec, _ = read_spec(Path(config.model.path))
    tokenizer = Tokenizer.load(Path(config.model.path)).with_template(config.model.template)
    problems, report = gather_problems(data, config.run.seed, tokenizer)
    for line in report.summary():
        view.say(line)
    held_out: list[Problem] = []
    if config.eval.data and config.eval.every:
        held_out = open_problems(config.eval.data, tokenizer, data.max_prompt_tokens, data.skip_malformed, view)
    longest = data.max_prompt_tokens + max(rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    if longest > spec.max_positions:
        raise UserError(f"context: expected at most the model's {spec.max_positions} positions, got {longest}")
    if len(problems) < rollout.prompts_per_step:
        raise UserError(
            f"rollout.prompts_per_step: expected at most the {len(problems)} problems of an epoch, "
            f"got {rollout.prompts_per_step}"
        )
    depots, limit_s = Depots(), section.step_limit_s
    run = stack.enter_context(ClusterRunDir(config, view, depots, ClusterStore(limit_s), limit_s))
    if report.dropped:
        report.write(run.path / "data.jsonl")
    connect(section, view, stack)
    asked = [sampling(rollout, tokenizer, config.run.seed)]
    if held_out:
        asked.append(sampling_for(config.eval, config.eval.max_new_tokens or rollout.max_new_tokens, tokenizer, 0))
    engines = Engines(config, depots, longest, asked, view, stack)
    trainer = ClusterTrainer(config, spec, depots, stack)
    trainer.start()
    engines.wait_ready()
    canary = Prompt("canary", 0, tokenizer.encode_prompt(problems[0].messages))
    params = SamplingParams(
        max_new_tokens=min(CANARY_TOKENS, longest - len(canary.tokens)), temperature=rollout.temperature, stream="eval"
    )
    bf16, every = config.model.dtype == "bfloat16", config.engine.server.checksum_every
    sync = ClusterSync(trainer, engines, section, canary, params, bf16, every, run.path / "logs" / "weights")
    return RLParts(
        config=config,
        problems=problems,
        held_out=held_out,
        order=DataOrder([p.uid for p in problems], config.run.seed),
        tokenizer=tokenizer,
        trainer=cast(Any, trainer),
        sampler=cast(Any, ClusterSampler(engines, view, stop)),
        sync=cast(Any, sync),
        run=run,
        view=view,
        stop=stop,
        measured=lambda: measured(trainer, sync, engines, depots),
    )


def measured(trainer: ClusterTrainer, sync: ClusterSync, engines: Engines, depots: Depots) -> dict[str, Any]:
    """What a step of a cluster has to tell beside the metrics."""
    traffic, trainer.traffic = trainer.traffic, type(trainer.traffic)()
    passed, depots.num_bytes = depots.num_bytes, 0
    return {
        "controller_bytes": passed,
        "transfer_bytes": traffic.num_bytes,
        "transfer_s": round(traffic.seconds, 4),
        "sync_send_s": round(sync.send_s, 4),
        "num_engines": len(engines.in_state("serving")),
        "num_lost_engines": engines.num_lost,
    }
