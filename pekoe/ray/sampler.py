"""`run.rollout.Sampler` of a cluster: problems in, groups with verdicts out; what a lost engine had, others do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pekoe.core.progress import ProgressReporter
from pekoe.core.types import Group, Problem, Rollout, SampleRef, SamplingParams, Verdict
from pekoe.ray.engines import Engines
from pekoe.ray.logprob_prefetch import LogprobPrefetcher
from pekoe.run.interrupt import StepTimer, Stop


@dataclass(frozen=True, slots=True)
class ClusterSampler:
    """Verdicts are made where the responses are, while others are still being sampled."""

    engines: Engines
    view: ProgressReporter
    stop: Stop
    ahead: LogprobPrefetcher | None = None

    def __call__(
        self,
        drawn: list[tuple[Problem, int]],
        params: SamplingParams,
        clock: StepTimer,
        keep: Callable[[Group, list[Verdict]], None] | None = None,
    ) -> list[tuple[Group, list[Verdict]]]:
        """See `Sampler`."""
        found: list[dict[int, tuple[Rollout, Verdict]]] = [{} for _ in drawn]
        with clock("rollout", len(drawn) * params.n):
            self.engines.begin(drawn, params)
            ahead = self.ahead if params.stream == "train" else None
            try:
                self._gather(found, drawn, params, ahead)
            except BaseException:
                self.engines.cancel()
                raise
        groups: list[tuple[Group, list[Verdict]]] = []
        for (problem, draw), samples in zip(drawn, found, strict=True):
            pairs = [samples[i] for i in range(params.n)]
            groups.append((Group(problem, draw, tuple(r for r, _ in pairs)), [v for _, v in pairs]))
            if keep is not None:
                keep(*groups[-1])
        return groups

    def _gather(
        self,
        found: list[dict[int, tuple[Rollout, Verdict]]],
        drawn: list[tuple[Problem, int]],
        params: SamplingParams,
        ahead: LogprobPrefetcher | None,
    ) -> None:
        missing = set(range(len(drawn)))
        if ahead is not None:
            ahead.begin()
        while missing:
            self.stop.check()
            for engine, report in self.engines.poll():
                for result in report.results:
                    samples, index = found[result.row], result.rollout.sample_index
                    if index not in samples:  # a group that was given to another engine may come twice
                        samples[index] = result.rollout, result.verdict
                        self.view.advance()
                    if len(samples) == params.n:
                        engine.rows.discard(result.row)
                        if ahead is not None and result.row in missing:
                            rollouts = [samples[i][0] for i in range(params.n)]
                            ahead.add(result.row, [sample_of(r, result.row) for r in rollouts if r.num_tokens])
                        missing.discard(result.row)
            self.engines.look_after()
            held = {row for engine in self.engines.in_state("serving") for row in engine.rows}
            if orphans := sorted(missing - held):
                self.engines.give(orphans, drawn, params)
        if ahead is not None:
            ahead.end()


def sample_of(rollout: Rollout, row: int) -> SampleRef:
    """As what its log-probs are computed of: they do not depend on the reward."""
    return SampleRef(rollout.num_prompt_tokens, rollout.num_tokens, rollout.payload, 0.0, row, rollout.sample_index)
